"""The process group of a run: how its ranks connect, agree, and fail together. How they find each
other is in parallel/rendezvous.py, how a model is spread over them in parallel/parallel_model.py.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from config import Settings, to_dict
from parallel.context import ParallelContext
from parallel.hang_guard import PATIENT_SECONDS, HangGuard, exchange_finished, may_take_long
from parallel.rendezvous import (
    Rendezvous,
    everyone,
    lost_ranks_are_one_line,
    rendezvous,
    store_of_launcher,
)
from runtime.device import pick_device, use_threads
from runtime.setting_fields import UserError
from settings.eval_and_generate import EvalSettings

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run as this process sees them: its own rank, how many there are, and what they
    do together. Without a launcher it is rank 0 of 1.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # the rank among the processes of this machine
    local_world: int = 1  # the number of processes on this machine
    on_cpu: dist.ProcessGroup | None = None  # all ranks, connected by Gloo on the CPU
    patient: dist.ProcessGroup | None = None  # the same, with a timeout for saves and the like
    host: str = ""

    def barrier(self) -> None:
        """Waits, for hours if need be, until all ranks have called it: rank 0 may be saving."""
        if self.patient is not None:
            dist.barrier(group=self.patient)

    @record_function("agree")
    def agree(self, *wishes: int) -> list[int]:
        """All-reduces each number to its maximum over the ranks, so that they all do the same after
        the same step. Runs on the CPU, so that it does not wait for a GPU.
        """
        most = torch.tensor(wishes)
        if self.on_cpu is not None:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.on_cpu)
        exchange_finished()
        return most.tolist()

    def each(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Calls work(*arguments) on every rank and returns this rank's result. If it raises
        UserError on some rank, all ranks raise the same UserError, which says on which. Some ranks
        may take hours longer than others.
        """
        result, mistake = None, ""
        try:
            with may_take_long():
                result = work(*arguments)
        except UserError as reason:
            mistake = str(reason)
        found = self._all((mistake, self.host))
        failed = {r: text for r, (text, _) in enumerate(found) if text}
        if len(set(failed.values())) == 1 and len(failed) == self.world:
            raise UserError(mistake, of_all=True)
        if failed:
            first = next(iter(failed))
            where = {found[r][1] for r in failed}
            if len(failed) == self.world or where & {host for text, host in found if not text}:
                hint = ""
            else:
                hint = f"; the others have it: do all machines see the same files as {where.pop()}?"
            raise UserError(f"rank {first} on {found[first][1]}: {failed[first]}{hint}", True)
        return result  # type: ignore[return-value]

    def from_first(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Calls work(*arguments) on rank 0 alone and returns its result, or raises its UserError,
        on all ranks, so that they go on alike where what they see could differ.
        """
        result, mistake = None, ""
        if self.rank == 0:
            try:
                with may_take_long():
                    result = work(*arguments)
            except UserError as reason:
                mistake = str(reason)
        result, mistake = self._all((result, mistake))[0]
        if mistake:
            raise UserError(mistake, of_all=True)
        return result

    def must_agree(self, mine: Mapping[str, object]) -> None:
        """Raises UserError on all ranks unless all have the same value under each name of `mine`.
        All ranks must call it together.
        """
        found = self._all({**mine, "host": self.host})
        wrong = [name for name in mine if any(f.get(name) != mine[name] for f in found)]
        wrong = sorted({n for names in self._all(wrong) for n in names})
        if wrong:
            each = "; ".join(
                f"{name}: "
                + ", ".join(f"{f.get(name)} on rank {r} ({f['host']})" for r, f in enumerate(found))
                for name in wrong[:3]
            )
            raise UserError(
                f"the ranks differ in {each}; do all see the same files, code and flags?", True
            )

    def _all(self, mine: Any) -> list[Any]:
        """All-gathers an object: the list of what each rank passes, ordered by rank."""
        found = [mine] * self.world
        if self.patient is not None:
            dist.all_gather_object(found, mine, group=self.patient)
        return found


class DataParallel(ParallelContext):
    """The data-parallel context of an evaluation: each rank has the unsharded model and works on
    data of its own.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.dp_rank, self.dp_size, self.world_size = ranks.rank, ranks.world, ranks.world

    def sum(self, values: Tensor) -> Tensor:
        return sum_ranks(values)


def identity(args: Settings, data: Mapping[str, Any], model: nn.Module) -> dict[str, object]:
    """Names and values that must be the same on all ranks when a run starts, for
    `Ranks.must_agree`: the version of torch, the settings, and hashes of the data and the initial
    weights.
    """
    bits = [int(p.detach().view(torch.int32).sum()) for p in model.parameters()]
    known = {k: v for part in ("train", "val") for k, v in data[part].items() if k != "source"}
    return {
        "torch": str(torch.__version__),
        **{f"--{k.replace('_', '-')}": v for k, v in to_dict(args).items()},
        "data": hashlib.sha256(repr(known).encode()).hexdigest()[:12],
        "initial weights": hashlib.sha256(repr(bits).encode()).hexdigest()[:12],
    }


@contextmanager
def process_group(
    args: Settings | EvalSettings, start: Rendezvous | None = None, alone: bool = False
) -> Iterator[Ranks]:
    """Context manager that connects the ranks by torch.distributed (NCCL between GPUs, Gloo
    otherwise) and yields the Ranks. Raises UserError if another rank is missing, or gets lost
    meanwhile.

    Of the settings it takes device, threads and timeout_seconds. start: what `rendezvous` returned;
    None calls it. Without a launcher there is nothing to connect, and a group of one process is
    made only with alone=True.
    """
    start = start or rendezvous()
    ranks = Ranks(start.rank, start.world, start.local_rank, start.local_world)
    if not start.launched and not alone:
        use_threads(args.threads, ranks.local_world)
        yield ranks
        return
    device = pick_device(args.device, local_rank=ranks.local_rank).torch_device
    cuda = device.type == "cuda"
    use_threads(args.threads, ranks.local_world)
    if cuda:
        refuse_shared_gpus(start, gpu_name(device))
    guard = _guard(start, args.timeout_seconds, device) if ranks.world > 1 else None
    with guard or nullcontext(), lost_ranks_are_one_line(guard.gone if guard else list):
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=datetime.timedelta(seconds=args.timeout_seconds),
            device_id=device if cuda else None,
            store=start.store,
            rank=ranks.rank,
            world_size=ranks.world,
        )
        on_cpu, patient = (
            dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))
            for seconds in (args.timeout_seconds, max(PATIENT_SECONDS, args.timeout_seconds))
        )
        host = socket.gethostname()
        yield dataclasses.replace(ranks, on_cpu=on_cpu, patient=patient, host=host)
    dist.destroy_process_group()


