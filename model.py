"""The GPT model: from token ids to logits and loss. It knows nothing of ranks, files or optimizers.

Shapes: B batch, T tokens, C channels (d_model), H heads, D channels per head (C / H), V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GPTConfig
from kv_cache import KVCache, LayerCache
from loss import IGNORE, WHOLE_VOCAB, next_token_loss, token_losses


def ngram_table_rows(ids: Tensor, rows: int, longest: int = 4) -> Tensor:
    """Hashes the last 2, 3, ... and `longest` ids at each position to rows of an embedding table:
    ids (B, T) int64 to (B, T, longest - 1) int64 below rows. N-grams may share a row (Pagnoni et
    al. 2024, sec. 3.2.1).
    """
    own = ids + 1  # before the first token all ids are 0
    found, hashed = [], own
    for back in range(1, longest):
        before = F.pad(own, (back, 0))[:, : ids.shape[1]]
        hashed = (hashed * 1_000_003 + before) % 2_147_483_647
        found.append((hashed ^ (hashed >> 15)) % rows)
    return torch.stack(found, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 34): rotates the channel pairs (i, i + D/2) of
    x (B, H, T, D) by angles with these cosines and sines, each (T, D/2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotary_table(positions: int, width: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines of rotary position embedding, each (positions, width / 2) float32, for
    heads of `width` channels; base 10000 (Su et al. 2021).
    """
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


