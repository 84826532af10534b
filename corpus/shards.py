"""Streams of token ids, read by position: files of ids (`TokenShards`), random ones (`ToyTokens`),
and ranges of these put together (`JoinedTokens`).
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from corpus.hashing import hash_of, mix
from corpus.shard_formats import _Shard
from runtime.setting_fields import UserError


class SourceFile(NamedTuple):
    """One file behind a stream of tokens."""

    path: str
    content: str  # hash of its content
    start: int  # its first token in the stream
    stop: int  # the first token of the next file; for texts both are estimated from their bytes


class Source(Protocol):
    """The interface of a stream of `num_tokens` token ids."""

    name: str
    num_tokens: int
    vocab_size: int  # every id is below it
    fingerprint: str  # changes when the content does

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids of positions start .. start + count - 1: (count,) integers below vocab_size."""
        ...

    def files_in(self, start: int, stop: int) -> list[tuple[SourceFile, int, int]]:
        """The files that tokens start .. stop - 1 come from, each as (file, low, high): these are
        tokens low .. high - 1 of that file.
        """
        ...


class ToyTokens:
    """A stream of random ids below vocab_size. Each is a function of (seed, position), so a sample
    has the same ids each time it is read.
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
    """The ids of several files, in the given order, as one stream. Raises UserError for a file that
    is no shard of token ids. notes: for the run's log, what was guessed about the files. texts:
    (path, hash, bytes) of each text from which the files were made; `files_in` then names these.

    Reads with pread, not through a memory map. Both read on demand, but a file that shrinks while
    open then gives an error that names it, where a memory map would kill the process with SIGBUS.
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
        """The largest id in up to 64 blocks of 4096 tokens spread over the stream; -1 if empty."""
        if not self.num_tokens:
            return -1
        count = min(4096, self.num_tokens)
        places = np.unique(np.linspace(0, self.num_tokens - count, 64).astype(np.int64)).tolist()
        return max(int(self._read(p, count, 1 << 32).max()) for p in places)

    def files_in(self, start: int, stop: int) -> list[tuple[SourceFile, int, int]]:
        ranges = [(f, max(f.start, start), min(f.stop, stop)) for f in self.files]
        return [(f, low - f.start, high - f.start) for f, low, high in ranges if low < high]


class JoinedTokens:
    """Ranges (source, start, stop) of several sources, concatenated to one stream."""

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
    """The token shards that the paths name: files, folders (their .npy and .bin files) and globs.
    The files of a folder or glob are in the order of their names. Raises UserError if a folder or
    glob has none.
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
