"""Finds the checkpoints that paths, patterns and folders name, and watches for new ones."""

from __future__ import annotations

import glob
import os
import re
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

from checkpointing.file_format import is_sealed
from checkpointing.reading import open_checkpoint
from runtime.setting_fields import UserError
from settings.paths import checkpoint_in

_ARCHIVE = b"PK\3\4"  # the first bytes of a zip archive
_BESIDE = re.compile(r"\..*|.*\.(lock|\d+\.tmp)", re.S)  # files of a run that hold no state

Stamp = tuple[int, int, int, int]


def stamp_of(found: os.stat_result) -> Stamp:
    """What tells a file from any other, and from itself after a change: device, inode, bytes, and
    the time of the last change in nanoseconds. All hard links of a file have the same.
    """
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class CheckpointFile:
    """A file that may be a checkpoint. named: the user typed its name; others were found in a
    folder or by a pattern.
    """

    names: tuple[str, ...]  # several where they are links to one file
    named: bool
    stamp: Stamp

    @property
    def path(self) -> str:
        """The name to open it by."""
        return self.names[0]


def choose_checkpoints(paths: Iterable[str]) -> tuple[list[CheckpointFile], str]:
    """Returns the files to evaluate, in the order of the paths, and one line about the files that
    were left out because they are no checkpoints ("" if none was). Raises UserError if a file that
    is named cannot be read, or if there is none to evaluate.
    """
    paths = tuple(paths)
    for path in paths:
        if not _stands_for_several(path):
            with open_checkpoint(checkpoint_in(path)):  # is it whole?
                pass
    files = files_of(paths)
    foreign = [f for f in files if not f.named and is_foreign(f.path)]
    chosen = [f for f in files if f not in foreign]
    note = left_out(foreign)
    if not chosen:
        raise UserError(f"{' '.join(paths)}: no checkpoint there" + (f"; {note}" if note else ""))
    return chosen, note


def left_out(foreign: list[CheckpointFile]) -> str:
    """The line about files that are no checkpoints; "" if there are none."""
    if not foreign:
        return ""
    shown = ", ".join(f.path for f in foreign[:3]) + (", ..." if len(foreign) > 3 else "")
    return f"files left out, since no run of this program has saved them ({len(foreign)}): {shown}"


def files_of(paths: Iterable[str]) -> list[CheckpointFile]:
    """The files that the paths stand for, each once: a file, all files of a folder, or all that a
    pattern (with *, ? or [) matches. Locks and files that are being written are left out, and what
    vanishes meanwhile.
    """
    found: dict[Stamp, tuple[list[str], bool]] = {}
    places = set()
    for path in paths:
        named = not _stands_for_several(path)
        for name in [checkpoint_in(path)] if named else _files_behind(path):
            place = os.path.abspath(name)
            try:
                status = os.stat(name)
            except OSError:
                continue
            if place not in places and stat.S_ISREG(status.st_mode):
                names, was_named = found.get(stamp_of(status), ([], False))
                found[stamp_of(status)] = ([*names, name], named or was_named)
            places.add(place)
    return [CheckpointFile(tuple(n), named, stamp) for stamp, (n, named) in found.items()]


def _stands_for_several(path: str) -> bool:
    return os.path.isdir(path) or (glob.has_magic(path) and not os.path.lexists(path))


def _files_behind(path: str) -> list[str]:
    """The files in a folder, or those that match a pattern and those in folders that do: short
    names first, so that name.pt comes before name.best.pt, and name.previous.pt last, since the
    next save replaces it.
    """
    folders = [path] if os.path.isdir(path) else []
    files: list[str] = []
    for match in [] if folders else glob.glob(path, recursive=True):
        (folders if os.path.isdir(match) else files).append(match)
    for folder in folders:
        try:
            files += [os.path.join(folder, name) for name in os.listdir(folder)]
        except OSError as reason:
            raise UserError(f"cannot read the folder {folder}: {reason.strerror}") from None
    files = [f for f in files if not _BESIDE.fullmatch(os.path.basename(f))]
    return sorted(files, key=lambda f: (".previous." in os.path.basename(f), len(f), f))


