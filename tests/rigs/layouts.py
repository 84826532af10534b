"""The same training in every layout: `python -m tests.rigs.layouts` compares each with one process.

Runs in processes of its own, which share one group for all layouts of a size.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import on_ranks  # noqa: E402
from checkpoint import build_checkpoint, load_checkpoint, read_checkpoint  # noqa: E402
from checkpointing.writing import write_checkpoint  # noqa: E402
from dataset import open_data  # noqa: E402
from model import GPTModel  # noqa: E402
from parallel import parallel_model as distributed  # noqa: E402
from parallel import tensor_parallel  # noqa: E402
from parallel.parallel_model import ParallelModel  # noqa: E402
from parallel.process_group import Ranks  # noqa: E402
from runtime.device import Device  # noqa: E402
from settings.command_line import parse_settings  # noqa: E402
from training.activation_recompute import recompute_activations  # noqa: E402
from training.evaluation import evaluate  # noqa: E402
from training.optimizers import make_optimizer  # noqa: E402
from training.step import RunState, train_step  # noqa: E402

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
MUON = """
    --arch modern --optimizer muon --lr 0.02 --ngram-rows 301 --ngram-longest 6
    --ngram-optimizer rmsprop --ngram-weight-decay 0.5 --lr-width 16
"""


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

    def __init__(self, ranks: Ranks, flags: str, sgd: bool = False) -> None:
        args = parse_settings("train_ddp", [*TINY.split(), *flags.split()], ranks.world)
        precision = "fp32" if args.precision == "auto" else args.precision
        self.device = Device(torch.device("cpu"), precision, "test")
        self.train, self.val, self.args = open_data(args)
        self.model = GPTModel(self.args.model, seed=7)
        with torch.no_grad():  # so that zero-initialised parts have an effect
            draw = torch.Generator().manual_seed(1)
            for p in self.model.parameters():
                p.add_(torch.randn(p.shape, generator=draw) * 0.02)
        self.parallel = ParallelModel(self.model, self.args, self.device, ranks)
        recompute_activations(self.model)
        self.optimizer: torch.optim.Optimizer
        if sgd:
            self.optimizer = SGDOfParts(self.model.parameters(), {"lr": args.lr})
        else:
            self.optimizer = make_optimizer(self.model, self.args, self.parallel)
        self.ranks, self.state = ranks, RunState.fresh(self.device)

    def step(self) -> tuple[float, float]:
        """Loss and gradient norm of one update."""
        s = self.parallel
        batch = self.train.global_batch(self.state.step, self.args, s.dp_rank, s.dp_size)
        stats = train_step(s.net, self.optimizer, batch, self.args, self.state, self.device, s)
        return float(stats.summed(s).nll_sum) / stats.n_tokens, float(stats.grad_norm)

    def weights(self) -> dict[str, torch.Tensor]:
        """All of each."""
        named = self.model.named_parameters()
        return {k: self.parallel.gather(k, p.detach()).clone() for k, p in named}

    def evaluate(self) -> tuple[float, int]:
        """Validation loss and tokens."""
        s = self.parallel
        found = evaluate(self.model, self.val, 5, self.device, s)
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


def _alone(net: torch.nn.Module, *_: Any) -> torch.nn.Module:
    return net


# What is left out, in which layout it must show, and how: object, attribute, what to put there.
BREAKAGES: dict[str, tuple[str, Any, str, Any]] = {
    "gradients of what ranks have the same": (
        "tp 2", tensor_parallel._Same, "backward", staticmethod(lambda ctx, d: (d, None)),
    ),
    "outputs of second parts": (
        "tp 2", tensor_parallel._Added, "forward", staticmethod(lambda ctx, x, group: x),
    ),
    "norm of parts": ("fsdp 2", distributed.ParallelModel, "sum", lambda self, x: x),
    "norm of split layers": ("tp 2", distributed, "sum_ranks", lambda x, group=None: x),
    "gradients under DDP": ("ddp 2", distributed, "replicate", _alone),
}  # fmt: skip


def break_all(ranks: Ranks) -> dict[str, Any]:
    """Five updates with each of BREAKAGES."""
    found = {}
    for what, (layout, owner, name, broken) in BREAKAGES.items():
        with mock.patch.object(owner, name, broken):
            found[what] = train_all(ranks, [layout], SGD, 5)[layout]
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


def validate_all(ranks: Ranks, names: list[str], tokens: int) -> dict[str, tuple[float, int]]:
    """Validation loss of the same weights in each layout, and the tokens scored."""
    found = {}
    for name in names:
        run = Run(ranks, f"{SGD} {LAYOUTS[name][1]} --val-max-tokens {tokens}")
        found[name] = run.evaluate()
    return found


_COLLECTIVES = {  # in torch.distributed (the last two before 2.13), and what they are
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_single": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}


def count_collectives(ranks: Ranks, names: list[str]) -> dict[str, Counter[str]]:
    """What ranks exchange in one update of each layout: kind of collective, and how often. (Torch's
    profiler shows what Gloo makes of them: a reduce_scatter is an all_reduce there.)
    """
    found = {}
    for name in names:
        run, counts = Run(ranks, f"{ADAMW} {LAYOUTS[name][1]}"), Counter[str]()
        run.step()
        s = run.parallel
        if isinstance(s.net, torch.nn.parallel.DistributedDataParallel):
            s.net.register_comm_hook(s.dp_group, allreduce_hook)  # instead of DDP's own, in C++
        batch = run.train.global_batch(1, run.args, s.dp_rank, s.dp_size)
        with ExitStack() as patches:
            for function, kind in _COLLECTIVES.items():
                if original := getattr(dist, function, None):
                    call = _counting(original, kind, counts)
                    patches.enter_context(mock.patch.object(dist, function, call))
            train_step(s.net, run.optimizer, batch, run.args, run.state, run.device, s)
        found[name] = counts
    return found


def _counting(function: Callable[..., Any], kind: str, counts: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        counts[kind] += 1
        return function(*args, **more)

    return call


def write_all(ranks: Ranks, names: list[str], kind: str, folder: str) -> None:
    """A checkpoint of each layout, after two updates."""
    for name in names:
        run = Run(ranks, f"{kind} {LAYOUTS[name][1]}")
        run.step(), run.step()
        content = build_checkpoint(
            run.model, run.optimizer, run.state, run.args, gather=run.parallel.gather
        )
        if ranks.rank == 0:
            write_checkpoint(f"{folder}/{name}.pt", content)


def read_all(ranks: Ranks, names: list[str], kind: str, folder: str) -> dict[str, list[str]]:
    """Of each layout: the files of which it has the weights and optimizer state, bit for bit."""
    found: dict[str, list[str]] = {}
    for name in names:
        run = Run(ranks, f"{kind} {LAYOUTS[name][1]}")
        found[name] = []
        for file in sorted(Path(folder).glob("*.pt")):
            load_checkpoint(file, run.model, run.optimizer, own_part=run.parallel.part)
            content = build_checkpoint(
                run.model, run.optimizer, run.state, run.args, gather=run.parallel.gather
            )
            written = read_checkpoint(file)
            if all(_equal(content[k], written[k]) for k in ("model", "optimizer")):
                found[name].append(file.stem)
    return found


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return torch.equal(a, b)


def by_world(work: Callable[..., Any], names: list[str], *arguments: Any) -> dict[str, Any]:
    """work(ranks, names, *arguments) for the layouts of each size, joined."""
    found: dict[str, Any] = {}
    for world in sorted({LAYOUTS[name][0] for name in names}):
        some = [name for name in names if LAYOUTS[name][0] == world]
        found |= on_ranks(world, work, some, *arguments) or {}
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """As a table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def equal() -> None:
    """Losses, norms and weights against one process."""
    for title, kind in (("SGD", SGD), ("AdamW", ADAMW), ("Muon", MUON)):
        print(f"\n{title}, 30 steps, largest relative difference from one process:\n")
        show(compare(all_layouts(kind)))


