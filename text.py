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
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from config import UserError

_KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
_PACKED = (".gz", ".zst")
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
    found: list[Path] = []
    for path in map(str, paths):
        if os.path.isdir(path):
            inside = sorted(p for p in Path(path).rglob("*") if p.is_file() and kind_of(p)[0])
            some = [p for p in inside if p.stat().st_size]
        elif glob.has_magic(path) and not os.path.exists(path):
            matches = [Path(p) for p in sorted(glob.glob(path, recursive=True))]
            some = [p for p in matches if p.is_file() and p.stat().st_size]
        else:
            some = [Path(path)]
        if not some:
            raise UserError(
                f"{path}: no text in it; known endings are {' '.join(_KINDS)}, also packed"
            )
        found += some
    return found


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
    """(".jsonl", ".gz") of a.jsonl.gz; "" for what is not known."""
    packed = path.suffix if path.suffix in _PACKED else ""
    kind = Path(path.stem).suffix if packed else path.suffix
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


def read_texts(path: Path) -> Iterator[Text]:
    """The documents of one file, in constant memory. Raises UserError with file and position."""
    kind, packed = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        else:
            with _open(path) as file:
                yield from (_json_lines if kind == ".jsonl" else _plain)(path, file)
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
            raise UserError(f"{path}: byte {read + nul} is NUL; is this a text file?")
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
                f"({type(reason).__name__}: {str(reason)[:80]})"
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


def read_pieces(sources: Sequence[Path]) -> Iterator[list[Text]]:
    """All texts in order, small ones together, so that a worker gets enough to do."""
    piece: list[Text] = []
    size = 0
    for path in sources:
        for text in read_texts(path):
            piece.append(text)
            size += text.n_bytes
            if size >= BLOCK_BYTES // 4:
                yield piece
                piece, size = [], 0
    if piece:
        yield piece
