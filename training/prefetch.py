"""Reads the next batch while a step is computed."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor
from torch.profiler import record_function

from config import Settings
from corpus.token_dataset import TokenDataset
from parallel.context import SINGLE_PROCESS, ParallelContext
from runtime.device import Device


class Prefetch:
    """Reads the global batch of the next step in a thread while the current step is computed.

    The content of a batch depends on its step alone, so prefetching changes only when it is read.
    On CUDA the batch is in pinned memory, from which copies overlap with computing.
    """

    def __init__(
        self,
        train: TokenDataset,
        args: Settings,
        device: Device,
        parallel: ParallelContext = SINGLE_PROCESS,
    ) -> None:
        self._read = lambda step: train.global_batch(step, args, parallel.dp_rank, parallel.dp_size)
        self._pin, self._pool = (
            device.torch_device.type == "cuda",
            ThreadPoolExecutor(1, "prefetch"),
        )
        self._next: tuple[int, Future[Tensor]] | None = None
        self.waited = 0.0  # seconds, in all calls

    def __call__(self, step: int) -> Tensor:
        """This rank's rows of the global batch of optimizer step `step`: (rows, T) int64. Starts to
        read those of the step after it.
        """
        ahead, start = self._next, time.perf_counter()
        with record_function("data"):
            batch = ahead[1].result() if ahead and ahead[0] == step else self._fetch(step)
        self.waited += time.perf_counter() - start
        self._next = (step + 1, self._pool.submit(self._fetch, step + 1))
        return batch

    def _fetch(self, step: int) -> Tensor:
        batch = self._read(step)
        return batch.pin_memory() if self._pin else batch
