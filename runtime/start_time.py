"""When this process began: the scripts import this first."""

from __future__ import annotations

import time

_STARTED = time.monotonic()


def seconds_since_start() -> float:
    """Seconds since this process began to import."""
    return time.monotonic() - _STARTED
