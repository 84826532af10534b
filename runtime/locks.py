"""File locks of the operating system, released when their process ends, however it ends."""

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
    """Returns the module with the file locks, fcntl. Raises UserError on a system that has none."""
    if fcntl is None:
        raise UserError(
            "this Python has no file locks (fcntl), which keep two runs apart; use Linux or macOS, "
            "or on Windows its Linux subsystem (WSL)"
        )
    return fcntl


def lock(file: IO[Any], wait: bool = True) -> bool:
    """Takes an exclusive lock on an open file, held until the file is closed or the process ends.
    Returns False if another process holds it and `wait` is false, else True. Raises UserError on a
    system without file locks, and OSError if locking fails.
    """
    known = need_locks()
    try:
        known.flock(file, known.LOCK_EX | (0 if wait else known.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def hold(path: Path, what: str, flag: str) -> IO[str]:
    """Locks the lock file at `path` and returns it open: the lock is held until that is closed or
    the process ends. Raises OSError, or UserError if another process holds the lock; the message
    names `what` is in use, the process that holds it, and the `flag` to change.
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
