"""Spreads one model over many processes: DDP, FSDP, tensor parallelism, or the last two together.

Parameters and optimizer state are converted here between the unsharded tensors, which checkpoints
hold, and the part of each rank. The processes themselves are in process_group.py.
"""

from __future__ import annotations

import datetime
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from config import Settings
from model import GPTModel
from parallel.context import ParallelContext, has_sparse_gradients, local_part
from parallel.process_group import Ranks, sum_ranks
from parallel.tensor_parallel import joined, part_of, split_dim, split_model
from runtime.device import Device, free_memory_of


class ParallelModel(ParallelContext):
    """The data-parallel context of a model that is spread over all ranks. Call `net` in place of
    the model.

    dp_rank, dp_size: the data-parallel rank, and how many of them there are. The ranks of a
    tensor-parallel group, which share each layer, have the same dp_rank and see the same data.
    """

    def __init__(self, model: GPTModel, args: Settings, device: Device, ranks: Ranks) -> None:
        """Moves the model to the device and shards it in place, as args say, so that only this
        rank's part is left. All ranks must pass the same model and args.
        """
        self.model, self.args, self.device = model, args, device
        self.tp_size = args.tensor_parallel_size
        self.sharded = args.parallel == "fsdp"
        self.world_size, self.local_world = ranks.world, ranks.local_world
        self.dp_rank, self.dp_size = ranks.rank // self.tp_size, ranks.world // self.tp_size
        # Ranks that share layers talk most, so they are neighbours, on one machine where they fit.
        grid = torch.arange(ranks.world).view(self.dp_size, self.tp_size)
        wait = datetime.timedelta(seconds=args.timeout_seconds)
        self.dp_group, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), wait)
        self.tp_group, _ = dist.new_subgroups_by_enumeration(grid.tolist(), wait)
        self.mesh = DeviceMesh.from_group(self.dp_group, device.torch_device.type)
        self.sparse_gradients = has_sparse_gradients(args, device, self.dp_size)
        if self.tp_size > 1:
            split_model(model, self.tp_group)
        if self.sharded:
            shard(model, self.mesh, device)
        else:
            model.to(device.torch_device)

    @functools.cached_property
    def net(self) -> nn.Module:
        """The module to call in training; its backward pass averages gradients over the
        data-parallel ranks. Under FSDP, or with one data-parallel rank, it is the model itself,
        else a DDP wrapper.

        The wrapper is made at the first access, which runs a forward and a backward pass:
        activation recomputation and the optimizer, which says what gradients are sparse, are set
        up before that.
        """
        if self.sharded or self.dp_size == 1:
            return self.model
        return replicate(self.model, self.dp_group, self.args, self.device)

    def no_sync(self) -> AbstractContextManager[object]:
        if isinstance(self.net, DistributedDataParallel):
            return self.net.no_sync()
        return _unsynced(self.net) if isinstance(self.net, FSDPModule) else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        return sum_ranks(values, self.dp_group)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clips by the norm of the full gradient over all ranks, in which each element counts once,
        also if several ranks hold it.
        """
        if self.sharded_state is None:
            return super().clip(parameters, max_norm)
        grads: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                grads[self.tp_size > 1 and split_dim(name) is not None].append(local_part(p.grad))
        squares = torch.stack([_sum_of_squares(grads[k], self.device) for k in (True, False)])
        if self.sharded:
            squares = self.sum(squares)
        in_parts = sum_ranks(squares[0], self.tp_group) if self.tp_size > 1 else squares[0]
        norm = (in_parts + squares[1]).sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads[True] + grads[False], scale)
        return norm

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keeps the parameters that a forward pass gathers, if all ranks have memory for them."""
        groups = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        if groups and self._all_have_room():
            for group in groups:
                group.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for group in groups:
                outermost = id(group) == id(self.model)  # FSDP keeps it gathered by itself
                group.set_reshard_after_forward(not outermost, recurse=False)
                group.reshard()

    def _all_have_room(self) -> bool:
        """Whether each rank has memory for the unsharded parameters, and as much again for the rest
        of a forward pass. All ranks must call it together.
        """
        needed = 2.0 * self.device.dtype.itemsize * self.model.num_parameters() / self.tp_size
        each = self.local_world if self.device.torch_device.type == "cpu" else 1
        short = torch.tensor(float(free_memory_of(self.device) / each < needed))
        return not self.sum(short)

    def reshard(self) -> None:
        """Frees the outermost parameter group, which FSDP leaves gathered after an evaluation."""
        if isinstance(self.net, FSDPModule):
            self.net.reshard()

    @property
    def sharded_state(self) -> ParallelModel | None:  # type: ignore[override]
        """This object if each rank holds only a part of the model, None if each holds all of it."""
        return self if self.sharded or self.tp_size > 1 else None

    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """All-gathers the parameter called name, or a tensor of its optimizer state; a tensor that
        is not sharded is returned as it is. All ranks must call it together.
        """
        return self._whole(name, tensor, 0) if tensor.ndim else tensor

    def part(self, name: str, whole: Tensor) -> Tensor:
        """The inverse of `gather`: this rank's part of an unsharded tensor, on the rank's device,
        and under FSDP as a DTensor like the parameter.
        """
        own = self._own(name, whole, 0) if whole.ndim else whole
        own = own.to(self.device.torch_device, copy=True)
        if not (self.sharded and whole.ndim):
            return own
        p = self.model.get_parameter(name)
        return DTensor.from_local(
            own, self.mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride()
        )

    def distribute(self, function: Callable[[Tensor], Tensor], name: str, stack: Tensor) -> Tensor:
        """Returns function(stack), for a function that treats each matrix of stack (N, m, n)
        independently but needs it unsharded: each rank computes N / world_size of them. stack: this
        rank's parts of N parameters that are sharded like the one called name; the result has the
        same parts.
        """
        whole = self._whole(name, stack, 1)
        world, rank = dist.get_world_size(), dist.get_rank()
        everyone = dist.distributed_c10d._get_default_group()
        done = joined(function(part_of(whole, 0, rank, world)), 0, len(whole), everyone)
        return self._own(name, done, 1)

    def _whole(self, name: str, tensor: Tensor, offset: int) -> Tensor:
        """The unsharded tensor. offset: the number of dimensions that `tensor` has before those of
        the parameter: 1 for a stack of them, else 0.
        """
        shape, dim = self.model.shapes[name], split_dim(name) if self.tp_size > 1 else None
        tensor = local_part(tensor)
        if self.sharded:
            rows = shape[0]
            if dim == 0:
                rows = len(part_of(torch.empty(rows), 0, self.tp_group.rank(), self.tp_size))
            tensor = joined(tensor, offset, rows, self.dp_group)
        if dim is not None:
            tensor = joined(tensor, offset + dim, shape[dim], self.tp_group)
        return tensor

    def _own(self, name: str, whole: Tensor, offset: int) -> Tensor:
        dim = split_dim(name) if self.tp_size > 1 else None
        if dim is not None:
            whole = part_of(whole, offset + dim, self.tp_group.rank(), self.tp_size)
        return part_of(whole, offset, self.dp_rank, self.dp_size) if self.sharded else whole


