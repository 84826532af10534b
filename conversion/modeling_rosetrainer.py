"""A GPT of rosetrainer with hashed n-gram embeddings, for transformers with trust_remote_code: its
NanoChat, and one more embedding. The rows for the last 2, 3, ... ids at each position are added to
the embedding of the token (Pagnoni et al. 2024, sec. 3.2.1).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import NanoChatConfig, NanoChatForCausalLM


class RosetrainerConfig(NanoChatConfig):
    """The configuration of NanoChat, the rows of the n-gram embedding, and the ids of the longest
    n-gram that has one.
    """

    model_type = "rosetrainer"
    ngram_rows: int = 1
    ngram_longest: int = 4


def ngram_table_rows(ids: Tensor, rows: int, longest: int) -> Tensor:
    """Hashes the last 2, 3, ... `longest` ids at each position to rows of the table: ids (B, T)
    int64 to (B, T, longest - 1) int64 below `rows`. An id of -1 stands for no token.
    """
    own = ids + 1
    found, hashed = [], own
    for back in range(1, longest):
        before = F.pad(own, (back, 0))[:, : ids.shape[1]]
        hashed = (hashed * 1_000_003 + before) % 2_147_483_647
        found.append((hashed ^ (hashed >> 15)) % rows)
    return torch.stack(found, -1)


class RosetrainerForCausalLM(NanoChatForCausalLM):
    """NanoChat with n-gram embeddings. `generate` works with and without its cache."""

    config_class = RosetrainerConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.ngrams = nn.Embedding(config.ngram_rows, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        ids_so_far: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As NanoChat's. ids_so_far (B, T_all): all ids up to the last of input_ids, which a
        forward pass with a filled cache needs; `generate` passes them. Raises ValueError without.
        """
        if input_ids is None:
            raise ValueError("the n-gram embeddings need input_ids; inputs_embeds will not do")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if ids_so_far is None:
            if cache is not None and cache.get_seq_length():
                raise ValueError("with a filled cache, n-grams need all ids: pass ids_so_far")
            ids_so_far = input_ids
        new = input_ids.shape[1]
        longest = self.config.ngram_longest
        seen = ids_so_far[:, -(new + longest - 1) :]
        if attention_mask is not None and attention_mask.ndim == 2:  # padding is no token
            seen = seen.masked_fill(attention_mask[:, -seen.shape[1] :] == 0, -1)
        rows = ngram_table_rows(seen, self.config.ngram_rows, longest)[:, -new:]
        embedded = self.model.embed_tokens(input_ids) + self.model.ngrams(rows).sum(2)
        return super().forward(inputs_embeds=embedded, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adds all ids so far to what a step of `generate` passes to `forward`."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return {**inputs, "ids_so_far": input_ids}
