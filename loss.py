"""Next-token cross-entropy in chunks: the (tokens, V) logits never exist at once, forward or
backward.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a label with this value is not scored
_CHUNK_LOGITS = 1 << 23  # logits that exist at once: 32 MiB in float32


def next_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy in nats, summed, and the number of scored tokens (Radford et al.
    2019, sec. 2).

    hidden (B, T, C) float; weight (V, C) float; labels (B, T) int64, -100 not scored. Position t
    predicts label t + 1. Returns two float32 scalars; the first has gradients for hidden and
    weight. Raises ValueError if the (B, T) parts differ.
    """
    hidden, labels = _shifted(hidden, labels)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total = _ChunkedSum.apply(hidden, weight, labels, _compute_dtype(hidden))
    else:
        total = _token_losses(hidden, weight, labels).sum()
    return total, (labels != IGNORE).sum().float()


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same loss per position, for evaluation: (B, T - 1) float32 nats, 0 where not scored,
    without gradients.
    """
    flat_hidden, flat_labels = _shifted(hidden, labels)
    return _token_losses(flat_hidden, weight, flat_labels).view(labels.shape[0], -1)


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


def workspace_bytes(vocab_size: int) -> float:
    """What one chunk takes: its logits, and as much again while they change."""
    return 8.0 * max(_CHUNK_LOGITS, 16 * vocab_size)


def _unused_columns(weight: Tensor, dtype: torch.dtype) -> int:
    """Logits added so that their number is a multiple of 128, as the fast kernels of GPUs want it;
    they are -inf, so nothing predicts them.
    """
    return -len(weight) % 128 if weight.is_cuda and dtype != torch.float32 else 0


def _chunk_rows(weight: Tensor) -> int:
    return max(16, _CHUNK_LOGITS // weight.shape[0])


def _token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows = _chunk_rows(weight)
    parts = []
    for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = F.linear(h, weight).float()  # (rows, V)
        parts.append(F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="none"))
    return torch.cat(parts)


class _ChunkedSum(torch.autograd.Function):
    """The summed loss whose forward pass also makes the gradients, so that no logit is kept or
    computed twice.

    The gradient of the sum with respect to a chunk's logits is softmax(logits) - onehot(label),
    known as soon as the logits are. The matrix products run in `dtype` (that of autocast); softmax
    and sums in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, dtype):  # type: ignore[no-untyped-def]
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        rows = _chunk_rows(weight)
        unused = _unused_columns(weight, dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            w = F.pad(w, (0, 0, 0, unused)) if unused else w
            if dtype == torch.float16:  # whose products of more rows could overflow
                rows = min(rows, 1024)
            for start in range(0, len(labels), rows):
                h, y = hidden[start : start + rows].to(dtype), labels[start : start + rows]
                scored = y != IGNORE
                target = y.where(scored, 0)[:, None]  # (rows, 1)
                logits = (h @ w.T).float()  # (rows, V), and the unused ones
                logits[:, len(weight) :] = -math.inf
                top, right = logits.amax(-1, keepdim=True), logits.gather(1, target)
                share = logits.sub_(top).exp_()  # of the softmax, once divided; in place
                z = share.sum(-1, keepdim=True)
                total += ((top + z.log() - right).squeeze(1) * scored).sum()
                once = scored[:, None].float()
                share.mul_(once / z).scatter_add_(1, target, -once)
                d_logits = share.to(dtype)
                if d_hidden is not None:
                    d_hidden[start : start + rows] = d_logits @ w
                if d_weight is not None:
                    if dtype == d_weight.dtype and not unused:
                        d_weight.addmm_(d_logits.T, h)
                    else:
                        d_weight += (d_logits.T @ h)[: len(weight)]
                del logits, share, d_logits  # before the next chunk takes as much
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx, d_total):  # type: ignore[no-untyped-def]
        # In place, since a second d_weight would be the largest tensor of the step. A second
        # backward pass, which would scale it again, is refused by autograd: the saved one changed.
        d_hidden, d_weight = (None if d is None else d.mul_(d_total) for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None
