"""The data-parallel context of one process. `SINGLE_PROCESS` has the whole model and all of the
data; `ParallelModel` in parallel_model.py has the same methods for many processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn


class ShardedState(Protocol):
    """Puts together parameters and optimizer state of which each rank has a part."""

    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """The whole of a parameter called name, or of a tensor that the optimizer keeps for it. All
        ranks call it together.
        """
        ...

    def part(self, name: str, whole: Tensor) -> Tensor:
        """The inverse of `gather`: this rank's part, on its device."""
        ...

    def reshard(self) -> None:
        """Frees whole parameters that an evaluation has left gathered."""
        ...


class ParallelContext:
    """Which data this process works on, and how sums, gradients and norms are combined with those
    of the other processes. This class is the context of a single process: nothing is combined.
    """

    dp_rank: int = 0  # this process among those that work on different data
    dp_size: int = 1  # how many those are
    world_size: int = 1  # all processes, those that share each layer included
    sharded_state: ShardedState | None = None  # None: each process has all parameters whole

    def no_sync(self) -> AbstractContextManager[object]:
        """Inside this context manager, a backward pass adds to the gradients of this process alone;
        outside, it also averages them over the processes that work on different data.
        """
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes that work on different data."""
        return values

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scales the global gradient down to a norm of at most max_norm; returns its norm before
        that, () float32.
        """
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def distribute(self, function: Callable[[Tensor], Tensor], name: str, stack: Tensor) -> Tensor:
        """function(stack), for a function that treats each matrix of stack (N, m, n) separately.
        Several processes compute a share of the N matrices each. stack: this process's parts of
        parameters like the one called name; the result has the same parts.
        """
        return function(stack)


SINGLE_PROCESS = ParallelContext()


def local_part(x: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, except under FSDP."""
    return x.to_local() if hasattr(x, "to_local") else x
