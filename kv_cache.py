"""The key/value cache of generation: what a model keeps of the tokens that it has seen.

Shapes: B batch, T new tokens, S tokens so far, H heads, D channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """The keys and values that one attention layer has computed, each (B, H, S, D). max_length: how
    many tokens there is room for.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length, self.length = max_length, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of T more tokens, (B, H, T, D); returns those of all so far. Raises ValueError
        if there is no room for them.
        """
        if self.length + k.shape[2] > self.max_length:
            raise ValueError(f"a cache of {self.max_length} tokens holds no {k.shape[2]} more")
        if not self.length:
            B, H, _, D = k.shape
            self.keys, self.values = (x.new_empty(B, H, self.max_length, D) for x in (k, v))
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KVCache:
    """What a model keeps of the tokens that it has seen, so that the next ones are predicted
    without computing those again: the keys and values of each layer, and the last ids, from which
    n-grams go on. max_length: how many tokens there is room for. ngram_longest: the ids of the
    longest n-gram.
    """

    def __init__(self, n_layers: int, max_length: int, ngram_longest: int = 4) -> None:
        self.before = ngram_longest - 1
        self.layers = [LayerCache(max_length) for _ in range(n_layers)]
        self.last_ids: Tensor | None = None  # (B, up to before) int64, -1 = padding

    @property
    def length(self) -> int:
        """The number of tokens so far, padding included."""
        return self.layers[0].length

    def with_ids_before(self, ids: Tensor) -> Tensor:
        """ids (B, T), and before them the ids that came last, as many as an n-gram needs; keeps
        the last of both."""
        joined = ids if self.last_ids is None else torch.cat((self.last_ids, ids), 1)
        self.last_ids = joined[:, -self.before :]
        return joined
