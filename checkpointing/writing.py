"""Writes checkpoint files atomically: at any moment the file at a path is a complete one."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from checkpointing.file_format import (
    tensor_bytes,
    write_with_checksum,
)
from checkpointing.reading import open_checkpoint
from checkpointing.safe_pickle import TensorRef
from runtime.files import target_of
from runtime.locks import hold
from runtime.setting_fields import UserError
from settings.paths import LABELS, variant_path

_SPACE = 1_000_000  # bytes of a checkpoint beside its tensors


def write_checkpoint(
    path: str | Path, content: dict[str, Any], *labels: str, keep_previous: bool = False
) -> None:
    """Writes content to `path`, and gives the file a second name for each label (name.best.pt). The
    file that was at `path` becomes name.previous.pt, unless keep_previous keeps the one that has
    that name. Raises UserError; the file at `path` is then the old one, or the new one in full.
    """
    target = target_of(path)  # a symbolic link stays one
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    on_cpu = _on_cpu(content)
    broken = [name for name, t in named_tensors(on_cpu) if not _is_finite(t)]
    if broken:
        raise UserError(f"{broken[0]} is not finite, so this is no state to continue from")
    with _says_why(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target.parent, tensor_bytes(on_cpu))
        temporary.unlink(missing_ok=True)  # it may be a second name of a file to keep
        try:
            write_with_checksum(temporary, on_cpu)
            with open_checkpoint(temporary):  # is it as it was written, and can it be loaded?
                pass
            if target.exists() and not keep_previous:
                _second_name(target, variant_path(target, "previous"))
            os.replace(temporary, target)  # before the labels: --resume reads this name
            add_names(target, *labels)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


def add_names(path: Path, *labels: str) -> None:
    """Gives the file at `path` a second name for each label that it lacks. Raises UserError."""
    with _says_why(path):
        for name in (variant_path(path, label) for label in labels):
            if not (name.exists() and name.samefile(path)):
                _second_name(path, name)


def _on_cpu(tree: Any) -> Any:
    """The nested dicts with tensors that are contiguous and on the CPU; those that are already are
    not copied.
    """
    if isinstance(tree, dict):
        return {k: _on_cpu(v) for k, v in tree.items()}
    return tree.cpu().contiguous() if isinstance(tree, Tensor) else tree


def named_tensors(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Iterates over the tensors in nested dicts, as (their keys joined by spaces, tensor)."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from named_tensors(value, f"{path}{key} ")
        elif isinstance(value, (Tensor, TensorRef)):
            yield path + key, value


def _is_finite(t: Tensor) -> bool:
    if not t.is_floating_point() or not t.numel():
        return True
    low, high = torch.aminmax(t)  # one pass without a copy; a NaN becomes both
    return bool(low.isfinite() & high.isfinite())


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises OSError if the folder has no room for a checkpoint with tensors of n_bytes."""
    free = shutil.disk_usage(folder).free
    needed = n_bytes + _SPACE
    if free < needed:
        raise OSError(f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free")


def _second_name(file: Path, name: Path) -> None:
    """Makes `name` a hard link to the file, or a copy where the file system has no hard links. A
    file that had the name is replaced atomically.
    """
    made = name.with_name(f"{name.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(file, made)
        except OSError:
            shutil.copyfile(file, made)
            with open(made, "rb") as copy:
                os.fsync(copy.fileno())
        os.replace(made, name)
    finally:
        made.unlink(missing_ok=True)  # a rename onto another name of the same file does nothing


@contextmanager
def _says_why(target: Path) -> Iterator[None]:
    """Context manager that turns failures of writing into a UserError: the cause and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as reason:  # torch.save hides a full disk in a RuntimeError
        cause = reason if isinstance(reason, OSError) else reason.__context__ or reason
        raise UserError(
            f"cannot write the checkpoint {target}: {cause}; free space or change --checkpoint-path"
        ) from reason


def _sync_folder(folder: Path) -> None:
    """Fsyncs a folder, so that a rename in it survives a power failure, if the file system can."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as reason:
        if reason.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def lock_path(path: Path) -> IO[str]:
    """Locks a checkpoint path against other runs, and removes what a killed run left half-written.
    Returns the lock, held until it is closed or the process ends. Raises UserError.
    """
    target = target_of(path)
    if part := re.fullmatch(rf"(.+)\.({LABELS})", target.stem):
        raise UserError(
            f"{path} belongs to the run at {part[1]}{target.suffix}; copy it to another name to "
            "start a run from it"
        )
    if target.exists() and not target.is_file():
        raise UserError(f"{path} is not a plain file; give a file name as --checkpoint-path")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        held = hold(target.with_name(target.name + ".lock"), str(path), "--checkpoint-path")
        stem = re.escape(target.stem)
        for rest in target.parent.iterdir():
            label = rf"(\.({LABELS}))?"
            if re.fullmatch(rf"{stem}{label}{re.escape(target.suffix)}\.\d+\.tmp", rest.name):
                rest.unlink()
    except OSError as reason:
        raise UserError(
            f"cannot save to {path}: {reason.strerror}; change --checkpoint-path"
        ) from reason
    return held
