"""Paths and files, and who may use them."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.fields import UserError


def expanded(path: str | Path, flag: str) -> Path:
    """A path in which ~ may stand for the home directory. Raises UserError where the user has none:
    HOME is not set, and the number of the user stands for no account, as in some containers.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: this user has no home directory; set HOME, or name another folder with {flag}"
        ) from None


def target_of(path: str | Path) -> Path:
    """Where a file at `path` lies if that is a symbolic link."""
    return Path(os.path.realpath(path))
