"""Paths of files: the home directory and symbolic links in them; files that change at once."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.setting_fields import UserError


def expanded(path: str | Path, flag: str) -> Path:
    """Returns the path with a leading ~ replaced by the home directory. Raises UserError if the
    user has none: HOME is not set, and the user id has no account, as in some containers. flag: the
    command-line flag that the error message names.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: this user has no home directory; set HOME, or name another folder with {flag}"
        ) from None


def target_of(path: str | Path) -> Path:
    """The path with all symbolic links resolved: where a file at `path` really lies."""
    return Path(os.path.realpath(path))


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file under another name and renames it, so that whoever reads `path` meanwhile gets
    the old content or the new one, whole. A symbolic link stays one. Raises OSError.
    """
    target = target_of(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
