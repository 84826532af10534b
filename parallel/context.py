"""The data-parallel context of one process. `SINGLE_PROCESS` has the whole model and all of the
data; `ParallelModel` in parallel_model.py has the same methods for many processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from config import Settings
from runtime.device import Device


class ShardedState(Protocol):
    """The interface of a model of which each rank holds only a part (FSDP, tensor parallelism):
    converts parameters and optimizer state between unsharded tensors and the parts.
    """

    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """All-gathers the parameter called name, or a tensor of its optimizer state, and returns
        the unsharded tensor. All ranks must call it together.
        """
        ...

    def part(self, name: str, whole: Tensor) -> Tensor:
        """The inverse of `gather`: this rank's part of an unsharded tensor, on its device."""
        ...

    def reshard(self) -> None:
        """Frees the unsharded parameters that FSDP keeps gathered after an evaluation."""
        ...


def has_sparse_gradients(args: Settings, device: Device, dp_size: int) -> bool:
    """Whether an embedding may have the gradient of its rows in use alone: where each process has
    all parameters, and what adds gradients over dp_size data-parallel ranks adds sparse ones (Gloo
    does, NCCL does not).
    """
    whole = args.parallel == "ddp" and args.tensor_parallel_size == 1
    return whole and (dp_size == 1 or device.torch_device.type == "cpu")


class ParallelContext:
    """Which data this process works on, and how sums, gradients and norms are combined with those
    of the other processes. This class is the context of a single process: nothing is combined.
    """

    dp_rank: int = 0  # data-parallel rank: processes of other ranks work on other data
    dp_size: int = 1  # the number of data-parallel ranks
    world_size: int = 1  # the number of all processes, those that share each layer included
    sharded_state: ShardedState | None = None  # None: each process has all parameters in full
    sparse_gradients: bool = True  # whether an embedding may have the gradient of its rows in use

    def no_sync(self) -> AbstractContextManager[object]:
        """Inside this context manager, a backward pass adds to the gradients of this process alone;
        outside, it also averages them over the processes that work on different data.
        """
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """All-reduces a tensor: its sum over the data-parallel ranks, on each of them."""
        return values

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scales the global gradient down to a norm of at most max_norm; returns its norm before
        that, () float32.
        """
        grads = [_numbers(p) for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gathered(self) -> AbstractContextManager[object]:
        """Inside this context manager, forward passes without gradients gather parameters that are
        sharded (FSDP) only once, and keep them. All ranks must enter it together.
        """
        return nullcontext()

    def distribute(self, function: Callable[[Tensor], Tensor], name: str, stack: Tensor) -> Tensor:
        """Returns function(stack), for a function that treats each matrix of stack (N, m, n)
        independently. Several processes compute a share of the N matrices each. stack: this rank's
        parts of N parameters that are sharded like the one called name; the result has the same
        parts.
        """
        return function(stack)


SINGLE_PROCESS = ParallelContext()


def _numbers(p: nn.Parameter) -> Tensor:
    """The gradient of a parameter; if it is sparse, the tensor of its values, each row once."""
    assert p.grad is not None
    if p.grad.is_sparse:
        p.grad = p.grad.coalesce()
        return p.grad._values()
    return p.grad


def local_part(x: Tensor) -> Tensor:
    """The local shard of a DTensor, which FSDP makes of parameters; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x