def is_foreign(path: str) -> bool:
    """Whether a file is no checkpoint of this program, not even a damaged one: it does not end in a
    checksum, and is no archive that was cut off. False if it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            start, sealed, whole = file.read(4), is_sealed(file), _is_whole_archive(file)
    except OSError:
        return False
    cut_off = not whole and (start == _ARCHIVE or (len(start) < 4 and path.endswith(".pt")))
    return not sealed and not cut_off


def _is_whole_archive(file: IO[bytes]) -> bool:
    """Whether an open file is a zip archive up to its last byte. zipfile.is_zipfile overlooks that
    the end of a comment is missing, which is where a checkpoint has its checksum.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1000, 0))
    rest = file.read()
    end = rest.rfind(b"PK\5\6")  # 22 bytes, the last two of them the length of the comment
    comment = int.from_bytes(rest[end + 20 : end + 22], "little") if end >= 0 else 0
    return zipfile.is_zipfile(file) and end + 22 + comment <= len(rest)


class Watch:
    """Says which checkpoint to read next while runs go on saving, and when they are finished. Which
    files were read is known by their stamps, so that a rename or another link does not count.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self.first: set[Stamp] | None = None  # what was there at the first look
        self.read: set[Stamp] = set()  # what need not be looked at again
        self.suspects: dict[Stamp, str] = {}  # what could not be read, and why
        self.failed_reads = 0  # of files that were there; each is a suspect
        self.runs: dict[str, tuple[int, int]] = {}  # run: its latest step, and its num_steps
        self.growing: set[str] = set()  # the runs that have saved since the first look
        self.newest = (0, "")  # time and run of the newest checkpoint

    def next(self) -> CheckpointFile | None:
        """The oldest file that was not read yet, or None if there is none at present: those that
        the next save replaces come last, for they are not missed as much as those that stay.
        """
        files = files_of(self.paths)
        there = {f.stamp for f in files}
        if self.first is None:
            self.first = there
        self.read &= there
        for file in sorted(files, key=lambda f: (f.stamp[3], f.path)):
            if file.stamp in self.read or file.stamp in self.suspects:
                continue
            if file.named or not is_foreign(file.path):
                return file
            self.read.add(file.stamp)
        return None

    def note(self, stamp: Stamp, run_id: str, step: int, num_steps: int) -> None:
        """Records that the file with this stamp was read, and which state is in it."""
        self.read.add(stamp)
        if (step, num_steps) > self.runs.get(run_id, (-1, 0)):
            self.runs[run_id] = step, num_steps
        if self.first is not None and stamp not in self.first:
            self.growing.add(run_id)
        self.newest = max(self.newest, (stamp[3], run_id))

    def suspect(self, file: CheckpointFile, reason: str) -> None:
        """Records that a file could not be read. That is no error where it has vanished. Perhaps
        somebody is still copying it there: `damaged` says later whether it stayed as it was.
        """
        if os.path.lexists(file.path):
            self.failed_reads += 1
            self.suspects[file.stamp] = reason

    def damaged(self) -> list[str]:
        """What was wrong with the suspects that are as they were. Those that have changed are read
        again, and those that have vanished are no error.
        """
        there = {f.stamp for f in files_of(self.paths)} if self.suspects else set()
        reasons = [reason for stamp, reason in self.suspects.items() if stamp in there]
        self.read |= self.suspects.keys() & there
        self.suspects.clear()
        return reasons

    def foreign(self) -> list[CheckpointFile]:
        """The files there that are no checkpoints."""
        return [f for f in files_of(self.paths) if not f.named and is_foreign(f.path)]

    def finished(self) -> bool:
        """Whether the runs that are watched have done all their steps: the one with the newest
        checkpoint, and all that have saved since the first look. Others may have been given up.
        """
        watched = self.growing | {self.newest[1]}
        return (
            bool(self.runs)
            and not self.suspects
            and all(
                step >= num_steps for run, (step, num_steps) in self.runs.items() if run in watched
            )
        )