def replicate(
    model: GPTModel, group: dist.ProcessGroup, args: Settings, device: Device
) -> DistributedDataParallel:
    """Wraps the model in DDP, so that its backward pass averages gradients over the ranks of the
    group. Buffers are constants in this model, so DDP does not broadcast them.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}  # renamed in torch 2.13
    ids = [device.torch_device.index] if device.torch_device.type == "cuda" else None
    options |= {"device_ids": ids, "process_group": group}
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
    # After its first backward pass DDP sorts gradients into other buckets, in which three or more
    # ranks add them in another order. So that a resumed run adds as the one that did not stop, that
    # first pass belongs to no step: here it is, on zeros, with its gradients thrown away.
    warmup_pass(ddp, args, device)
    return ddp


def warmup_pass(model: nn.Module, args: Settings, device: Device) -> None:
    """Runs a forward and a backward pass on zeros, outside of any step, and drops the gradients."""
    zeros = torch.zeros(
        args.batch_size, args.seq_len, dtype=torch.int64, device=device.torch_device
    )
    try:
        with device.autocast():
            loss = model(zeros, labels=zeros, reduction="sum", return_logits=False)[1]
        loss.backward()
    finally:
        model.zero_grad(set_to_none=True)


def shard(model: GPTModel, mesh: DeviceMesh, device: Device) -> None:
    """Applies FSDP (`fully_shard`; Zhao et al. 2023) in place: of each parameter, its gradient and
    its moments a rank keeps some rows. The matrices of a block are gathered while it is computed,
    in the precision of the computation; norms and embeddings stay gathered in float32 until the
    step is done, as autocast has them without sharding. Gradients are added in float32.
    """
    # The warning is about in-place changes of a wrapped module's output; model.py makes none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(device.precision)
    policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    groups: list[Any] = []
    for block in model.blocks:
        together: Any = [block.attn, block.mlp]
        groups += fully_shard(together, mesh=mesh, mp_policy=policy)
    for group in (*groups, fully_shard(model, mesh=mesh)):
        if device.torch_device.type == "cpu":  # Gloo has no average
            group.set_force_sum_reduction_for_comms(True)


@contextmanager
def _unsynced(net: FSDPModule) -> Iterator[None]:
    net.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        net.set_requires_gradient_sync(True)


def _sum_of_squares(tensors: list[Tensor], device: Device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device.torch_device)
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
