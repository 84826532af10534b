"""Where the files of a run are, and how they are called."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

from config import Settings
from runtime.files import target_of
from runtime.setting_fields import UserError


def default_checkpoint(script: str) -> str:
    """Where a trainer saves unless told otherwise."""
    return f"checkpoints/minigpt_{'ddp' if script == 'train_ddp' else 'single'}.pt"


def in_folder(path: str, default: str) -> str:
    """The path, or in a folder the file there with the name of the default path; "" is that."""
    if path and (path.endswith("/") or os.path.isdir(path)):
        return os.path.join(path, os.path.basename(default))
    return path or default


def checkpoint_in(path: str) -> str:
    """The path of a checkpoint to read; of a folder, that of the trainer whose usual name is there.
    Raises UserError where both are.
    """
    usual = [in_folder(path, default_checkpoint(x)) for x in ("train_minimal", "train_ddp")]
    found = [p for p in dict.fromkeys(usual) if os.path.exists(p)]
    if len(found) == 2:
        raise UserError(f"{path} holds {found[0]} and {found[1]}; say which")
    if not found and os.path.isdir(path):
        others = sorted(p.name for p in Path(path).glob("*.pt"))
        if others:
            raise UserError(
                f"{path} has no {Path(usual[0]).name}; name one of its checkpoints: "
                f"{', '.join(others[:4])}{', ...' if len(others) > 4 else ''}"
            )
    return found[0] if found else usual[0]


def log_base(args: Settings) -> Path:
    """What the logs of a run are called, without their endings: in log_dir, as its checkpoint is,
    or for a trainer's default checkpoint as the trainer.
    """
    name = Path(args.checkpoint_path).stem
    for script in ("train_minimal", "train_ddp"):
        if os.path.abspath(args.checkpoint_path) == os.path.abspath(default_checkpoint(script)):
            name = script
    return Path(args.log_dir) / name


LABELS = r"previous|best|step\d+"


def run_files(path: Path) -> list[Path]:
    """All checkpoints of the run at `path`."""
    target = target_of(path)
    if not target.parent.is_dir():
        return []
    stem, suffix = re.escape(target.stem), re.escape(target.suffix)
    name = rf"{stem}(\.({LABELS}))?{suffix}"
    return sorted(p for p in target.parent.iterdir() if re.fullmatch(name, p.name))


def free_number(path: Path, logs: Path) -> int:
    """The first number that nothing has been set aside with, neither checkpoints of runs at `path`
    nor their metrics, which are at `logs`.jsonl: what belongs together gets the same one.
    """
    target, taken = target_of(path), set[str]()
    stem, suffix = re.escape(target.stem), re.escape(target.suffix)
    numbered = {
        target.parent: rf"{stem}\.(\d+)(\.({LABELS}))?{suffix}",
        logs.parent: rf"{re.escape(logs.name)}\.(\d+)\.jsonl",
    }
    for folder, pattern in numbered.items():
        if folder.is_dir():
            taken |= {m[1] for p in folder.iterdir() if (m := re.fullmatch(pattern, p.name))}
    return next(n for n in itertools.count(1) if str(n) not in taken)


def archive_existing(files: list[Path], number: int) -> list[str]:
    """Gives files of an earlier run this number in their names; returns a line that says so, or
    nothing. Raises UserError.
    """
    files = [f for f in files if os.path.lexists(f)]
    try:
        for f in files:
            os.rename(f, _numbered(f, number))
    except OSError as reason:
        raise UserError(f"cannot rename {f}, which is there already: {reason.strerror}") from reason
    renamed = ", ".join(f"{f.name} -> {_numbered(f, number).name}" for f in files)
    return [f"{files[0].parent}: renamed what was there, {renamed}"] if files else []


def _numbered(file: Path, number: int) -> Path:
    """name.best.pt -> name.1.best.pt, which is then the best of name.1.pt."""
    parts = re.fullmatch(rf"(.+?)((\.({LABELS}))?(\.\w+)?)", file.name)
    assert parts is not None, "the first part takes what the others don't"
    return file.with_name(f"{parts[1]}.{number}{parts[2]}")


def variant_path(path: str | Path, label: str) -> Path:
    """`name.label.pt` beside `name.pt`."""
    return Path(path).with_name(f"{Path(path).stem}.{label}{Path(path).suffix}")
