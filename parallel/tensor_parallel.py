"""Tensor parallelism (Shoeybi et al. 2019, sec. 3): each rank has some rows or columns of the
matrices of a block, and the rows of embedding and head for some token ids, as plain tensors.

The parts are ordinary parameters, so DDP, `fully_shard`, the fused optimizer and what model.py and
loss.py do to save memory take them as they are. Torch's `parallelize_module` makes DTensors of them
instead, which none of these but `fully_shard` takes; the tests use it as the reference.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.hashing import hash_of
from loss import VocabShard
from model import GPTModel
from runtime.device import generator_of


def split_dim(name: str) -> int | None:
    """The dimension along which the parameter of GPTModel called name is sharded, or None if every
    rank has all of it.

    The first matrix of a pair (qkv, fc) is split by outputs, so attention by heads, as `qkv` is
    ordered head by head; the second one (proj) by inputs; embedding and head by token id.
    """
    if re.search(r"(qkv|fc)\.(weight|bias)$|^(wte|lm_head)\.weight$", name):
        return 0
    return 1 if re.search(r"\.proj\.weight$", name) else None


def part_of(whole: Tensor, dim: int, index: int, parts: int) -> Tensor:
    """Shard `index` of `parts` along a dimension, as a view. A shard has ceil(size / parts) entries
    as with torch.chunk, but there are always `parts` of them: the last ones may be shorter, or
    empty.
    """
    share = -(-whole.shape[dim] // parts)
    start = min(share * index, whole.shape[dim])
    return whole.narrow(dim, start, min(share, whole.shape[dim] - start))


def split_model(model: GPTModel, group: dist.ProcessGroup) -> None:
    """Shards the model in place: each matrix becomes this rank's part of it, and layers all-reduce
    over the ranks where needed. All ranks of the group start with the same model and see the same
    batches.
    """
    rank, parts = group.rank(), group.size()
    for name, p in list(model.named_parameters()):
        dim = split_dim(name)
        if dim is not None:
            owner = model.get_submodule(name.rpartition(".")[0])
            own = part_of(p.detach(), dim, rank, parts).clone()
            setattr(owner, name.rpartition(".")[2], nn.Parameter(own))
    config = model.config
    share = -(-config.vocab_size // parts)
    start = min(share * rank, config.vocab_size)
    model.wte = VocabParallelEmbedding(model.wte, start, group)  # type: ignore[assignment]
    model.vocab_shard = VocabShard(
        start,
        share,
        lambda x: _stacked(x, group),
        lambda x: _sum(x, group),
        lambda x: _joined(x, config.vocab_size, group),
    )
    for layer, block in enumerate(model.blocks):
        attn: Any = block.attn
        mlp: Any = block.mlp
        attn.qkv, mlp.fc = (
            ColumnParallelLinear(attn.qkv, group),
            ColumnParallelLinear(mlp.fc, group),
        )
        attn.proj, mlp.proj = (
            RowParallelLinear(attn.proj, group),
            RowParallelLinear(mlp.proj, group),
        )
        if config.dropout:
            _draw_own_masks(attn, layer, rank)


class ColumnParallelLinear(nn.Module):
    """A linear layer split by outputs: each rank computes some of them from the full input."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., outputs of this rank)."""
        return F.linear(_Same.apply(x, self.group), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A linear layer split by inputs: each rank has some of them, and the outputs are all-reduced,
    so that all ranks have the same.
    """

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., inputs of this rank) to (..., out); the bias is added once, after the sum."""
        y = _Added.apply(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabParallelEmbedding(nn.Module):
    """An embedding split by token id: each rank has the rows of some ids. The outputs are
    all-reduced; for each id, all ranks but one contribute zeros.
    """

    def __init__(self, embedding: nn.Embedding, start: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.start, self.group = embedding.weight, start, group

    def forward(self, ids: Tensor) -> Tensor:
        """Maps ids (B, T) int64 to (B, T, C)."""
        own = ids - self.start
        here = (own >= 0) & (own < len(self.weight))
        rows = F.embedding(own.where(here, 0), self.weight) * here[..., None]
        return _Added.apply(rows, self.group)


class _Same(torch.autograd.Function):
    """The identity; its backward pass all-reduces the gradient (f in fig. 3 of that paper)."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):  # type: ignore[no-untyped-def]
        return _sum(d, ctx.group), None


class _Added(torch.autograd.Function):
    """An all-reduce (sum); its backward pass is the identity (g in fig. 3 of that paper)."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        return _sum(x, group)

    @staticmethod
    def backward(ctx, d):  # type: ignore[no-untyped-def]
        return d, None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _stacked(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gathers x: (parts, *x.shape)."""
    found = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(found, x.contiguous(), group=group)
    return torch.stack(found)


def joined(part: Tensor, dim: int, size: int, group: dist.ProcessGroup) -> Tensor:
    """All-gathers the parts that `part_of` makes of a tensor: returns the full tensor on every
    rank. size: of the full tensor in dimension `dim`.
    """
    share = -(-size // group.size())
    padded = part.new_zeros(*part.shape[:dim], share, *part.shape[dim + 1 :])
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    found = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(found, padded, group=group)
    return torch.cat(found, dim).narrow(dim, 0, size)  # only the last ones have padding


def _joined(logits: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    if logits.requires_grad:
        raise RuntimeError("whole logits with gradients are not made under tensor parallelism")
    return joined(logits, logits.ndim - 1, size, group)


def _draw_own_masks(attn: nn.Module, layer: int, rank: int) -> None:
    """Gives the dropout inside attention another mask on each rank, since ranks have different
    heads. All other dropout acts on activations that are the same on all ranks, and so must its
    masks be.
    """
    saved = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        draw = generator_of(args[0].device)
        saved.append(draw.get_state())
        draw.manual_seed(hash_of(draw.initial_seed(), layer, rank))

    def after(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        generator_of(args[0].device).set_state(saved.pop())

    attn.register_forward_pre_hook(before)
    attn.register_forward_hook(after)
