"""The paths of a run's checkpoints and logs, and new names for the files of earlier runs."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

from config import Settings
from runtime.files import target_of
from runtime.setting_fields import UserError


def default_checkpoint(script: str) -> str:
    """The path where a trainer ("train_minimal" or "train_ddp") saves without --checkpoint-path."""
    return f"checkpoints/minigpt_{'ddp' if script == 'train_ddp' else 'single'}.pt"


def in_folder(path: str, default: str) -> str:
    """Returns a complete file path: a folder (an existing one, or a path that ends in /) gets the
    file name of `default` appended, and an empty path becomes `default`.
    """
    if path and (path.endswith("/") or os.path.isdir(path)):
        return os.path.join(path, os.path.basename(default))
    return path or default


def checkpoint_in(path: str) -> str:
    """The path of the checkpoint to read. In a folder it is the one with a trainer's default file
    name. Raises UserError if the folder has those of both trainers, or only other checkpoints.
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
    """The path of a run's logs without their suffixes. It lies in log_dir and has the name of the
    checkpoint, or the name of the trainer if the checkpoint is at the trainer's default path.
    """
    name = Path(args.checkpoint_path).stem
    for script in ("train_minimal", "train_ddp"):
        if os.path.abspath(args.checkpoint_path) == os.path.abspath(default_checkpoint(script)):
            name = script
    return Path(args.log_dir) / name


LABELS = r"previous|best|step\d+"


def run_files(path: Path) -> list[Path]:
    """All existing checkpoints of the run at `path`: latest, previous, best, and those kept."""
    target = target_of(path)
    if not target.parent.is_dir():
        return []
    stem, suffix = re.escape(target.stem), re.escape(target.suffix)
    name = rf"{stem}(\.({LABELS}))?{suffix}"
    return sorted(p for p in target.parent.iterdir() if re.fullmatch(name, p.name))


def free_number(path: Path, logs: Path) -> int:
    """The first number that is in the name of no renamed file of an earlier run, neither of a
    checkpoint of `path` nor of the metrics at `logs`.jsonl, so that the files of one run get the
    same number.
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
    """Renames those of the files that exist, so that their names contain the number. Returns one
    line about it for the log, or an empty list if no file exists. Raises UserError if renaming
    fails.
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
    """The path with a number in it: name.best.pt -> name.1.best.pt, the best of name.1.pt."""
    parts = re.fullmatch(rf"(.+?)((\.({LABELS}))?(\.\w+)?)", file.name)
    assert parts is not None, "the first part takes what the others don't"
    return file.with_name(f"{parts[1]}.{number}{parts[2]}")


def variant_path(path: str | Path, label: str) -> Path:
    """The path `name.label.pt` beside `name.pt`."""
    return Path(path).with_name(f"{Path(path).stem}.{label}{Path(path).suffix}")
