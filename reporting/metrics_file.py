"""The metrics of a run, one JSON record a line."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(record: dict[str, Any]) -> str:
    """One line of JSON; numbers that JSON lacks (NaN, infinities) become null."""
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(clean)
