"""The check for data contamination: validation text must not occur in the training data."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from corpus.hashing import mix
from corpus.shards import Source, SourceFile
from runtime.files import write_atomically
from runtime.locks import lock
from runtime.setting_fields import UserError

PROBES = 256  # number of pieces of the validation data that are searched for
_DOUBLINGS = 5  # a piece has 2**5 tokens
_DOUBLINGS_OF_BYTES = 7  # a piece of byte-like tokens has 2**7: about as much text
_SMALL_VOCABULARY = 1024  # byte-like: all ids are below this
_MOST_TOKENS = 1_000_000_000  # at most so many training tokens are read
_BLOCK = 1 << 16  # tokens hashed at once: they stay in the cache of a core
_VAL_BLOCK = 1 << 12  # tokens of each of the PROBES blocks of validation data that pieces are from
REFUSED_SHARE = 0.2  # boilerplate repeats here and there; a copied part repeats all over
_LEAST_PIECES = 16  # a copy has at least the length of so many pieces; a license header has less
_LEAST_NAMED = 1000  # tokens of a copied file that is worth a line in the log
_VERSION = 2  # of this search; another version does not read its cached results


class TokenRange(Protocol):
    """The part of `TokenDataset` that this check uses: tokens start .. stop - 1 of a source."""

    source: Source
    start: int
    stop: int
    num_tokens: int

    def files(self) -> list[tuple[SourceFile, int, int]]:
        """The files that the tokens come from, each as (file, low, high): these are tokens low ..
        high - 1 of that file.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """A record that identifies these tokens."""
        ...


def refuse_leak(
    train: TokenRange, val: TokenRange, cache_dir: Path, allow: bool = False, hint: str = ""
) -> float:
    """Returns the share (0 to 1) of the text of `val` that also occurs in `train`. Raises UserError
    if that is more than a fifth, unless allow is true.

    256 pieces of 32 tokens (128 where tokens are bytes), spread evenly over the distinct text of
    the validation data, are searched for at every position of the training data, or beyond a
    billion tokens in blocks spread evenly over it. Text that recurs within the validation data,
    such as a license in each file, counts once, and less than the text of 16 pieces is never called
    a copy. The result is cached in cache_dir, and UserError is raised if that cannot be written.
    hint: what may be the cause, for the error message.
    """
    about = repr((train.describe(), val.describe(), PROBES, _MOST_TOKENS, _VERSION))
    key = hashlib.blake2b(about.encode(), digest_size=16).hexdigest()
    path = cache_dir / f"leak-{key}.json"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as held:
            lock(held)  # ranks that start together search once
            if not path.exists():
                found = {"share": leaked_share(train, val), "runs": len(_distinct_runs(val))}
                write_atomically(path, json.dumps(found).encode())
            found = json.loads(path.read_text())
    except OSError as reason:
        raise UserError(
            f"cannot write {path}: {reason.strerror}; name another folder with --cache-dir"
        ) from reason
    share, enough = float(found["share"]), _LEAST_PIECES << _longest(val)
    if not allow and share > REFUSED_SHARE and share * found["runs"] >= enough:
        if val.source is train.source:
            where = f"what is held out of {val.source.name} also stand in the rest of it, which "
            where += "holds that text more than once"
        else:
            where = f"the validation data ({val.source.name}) also stand in the training data "
            where += f"({train.source.name})"
        raise UserError(f"{share:.0%} of {PROBES} pieces of {where}{hint}; {_WAYS_OUT}")
    return share


_WAYS_OUT = (
    "give each text once, or validate on other text; --allow-leak trains nevertheless, and the "
    "validation loss then measures memory"
)


def refuse_copies(train: TokenRange, val: TokenRange, allow: bool = False) -> list[str]:
    """Compares the files of `val` and `train` by their hashes. Returns a sentence such as "b.txt is
    a copy of a.txt" for each copy that has at least 1000 tokens in both. Raises UserError if copies
    are more than a fifth of `val`, unless allow is true.
    """
    trained: dict[str, list[tuple[SourceFile, int, int]]] = {}
    for entry in train.files():
        trained.setdefault(entry[0].content, []).append(entry)
    shared, names, large = 0, [], []
    for file, low, high in val.files():
        for other, first, after in trained.get(file.content, []):
            tokens = min(high, after) - max(low, first)  # of the same part of the file in both
            if tokens > 0 and other is not file:
                shared += tokens
                names.append(_same(file, other))
                large += names[-1:] if tokens >= _LEAST_NAMED else []
                break
    if not allow and shared > REFUSED_SHARE * val.num_tokens:
        raise UserError(
            f"{shared / val.num_tokens:.0%} of the validation data also stand in the training "
            f"data: {some(names)}; {_WAYS_OUT}"
        )
    return large


