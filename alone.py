"""One process with the whole model and all of the data: what `Ranks` and `Spread` say for many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


class Alone:
    """Which part of a step is this process's, and how it becomes whole. Here all of it is; the
    subclasses with the same methods are in ranks.py and distributed.py.
    """

    rank: int = 0  # of those that see other data, or that write files
    world: int = 1  # how many those are
    helpers: int = 1  # ranks that do a part each of the work that is given to divide()
    parts: Any = None  # that which gathers tensors, where each rank has a part of the model

    def meet(self) -> None:
        """Waits until all ranks are here."""

    def must_agree(self, mine: Mapping[str, object]) -> None:
        """Raises UserError on all ranks unless they have the same under each name."""

    def agree(self, *wishes: int) -> list[int]:
        """The largest of each wish over the ranks."""
        return list(wishes)

    def no_sync(self) -> AbstractContextManager[object]:
        """In it, a backward pass keeps its gradients to itself; outside of it, it averages them
        over the ranks that see other data.
        """
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that see other data."""
        return values

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scales the gradient down to a norm of max_norm; its norm before, () float32."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def divide(self, work: Callable[[Tensor], Tensor], name: str, stack: Tensor) -> Tensor:
        """work(stack), for work that treats each of stack's (N, m, n) alone. stack: what this rank
        has of parameters like the one called name.
        """
        return work(stack)


ALONE = Alone()
