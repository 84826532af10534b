"""Text files, read as a stream of documents: plain, JSON lines or Parquet, packed or not."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from corpus.shards import OTHER_FORMATS
from runtime.fields import UserError

_KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
_PACKED = (".gz", ".zst")
_NO_TEXT = {  # endings of what would be learned as characters, or not read at all: what to do
    ".json": 'write one object with a "text" on each line of a .jsonl file, as with jq -c',
    ".csv": 'write the texts into a .txt, or as {"text": ...} on each line of a .jsonl file',
    ".tsv": 'write the texts into a .txt, or as {"text": ...} on each line of a .jsonl file',
    ".npy": "token shards are given with --train-npy or --val-npy",
    ".bin": "token shards are given with --train-npy or --val-npy",
    ".tar": "unpack it and give the folder",
    ".tgz": "unpack it and give the folder",
    ".zip": "unpack it and give the folder",
}
USUAL_SEPARATOR = "<|endoftext|>"  # between documents in one file, as GPT-2's end token is written
BLOCK_BYTES = 1 << 20  # text is read, and handed to a worker, in pieces of about this size
_STDLIB_LEAST_BYTES = 1_000_000
_FORCED_CUT_BLOCKS = 16  # after that many without a safe place, text is cut where it is
# Where the patterns by which BPE tokenizers split text first (GPT-2's and its successors') always
# end a match, so that pieces give the ids of the whole: before a space that follows something
# visible, before a line break that follows a letter or digit, after one between two such lines.
_SAFE_CUT = re.compile(r"(?<=\S)(?= )|(?<=[^\W_])(?=\n)|(?<=\S\n)(?=[^\W_])")


class Text(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    n_bytes: int  # in UTF-8
    ends_document: bool


def find_sources(paths: Iterable[str | Path]) -> list[Path]:
    """The files that files, folders and globs stand for; those of a folder or glob in name order.

    In folders only files with a known ending count, and empty ones don't. Raises UserError.
    """
    return find_texts(paths)[0]


def find_texts(paths: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """As `find_sources`, and for each folder or glob how many files are read, how many are left
    out, and why.
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
    """Why a file of a folder, or of a glob (None), is not read; None if it is, "" for a folder on
    the way.
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
    """Raises UserError for what would be trained on as characters, though it is something else."""
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
            raise UserError(f"{path}: is {encoding}; {_convert(path, encoding)}")
    for magic, name in {**OTHER_FORMATS, b"\x93NUMPY": "a token shard (--train-npy)"}.items():
        if start.startswith(magic):
            raise UserError(
                f"{path}: is {name}, not text; unpack or convert it, or give it its usual ending "
                f"(read packed are {' '.join(_PACKED)})"
            )


def _convert(path: Path, encoding: str) -> str:
    good = shlex.quote(str(path.with_suffix(".utf8.txt")))
    return f"convert it first: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {good}"


def stdlib_files() -> list[Path]:
    """The source of Python's standard library without its tests, its packages well mixed.

    Raises UserError where it is not there.
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
    """(".jsonl", ".gz") of a.jsonl.gz or A.JSONL.GZ; "" for what is not known."""
    packed = path.suffix.lower() if path.suffix.lower() in _PACKED else ""
    kind = (Path(path.stem).suffix if packed else path.suffix).lower()
    return (kind if kind in _KINDS else ""), packed


def _open(path: Path) -> IO[bytes]:
    packed = kind_of(path)[1]
    if packed == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if packed == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: needs a package: pip install zstandard") from None
        return io.BufferedReader(zstandard.open(path, "rb"))  # it has no lines of its own
    return open(path, "rb")


def read_texts(path: Path, separator: str = "") -> Iterator[Text]:
    """The documents of one file, in constant memory. Raises UserError with file and position.

    separator: what parts the documents of a plain text; "" = it is one document.
    """
    kind, packed = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        else:
            with _open(path) as file:
                if kind == ".jsonl":
                    yield from _json_lines(path, file)
                elif separator:
                    yield from _documents(_plain(path, file), separator)
                else:
                    yield from _plain(path, file)
    except (OSError, EOFError) as reason:
        said = " ".join((getattr(reason, "strerror", None) or str(reason)).split())[:200]
        raise UserError(f"{path}: cannot be read: {said}") from reason
    except Exception as reason:
        if packed and type(reason).__name__ in ("ZstdError", "error"):
            raise UserError(f"{path}: damaged {packed} data: {reason}") from reason
        raise


