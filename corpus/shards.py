"""Streams of token ids, read by position: files of ids (`TokenShards`) or computed ones
(`ToyTokens`).
"""

from __future__ import annotations

import codecs
import functools
import glob
import hashlib
import os
import shlex
from collections.abc import Sequence
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from corpus.hashing import hash_of, mix
from corpus.id_width import sample_bytes, width_of_ids
from runtime.fields import UserError

OTHER_FORMATS = {  # long enough not to be the first ids of a file without header
    b"\x1f\x8b\x08": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PK\x03\x04": "a zip archive (or a PyTorch file)",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"PAR1": "a Parquet file",
    b"\x80\x02\x8a": "a pickle (or a PyTorch file)",
    b"\x80\x02}": "a pickle",
    b"\x80\x02]": "a pickle",
    b"\x80\x02c": "a pickle",
    b"\x80\x04\x95": "a pickle",
    b"\x80\x05\x95": "a pickle",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF",
}


class SourceFile(NamedTuple):
    """One file behind a stream of tokens."""

    path: str
    content: str  # hash of what is in it
    start: int  # its first token in the stream, and
    stop: int  # where the next file starts; near it where only the bytes of the text are known


class Source(Protocol):
    """A stream of `num_tokens` token ids."""

    name: str
    num_tokens: int
    vocab_size: int  # every id is below it
    fingerprint: str  # changes when the content does

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids of positions start .. start + count - 1: (count,) of an integer type, each one of
        the vocabulary.
        """
        ...

    def files_in(self, start: int, stop: int) -> list[tuple[SourceFile, int, int]]:
        """The files that tokens start .. stop - 1 are from, each with the range of its own tokens
        that they are.
        """
        ...


class ToyTokens:
    """Random ids below vocab_size: a function of (seed, position), so each visit of a sample
    finds the same ones.
    """

    def __init__(self, num_tokens: int, vocab_size: int, seed: int) -> None:
        self.num_tokens, self.vocab_size, self.seed = (
            num_tokens,
            vocab_size,
            np.uint64(hash_of(seed)),
        )
        self.name = "random tokens"
        self.fingerprint = f"toy-{num_tokens}-{vocab_size}-{seed}"

    def read(self, start: int, count: int) -> np.ndarray:
        return (
            mix(np.arange(start, start + count, dtype=np.uint64) ^ self.seed)
            % np.uint64(self.vocab_size)
        ).astype(np.int64)

    def files_in(self, start: int, stop: int) -> list[tuple[SourceFile, int, int]]:
        return []


class TokenShards:
    """Files of token ids, in the order given, as one stream. Raises UserError for files that are
    not what they should be. notes: what was decided about them, for the run's log. texts: path,
    hash and bytes of the texts that they were made from, which `files_in` then names.

    Read with pread, not through a memory map: just as lazy, and a file that shrinks while open
    gives an error that names it, where a map would kill the process with SIGBUS.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        vocab_size: int,
        name: str = "",
        fingerprint: str = "",
        bin_dtype: str = "auto",
        texts: Sequence[tuple[str, str, int]] = (),
    ) -> None:
        self.vocab_size = vocab_size
        self.shards = [_Shard(p, bin_dtype) for p in find_shards(paths)]
        self.notes = [s.note for s in self.shards if s.note]
        self.starts = np.cumsum([0] + [s.count for s in self.shards])
        self.num_tokens = int(self.starts[-1])
        self.name = name or ", ".join(str(s.path) for s in self.shards[:3]) + (
            ", ..." if len(self.shards) > 3 else ""
        )
        digests = [s.digest() for s in self.shards]
        all_digests = hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
        self.fingerprint = fingerprint or all_digests
        about = texts or [
            (str(s.path), digest.hex(), s.count)
            for s, digest in zip(self.shards, digests, strict=True)
        ]
        ends = np.cumsum([0] + [size for _, _, size in about])
        places = [int(end) * self.num_tokens // max(int(ends[-1]), 1) for end in ends]
        self.files = [
            SourceFile(path, content, start, stop)
            for (path, content, _), (start, stop) in zip(about, pairwise(places), strict=True)
        ]
        # Few files stay open, whatever the number of shards.
        self._open = functools.lru_cache(64)(lambda i: self.shards[i].open())

    def read(self, start: int, count: int) -> np.ndarray:
        return self._read(start, count, self.vocab_size)

    def _read(self, start: int, count: int, vocab_size: int) -> np.ndarray:
        parts, stop = [], start + count
        for i in range(int(np.searchsorted(self.starts, start, "right")) - 1, len(self.shards)):
            first = int(self.starts[i])
            parts.append(
                self.shards[i].read(
                    self._open(i).fileno(),
                    max(start - first, 0),
                    min(stop, int(self.starts[i + 1])) - first,
                    vocab_size,
                )
            )
            if stop <= self.starts[i + 1]:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def largest_id_seen(self) -> int:
        """The largest of the ids at up to 64 places spread over the stream; -1 = there are none."""
        if not self.num_tokens:
            return -1
        count = min(4096, self.num_tokens)
        places = np.unique(np.linspace(0, self.num_tokens - count, 64).astype(np.int64)).tolist()
        return max(int(self._read(p, count, 1 << 32).max()) for p in places)

    def files_in(self, start: int, stop: int) -> list[tuple[SourceFile, int, int]]:
        ranges = [(f, max(f.start, start), min(f.stop, stop)) for f in self.files]
        return [(f, low - f.start, high - f.start) for f, low, high in ranges if low < high]


class JoinedTokens:
    """Ranges of several sources, one after the other, as one stream."""

    def __init__(self, parts: Sequence[tuple[Source, int, int]]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0] + [stop - start for _, start, stop in parts])
        self.num_tokens = int(self.starts[-1])
        self.vocab_size = max(source.vocab_size for source, _, _ in parts)
        self.name = ", ".join(source.name for source, _, _ in parts)
        about = repr([(source.fingerprint, start, stop) for source, start, stop in parts])
        self.fingerprint = hashlib.blake2b(about.encode(), digest_size=16).hexdigest()

    def read(self, start: int, count: int) -> np.ndarray:
        pieces, stop = [np.empty(0, np.int64)], start + count
        for (source, first, _), here, after in zip(
            self.parts, self.starts, self.starts[1:], strict=False
        ):
            low, high = max(start, int(here)), min(stop, int(after))
            if low < high:
                pieces.append(source.read(first + low - int(here), high - low))
        return np.concatenate(pieces)

    def files_in(self, start: int, stop: int) -> list[tuple[SourceFile, int, int]]:
        found = []
        for (source, first, after), here in zip(self.parts, self.starts.tolist(), strict=False):
            low, high = max(start - here, 0) + first, min(stop - here + first, after)
            found += source.files_in(low, high)
        return found