def gpu_name(device: torch.device) -> str:
    """A name that no other GPU of any machine has: the host and the UUID of the GPU."""
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def refuse_shared_gpus(start: Rendezvous, mine: str) -> None:
    """Raises UserError on all ranks if two of them use the same GPU, which NCCL can't do. All ranks
    call it together. mine: the `gpu_name` of this rank's GPU.
    """
    gpus = everyone(start.store, "gpu", mine, start.rank, start.world)
    for gpu in gpus:
        if gpus.count(gpu) > 1:
            shared = ", ".join(str(r) for r, other in enumerate(gpus) if other == gpu)
            raise UserError(
                f"ranks {shared} would all use GPU {gpu.split()[1]} of {gpu.split()[0]}; leave "
                "--device at auto, and start one process for each GPU",
                of_all=True,
            )


def _guard(start: Rendezvous, timeout_seconds: int, device: torch.device) -> HangGuard:
    with lost_ranks_are_one_line():
        mine = dist.PrefixStore(
            f"guard {start.name}", store_of_launcher()
        )  # a connection of its own
    return HangGuard(mine, start.rank, start.world, timeout_seconds, queue_of(device))


def queue_of(device: torch.device) -> Callable[[], bool]:
    """Returns a function that says whether the GPU still has work on the current stream of the
    thread that calls `queue_of`. Any thread may call that function. For a CPU it says False.
    """
    if device.type != "cuda":
        return lambda: False
    stream = torch.cuda.current_stream(device)

    def busy() -> bool:
        try:
            return not stream.query()
        except RuntimeError:  # a kernel failed; the main thread finds out at its next call
            return False

    return busy


def sum_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All-reduces a tensor: its sum over the ranks of a group (None = all ranks), on each of them.
    Without a process group, the tensor itself.
    """
    if not dist.is_initialized():
        return values
    there = "cuda" if dist.get_backend(group) == "nccl" else values.device  # NCCL adds on GPUs only
    total = values.to(there, copy=True)
    dist.all_reduce(total, group=group)
    exchange_finished()
    return total.to(values.device)
