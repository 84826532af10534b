"""Many processes: ranks, wrapping, sums over ranks. With train_ddp.py the only user of
torch.distributed.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from config import Settings, UserError
from device import Device, pick_device
from hang import HangGuard
from model import GPTModel
from step import StepStats, rehearse
from watch import end_with_parent

_PATIENT_SECONDS = 7200  # that a save may take


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; alone, it is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_world: int = 1  # how many those are
    on_cpu: dist.ProcessGroup | None = None  # the same ranks, connected over the CPU
    patient: dist.ProcessGroup | None = None  # and once more, for waiting longer than for a step

    def meet(self) -> None:
        """Waits until all ranks are here, such as after rank 0 has saved, which may take
        minutes.
        """
        if self.patient is not None:
            dist.barrier(group=self.patient)

    def agree(self, *wishes: int) -> list[int]:
        """The largest of each wish over the ranks, so that they all do the same after the same
        step. Goes over the CPU: a GPU is not waited for.
        """
        most = torch.tensor(wishes)
        if self.on_cpu is not None:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.on_cpu)
        return most.tolist()

    def must_agree(self, what: str, mine: object) -> None:
        """Raises UserError on all ranks unless they have the same."""
        if self.on_cpu is None:
            return
        found: list[object] = [None] * self.world
        dist.all_gather_object(found, mine, group=self.on_cpu)
        if any(other != found[0] for other in found):
            each = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
            raise UserError(f"ranks differ in {what}: {each}; do they all see the same files?")


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that died (--max-restarts)."""
    return _start_number() > 0


def _start_number() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def ranks_of_torchrun() -> Ranks:
    """As torchrun says in its environment variables."""
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    rank, world, local, here = (int(os.environ.get(name, default)) for name, default in names)
    return Ranks(rank, world, local, here)


@contextmanager
def process_group(device_name: str, timeout_seconds: int, alone: bool = False) -> Iterator[Ranks]:
    """Connects the processes: NCCL between GPUs, Gloo otherwise. Raises UserError where another one
    is not there, or gets lost.

    timeout_seconds: the longest that a rank waits for the others. Without torchrun there is nothing
    to connect, and a group of one is made only if asked for with alone.
    """
    ranks = ranks_of_torchrun()
    started = "RANK" in os.environ
    if not started and not alone:
        yield ranks
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    device = pick_device(device_name, local_rank=ranks.local_rank).torch
    cuda = device.type == "cuda"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store: dist.Store = dist.HashStore()
        if started:
            store, _, _ = next(rendezvous("env://", timeout=timeout))
            # Ranks that torchrun started again would find addresses of those that died.
            store = dist.PrefixStore(f"start{_start_number()}", store)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timeout,
            device_id=device if cuda else None,
            store=store,
            rank=ranks.rank,
            world_size=ranks.world,
        )
        on_cpu, patient = (
            dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))
            for seconds in (timeout_seconds, _PATIENT_SECONDS)
        )
        guard = _guard(ranks, timeout_seconds) if ranks.world > 1 else None
        yield dataclasses.replace(ranks, on_cpu=on_cpu, patient=patient)
        if guard is not None:
            guard.end()
    except (dist.DistError, RuntimeError, ValueError) as reason:
        cause = " ".join(str(reason).split())
        if isinstance(reason, dist.DistError) or "gloo" in cause or "rendezvous" in cause:
            raise UserError(
                f"no connection to the other ranks ({cause[:200]}); where one of them failed, its "
                "own message says why"
            ) from reason
        raise
    dist.destroy_process_group()


def _guard(ranks: Ranks, timeout_seconds: int) -> HangGuard:
    where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = datetime.timedelta(seconds=10)
    store = dist.TCPStore(where, port, is_master=False, timeout=wait)  # used by its thread alone
    mine = dist.PrefixStore(f"guard{_start_number()}", store)
    return HangGuard(mine, ranks.rank, ranks.world, timeout_seconds)


def wrap(model: GPTModel, device: Device, args: Settings) -> DistributedDataParallel:
    """The same model, with a backward pass that averages gradients over the ranks.

    All ranks start with the weights of rank 0. Buffers are constants here and never sent.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ids = [device.torch.index] if device.torch.type == "cuda" else None
    options: dict[str, Any] = {name: False}  # renamed in torch 2.13
    ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **options)
    # After its first backward pass DDP sorts gradients into other buckets, in which three or more
    # ranks add them in another order. So that a resumed run adds as the one that did not stop, that
    # first pass belongs to no step: here it is, on zeros, with its gradients thrown away.
    rehearse(ddp, args, device)
    return ddp


def sum_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, the same on each; alone, the tensor itself."""
    if not dist.is_initialized():
        return values
    there = "cuda" if dist.get_backend() == "nccl" else values.device  # NCCL adds on GPUs only
    total = values.to(there, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def divide(work: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """work(stack), for work that treats each of stack's (N, m, n) alone: every rank does N / world
    of them, and all get all.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(stack) // world)
    mine = F.pad(stack, (0, 0, 0, 0, 0, share * world - len(stack)))[share * rank :][:share]
    part = work(mine).contiguous()
    whole = part.new_empty(share * world, *part.shape[1:])
    dist.all_gather_into_tensor(whole, part)
    return whole[: len(stack)]


def summed(stats: StepStats) -> StepStats:
    """The stats of a step over all ranks; n_tokens, lr and grad_norm are already global."""
    return dataclasses.replace(stats, nll_sum=sum_ranks(stats.nll_sum))
