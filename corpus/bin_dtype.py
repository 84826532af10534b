"""Guesses the width of the token ids in a file without header from the bytes of the file."""

from __future__ import annotations

import os

import numpy as np

_FEW_IDS = 32  # from this many on, chance does not make one width look like another
_MOST_HIGH = 64  # upper halves of 32-bit ids are below this, for a vocabulary up to 4 million
_FEW_BYTES = 2048  # random 16-bit ids need this many to be told from bytes


def sample_bytes(fd: int, size: int) -> np.ndarray:
    """Reads 64 blocks of 4096 bytes spread evenly over a file of `size` bytes, open as descriptor
    fd, or all of a smaller file: (n,) uint8.

    Each block starts and ends at a multiple of 8 bytes, so that it holds complete ids of any width.
    """
    block, whole = 4096, size - size % 8
    if whole <= 64 * block:
        return np.frombuffer(os.pread(fd, whole, 0), np.uint8)
    places = [i * (whole - block) // 63 // 8 * 8 for i in range(64)]
    return np.frombuffer(b"".join(os.pread(fd, block, p) for p in places), np.uint8)


def width_of_ids(sample: np.ndarray) -> tuple[str, str]:
    """Guesses the type of ids without header from a sample of their bytes, (n,) uint8 with n a
    multiple of 8. Returns ("uint16" or "uint32", the reason), or ("", the reason) if the bytes look
    like another type or fit two types.

    Read as 16-bit numbers, 32-bit ids have their upper halves at the odd positions: these are 0, or
    small although the lower halves take any value. In a stream of 16-bit ids, the numbers at even
    and odd positions have the same distribution. In a stream of 8-bit ids even the single bytes do,
    while 16-bit ids have upper bytes that differ from the lower ones.
    """
    halves = sample.view("<u2")
    low, high = halves[0::2], halves[1::2]
    if not halves.any():
        return "uint16", "nothing else is known of it"
    if high.max() < _MOST_HIGH and int(low.max()) > 256 * int(high.max()):
        if len(high) < _FEW_IDS:
            return "", f"its {len(sample)} bytes are too few to tell 16-bit from 32-bit ids"
        if not sample.view("<u4")[1::2].any():
            return "", "every other 32-bit number in it is 0, as in int64 ids"
        return "uint32", "the upper half of every 32-bit number in it is 0 or nearly so"
    if len(halves) >= _FEW_IDS and _alike(sample[0::2], sample[1::2]):
        return "", "its bytes at even and at odd places are alike, as in uint8 ids"
    return "uint16", "its 16-bit numbers at even and at odd places are alike"


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two equally large samples of bytes look as if drawn from one distribution.

    The G statistic of two such samples is about the number of distinct values in them (at most 1.4
    times that where each value is rare). The upper bytes of random 16-bit ids are distributed
    nearly as evenly as the lower ones, so it takes a large sample to tell them apart.
    """
    if len(one) < _FEW_BYTES and max(one.max(), other.max()) > 127:
        return False
    counts = np.array([np.bincount(x, minlength=256) for x in (one, other)], float)
    counts = counts[:, counts.any(0)]
    ratio = np.where(counts > 0, counts / counts.mean(0), 1.0)
    return float(2 * (counts * np.log(ratio)).sum()) < 2 * counts.shape[1] + 4
