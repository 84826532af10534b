"""How long an optimizer step of a run would take, by a few that are thrown away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from config import Settings
from corpus.token_dataset import TokenDataset
from model import GPTModel
from parallel.context import SINGLE_PROCESS, ParallelContext
from parallel.process_group import Ranks
from runtime.device import Device
from training.activation_recompute import recompute_activations
from training.memory import fit_micro_batch
from training.optimizers import make_optimizer
from training.step import RunState, train_step


def seconds_of_step(
    args: Settings,
    train: TokenDataset,
    device: Device,
    ranks: Ranks,
    spread: Callable[..., Any] | None,
    limit: float,
) -> float:
    """The seconds of an uncompiled step with these settings, the mean of at least three, and of as
    many as fit into `limit` seconds. All ranks call it together. train: the training data, opened
    with any seq_len; spread: ParallelModel, or None for a single process.
    """
    args = fit_micro_batch(args, device, ranks.local_world, ranks.agree)
    model, state = GPTModel(args.model, seed=args.seed), RunState.fresh(device)
    parallel: Any = spread(model, args, device, ranks) if spread else SINGLE_PROCESS
    recompute_activations(model)
    if not spread:
        model.to(device.torch_device)
    optimizer = make_optimizer(model, args, parallel)
    net = parallel.net if spread else model

    def steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            batch = _batch(train, state.step, args, parallel)
            stats = train_step(net, optimizer, batch, args, state, device, parallel)
        float(stats.grad_norm)  # waits for a GPU
        return (time.perf_counter() - start) / count

    steps(2)  # the first ones take memory
    (count,) = ranks.agree(max(3, min(500, int(limit / steps(1)))))
    return steps(count)


def _batch(train: TokenDataset, step: int, args: Settings, parallel: ParallelContext) -> Tensor:
    """Sequences of args.seq_len training tokens, as many as a rank has in a step, cut from the
    windows of the data, whatever their length: (rows, T) int64.
    """
    rows, T = args.global_batch_size // parallel.dp_size, args.seq_len
    each = -(-rows * T // train.seq_len)
    ids = train.samples((step * parallel.dp_size + parallel.dp_rank) * each, each, 0)
    return ids.flatten()[: rows * T].view(rows, T)
