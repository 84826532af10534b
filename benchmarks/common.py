"""What the benchmarks share: settings, processes of their own, memory, the machine's speed."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.process_group import Ranks
from runtime.console import one_line
from runtime.setting_fields import check_fields, flag


# fmt: off
@dataclass(frozen=True)
class BenchSettings:
    """Settings of bench.py."""

    verb: tuple[str, ...] = flag((), "what to measure", positional=True)
    train_data: tuple[str, ...] = flag((), "prepare, recipe, dial: texts; none = source of "
                                       "Python's library")
    synthetic_bytes: int = flag(0, "prepare: so much text made from these lines; 0 = as it is")
    tokenizer_name: str = flag("gpt2", "prepare: tokenizer")
    steps: int = flag(20, "resume: steps before the kill, and after it", at_least=2)
    ranks: int = flag(0, "resume: processes under torchrun; 0 = train_minimal.py", at_least=0)
    batch_size: int = flag(4, "save, train, eval: sequences of 1024 tokens; generate: prompts",
                           at_least=1)
    new_tokens: int = flag(512, "generate: tokens to write", at_least=1)
    global_batch_size: int = flag(0, "train: sequences of a step; 0 = batch-size", at_least=0)
    device: str = flag("auto", "train, loss, optim, profile, generate, rates: auto, cpu, cuda")
    small: bool = flag(False, "train, loss, optim, profile, generate: toy sizes, to try "
                        "them out")
    seeds: int = flag(3, "recipe, dial: runs of each side", at_least=1)
    minutes: tuple[str, ...] = flag(("0.5", "1", "3", "10", "30"), "dial: times", metavar="M")
    sides: tuple[str, ...] = flag((), "dial: only sides whose name begins with one of these",
                                  metavar="NAME")
    shapes: bool = flag(False, "dial: each shape, instead of the quickstart and the plain recipe")
    ablate: bool = flag(False, "recipe: without each of its parts, instead of plain")
    recipe_steps: int = flag(75, "recipe: steps of the default recipe; rates: of each run",
                             at_least=1)
    target_loss: float = flag(0.0, "recipe: validation loss to reach; 0 = that of the plain one")
    repeats: int = flag(5, "runs of each side; the median counts", at_least=1)
    log_dir: str = flag("logs", "folder of the JSON")
    trainer: tuple[str, ...] = ()  # what stands behind --

    def __post_init__(self) -> None:
        check_fields(self)
# fmt: on


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What work returns in a process of its own, so that memory and caches of others don't
    count.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What work(ranks, *arguments) returns on rank 0 of so many new processes, connected by Gloo,
    with one thread each.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        inputs = [(rank, world, folder, work, arguments) for rank in range(world)]
        processes = [context.Process(target=_rank, args=each) for each in inputs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"exit codes {[p.exitcode for p in processes]}")
        return torch.load(f"{folder}/result", weights_only=False)


def _rank(
    rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    everyone = dist.group.WORLD
    result = work(Ranks(rank, world, rank, world, everyone, everyone, "here"), *arguments)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    dist.barrier()
    dist.destroy_process_group()


def memory(kind: str) -> float:
    """MB of this process: "VmRSS" now, "VmHWM" at its highest. 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1000
    except OSError:
        return 0.0


def give_memory_back() -> None:
    """Has the C library return what is free, so that what is taken from now on shows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here


class Side:
    """One side of a comparison, in a process of its own: `build(*arguments)` prepares there, at the
    same time as other sides do, and what it returns is run by each call.
    """

    def __init__(
        self,
        build: Callable[..., Callable[[], Any]],
        *arguments: Any,
    ) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.built = self.pool.submit(_keep, build, arguments)

    def __call__(self) -> Any:
        return self.pool.submit(_run_kept).result()

    def end(self) -> None:
        """Ends the process and frees its memory."""
        self.pool.shutdown()


_kept: list[Callable[[], Any]] = []  # of the process of one side


def _keep(build: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    _kept.append(build(*arguments))
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # for the others


def _run_kept() -> Any:
    return _kept[-1]()


def side_by_side(sides: dict[str, Side], repeats: int, warm_up: int = 1) -> dict[str, list[Any]]:
    """What each side returned, run in turns: a machine that is slow for a while is so for all."""
    for side in sides.values():
        side.built.result()  # nothing is measured while others prepare
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for i in range(warm_up + repeats):
        for name, side in sides.items():
            result = side()
            if i >= warm_up:
                found[name].append(result)
    for side in sides.values():
        side.end()
    return found


def one_by_one(sides: dict[str, Side], repeats: int, warm_up: int = 1) -> dict[str, Any]:
    """The same on a GPU, which each side has to itself: one is ended before the next runs. Of a
    side that fails, the reason as text.
    """
    for side in sides.values():
        side.built.exception()  # waits
    found: dict[str, Any] = {}
    for name, side in sides.items():
        try:
            side.built.result()
            found[name] = [side() for _ in range(warm_up + repeats)][warm_up:]
        except Exception as reason:  # out of memory, a compiler, a package that is not there
            found[name] = f"failed: {one_line(reason)}"
        print(f"{name}: {found[name]}", flush=True)  # in case that the time is up before the table
        side.end()
    return found


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the runs."""
    return {k: statistics.median(run[k] for run in runs) for k in runs[0]}


def build_matmul_peak(device: str, dtype: torch.dtype) -> Callable[[], float]:
    """FLOP/s of the fastest of a few plain matrix products, each kept up for half a second."""
    shapes = ((2048, 2048, 2048), (4096, 768, 3072), (4096, 3072, 768))
    if device != "cpu":
        shapes = ((8192, 8192, 8192), (16384, 4096, 4096), (8192, 8192, 4096))
    pairs = [
        (torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype).T)
        for m, k, n in shapes
    ]

    def measure() -> float:
        best = 0.0
        for a, b in pairs:
            a @ b
            synchronize(device)
            start, done = time.perf_counter(), 0
            while time.perf_counter() - start < 0.5:
                a @ b
                synchronize(device)
                done += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            best = max(best, done / (time.perf_counter() - start))
        return best

    return measure


def synchronize(device: str) -> None:
    """Waits until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
