"""The check that validation files hold no piece of the training data."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from config import UserError
from locks import lock
from shards import mix

if TYPE_CHECKING:
    from dataset import TokenDataset

PROBES = 256  # pieces of the validation data that are searched for
_DOUBLINGS = 5  # a piece has 2**5 tokens,
_DOUBLINGS_OF_BYTES = 7  # or 2**7 where tokens are bytes or the like: about as much text
_SMALL_VOCABULARY = 1024
_MOST_TOKENS = 1_000_000_000  # of the training data are read
_BLOCK = 1 << 16  # tokens hashed at once: they stay in the cache of a core
_REFUSED_SHARE = 0.2  # boilerplate repeats here and there; a copied part repeats all over


def refuse_leak(train: TokenDataset, val: TokenDataset, cache_dir: Path) -> float:
    """The share of probes of `val` that stand somewhere in `train`; more than a fifth is refused.

    Files of their own may still be copies. 256 pieces of 32 tokens (128 where tokens are bytes),
    spread evenly over the validation data, are searched at every position of the training data;
    beyond a billion tokens, in blocks spread evenly over it. The result is kept in the cache.
    Raises UserError.
    """
    about = repr(
        (train.describe(), val.describe(), PROBES, _DOUBLINGS, _DOUBLINGS_OF_BYTES, _MOST_TOKENS)
    )
    key = hashlib.blake2b(about.encode(), digest_size=16).hexdigest()
    path = cache_dir / f"leak-{key}.json"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as held:
            lock(held)  # ranks that start together search once
            if not path.exists():
                temporary = path.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_text(json.dumps(leaked_share(train, val)))
                os.replace(temporary, path)
            share = float(json.loads(path.read_text()))
    except OSError as reason:
        raise UserError(
            f"cannot write {path}: {reason.strerror}; name another folder with --cache-dir"
        ) from reason
    if share > _REFUSED_SHARE:
        raise UserError(
            f"{share:.0%} of {PROBES} pieces of the validation data ({val.source.name}) also stand "
            f"in the training data ({train.source.name}); validate on other data, or give no "
            "validation files and let --val-ratio hold out a part"
        )
    return share


def leaked_share(train: TokenDataset, val: TokenDataset) -> float:
    """Of the probes of `val`, the share that stands in `train`, 0 to 1; estimated where only a part
    of `train` was read.
    """
    small = val.source.vocab_size < _SMALL_VOCABULARY
    doublings = min(_DOUBLINGS_OF_BYTES if small else _DOUBLINGS, val.num_tokens.bit_length() - 1)
    length = 1 << doublings
    places = np.unique(np.linspace(val.start, val.stop - length, PROBES).astype(np.int64))
    probes = [run_hashes(val.source.read(p, length), doublings)[0] for p in places.tolist()]
    wanted = np.unique(np.array(probes, np.uint64))
    table = np.zeros(1 << 16, bool)  # a cheap first look: the top 16 bits
    table[wanted >> np.uint64(48)] = True
    found = np.zeros(len(wanted), bool)
    starts, share_read = _blocks(train)
    for start in starts:
        count = min(_BLOCK + length - 1, train.stop - start)
        if count >= length:
            hashes = run_hashes(train.source.read(start, count), doublings)
            maybe = hashes[table[hashes >> np.uint64(48)]]
            place = np.minimum(np.searchsorted(wanted, maybe), len(wanted) - 1)
            found[place[wanted[place] == maybe]] = True
    return min(1.0, float(found.mean()) / share_read)


def _blocks(train: TokenDataset) -> tuple[list[int], float]:
    """Where the blocks start that are read, and the share of the data that they are."""
    count, most = -(-train.num_tokens // _BLOCK), _MOST_TOKENS // _BLOCK
    chosen = range(count) if count <= most else (i * count // most for i in range(most))
    return [train.start + i * _BLOCK for i in chosen], min(1.0, most / count)


def run_hashes(ids: np.ndarray, doublings: int) -> np.ndarray:
    """A hash of each run of 2**doublings ids: a polynomial modulo 2**64, made by doubling runs."""
    hashes, width, factor = mix(ids.astype(np.uint64)), 1, 0x9E3779B97F4A7C15
    for _ in range(doublings):
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        width, factor = 2 * width, factor * factor % (1 << 64)
    return hashes
