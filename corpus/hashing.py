"""Pseudo-random numbers that follow from their arguments: hashes, and permutations of any size."""

from __future__ import annotations

import hashlib

import numpy as np


def mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finalizer: a bijection of uint64 that scatters neighbours (Steele et al.
    2014, fig. 17).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_of(*numbers: int) -> int:
    """A 64-bit hash of several integers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Maps positions, (m,), by the pseudo-random permutation of range(n) that key selects: (m,)
    int64. Takes O(1) memory besides, for any n below 2**62.

    A six-round Feistel network on the next power of 4, applied until the result is below n (cycle
    walking: Black and Rogaway 2002, sec. 3).
    """
    half = np.uint64(max(3, (n.bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = mix(
        np.uint64(key) + np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        return (left << half) | right

    x = network(positions.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)
