"""The loss of a model on validation data.

The number of processes and the batch size change neither which tokens are scored nor, beyond
float32 rounding inside the model, any of the results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Settings
from corpus.token_dataset import TokenDataset
from corpus.tokenizer import Tokenizer
from loss import IGNORE
from model import GPTModel
from parallel.context import SINGLE_PROCESS, ParallelContext
from runtime.console import progress
from runtime.device import Device
from training.memory import num_numbers

_LONG_ON_CPU = 1e12  # tokens x parameters; with 2 FLOP each, 20 s at 100 GFLOP/s


@dataclass(frozen=True)
class EvalResult:
    """The result of one evaluation. bpb is None where the text behind the tokens is not known."""

    loss: float  # nats per token
    loss_se: float  # its standard error
    ppl: float  # perplexity, exp(loss); inf where that overflows
    bpb: float | None  # bits per byte of text
    tokens: int  # the number of scored tokens


@torch.no_grad()
def evaluate(
    model: GPTModel,
    val: TokenDataset,
    batch_size: int,
    device: Device,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> EvalResult:
    """Loss of the model on every token of `val` but the first, each scored once, over all ranks
    together.

    parallel: the data-parallel context, which says which windows are this rank's, and sums over
    ranks. The standard error takes windows as the independent samples, since tokens of one window
    are not (ratio estimator: Cochran 1977, sec. 2.11). The model's mode is left as it was.
    """
    was_training = model.training
    model.eval()
    on, sums = device.torch_device, torch.zeros(7, dtype=torch.float64)
    windows = math.ceil((val.num_tokens - 1) / (val.seq_len - 1))
    batches = val.batches(batch_size, parallel.dp_rank, parallel.dp_size)
    total = math.ceil(windows / (parallel.dp_size * batch_size))
    for ids, labels in progress(batches, "evaluating", total, quiet=parallel.dp_rank > 0):
        with device.autocast():
            nll = model(ids.to(on), None, labels.to(on), "none", return_logits=False)[1]
        scored = labels[:, 1:] != IGNORE
        s, n = nll.cpu().double().sum(1), scored.sum(1).double()  # (B,) nats, tokens of each window
        sums[:6] += torch.stack((s, n, s * s, s * n, n * n, (n > 0).double())).sum(1)
        sums[6] += _bytes_of(labels[:, 1:][scored], val.tokenizer)
    model.train(was_training)
    nll, tokens, ss, sn, nn, windows, n_bytes = parallel.sum(sums).tolist()
    loss = nll / tokens
    spread = max(ss - 2 * loss * sn + loss * loss * nn, 0.0)  # sum over windows of (s - loss n)^2
    return EvalResult(
        loss=loss,
        loss_se=math.sqrt(spread * windows / max(windows - 1, 1)) / tokens,
        ppl=perplexity(loss),
        bpb=nll / math.log(2) / n_bytes if n_bytes else None,
        tokens=int(tokens),
    )


def starts_with_evaluation(step: int, val: TokenDataset, args: Settings, device: Device) -> bool:
    """Whether a run evaluates before its next update. A resumed run (step > 0) does not; a new one
    follows eval_at_start. With "auto" it does, except on a CPU where validation tokens x parameters
    exceed 1e12. No time is measured, so all ranks, and the same run tomorrow, decide alike.
    """
    if step or args.eval_at_start != "auto":
        return step == 0 and args.eval_at_start == "on"
    work = val.num_tokens * num_numbers(args.model)[0]
    return device.torch_device.type != "cpu" or work <= _LONG_ON_CPU


def _bytes_of(ids: Tensor, tokenizer: Tokenizer | None) -> int:
    """The number of bytes of text that these ids stand for; 0 without a tokenizer."""
    if tokenizer is None:
        return 0
    table = tokenizer.token_bytes
    return int(table[ids.numpy()[ids.numpy() < len(table)]].sum())


def perplexity(loss: float) -> float:
    """exp(loss); inf where a float64 cannot hold it, and NaN for NaN."""
    return math.exp(loss) if loss < 709 else math.inf if loss == loss else math.nan
