"""Next-token cross-entropy in chunks of tokens, so that the (tokens, V) logits never exist all at
once, neither in the forward nor in the backward pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a label with this value is not scored
_CPU_LOGITS = 1 << 25  # logits of one chunk: 128 MiB in float32
_GPU_LOGITS = 1 << 28  # enough to fill an H100 with one product: 5,336 rows of GPT-2's logits
_GPU_SHARE = 256  # bytes of a GPU's memory for each logit of a chunk, if that is the tighter limit


def _itself(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class VocabShard:
    """The rows of the head (a range of token ids) that this process holds under tensor parallelism,
    and how results are combined with those of the other parts. By default it holds all rows.
    """

    start: int = 0  # the token id of the first row
    most_rows: int = 0  # rows of the largest part, which sets the chunks of all; 0 = its own
    gather: Callable[[Tensor], Tensor] = lambda x: x[None]  # all-gather: (parts, *x.shape)
    add: Callable[[Tensor], Tensor] = _itself  # all-reduce: the sum over the parts
    join: Callable[[Tensor], Tensor] = _itself  # (..., V of this part) to (..., V); no gradients


WHOLE_VOCAB = VocabShard()


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    part: VocabShard = WHOLE_VOCAB,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """The summed next-token cross-entropy in nats and the number of scored tokens, two float32
    scalars (Radford et al. 2019, sec. 2). The first has gradients for hidden and weight.

    hidden (B, T, C) float; weight (V, C) float, or this process's rows of it, which `part`
    describes; labels (B, T) int64, -100 is not scored. Position t predicts label t + 1. fused: the
    operations on each chunk of logits are compiled to one kernel, which reads and writes the chunk
    fewer times; not with a part of the head. Raises ValueError if hidden and labels differ in
    (B, T).
    """
    hidden, labels = _shifted(hidden, labels)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total = _ChunkedSum.apply(hidden, weight, labels, compute_dtype(hidden), part, fused)
    else:
        total = _token_losses(hidden, weight, labels, part, fused).sum()
    return total, (labels != IGNORE).sum().float()


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    part: VocabShard = WHOLE_VOCAB,
    fused: bool = False,
) -> Tensor:
    """The next-token cross-entropy of each position, for evaluation: (B, T - 1) float32 nats, 0
    where not scored, without gradients. Arguments and errors are those of `next_token_loss`.
    """
    flat_hidden, flat_labels = _shifted(hidden, labels)
    losses = _token_losses(flat_hidden, weight, flat_labels, part, fused)
    return losses.view(labels.shape)[:, :-1]


def _shifted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flattens the hidden states and shifts the labels, so that row i of the first predicts entry i
    of the second: (N, C) and (N,) for N = B T. The last position of a sequence gets the label -100,
    which costs less than copying all others would.
    """
    if hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} must share (B, T)"
        )
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return hidden.reshape(-1, hidden.shape[-1]), following.reshape(-1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which a matrix product of x is computed here: that of autocast, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def chunk_logits(device: torch.device) -> int:
    """The largest number of logits that exist at once on a device. It depends on the kind of device
    and not on the memory that is free at the moment: other chunks would add gradients in another
    order, and a resumed run must add them like one that never stopped.
    """
    if device.type != "cuda":
        return _CPU_LOGITS
    return min(_GPU_LOGITS, torch.cuda.get_device_properties(device).total_memory // _GPU_SHARE)


def workspace_bytes(vocab_size: int, half: bool, device: torch.device) -> float:
    """The memory in bytes for one chunk: its logits in 32 bits, and with `half` (fp16 or bf16
    autocast) two more copies in 16 bits.
    """
    return (8.0 if half else 4.0) * max(chunk_logits(device), 16 * vocab_size)


def _chunk_rows(n: int, weight: Tensor, part: VocabShard) -> int:
    """The number of rows (tokens) of a chunk, out of n in all. If possible it divides n, so that
    all chunks have the same shape and none must be compiled again.
    """
    most = max(16, chunk_logits(weight.device) // (part.most_rows or len(weight)))
    fewest = math.ceil(n / most)
    even = next((k for k in range(fewest, 2 * fewest + 1) if k and n % k == 0), 0)
    return n // even if even else most - most % 128 or most


def _unused_columns(weight: Tensor, dtype: torch.dtype) -> int:
    """The number of logits to add so that V becomes a multiple of 128, as the fast 16-bit kernels
    of GPUs want it; 0 on a CPU or in float32. No label refers to these logits.
    """
    return -len(weight) % 128 if weight.is_cuda and dtype != torch.float32 else 0


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head (V, C) in dtype, with a row of zeros added for each unused column (see
    `_unused_columns`); `weight` itself if nothing changes.
    """
    unused = _unused_columns(weight, dtype)
    if not unused:
        return weight.to(dtype)
    padded = weight.new_empty(len(weight) + unused, weight.shape[1], dtype=dtype)
    padded[: len(weight)] = weight
    padded[len(weight) :] = 0
    return padded


def _room(rows: int, w: Tensor) -> Tensor:
    """An uninitialised buffer for the logits of a chunk: (rows, V). On a CPU its row stride is a
    multiple of 64: the matrix product that fills it reached 184 GFLOP/s that way, and 140 with a
    stride of 50257.
    """
    return w.new_empty(rows, len(w) + (-len(w) % 64 if w.device.type == "cpu" else 0))[:, : len(w)]


def _losses_and_gradients(logits: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For each row of logits (rows, V), of which the first `size` columns count: its cross-entropy,
    (rows,) float32, and the gradient of that, softmax - onehot(label), which replaces the logits;
    both are 0 where labels (rows,) is -100. It is written to be compiled to one kernel.
    """
    column, scored = torch.arange(logits.shape[1], device=logits.device), labels != IGNORE
    x = logits.float().where(column < size, -math.inf)
    top = x.amax(-1, keepdim=True)
    lse = top + (x - top).exp().sum(-1, keepdim=True).log()  # in this form, x is read once for both
    is_label = column == labels[:, None]
    losses = (lse.squeeze(1) - x.where(is_label, 0).sum(-1)).where(scored, 0)
    gradients = ((x - lse).exp() - is_label.float()).where(scored[:, None], 0)
    return losses, logits.copy_(gradients)


def _losses(logits: Tensor, labels: Tensor, size: int) -> Tensor:
    """The first result of `_losses_and_gradients`, without the second."""
    return F.cross_entropy(logits[:, :size].float(), labels, reduction="none")


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _chunk_losses(
    logits: Tensor, own: Tensor, size: int, part: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, logsumexp over all parts, largest logit of this part), each (rows,) float32.
    It overwrites the float32 logits (rows, V) with exp(logits - largest): one pass less. own
    (rows,) int64: the column of the label, which may be another part's.
    """
    here = (own >= 0) & (own < size)
    label = logits.gather(1, own.where(here, 0)[:, None]).squeeze(1) * here
    logits[:, size:] = -math.inf
    top = logits.amax(-1)
    sums = torch.stack((top, logits.sub_(top[:, None]).exp_().sum(-1), label))
    tops, zs, label = part.gather(sums).unbind(1)  # (parts, rows) each
    highest = tops.amax(0)
    lse = highest + (zs * (tops - highest).exp()).sum(0).log()
    return lse - label.sum(0), lse, top


def _eager_losses_and_gradients(
    logits: Tensor, labels: Tensor, size: int, part: VocabShard
) -> tuple[Tensor, Tensor]:
    """The results of `_losses_and_gradients`, not compiled, and for logits of the part of the head
    that `part` describes. The gradients replace the logits if those are float32.
    """
    own, scored = labels - part.start, (labels != IGNORE).float()
    x = logits.float()
    loss, lse, top = _chunk_losses(x, own, size, part)
    x.mul_(((top - lse).exp() * scored)[:, None])  # probabilities now
    here = (own >= 0) & (own < size)
    x.scatter_add_(1, own.where(here, 0)[:, None], -(scored * here)[:, None])
    return loss * scored, x.to(logits.dtype)


def _token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabShard, fused: bool
) -> Tensor:
    dtype = compute_dtype(hidden)
    rows, losses = _chunk_rows(len(labels), weight, part), []
    with torch.autocast(hidden.device.type, enabled=False):
        w = _padded(weight, dtype)
        room = _room(rows, w)
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
            logits = torch.mm(h.to(dtype), w.T, out=room[: len(y)])
            if fused and part is WHOLE_VOCAB:
                loss = _compiled(_losses)(logits, y, len(weight))
            else:
                loss = _chunk_losses(logits.float(), y - part.start, len(weight), part)[0]
            losses.append(loss.masked_fill(y == IGNORE, 0))
    return torch.cat(losses)


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """Computes out = a @ b, or with `add` out += a @ b. Where a and b have 16 bits and out has 32,
    CUDA accumulates in 32 if `adds_wide` says that it can.
    """
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif adds_wide(out):
        torch.addmm(out, a, b, out.dtype, beta=int(add), out=out)
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


def adds_wide(out: Tensor) -> bool:
    """Whether torch.addmm can multiply fp16 or bf16 matrices and add to the float32 tensor `out`.
    CUDA can, since torch 2.8.
    """
    return out.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out")


class _ChunkedSum(torch.autograd.Function):
    """The summed loss as an autograd function whose forward pass also computes the gradients, so
    that no logit is saved or computed twice.

    The gradient of the sum with respect to a chunk's logits is softmax(logits) - onehot(label),
    known as soon as the logits are. The matrix products run in `dtype` (that of autocast); softmax
    and sums in float32. Where several processes hold parts of the head, each computes the logits of
    its part; they exchange three numbers per token, and sum their gradients of `hidden`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, dtype, part, fused):  # type: ignore[no-untyped-def]
        total, size = torch.zeros((), device=hidden.device), len(weight)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = _chunk_rows(len(labels), weight, part)
        if dtype == torch.float16 and not adds_wide(weight):
            rows = min(rows, 1024)  # products of more rows could overflow
        with torch.autocast(hidden.device.type, enabled=False):
            w = _padded(weight, dtype)
            d_w = torch.empty_like(w, dtype=weight.dtype) if ctx.needs_input_grad[1] else None
            room = _room(rows, w)
            for start in range(0, len(labels), rows):
                h, y = hidden[start : start + rows].to(dtype), labels[start : start + rows]
                logits = torch.mm(h, w.T, out=room[: len(y)])  # (rows, V), and the unused ones
                if fused and part is WHOLE_VOCAB:
                    loss, d_logits = _compiled(_losses_and_gradients)(logits, y, size)
                else:
                    loss, d_logits = _eager_losses_and_gradients(logits, y, size, part)
                total += loss.sum()
                if d_hidden is not None:
                    _multiply(d_hidden[start : start + rows], d_logits, w)
                if d_w is not None:
                    _multiply(d_w, d_logits.T, h, add=start > 0)
                del logits, d_logits  # before the next chunk takes as much
            if d_hidden is not None:
                d_hidden = part.add(d_hidden)
        if d_w is not None:  # without its unused rows; of a view, autograd would add to a copy
            d_w.resize_(size, d_w.shape[1])
        ctx.save_for_backward(d_hidden, d_w)
        return total

    @staticmethod
    def backward(ctx, d_total):  # type: ignore[no-untyped-def]
        # In place, since a second d_weight would be the largest tensor of the step. A second
        # backward pass, which would scale it again, is refused by autograd: the saved one changed.
        d_hidden, d_weight = (None if d is None else d.mul_(d_total) for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None
