"""Several data sets as one: mixed by weight for training, joined for validation."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corpus.hashing import hash_of
from corpus.shards import (
    JoinedTokens,
)
from corpus.token_dataset import TokenDataset
from runtime.setting_fields import UserError

_LONGEST_PATTERN = 1_000_000  # samples after which a mixture repeats its pattern of sources


class Joined(TokenDataset):
    """Several data sets concatenated to one, such as the validation parts of a mixture."""

    def __init__(self, parts: Sequence[TokenDataset], weights: Sequence[Fraction]) -> None:
        joined = JoinedTokens([(p.source, p.start, p.stop) for p in parts])
        super().__init__(joined, parts[0].seq_len, tokenizer=parts[0].tokenizer)
        self._parts, self.weights = list(parts), list(weights)

    @property
    def parts(self) -> list[TokenDataset]:
        return self._parts

    def limited(self, max_tokens: int) -> TokenDataset:
        """The data set of the first tokens of each part, in proportion to the weights, max_tokens
        in all; 0 = all.
        """
        if not max_tokens or max_tokens >= self.num_tokens:
            return self
        counts = share_out(max_tokens, [p.num_tokens for p in self.parts], self.weights)
        kept = [(p, n, w) for p, n, w in zip(self.parts, counts, self.weights, strict=True) if n]
        return Joined([p.limited(n) for p, n, _ in kept], [w for _, _, w in kept])


def share_out(total: int, sizes: Sequence[int], weights: Sequence[Fraction]) -> list[int]:
    """Splits `total` among several parts in proportion to their weights, as integers. No part gets
    more than its size; what it cannot take goes to the others.
    """
    counts = [0] * len(sizes)
    left, open_ones = total, set(range(len(sizes)))
    while open_ones:
        rate = left / sum(weights[i] for i in open_ones)
        full = {i for i in open_ones if sizes[i] <= rate * weights[i]}
        if not full:  # the rest of the division goes to the first ones
            for i in sorted(open_ones):
                counts[i] = int(rate * weights[i])
            for i in sorted(open_ones)[: total - sum(counts)]:
                counts[i] += 1
            break
        for i in full:
            counts[i], left = sizes[i], left - sizes[i]
        open_ones -= full
    return counts


class Mixture(TokenDataset):
    """Several data sets mixed by weight: each gives its share of the training samples and has
    epochs of its own.

    The shares are exact: if n is a multiple of the pattern's length, n x weight[i] of the first n
    samples are from part i, and for any other n at most len(parts) more or fewer.
    """

    def __init__(self, parts: Sequence[TokenDataset], weights: Sequence[Fraction]) -> None:
        joined = JoinedTokens([(p.source, p.start, p.stop) for p in parts])
        super().__init__(joined, parts[0].seq_len, tokenizer=parts[0].tokenizer)
        self._parts, total = list(parts), sum(weights, Fraction())
        self.weights = [w / total for w in weights]
        period = math.lcm(*(w.denominator for w in self.weights))
        if period > _LONGEST_PATTERN:
            raise UserError(f"weights {', '.join(map(str, weights))} are too fine; use 3 digits")
        self.counts = np.array([int(w * period) for w in self.weights])
        # Smooth weighted round-robin: the part that is most behind its share goes next.
        owed, pattern = np.zeros(len(parts), np.int64), []
        for _ in range(period):
            owed += self.counts
            pattern.append(int(owed.argmax()))
            owed[pattern[-1]] -= period
        self.pattern = np.array(pattern)
        self.before = np.array(
            [np.cumsum(self.pattern == i) - (self.pattern == i) for i in range(len(parts))]
        )  # (parts, period)

    @property
    def parts(self) -> list[TokenDataset]:
        return self._parts

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts)

    def samples(self, first: int, count: int, seed: int) -> Tensor:
        """The sequences of training samples first .. first + count - 1: (count, T) int64. Sample i
        is from the data set with the index pattern[i % len(pattern)], in that set's own shuffled
        order.
        """
        cycle, place = np.divmod(np.arange(first, first + count), len(self.pattern))
        rows = torch.empty(count, self.seq_len, dtype=torch.int64)
        for i, part in enumerate(self.parts):
            here = self.pattern[place] == i
            own = cycle[here] * self.counts[i] + self.before[i][place[here]]
            rows[torch.from_numpy(here)] = part.rows(part.ordered(own, hash_of(seed, i)))
        return rows

    def limited(self, max_tokens: int) -> TokenDataset:
        if max_tokens:
            raise UserError("--max-tokens with weighted sources is ambiguous; limit num_steps")
        return self

    def describe(self) -> dict[str, Any]:
        shares = {"weights": [str(w) for w in self.weights]}
        return {**super().describe(), **shares}


def weighted(paths: Sequence[str]) -> list[tuple[str, Fraction | None]]:
    """Splits paths from their weights: "a.npy:0.7" becomes ("a.npy", 7/10), and the weight of a
    plain path is None. Raises UserError for a weight that is no number above 0, or if only some
    have one.
    """
    found: list[tuple[str, Fraction | None]] = []
    for path in paths:
        name, colon, number = path.rpartition(":")
        if colon and re.fullmatch(r"[0-9.]+", number) and not os.path.exists(path):
            try:
                found.append((name, Fraction(number)))
            except ValueError:
                raise UserError(f"{path}: {number} is not a weight; try {name}:0.5") from None
        else:
            found.append((path, None))
    given = [weight for _, weight in found if weight is not None]
    if given and (len(given) < len(found) or min(given) <= 0):
        raise UserError(f"{' '.join(paths)}: give every source a weight above 0, or none of them")
    return found
