"""Finds the text files that paths, folders and globs name, and says what it leaves out and why."""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import shlex
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from corpus.shard_formats import OTHER_FORMATS
from runtime.setting_fields import UserError

_KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
_PACKED = (".gz", ".zst")
_NO_TEXT = {  # endings of files that are not read as text -> what to do instead
    ".json": 'write one object with a "text" on each line of a .jsonl file, as with jq -c',
    ".csv": 'write the texts into a .txt, or as {"text": ...} on each line of a .jsonl file',
    ".tsv": 'write the texts into a .txt, or as {"text": ...} on each line of a .jsonl file',
    ".npy": "token shards are given with --train-npy or --val-npy",
    ".bin": "token shards are given with --train-npy or --val-npy",
    ".tar": "unpack it and give the folder",
    ".tgz": "unpack it and give the folder",
    ".zip": "unpack it and give the folder",
}

_STDLIB_LEAST_BYTES = 1_000_000


def find_sources(paths: Iterable[str | Path]) -> list[Path]:
    """The text files that the paths name. A path is a file, a folder (searched recursively) or a
    glob; the files of a folder or glob are in the order of their names.

    Empty files of a folder or glob are left out, and in folders also hidden files, node_modules and
    files without a known ending. Raises UserError.
    """
    return find_texts(paths)[0]


def find_texts(paths: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """Returns the files as `find_sources` does, and notes for the log: for each folder or glob how
    many files are read, how many are left out, and why.
    """
    found: list[Path] = []
    notes = []
    for path in map(str, paths):
        if os.path.isdir(path):
            matches = sorted(Path(path).rglob("*"))
        elif glob.has_magic(path) and not os.path.exists(path):
            matches = [Path(p) for p in sorted(glob.glob(path, recursive=True))]
        else:
            _refuse_no_text(Path(path))
            found.append(Path(path))
            continue
        folder = Path(path) if os.path.isdir(path) else None
        reasons = [_why_left_out(p, folder) for p in matches]
        some = [p for p, reason in zip(matches, reasons, strict=True) if reason is None]
        left_out = Counter(reason for reason in reasons if reason)
        why = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common(6))
        why += ", ..." if len(left_out) > 6 else ""
        notes.append(
            f"{path}: {len(some)} files read, {left_out.total()} left out"
            + (f" ({why})" if why else "")
        )
        if not some:
            raise UserError(
                f"{path}: no text in it; known endings are {' '.join(_KINDS)}, also packed"
                + (f"; found were {why}" if why else "")
            )
        for file in some:
            _refuse_no_text(file)
        found += some
    return found, notes


def _why_left_out(path: Path, folder: Path | None) -> str | None:
    """Why a path found in a folder or by a glob is not read, in words for the log; None if it is
    read, and "" if it is a folder, of which nothing needs to be said. folder: the one that was
    searched; None for a glob.
    """
    if folder and any(part.startswith(".") for part in path.relative_to(folder).parts):
        return "" if path.is_dir() else "hidden"
    if folder and "node_modules" in path.relative_to(folder).parts:
        return "" if path.is_dir() else "in node_modules"
    if path.is_dir():
        return "link to a folder" if path.is_symlink() else ""
    if not path.exists():
        return "broken link"
    if not path.is_file():
        return "pipe or device"
    if folder and not kind_of(path)[0]:
        return f"*{path.suffix.lower()}" if path.suffix else "without ending"
    return None if path.stat().st_size else "empty"


def _refuse_no_text(path: Path) -> None:
    """Raises UserError for a file that is not UTF-8 text but would be read as such, by its ending
    or its first bytes, and for a pipe or device.
    """
    kind, packed = kind_of(path)
    ending = Path(path.stem if packed else path).suffix.lower()
    if ending in _NO_TEXT:
        raise UserError(
            f"{path}: {ending} files are not read as text; {_NO_TEXT[ending]} (to train on it as "
            "it is, name it .txt)"
        )
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(
            f"{path}: is a pipe or a device, and text is read twice; write it to a file first"
        )
    if packed or kind == ".parquet" or not path.is_file():
        return
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as reason:
        raise UserError(f"{path}: cannot be read: {reason.strerror}") from reason
    for encoding in ("UTF-32", "UTF-16"):  # the mark of one starts as that of the other
        marks = [
            getattr(codecs, f"BOM_{encoding.replace('-', '')}_{order}") for order in ("LE", "BE")
        ]
        if start.startswith(tuple(marks)):
            raise UserError(f"{path}: is {encoding}; {converting_command(path, encoding)}")
    for magic, name in {**OTHER_FORMATS, b"\x93NUMPY": "a token shard (--train-npy)"}.items():
        if start.startswith(magic):
            raise UserError(
                f"{path}: is {name}, not text; unpack or convert it, or give it its usual ending "
                f"(read packed are {' '.join(_PACKED)})"
            )


def converting_command(path: Path, encoding: str) -> str:
    """The advice, with the shell command, that turns a file into UTF-8."""
    good = shlex.quote(str(path.with_suffix(".utf8.txt")))
    return f"convert it first: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {good}"


def stdlib_files() -> list[Path]:
    """The source files of Python's standard library without its tests, ordered by a hash of their
    paths, which mixes the packages. Raises UserError if this Python has no such source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [
        p
        for p in root.rglob("*.py")
        if not skip & set(p.relative_to(root).parts) and p.stat().st_size
    ]
    found = sum(p.stat().st_size for p in files)
    if found < _STDLIB_LEAST_BYTES:
        raise UserError(
            f"this Python has only {found} bytes of its standard library's source in {root}, too "
            "little to train on; give your own text with --train-data FILE, or --use-toy-data"
        )
    return sorted(
        files, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest()
    )


def kind_of(path: Path) -> tuple[str, str]:
    """The kind and the compression of a text file by the endings of its name: (".jsonl", ".gz") for
    a.jsonl.gz or A.JSONL.GZ; "" for an unknown kind or no compression.
    """
    packed = path.suffix.lower() if path.suffix.lower() in _PACKED else ""
    kind = (Path(path.stem).suffix if packed else path.suffix).lower()
    return (kind if kind in _KINDS else ""), packed
