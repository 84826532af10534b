"""Next-token cross-entropy in chunks: the (tokens, V) logits never exist at once, forward or
backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a label with this value is not scored
_CHUNK_LOGITS = 1 << 25  # logits that exist at once: 128 MiB in float32


def _itself(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class HeadPart:
    """Which rows of the head this process has, and how to learn of the others: all of them, where
    nothing else is said.
    """

    start: int = 0  # the token id of the first row
    most_rows: int = 0  # of any part, so that all cut the tokens into the same chunks; 0 = its own
    gather: Callable[[Tensor], Tensor] = lambda x: x[None]  # x of every part: (parts, *x.shape)
    add: Callable[[Tensor], Tensor] = _itself  # the sum of x over the parts
    join: Callable[[Tensor], Tensor] = _itself  # (..., V of this part) to (..., V); no gradients


WHOLE_HEAD = HeadPart()


def next_token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: HeadPart = WHOLE_HEAD
) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy in nats, summed, and the number of scored tokens (Radford et al.
    2019, sec. 2).

    hidden (B, T, C) float; weight (V, C) float, or the rows that part says; labels (B, T) int64,
    -100 not scored. Position t predicts label t + 1. Returns two float32 scalars; the first has
    gradients for hidden and weight. Raises ValueError if the (B, T) parts differ.
    """
    hidden, labels = _shifted(hidden, labels)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total = _ChunkedSum.apply(hidden, weight, labels, _compute_dtype(hidden), part)
    else:
        total = _token_losses(hidden, weight, labels, part).sum()
    return total, (labels != IGNORE).sum().float()


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: HeadPart = WHOLE_HEAD
) -> Tensor:
    """The same loss per position, for evaluation: (B, T - 1) float32 nats, 0 where not scored,
    without gradients.
    """
    flat_hidden, flat_labels = _shifted(hidden, labels)
    return _token_losses(flat_hidden, weight, flat_labels, part).view(labels.shape[0], -1)


def _shifted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that predict something and what they predict: (N, C) and (N,) for N = B (T - 1)."""
    if hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} must share (B, T)"
        )
    return hidden[:, :-1].reshape(-1, hidden.shape[-1]), labels[:, 1:].reshape(-1)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def workspace_bytes(vocab_size: int, half: bool) -> float:
    """What one chunk takes: its logits, and in 16 bits a second and a third time."""
    return (8.0 if half else 4.0) * max(_CHUNK_LOGITS, 16 * vocab_size)


def _unused_columns(weight: Tensor, dtype: torch.dtype) -> int:
    """Logits added so that their number is a multiple of 128, as the fast kernels of GPUs want it;
    they are -inf, so nothing predicts them.
    """
    return -len(weight) % 128 if weight.is_cuda and dtype != torch.float32 else 0


def _chunk_rows(weight: Tensor, part: HeadPart) -> int:
    return max(16, _CHUNK_LOGITS // (part.most_rows or len(weight)))


def _exponentials(logits: Tensor, size: int, y: Tensor, part: HeadPart) -> tuple[Tensor, ...]:
    """Of the float32 logits (rows, V), which become exp(logits - their largest) in place: (the loss
    of each row, what its exponentials have to be multiplied with to be probabilities, the columns
    of the labels, which rows have theirs here). V: size, that of this part, and unused columns.
    """
    own = y - part.start
    here = (own >= 0) & (own < size)
    column = own.where(here, 0)[:, None]  # (rows, 1)
    top, right = logits.amax(-1), logits.gather(1, column).squeeze(1) * here
    z = logits.sub_(top[:, None]).exp_().sum(-1)
    tops, zs, rights = part.gather(torch.stack((top, z, right))).unbind(1)  # (parts, rows) each
    highest = tops.amax(0)
    z = (zs * (tops - highest).exp()).sum(0)
    loss = highest + z.log() - rights.sum(0)
    return loss, (top - highest).exp() / z, column, here


def _room(rows: int, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Memory for the logits of a chunk on a CPU, each row at a multiple of 64 numbers: the product
    that writes them reached 184 GFLOP/s that way, and 140 with 50257 numbers from row to row.
    """
    if weight.device.type != "cpu" or dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    return weight.new_empty(rows, len(weight) + -len(weight) % 64)[:, : len(weight)]


def _logits(h: Tensor, weight: Tensor, room: Tensor | None) -> Tensor:
    """(rows, C) and (V, C) to float32 (rows, V)."""
    if room is None:
        return (h @ weight.T).float()
    return torch.mm(h, weight.T, out=room[: len(h)])


def _token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, part: HeadPart) -> Tensor:
    rows, dtype = _chunk_rows(weight, part), _compute_dtype(hidden)
    room = _room(min(rows, len(labels)), weight, dtype)
    losses = []
    for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
        loss = _exponentials(_logits(h, weight, room), len(weight), y, part)[0]
        losses.append(loss.masked_fill(y == IGNORE, 0))
    return torch.cat(losses)


class _ChunkedSum(torch.autograd.Function):
    """The summed loss whose forward pass also makes the gradients, so that no logit is kept or
    computed twice.

    The gradient of the sum with respect to a chunk's logits is softmax(logits) - onehot(label),
    known as soon as the logits are. The matrix products run in `dtype` (that of autocast); softmax
    and sums in float32. Where several processes have parts of the head, each makes the logits of
    its part, and they exchange three numbers per token.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, dtype, part):  # type: ignore[no-untyped-def]
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = _chunk_rows(weight, part)
        unused = _unused_columns(weight, dtype)
        in_place = dtype == weight.dtype and not unused and len(labels) > 0
        new = torch.empty_like if in_place else torch.zeros_like
        d_weight = new(weight) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            w = F.pad(w, (0, 0, 0, unused)) if unused else w
            if dtype == torch.float16:  # whose products of more rows could overflow
                rows = min(rows, 1024)
            room = _room(min(rows, len(labels)), w, dtype)
            for start in range(0, len(labels), rows):
                h, y = hidden[start : start + rows].to(dtype), labels[start : start + rows]
                scored = y != IGNORE
                logits = _logits(h, w, room)  # (rows, V), and the unused ones
                logits[:, len(weight) :] = -math.inf
                loss, scale, column, here = _exponentials(logits, len(weight), y, part)
                total += (loss * scored).sum()
                logits.mul_((scale * scored)[:, None])  # exponentials become probabilities
                logits.scatter_add_(1, column, -(scored & here).float()[:, None])
                d_logits = logits.to(dtype)
                if d_hidden is not None:
                    d_hidden[start : start + rows] = d_logits @ w
                if d_weight is not None:
                    if in_place:  # the first chunk's product reads nothing of it
                        d_weight.addmm_(d_logits.T, h, beta=1 if start else 0)
                    else:
                        d_weight += (d_logits.T @ h)[: len(weight)]
                del logits, d_logits  # before the next chunk takes as much
            if d_hidden is not None:
                d_hidden = part.add(d_hidden)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx, d_total):  # type: ignore[no-untyped-def]
        # In place, since a second d_weight would be the largest tensor of the step. A second
        # backward pass, which would scale it again, is refused by autograd: the saved one changed.
        d_hidden, d_weight = (None if d is None else d.mul_(d_total) for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None
