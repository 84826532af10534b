"""Many processes: ranks, wrapping, sums over ranks. With train_ddp.py the only user of
torch.distributed.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from device import Device, pick_device
from model import GPTModel
from step import StepStats


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; alone, it is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among the processes of this machine


def ranks_of_torchrun() -> Ranks:
    """As torchrun says in its environment variables."""
    return Ranks(
        *(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    )


@contextmanager
def process_group(device_name: str, timeout_seconds: int) -> Iterator[Ranks]:
    """Connects the processes: NCCL between GPUs, Gloo otherwise; without torchrun there is nothing
    to connect.

    timeout_seconds: the longest that a rank waits for the others.
    """
    ranks = ranks_of_torchrun()
    if "RANK" not in os.environ:
        yield ranks
        return
    device = pick_device(device_name, local_rank=ranks.local_rank).torch
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=datetime.timedelta(seconds=timeout_seconds),
        device_id=device if cuda else None,
    )
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def wrap(model: GPTModel, device: Device) -> DistributedDataParallel:
    """The same model, with a backward pass that averages gradients over the ranks.

    All ranks start with the weights of rank 0. Buffers are constants here and never sent.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ids = [device.torch.index] if device.torch.type == "cuda" else None
    options: dict[str, Any] = {name: False}  # renamed in torch 2.13
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **options)


def sum_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, the same on each; alone, the tensor itself."""
    if not dist.is_initialized():
        return values
    there = "cuda" if dist.get_backend() == "nccl" else values.device  # NCCL adds on GPUs only
    total = values.to(there, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def summed(stats: StepStats) -> StepStats:
    """The stats of a step over all ranks; n_tokens, lr and grad_norm are already global."""
    return dataclasses.replace(stats, nll_sum=sum_ranks(stats.nll_sum))