class Attention(nn.Module):
    """Causal multi-head self-attention. The rows of `qkv` are ordered head by head, (H, 3, D), so
    that tensor parallelism can give each rank all rows of some heads in one slice.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        gpt2 = config.arch == "gpt2"
        self.width, self.dropout = config.d_model // config.n_heads, config.dropout
        self.qk_norm = not gpt2
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=gpt2)
        self.proj = nn.Linear(config.d_model, config.d_model, bias=gpt2)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Maps x (B, T, C) to (B, T, C). attn_mask (B, 1, T, S) bool: True where a query attends to
        a key; None = causal attention. rotary: the cosines and sines of the positions, each
        (T, D / 2) or (B, 1, T, D / 2), or None. cache: the keys and values of the tokens before x,
        to which those of x are added; S is the number of all.
        """
        qkv = self.qkv(x)  # (B, T, 3 C)
        q, k, v = qkv.unflatten(-1, (-1, 3, self.width)).transpose(1, 2).unbind(3)  # (B, H, T, D)
        if self.qk_norm:  # keeps the attention logits bounded (Dehghani et al. 2023, sec. 2.1)
            q, k = F.rms_norm(q, (self.width,)), F.rms_norm(k, (self.width,))
        if rotary is not None:
            q, k = rotate(q, *rotary).to(v.dtype), rotate(k, *rotary).to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            is_causal=attn_mask is None and q.shape[2] > 1,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class Square(nn.Module):
    """Squares its input elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x  # under autocast, x.square() would be float32


class MLP(nn.Module):
    """Two matrices, and between them GELU (gpt2; in its tanh form, or exact) or squared ReLU
    (modern; So et al. 2021, sec. 3).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        gpt2 = config.arch == "gpt2"
        self.fc = nn.Linear(config.d_model, config.d_ff, bias=gpt2)
        self.act = nn.GELU(config.gelu) if gpt2 else nn.Sequential(nn.ReLU(), Square())
        self.proj = nn.Linear(config.d_ff, config.d_model, bias=gpt2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.proj(self.act(self.fc(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_1, self.attn = make_norm(config), Attention(config)
        self.norm_2, self.mlp = make_norm(config), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = x + self.drop(self.attn(self.norm_1(x), attn_mask, rotary, cache))
        return x + self.drop(self.mlp(self.norm_2(x)))


def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm with gain and bias (gpt2), or RMSNorm without parameters (modern)."""
    if config.arch == "gpt2":
        return nn.LayerNorm(config.d_model, eps=1e-5)
    return nn.RMSNorm(config.d_model, elementwise_affine=False)


class GPTModel(nn.Module):
    """A GPT in one of two architectures (`config.arch`):

    gpt2: learned positions, LayerNorm, GELU, biases, head tied to the embedding (Radford et al.
    2019). modern: rotary positions, RMSNorm, QK-norm, squared ReLU, no biases, separate head,
    zero-initialised projections.

    seed: of the initial weights; None draws them from torch's global generator. The attribute
    `shapes` has the full shape of each parameter by name, also where FSDP or tensor parallelism
    leaves each rank only a part of it.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, seed: int | None = None) -> None:
        super().__init__()
        if not config.vocab_size:
            raise ValueError(
                "vocab_size=0 stands for the tokenizer's; give its number to build a model"
            )
        gpt2 = config.arch == "gpt2"
        self.config, self.vocab_shard = config, WHOLE_VOCAB
        self.compiled = False  # its blocks and its loss: set by training/compilation.py
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.ngrams = nn.Embedding(config.ngram_rows, config.d_model) if config.ngram_rows else None
        self.wpe = nn.Embedding(config.max_position_embeddings, config.d_model) if gpt2 else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = make_norm(config)
        self.lm_head = None if gpt2 else nn.Linear(config.d_model, config.vocab_size, bias=False)
        if not gpt2:
            cos, sin = rotary_table(
                config.max_position_embeddings, config.d_model // config.n_heads
            )
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
        self.init_weights(None if seed is None else torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws fresh weights. The first loss is ln(V) within 0.1 nats, for both architectures and
        every width.

        gpt2: std 0.02, which is divided by sqrt(2 n_layers) for residual projections (Radford et
        al. 2019, sec. 2.3). One deviation: the logits of a fresh model have variance C std^2, which
        raises the first loss by half of that, 0.15 nats at C = 768. So the embedding's std is
        lowered above C = 375, to keep that variance at 0.15. modern: std 1 / sqrt(fan_in),
        embeddings 0.02; residual projections and head start at zero (Zhang et al. 2019). All are
        normal with mean 0.
        """
        config = self.config
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif config.arch == "modern":
                if name.endswith(("proj.weight", "lm_head.weight")):
                    p.zero_()
                else:
                    block = name.startswith("blocks.")
                    p.normal_(0, p.shape[1] ** -0.5 if block else 0.02, generator=generator)
            else:
                std = 0.02
                if name.endswith("proj.weight"):
                    std /= math.sqrt(2 * config.n_layers)
                elif name == "wte.weight":
                    std = min(std, math.sqrt(0.15 / config.d_model))
                p.normal_(0, std, generator=generator)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        reduction: str = "mean",
        return_logits: bool = True,
        logits_to_keep: int = 0,
        cache: KVCache | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns (logits (B, T, V) or None, loss or None). The labels are shifted inside: position
        t predicts labels[:, t + 1].

        input_ids (B, T) int64; attention_mask (B, T), 0 = padding, neither attended to nor scored;
        labels (B, T) int64, -100 = not scored; None = no loss. reduction: "mean" (nats per token)
        or "sum" (nats), () float32; "none" (nats), (B, T - 1) float32 without gradients.
        return_logits=False does not compute the logits as a whole; logits_to_keep: only the logits
        of so many last positions, 0 = of all. cache: input_ids continue the tokens in it, and are
        added to it; attention_mask, if given, covers both. Raises ValueError if the tokens are more
        than max_position_embeddings.
        """
        hidden = self.hidden_states(input_ids, attention_mask, cache)
        weight, part = self.output_weight, self.vocab_shard
        last = hidden[:, -logits_to_keep:]
        logits = part.join(F.linear(last, weight)) if return_logits else None
        if labels is None:
            return logits, None
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask[:, -labels.shape[1] :] == 0, IGNORE)
        if reduction == "none":
            return logits, token_losses(hidden, weight, labels, part, self.compiled)
        total, count = next_token_loss(hidden, weight, labels, part, self.compiled)
        return logits, total if reduction == "sum" else total / count.clamp(min=1)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The normalised output of the last block, (B, T, C), from which the head predicts. The
        arguments are those of `forward`. Raises ValueError if there are more tokens than
        max_position_embeddings.
        """
        past, T = cache.length if cache else 0, input_ids.shape[1]
        if self.config.max_position_embeddings < past + T:
            raise ValueError(
                f"input of {past + T} tokens, but "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )
        x = self.wte(input_ids)  # (B, T, C)
        attn_mask = causal_and_padding(attention_mask, past, T, x.device)
        positions: slice | Tensor = slice(past, past + T)
        if attn_mask is not None and attention_mask is not None:  # padding has no position
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        if self.ngrams is not None:
            ids = input_ids
            if attention_mask is not None:  # padding counts as no token
                ids = ids.masked_fill(attention_mask[:, past:] == 0, -1)
            ids = cache.with_ids_before(ids) if cache else ids
            rows = ngram_table_rows(ids, self.config.ngram_rows, self.config.ngram_longest)
            found = self.ngrams(rows[:, -T:])  # (B, T, lengths, C)
            if self.training and self.config.ngram_dropout:
                whole = found.new_ones(*found.shape[:3], 1)
                found = found * F.dropout(whole, self.config.ngram_dropout)  # whole rows
            x = x + found.sum(2)
        if self.wpe is not None:
            x, rotary = x + self.wpe.weight[positions], None
        else:
            x, rotary = F.rms_norm(x, x.shape[-1:]), (self.cos[positions], self.sin[positions])
            if isinstance(positions, Tensor):
                rotary = rotary[0][:, None], rotary[1][:, None]  # the same for all heads
        x = self.drop(x)
        caches = cache.layers if cache else [None] * len(self.blocks)
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            x = block(x, attn_mask, rotary, layer_cache)
        return self.norm_f(x)

    @property
    def output_weight(self) -> Tensor:
        """The head: the matrix (V, C) that turns hidden states into logits. Where the head is tied
        to the embedding, it is the embedding; under tensor parallelism, this rank's rows of it.
        """
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def num_parameters(self) -> int:
        """The number of trainable parameters of the unsharded model, a tied matrix counted once."""
        return sum(map(math.prod, self.shapes.values()))


def causal_and_padding(
    attention_mask: Tensor | None, past: int, T: int, device: torch.device | None = None
) -> Tensor | None:
    """The attention mask of T tokens that follow `past` others, (B or 1, 1, T, past + T) bool: True
    where a query attends to a key. None if there is no padding and causal attention, or for one
    token full attention, suffices. attention_mask (B, past + T): 0 = padding.

    A position always sees itself, so that a row of padding has something to attend to and never
    becomes NaN.
    """
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (past == 0 or T == 1):
        return None
    keys = torch.arange(past + T, device=device)
    queries = keys[past:, None]
    causal = keys <= queries  # (T, past + T)
    if attention_mask is None:
        return causal[None, None]
    return (causal & attention_mask.bool()[:, None, None, :]) | (keys == queries)
