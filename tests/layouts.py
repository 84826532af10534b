"""The same training in every layout: `python -m tests.layouts` compares each with one process.

Runs in processes of its own, which share one group for all layouts of a size.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import parse_settings  # noqa: E402
from dataset import open_data  # noqa: E402
from device import Device  # noqa: E402
from distributed import Spread  # noqa: E402
from eval import evaluate  # noqa: E402
from model import GPTModel  # noqa: E402
from optim import make_optimizer  # noqa: E402
from ranks import Ranks  # noqa: E402
from step import RunState, train_step  # noqa: E402

# name: (processes, flags). Sizes are such that nothing divides evenly but what has to.
LAYOUTS = {
    "one process": (1, ""),
    "one, accumulation 4": (1, "--batch-size 3"),
    "ddp 2": (2, ""),
    "ddp 3": (3, ""),
    "ddp 4": (4, ""),
    "ddp 2, accumulation 2": (2, "--batch-size 3"),
    "fsdp 2": (2, "--parallel fsdp"),
    "fsdp 2, accumulation 2": (2, "--parallel fsdp --batch-size 3"),
    "fsdp 2, activation checkpoint": (2, "--parallel fsdp --use-activation-checkpoint"),
    "fsdp 4": (4, "--parallel fsdp"),
    "tp 2": (2, "--use-tensor-parallel"),
    "tp 2, activation checkpoint": (2, "--use-tensor-parallel --use-activation-checkpoint"),
    "tp 2, accumulation 4": (2, "--use-tensor-parallel --batch-size 3"),
    "tp 4": (4, "--use-tensor-parallel"),
    "ddp 2 x tp 2": (4, "--tensor-parallel-size 2"),
    "ddp 2 x tp 2, accumulation 2": (4, "--tensor-parallel-size 2 --batch-size 3"),
    "fsdp 2 x tp 2": (4, "--parallel fsdp --tensor-parallel-size 2"),
    "fsdp 2 x tp 2, accumulation 2": (
        4, "--parallel fsdp --tensor-parallel-size 2 --batch-size 3",
    ),
}  # fmt: skip
TINY = """
    --use-toy-data --vocab-size 97 --seq-len 16 --n-layers 2 --n-heads 4 --d-model 32 --d-ff 100
    --device cpu --val-max-tokens 3000 --num-steps 30 --warmup-steps 3 --global-batch-size 12
    --lr-scheduler none --ngram-rows 0
"""
SGD, ADAMW = "--arch gpt2 --optimizer adamw --lr 0.5", "--arch gpt2 --optimizer adamw --lr 3e-3"
MUON = "--arch modern --optimizer muon --lr 0.02 --ngram-rows 301"


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What work(ranks, *arguments) returns on rank 0 of so many connected processes."""
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
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    ranks = Ranks(rank, world, rank, world, dist.group.WORLD, dist.group.WORLD, "here")
    result = work(ranks, *arguments)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    dist.barrier()
    dist.destroy_process_group()


class SGDOfParts(torch.optim.Optimizer):
    """Plain gradient descent. It hides no wrong scale of a gradient, as AdamW does, and does not
    amplify rounding. (Torch's takes no `found_inf`, or none with DTensors.)
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


class Run:
    """A run in one layout, without files."""

    def __init__(
        self, ranks: Ranks, flags: str, sgd: bool = False, precision: str = "fp32"
    ) -> None:
        args = parse_settings("train_ddp", [*TINY.split(), *flags.split()], ranks.world)
        self.device = Device(torch.device("cpu"), precision, "test")
        self.train, self.val, self.args = open_data(args)
        self.model = GPTModel(self.args.model, seed=7)
        with torch.no_grad():  # so that zero-initialised parts have an effect
            draw = torch.Generator().manual_seed(1)
            for p in self.model.parameters():
                p.add_(torch.randn(p.shape, generator=draw) * 0.02)
        self.spread = Spread(self.model, self.args, self.device, ranks)
        self.optimizer: torch.optim.Optimizer
        if sgd:
            self.optimizer = SGDOfParts(self.model.parameters(), {"lr": args.lr})
        else:
            self.optimizer = make_optimizer(self.model, self.args, self.spread.divide)
        self.ranks, self.state = ranks, RunState.fresh(self.device)

    def step(self) -> tuple[float, float]:
        """Loss and gradient norm of one update."""
        s = self.spread
        batch = self.train.global_batch(self.state.step, self.args, s.rank, s.world)
        stats = s.summed(
            train_step(
                s.net,
                self.optimizer,
                batch,
                self.args,
                self.state,
                self.device,
                s.rank,
                s.world,
                s.no_sync,
                s.clip,
            )  # fmt: skip
        )
        return float(stats.nll_sum) / stats.n_tokens, float(stats.grad_norm)

    def weights(self) -> dict[str, torch.Tensor]:
        """All of each."""
        named = self.model.named_parameters()
        return {k: self.spread.gather(k, p.detach()).clone() for k, p in named}

    def evaluate(self) -> tuple[float, int]:
        """Validation loss and tokens."""
        s = self.spread
        found = evaluate(self.model, self.val, 5, self.device, s.rank, s.world, s.sum)
        return found.loss, found.tokens


def train_all(ranks: Ranks, names: list[str], kind: str, steps: int) -> dict[str, Any]:
    """Each layout: its losses and norms, final weights, and validation of the initial weights."""
    found = {}
    for name in names:
        run = Run(ranks, f"{kind} {LAYOUTS[name][1]}", sgd=kind == SGD)
        val = run.evaluate()
        losses, norms = zip(*(run.step() for _ in range(steps)), strict=True)
        found[name] = {"losses": losses, "norms": norms, "val": val, "weights": run.weights()}
    return found


def all_layouts(kind: str, steps: int = 30) -> dict[str, Any]:
    """`train_all` for all layouts, by name."""
    found: dict[str, Any] = {}
    for world in sorted({world for world, _ in LAYOUTS.values()}):
        names = [name for name, (size, _) in LAYOUTS.items() if size == world]
        found |= on_ranks(world, train_all, names, kind, steps)
    return found


def compare(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The largest relative differences of each layout from one process."""
    one = found["one process"]
    rows = []
    for name, other in found.items():
        row: dict[str, Any] = {"layout": name}
        for key in ("losses", "norms"):
            row[key] = max(abs(a - b) / a for a, b in zip(one[key], other[key], strict=True))
        row["weights"] = max(
            float((other["weights"][k] - w).norm() / w.norm()) for k, w in one["weights"].items()
        )
        row["val_loss"] = abs(other["val"][0] - one["val"][0]) / one["val"][0]
        row["val_tokens"] = other["val"][1]
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """As a table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", default=["equal"])
    for part in parser.parse_args().part:
        if part == "equal":
            for title, kind in (("SGD", SGD), ("AdamW", ADAMW), ("Muon", MUON)):
                print(f"\n{title}, 30 steps:\n")
                show(compare(all_layouts(kind)))


if __name__ == "__main__":
    main()
