"""How wide the ids of a file without header are, told by the bytes themselves."""

from __future__ import annotations

import os

import numpy as np

_FEW_IDS = 32  # with at least this many, chance does not make one width look like another
_MOST_HIGH = 64  # upper halves of 32-bit ids are below it, for vocabularies of up to 4 million
_FEW_BYTES = 2048  # random 16-bit ids need this many to be told from bytes


def sample_bytes(fd: int, size: int) -> np.ndarray:
    """Up to 64 blocks spread over a file of `size` bytes, or all of a small file: (n,) uint8.

    Each block starts and ends at a multiple of 8 bytes, so that it holds whole ids of any width.
    """
    block, whole = 4096, size - size % 8
    if whole <= 64 * block:
        return np.frombuffer(os.pread(fd, whole, 0), np.uint8)
    places = [i * (whole - block) // 63 // 8 * 8 for i in range(64)]
    return np.frombuffer(b"".join(os.pread(fd, block, p) for p in places), np.uint8)


def width_of_ids(sample: np.ndarray) -> tuple[str, str]:
    """("uint16" or "uint32", why) for ids without header; ("", why) where a sample of their bytes,
    (n,) uint8 with n a multiple of 8, looks like another type or fits two of them.

    Read as 16-bit numbers, 32-bit ids have upper halves at the odd places: these are 0, or small
    although the lower halves take any value. The numbers of a 16-bit stream are alike at even and
    odd places. In a stream of 8-bit ids even the single bytes are, while 16-bit ids have upper
    bytes that differ from the lower ones.
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

    The G statistic of such samples is about the number of their values (at most 1.4 times that
    where each value is rare). Random 16-bit ids have upper bytes nearly as even as their lower
    ones, which takes a larger sample to see.
    """
    if len(one) < _FEW_BYTES and max(one.max(), other.max()) > 127:
        return False
    counts = np.array([np.bincount(x, minlength=256) for x in (one, other)], float)
    counts = counts[:, counts.any(0)]
    ratio = np.where(counts > 0, counts / counts.mean(0), 1.0)
    return float(2 * (counts * np.log(ratio)).sum()) < 2 * counts.shape[1] + 4
