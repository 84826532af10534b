"""Checkpoints: one file that appears by an atomic rename, is verified when read, and fits every
parallel layout.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from config import Settings, UserError, flat, settings_from
from model import GPTModel
from step import RunState

FORMAT = 1
_PLAIN_STATE = ("step", "tokens", "best_val_loss", "run_id", "wandb_run_id")


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    args: Settings,
    data: dict[str, Any] | None = None,
) -> None:
    """Writes the whole run to `path`: at any moment the file is the whole old one or the whole new
    one.

    model: the bare module, not a DDP wrapper. data: what the run trains and validates on. Raises
    UserError where the file can't be written; what was at `path` before is then untouched.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    content = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": {names[id(p)]: dict(s) for p, s in optimizer.state.items()},
        "scaler": state.scaler.state_dict(),
        **{key: getattr(state, key) for key in _PLAIN_STATE},
        "settings": {**flat(args), "resume": False},
        "data": data or {},
    }
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with _says_why(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
        if args.keep_every and state.step % args.keep_every == 0:
            _keep(target, state.step)


@contextmanager
def _says_why(target: Path) -> Iterator[None]:
    """Turns failures of writing into one line with their cause and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as reason:  # torch.save hides a full disk in a RuntimeError
        cause = reason if isinstance(reason, OSError) else reason.__context__ or reason
        raise UserError(
            f"cannot write the checkpoint {target}: {cause}; free space or change --checkpoint-path"
        ) from reason


def claim_checkpoint(path: str | Path, resume: bool) -> tuple[IO[str], list[tuple[Path, Path]]]:
    """Proves that a run can save there, and keeps others off. Raises UserError.

    A new run sets aside what an earlier one left. Returns the lock, held until it is closed or the
    process ends, and pairs (old name, new name).
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UserError(f"{path} is not a plain file; give a file name as --checkpoint-path")
    with _says_why(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(target.name + ".lock"), "a+")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{path} is in use by another run ({lock.read().strip()}); stop it, or give "
                "another "
                "--checkpoint-path"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        kept = [] if resume else sorted(target.parent.glob(f"{glob.escape(target.stem)}.step*"))
        old = [] if resume else [Path(path), *kept]
        return lock, [(p, new) for p in old if (new := set_aside(p))]


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _keep(target: Path, step: int) -> None:
    """A second name for this checkpoint, which the next save won't replace:
    `name.step000500.pt`.
    """
    kept = target.with_name(f"{target.stem}.step{step:06d}{target.suffix}")
    kept.unlink(missing_ok=True)
    try:
        os.link(target, kept)
    except OSError:  # a file system without hard links
        shutil.copyfile(target, kept)


def read_checkpoint(path: str | Path, lazily: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, checked byte by byte. Never runs code from the file.
    Raises UserError.

    lazily: leave the tensors on disk and unchecked, for reading the settings alone.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"{path}: " + ("not a plain file" if os.path.exists(path) else "no such checkpoint")
        )
    try:
        if not lazily:
            with zipfile.ZipFile(path) as archive:
                # torch.load does not look at the checksums, and is led astray by odd attributes.
                odd = [i.filename for i in archive.infolist() if i.compress_type or i.external_attr]
                damaged = archive.testzip() or (odd[0] if odd else None)
            if damaged:
                raise UserError(
                    f"{path}: the checkpoint is damaged (wrong checksum or attributes of {damaged})"
                )
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except UserError:
        raise
    except Exception as reason:  # damage takes zipfile and the unpickler to many places
        raise UserError(
            f"{path}: not a checkpoint, or damaged ({type(reason).__name__}: "
            f"{' '.join(str(reason).split())[:120]})"
        ) from reason
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: checkpoint format {found!r:.40}, this version reads {FORMAT}")
    return content


def saved_settings(path: str | Path) -> dict[str, Any]:
    """The flat settings stored in a checkpoint. Raises UserError."""
    return read_checkpoint(path, lazily=True)["settings"]


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    state: RunState | None = None,
    data: dict[str, Any] | None = None,
) -> RunState:
    """Fills model and optimizer from a checkpoint and returns how far its run had come. Raises
    UserError.

    Parameters and their moments are matched by name, and names, shapes and data compared before
    anything is changed.
    """
    content = read_checkpoint(path)
    _compare_and_fill(path, model, content, data or {})
    if optimizer is not None:
        _load_optimizer(path, model, optimizer, content["optimizer"])
    state = state or RunState()
    for key in _PLAIN_STATE:
        setattr(state, key, content[key])
    if state.scaler.is_enabled() and content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    return state


def _compare_and_fill(
    path: str | Path, model: nn.Module, content: dict[str, Any], data: dict[str, Any]
) -> None:
    wanted, found = model.state_dict(), content["model"]
    problems = [f"{k} is missing" for k in wanted.keys() - found.keys()]
    problems += [f"{k} is unknown" for k in found.keys() - wanted.keys()]
    problems += [
        f"{k} is {tuple(found[k].shape)}, expected {tuple(wanted[k].shape)}"
        for k in wanted.keys() & found.keys()
        if found[k].shape != wanted[k].shape
    ]
    for part in ("train", "val") if data else ():
        problems += changes_of_data(content["data"].get(part, {}), data[part], part)
    if problems:
        more = f" (+{len(problems) - 20} more)" if len(problems) > 20 else ""
        raise UserError(f"{path} does not fit this run: {'; '.join(sorted(problems)[:20])}{more}")
    model.load_state_dict(found)


def changes_of_data(recorded: dict[str, Any], now: dict[str, Any], part: str) -> list[str]:
    """How data differs from what a checkpoint recorded; where it lies on disk doesn't matter."""
    return [
        f"{part} data: {k} was {recorded.get(k)!r}, is {now[k]!r}"
        for k in now
        if k != "source" and recorded.get(k) != now[k]
    ]


def _load_optimizer(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> None:
    parameters = dict(model.named_parameters())
    for name, moments in saved.items():
        if name not in parameters:
            raise UserError(f"{path}: optimizer state of {name}, a parameter that the model lacks")
        p = parameters[name]
        wrong = [k for k, v in moments.items() if v.ndim and v.shape != p.shape]
        if wrong:
            raise UserError(
                f"{path}: optimizer state of {name} ({', '.join(wrong)}) is not shaped like it"
            )
        optimizer.state[p] = {k: v.to(p.device) for k, v in moments.items()}


def load_model(path: str | Path) -> tuple[GPTModel, Settings, dict[str, Any]]:
    """(model on the CPU, settings of its run, record of its data) of a checkpoint. Raises
    UserError.
    """
    content = read_checkpoint(path)
    settings = settings_from(content["settings"])
    model = GPTModel(settings.model)
    _compare_and_fill(path, model, content, {})
    return model, settings, content["data"]


def set_aside(path: str | Path) -> Path | None:
    """Renames what an earlier run left at `path` to a free numbered name, which it returns; None
    if there is nothing.
    """
    old = Path(path)
    if not os.path.lexists(old):
        return None
    number = 1
    while os.path.lexists(new := old.with_name(f"{old.stem}.{number}{old.suffix}")):
        number += 1
    os.rename(old, new)
    return new
