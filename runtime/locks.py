"""File locks of the operating system: they end with the process that has them, however it ends."""

from __future__ import annotations

from types import ModuleType
from typing import IO, Any

from config import UserError

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