def find_shards(paths: Sequence[str | Path]) -> list[Path]:
    """The files that files, folders and globs stand for; those of a folder or glob in name
    order.
    """
    found: list[Path] = []
    for path in map(str, paths):
        if os.path.isdir(path):
            some = sorted(p for p in Path(path).iterdir() if p.suffix.lower() in (".npy", ".bin"))
        elif glob.has_magic(path) and not os.path.exists(path):
            some = [Path(p) for p in sorted(glob.glob(path, recursive=True))]
        else:
            some = [Path(path)]
        if not some:
            raise UserError(f"{path}: no token shard (.npy or .bin) in it")
        found += some
    return found


def _other_format(start: bytes) -> str:
    """What a file that starts with these bytes is, if it is known not to be ids; else ""."""
    for magic, name in OTHER_FORMATS.items():
        if start.startswith(magic):
            return name
    if _is_text(start):
        return (
            "text; use --train-data or --val-data for it (or --bin-dtype uint8 for ids of one byte)"
        )
    if bytes(512) in start:  # as between llm.c's three numbers and its ids
        return "a file with a header like llm.c's, but its first bytes differ"
    return ""


def _is_text(start: bytes) -> bool:
    """Whether it is UTF-8, perhaps cut off, without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    if len(start) < 32 and not start.isascii():  # few ids are UTF-8 by chance
        return False
    return not any((c < " " and c not in "\t\r\n\f") or "\x7f" <= c < "\xa0" for c in text)


class _Shard:
    """One file of token ids, its format told by its first bytes: NumPy .npy (1-D uint16, uint32 or
    int32), llm.c .bin (magic 20240520 or 20240801), or a .bin without header, as nanoGPT writes
    them: uint16, or what `bin_dtype` or the ids themselves say (see `width_of_ids`).
    """

    def __init__(self, path: Path, bin_dtype: str = "auto") -> None:
        self.path, self.bin_dtype, self.note = path, bin_dtype, ""
        try:
            if not path.is_file():
                raise UserError(
                    f"{path}: " + ("not a plain file" if path.exists() else "no such file")
                )
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self.offset, self.dtype, self.count = self._header(file)
        except OSError as reason:
            raise UserError(f"{path}: cannot be read: {reason.strerror}") from reason
        expected = self.offset + self.count * self.dtype.itemsize
        if self.size != expected:
            raise UserError(
                f"{path}: has {self.size} bytes, but its header stands for {expected}; is it cut "
                "off?"
            )

    def _header(self, file: BinaryIO) -> tuple[int, np.dtype[Any], int]:
        """Offset of the first id in bytes, type of an id, number of ids."""
        start = file.read(1024)
        if start[:6] == b"\x93NUMPY":
            file.seek(0)
            return self._npy_header(file)
        words = np.frombuffer(start[:12].ljust(12, b"\0"), "<i4")
        for magic, version, dtype in ((20240520, 1, "<u2"), (20240801, 7, "<u4")):
            if words[0] == magic:
                if words[1] != version or len(start) < 1024:
                    raise UserError(
                        f"{self.path}: llm.c header of version {words[1]}, expected {version}, "
                        "1024 bytes"
                    )
                return 1024, np.dtype(dtype), int(words[2])
        if self.path.suffix.lower() == ".bin":
            return self._headerless(file, start)
        raise UserError(
            f"{self.path}: is neither a NumPy .npy file nor an llm.c .bin file: it starts with "
            f"{start[:8]!r}; for text use --train-data or --val-data"
        )

    def _headerless(self, file: BinaryIO, start: bytes) -> tuple[int, np.dtype[Any], int]:
        """Ids and nothing else. What is known to be something else is refused by name."""
        name, known = self.bin_dtype, "" if start else "an empty file"
        if name == "auto" and not known:
            known = _other_format(start)
        if known:
            raise UserError(f"{self.path}: is {known}, not a shard of token ids")
        if name == "auto":
            name, why = width_of_ids(sample_bytes(file.fileno(), self.size))
            if not name:
                raise UserError(
                    f"{self.path}: has no header, and {why}; say what its ids are with --bin-dtype "
                    "uint8, uint16 or uint32, or convert other types to one of them"
                )
            if name == "uint32":
                self.note = f"{self.path}: read as uint32 ids, since {why}"
        dtype = np.dtype(name).newbyteorder("<")
        if self.size % dtype.itemsize:
            raise UserError(
                f"{self.path}: is of odd size ({self.size} bytes), not a shard of token ids: "
                f"{name} ids take {dtype.itemsize} bytes each; is it cut off, or are its ids of "
                "another type (--bin-dtype)?"
            )
        return 0, dtype, self.size // dtype.itemsize

    def _npy_header(self, file: BinaryIO) -> tuple[int, np.dtype[Any], int]:
        try:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
        except Exception as reason:  # a damaged header takes NumPy's parser to many places
            said = " ".join(str(reason).split())[:100]
            raise UserError(f"{self.path}: damaged .npy header: {said}") from reason
        if len(shape) != 1 or dtype.str not in ("<u2", "<u4", "<i4"):
            raise UserError(
                f"{self.path}: holds {dtype} of shape {shape}, expected 1-D uint16, uint32 or int32"
                + (self._conversion() if dtype.kind in "iu" else "")
            )
        return file.tell(), dtype, shape[0]

    def _conversion(self) -> str:
        new = str(self.path.with_suffix(".uint32.npy"))
        code = f"import numpy as np; np.save({new!r}, np.load({str(self.path)!r}).ravel()"
        return f"; convert it: python -c {shlex.quote(code + '.astype(np.uint32))')}"

    def read(self, fd: int, start: int, stop: int, vocab_size: int) -> np.ndarray:
        """Ids of positions start .. stop - 1 of this file, open as fd."""
        size = self.dtype.itemsize
        data = os.pread(fd, (stop - start) * size, self.offset + start * size)
        if len(data) != (stop - start) * size:
            raise UserError(
                f"{self.path}: ends before token {stop}, which its header promises; did it shrink?"
            )
        ids = np.frombuffer(data, self.dtype)
        if len(ids) and (ids.max() >= vocab_size or ids.min() < 0):
            bad = int(np.argmax((ids >= vocab_size) | (ids < 0)))
            raise UserError(
                f"{self.path}: token {start + bad} is {ids[bad]}, outside of the vocabulary "
                f"0..{vocab_size - 1}; was it made with another tokenizer? A model for such ids is "
                "trained with a larger --vocab-size"
            )
        return ids

    def open(self) -> FileIO:
        """The file, for read."""
        return open(self.path, "rb", buffering=0)

    def digest(self) -> bytes:
        """Of the size and of 64 blocks spread over the file: notices another file at once,
        whatever its size.
        """
        about = f"{self.dtype.str} {self.count} {self.size}"
        seen = hashlib.blake2b(about.encode(), digest_size=16)
        with open(self.path, "rb", buffering=0) as file:
            for i in range(64):
                place = i * max(self.size - 4096, 0) // 63
                seen.update(os.pread(file.fileno(), 4096, place))
        return seen.digest()