def validation() -> None:
    """Validation loss of the same weights."""
    found = by_world(validate_all, list(LAYOUTS), 100_000)
    one = found["one process"][0]
    show(
        [
            {"layout": k, "loss": repr(v), "apart": abs(v - one) / one, "tokens": n}
            for k, (v, n) in found.items()
        ]
    )


def collectives() -> None:
    """What is exchanged in an update."""
    found = by_world(count_collectives, list(LAYOUTS))
    kinds = sorted({kind for counts in found.values() for kind in counts})
    show([{"layout": k, **{kind: v[kind] for kind in kinds}} for k, v in found.items()])


def checkpoints() -> None:
    """Written by each, read by each."""
    for kind in (ADAMW, MUON):
        names = [n for n in LAYOUTS if "," not in n]
        with tempfile.TemporaryDirectory() as folder:
            by_world(write_all, names, kind, folder)
            found = by_world(read_all, names, kind, folder)
        pairs = sum(map(len, found.values()))
        print(f"{kind}: {len(names) ** 2} pairs of writer and reader, {pairs} bit-equal")


PARTS = {
    "equal": equal,
    "validation": validation,
    "collectives": collectives,
    "checkpoints": checkpoints,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", default=list(PARTS), choices=[*PARTS, []])
    for part in parser.parse_args().part:
        print(f"\n{part}", flush=True)
        PARTS[part]()


if __name__ == "__main__":
    main()
