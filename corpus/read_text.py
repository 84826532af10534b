"""Reads text files as a stream of documents: plain, JSON lines or Parquet, compressed or not."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from corpus.find_text import converting_command, kind_of
from runtime.console import one_line
from runtime.setting_fields import UserError

TEXT_COLUMN = "text"  # what most data sets call the column with the text
USUAL_SEPARATOR = "<|endoftext|>"  # between documents in one file: GPT-2's end token as text
BLOCK_BYTES = 1 << 20  # text is read, and handed to a worker, in pieces of about this size
_FORCED_CUT_BLOCKS = 16  # after so many without a safe place to cut, text is cut anywhere
# Places where a text can be cut so that its pieces give the same ids as the uncut text. GPT-2's
# tokenizer and its successors first split text by a pattern, and a match of these always ends
# before a space that follows something visible, before a line break that follows a letter or digit,
# and after a single line break with something visible before it and a letter or digit after it.
SAFE_CUT = re.compile(r"(?<=\S)(?= )|(?<=[^\W_])(?=\n)|(?<=\S\n)(?=[^\W_])")
# Of SentencePiece's models, tokens begin with a space, which they write as U+2581, and have none
# behind something visible.
CUT_BEFORE_SPACE = re.compile(r"(?<=[^\s\u2581])(?= )")


class Text(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    n_bytes: int  # in UTF-8
    ends_document: bool
    starts_document: bool = True


def _open(path: Path) -> IO[bytes]:
    packed = kind_of(path)[1]
    if packed == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if packed == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: needs a package: pip install zstandard") from None
        return io.BufferedReader(zstandard.open(path, "rb"))  # it can't iterate over lines
    return open(path, "rb")


def read_texts(
    path: Path,
    separator: str = "",
    column: str = TEXT_COLUMN,
    cut: re.Pattern[str] | None = SAFE_CUT,
) -> Iterator[Text]:
    """Reads the documents of one file, in memory that does not grow with it: a long document of
    plain text comes in several parts. Raises UserError that names the file and, where known, the
    position.

    separator: the text between two documents of a plain text file; "" = the file is one document.
    column: the name that the text has in JSON lines and Parquet. cut: the places between which a
    long document may be parted; None = nowhere, so that up to 16 MiB of it come whole.
    """
    found = _read(path, separator, column, cut or SAFE_CUT)
    return found if cut else _put_together(found)


def _read(path: Path, separator: str, column: str, cut: re.Pattern[str]) -> Iterator[Text]:
    kind, packed = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path, column)
        else:
            with _open(path) as file:
                if kind == ".jsonl":
                    yield from _json_lines(path, file, column)
                elif separator:
                    yield from _documents(_plain(path, file, cut), separator)
                else:
                    yield from _plain(path, file, cut)
    except (OSError, EOFError) as reason:
        said = one_line(getattr(reason, "strerror", None) or reason, 200)
        raise UserError(f"{path}: cannot be read: {said}") from reason
    except Exception as reason:
        if packed and type(reason).__name__ in ("ZstdError", "error"):
            raise UserError(f"{path}: damaged {packed} data: {reason}") from reason
        raise


def _put_together(parts: Iterator[Text]) -> Iterator[Text]:
    """Puts the parts of each document together again, up to about 16 MiB."""
    kept: list[Text] = []
    for part in parts:
        kept.append(part)
        size = sum(t.n_bytes for t in kept)
        if part.ends_document or size > _FORCED_CUT_BLOCKS * BLOCK_BYTES:
            text = "".join(t.text for t in kept)
            yield Text(text, size, part.ends_document, kept[0].starts_document)
            kept = []


def _plain(path: Path, file: IO[bytes], pattern: re.Pattern[str]) -> Iterator[Text]:
    decoder, kept, read, given = codecs.getincrementaldecoder("utf-8")(), "", 0, 0
    while block := file.read(BLOCK_BYTES):
        if (nul := block.find(0)) >= 0:
            raise UserError(f"{path}: byte {read + nul} is NUL; {_without_nul(path, block)}")
        kept += _decoded(path, decoder, block, read)
        read += len(block)
        if len(block) < BLOCK_BYTES:
            continue  # the file's end, most likely
        cut = _last_cut(kept, len(block), pattern)
        if cut or len(kept) > _FORCED_CUT_BLOCKS * BLOCK_BYTES:
            piece, kept = kept[: cut or None], kept[cut:] if cut else ""
            size = read - given - len(decoder.getstate()[0]) - len(kept.encode())
            given += size
            yield Text(piece, size, False, starts_document=given == size)
    kept += _decoded(path, decoder, b"", read)
    if not read:
        raise UserError(f"{path} is empty; give a file with text")
    yield Text(kept, read - given, True, starts_document=not given)


def _documents(pieces: Iterator[Text], separator: str) -> Iterator[Text]:
    """Splits one text, which comes in pieces, at a separator into its documents. Leaves out the
    separator with the line break after it, and documents of nothing but white space.
    """
    parting = re.compile(re.escape(separator) + r"\r?\n?")
    kept, begun = "", False  # begun: a part of the document was yielded
    for piece in pieces:
        *whole, rest = parting.split(kept + piece.text)
        if not whole and not piece.ends_document and len(piece.text) >= len(separator):
            # No separator reaches from what is kept into this piece, so what is kept can go.
            if kept:
                yield Text(kept, len(kept.encode()), False, not begun)
                begun = True
            kept = piece.text
            continue
        for document in whole:
            if begun or document.strip():
                yield Text(document, len(document.encode()), True, not begun)
            begun = False
        kept = rest if rest or not whole else separator  # the line break may be yet to come
    kept = parting.sub("", kept)
    if begun or kept.strip():
        yield Text(kept, len(kept.encode()), True, not begun)


def _without_nul(path: Path, block: bytes) -> str:
    """The advice in the error message about a text file with NUL bytes. block: a part of the file
    that holds some.
    """
    share = block.count(0) / len(block)
    if 0.3 < share < 0.7 and block[:1] and 0 in block[:2]:
        order = "BE" if block[0] == 0 else "LE"
        return f"it looks like UTF-16; {converting_command(path, 'UTF-16' + order)}"
    if share > 0.1 and block.count(0) > 8:
        return "this is no text file; leave it out"
    unpack = {".gz": "zcat", ".zst": "zstdcat"}.get(kind_of(path)[1], "cat")
    stem = path.name.lstrip(".").split(".")[0] or "text"
    clean = shlex.quote(str(path.with_name(f"{stem}.clean.txt")))
    return (
        "text has none; to train on the rest, make another file and take this one away: "
        f"{unpack} {shlex.quote(str(path))} | tr -d '\\000' > {clean}"
    )


def _last_cut(text: str, new: int, pattern: re.Pattern[str]) -> int:
    """The last position in the text where the pattern allows to cut, or 0. Only the last `new`
    characters are searched, since nothing before them holds one.
    """
    for reach in (1 << 8, new + 4):
        if cuts := [m.start() for m in pattern.finditer(text, max(0, len(text) - reach))]:
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


def _json_lines(path: Path, file: IO[bytes], column: str) -> Iterator[Text]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if isinstance(record, dict) and column not in record:
                raise UserError(f"{path}: line {number} {other_columns(column, record)}")
            text = record[column]
            data = text.encode()
        except (ValueError, TypeError, AttributeError, RecursionError) as reason:
            raise UserError(
                f"{path}: line {number} is not a JSON object with a {column!r} of characters "
                f"({type(reason).__name__}: {str(reason)[:80]})"
            ) from reason
        if data:
            yield Text(text, len(data), True)


def other_columns(column: str, names: Iterable[str]) -> str:
    """The end of the error message about a missing column: which ones there are."""
    there = [repr(name) for name in names]
    some = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
    return f"has no {column!r}; it has {some or 'nothing'}: name one with --text-column"


def _parquet(path: Path, column: str) -> Iterator[Text]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: needs a package: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise UserError(f"{path} {other_columns(column, file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield Text(text, len(text.encode()), True)
    except UserError:
        raise
    except Exception as reason:  # of many kinds: Arrow, decoding, memory
        raise UserError(
            f"{path}: not a Parquet file with text in the column {column!r} "
            f"({one_line(reason, 100)})"
        ) from reason


def in_pieces(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Lists of the texts in their order: small ones are put together until they have 256 KiB, so
    that a worker gets enough to do.
    """
    piece: list[Text] = []
    size = 0
    for text in texts:
        piece.append(text)
        size += text.n_bytes
        if size >= BLOCK_BYTES // 4:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