def repeated_files(data: TokenRange) -> list[str]:
    """One sentence for each file of the data that is a copy of an earlier one. Files with fewer
    than 1000 tokens are left out.
    """
    first: dict[str, SourceFile] = {}
    names = []
    for file, _, _ in data.files():
        earlier = first.setdefault(file.content, file)
        if earlier is not file and file.stop - file.start >= _LEAST_NAMED:
            names.append(_same(file, earlier))
    return names


def _same(file: SourceFile, other: SourceFile) -> str:
    try:
        if os.path.samefile(file.path, other.path):
            same_name = os.path.abspath(file.path) == os.path.abspath(other.path)
            return f"{file.path} is given twice" if same_name else f"{file.path} is {other.path}"
    except OSError:  # deleted meanwhile
        pass
    return f"{file.path} is a copy of {other.path}"


def some(names: list[str]) -> str:
    """The first three names as one text, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def leaked_share(train: TokenRange, val: TokenRange) -> float:
    """An estimate of the share (0 to 1) of the distinct pieces of the validation text that also
    occur in the training text. It searches for at most 256 pieces of 32 tokens each (128 of byte
    tokens, fewer where the text is short). Of more than 1e9 training tokens it reads evenly spread
    blocks and scales the share up.
    """
    doublings = _doublings(val)
    runs = _distinct_runs(val)
    wanted = np.unique(runs[np.unique(np.linspace(0, len(runs) - 1, PROBES).astype(np.int64))])
    table = np.zeros(1 << 16, bool)  # a cheap first test, by the top 16 bits of a hash
    table[wanted >> np.uint64(48)] = True
    found = np.zeros(len(wanted), bool)
    starts, share_read = _blocks(train, _BLOCK, _MOST_TOKENS // _BLOCK)
    for start in starts:
        hashes = _hashes(train, start, _BLOCK, doublings)
        maybe = hashes[table[hashes >> np.uint64(48)]]
        place = np.minimum(np.searchsorted(wanted, maybe), len(wanted) - 1)
        found[place[wanted[place] == maybe]] = True
    return min(1.0, float(found.mean()) / share_read)


def _longest(val: TokenRange) -> int:
    """The binary logarithm of the length of a piece in tokens, where the text is long enough. It
    depends on the ids that occur in the text, not on the vocabulary size, which may be far larger.
    """
    largest = val.source.read(val.start, min(_VAL_BLOCK, val.num_tokens)).max()
    return _DOUBLINGS_OF_BYTES if largest < _SMALL_VOCABULARY else _DOUBLINGS


def _doublings(val: TokenRange) -> int:
    return min(_longest(val), val.num_tokens.bit_length() - 1)


def _distinct_runs(val: TokenRange) -> np.ndarray:
    """Hashes of the distinct runs of 2**_doublings(val) tokens of the validation data, or of blocks
    spread evenly over it, in the order in which they appear there: (n,) uint64.
    """
    starts, _ = _blocks(val, _VAL_BLOCK, PROBES)
    hashes = np.concatenate([_hashes(val, s, _VAL_BLOCK, _doublings(val)) for s in starts])
    different, first = np.unique(hashes, return_index=True)
    return different[np.argsort(first)]


def _hashes(data: TokenRange, start: int, block: int, doublings: int) -> np.ndarray:
    """Hashes of the runs of 2**doublings tokens that start in a block: (n,) uint64, n <= block."""
    count = min(block + (1 << doublings) - 1, data.stop - start)
    if count < 1 << doublings:
        return np.empty(0, np.uint64)
    return run_hashes(data.source.read(start, count), doublings)


def _blocks(data: TokenRange, block: int, most: int) -> tuple[list[int], float]:
    """The start positions of the blocks to read, at most `most` of `block` tokens each, spread
    evenly over the data, and the share of the data that they cover.
    """
    count = -(-data.num_tokens // block)
    chosen = range(count) if count <= most else (i * count // most for i in range(most))
    return [data.start + i * block for i in chosen], min(1.0, most / count)


def run_hashes(ids: np.ndarray, doublings: int) -> np.ndarray:
    """A hash of each run of 2**doublings consecutive ids, (n - 2**doublings + 1,) uint64: a
    polynomial modulo 2**64, computed by doubling the length of the runs.
    """
    hashes, width, factor = mix(ids.astype(np.uint64)), 1, 0x9E3779B97F4A7C15
    for _ in range(doublings):
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        width, factor = 2 * width, factor * factor % (1 << 64)
    return hashes