def _plain(path: Path, file: IO[bytes]) -> Iterator[Text]:
    decoder, kept, read, given = codecs.getincrementaldecoder("utf-8")(), "", 0, 0
    while block := file.read(BLOCK_BYTES):
        if (nul := block.find(0)) >= 0:
            raise UserError(f"{path}: byte {read + nul} is NUL; {_without_nul(path, block)}")
        kept += _decoded(path, decoder, block, read)
        read += len(block)
        if len(block) < BLOCK_BYTES:
            continue  # the file's end, most likely
        cut = _last_cut(kept, len(block))
        if cut or len(kept) > _FORCED_CUT_BLOCKS * BLOCK_BYTES:
            piece, kept = kept[: cut or None], kept[cut:] if cut else ""
            size = read - given - len(decoder.getstate()[0]) - len(kept.encode())
            given += size
            yield Text(piece, size, False)
    kept += _decoded(path, decoder, b"", read)
    if not read:
        raise UserError(f"{path} is empty; give a file with text")
    yield Text(kept, read - given, True)


def _documents(pieces: Iterator[Text], separator: str) -> Iterator[Text]:
    """The documents of one text that a separator parts, without it, the line break after it, and
    documents of nothing but white space.
    """
    parting = re.compile(re.escape(separator) + r"\r?\n?")
    kept, begun = "", False  # begun: a part of the document is given already
    for piece in pieces:
        *whole, rest = parting.split(kept + piece.text)
        if not whole and not piece.ends_document and len(piece.text) >= len(separator):
            # No separator reaches from what is kept into this piece, so what is kept can go.
            if kept:
                yield Text(kept, len(kept.encode()), False)
                begun = True
            kept = piece.text
            continue
        for document in whole:
            if begun or document.strip():
                yield Text(document, len(document.encode()), True)
            begun = False
        kept = rest if rest or not whole else separator  # the line break may be yet to come
    kept = parting.sub("", kept)
    if begun or kept.strip():
        yield Text(kept, len(kept.encode()), True)


def _without_nul(path: Path, block: bytes) -> str:
    """What to do about a file of which a block holds NUL bytes."""
    share = block.count(0) / len(block)
    if 0.3 < share < 0.7 and block[:1] and 0 in block[:2]:
        order = "BE" if block[0] == 0 else "LE"
        return f"it looks like UTF-16; {_convert(path, 'UTF-16' + order)}"
    if share > 0.1 and block.count(0) > 8:
        return "this is no text file; leave it out"
    unpack = {".gz": "zcat", ".zst": "zstdcat"}.get(kind_of(path)[1], "cat")
    stem = path.name.lstrip(".").split(".")[0] or "text"
    clean = shlex.quote(str(path.with_name(f"{stem}.clean.txt")))
    return (
        "text has none; to train on the rest, make another file and take this one away: "
        f"{unpack} {shlex.quote(str(path))} | tr -d '\\000' > {clean}"
    )


def _last_cut(text: str, new: int) -> int:
    """The last safe place to cut, or 0. Only the `new` last characters can hold one."""
    for reach in (1 << 8, new + 4):
        if cuts := [m.start() for m in _SAFE_CUT.finditer(text, max(0, len(text) - reach))]:
            return cuts[-1]
    return 0


def _decoded(path: Path, decoder: codecs.IncrementalDecoder, block: bytes, read: int) -> str:
    pending = decoder.getstate()[0]
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as reason:
        position, byte = read - len(pending) + reason.start, (pending + block)[reason.start]
        raise UserError(
            f"{path}: byte {position} is {byte:#04x}, not UTF-8; convert it first, for example "
            "with iconv"
        ) from reason


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[Text]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            data = text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as reason:
            raise UserError(
                f'{path}: line {number} is not a JSON object with a "text" of characters '
                f"({type(reason).__name__}: {str(reason)[:80]}); where the text has another name, "
                """rename it: jq -c '{text: .content}' OLD.jsonl > NEW.jsonl"""
            ) from reason
        if data:
            yield Text(text, len(data), True)


def _parquet(path: Path) -> Iterator[Text]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: needs a package: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield Text(text, len(text.encode()), True)
    except Exception as reason:  # of many kinds: Arrow, decoding, memory
        raise UserError(
            f"{path}: not a Parquet file with a text column ({' '.join(str(reason).split())[:100]})"
        ) from reason


def read_pieces(sources: Sequence[Path], separator: str = "") -> Iterator[list[Text]]:
    """All texts in order, small ones together, so that a worker gets enough to do."""
    piece: list[Text] = []
    size = 0
    for path in sources:
        for text in read_texts(path, separator):
            piece.append(text)
            size += text.n_bytes
            if size >= BLOCK_BYTES // 4:
                yield piece
                piece, size = [], 0
    if piece:
        yield piece
