"""File locks of the operating system: they end with the process that has them, however it ends."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from runtime.setting_fields import UserError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def need_locks() -> ModuleType:
    """Raises UserError on a system without file locks; else returns the module that has them."""
    if fcntl is None:
        raise UserError(
            "this Python has no file locks (fcntl), which keep two runs apart; use Linux or macOS, "
            "or on Windows its Linux subsystem (WSL)"
        )
    return fcntl


def lock(file: IO[Any], wait: bool = True) -> bool:
    """Locks an open file until it is closed or the process ends; False where another process has
    it and this one is not to wait. Raises UserError, or OSError.
    """
    known = need_locks()
    try:
        known.flock(file, known.LOCK_EX | (0 if wait else known.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def hold(path: Path, what: str, flag: str) -> IO[str]:
    """Takes the lock file that stands for `what`, until the result is closed or the process ends.
    Raises OSError, or UserError that says who has it and which flag to give.
    """
    file = open(path, "a+")  # noqa: SIM115
    if not lock(file, wait=False):
        file.seek(0)
        raise UserError(
            f"{what} is in use by another run ({file.read().strip()}); stop it, or give another "
            f"{flag}"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    return file
