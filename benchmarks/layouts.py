"""Layouts of many processes: memory, throughput, and our tensor parallelism against torch's."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from benchmarks.common import BenchSettings, on_ranks
from benchmarks.speed import gpt2_small
from config import GPTConfig
from dataset import open_data
from model import GPTModel
from parallel.parallel_model import ParallelModel
from parallel.process_group import Ranks
from parallel.tensor_parallel import split_model
from reporting.metrics_file import read_records
from runtime.device import Device
from runtime.setting_fields import UserError
from settings.command_line import parse_settings
from training.activation_recompute import recompute_activations, storage_of
from training.optimizers import make_optimizer
from training.step import RunState, train_step

_LAYOUTS = {
    "one process": (1, []),
    "ddp 2": (2, []),
    "fsdp 2": (2, ["--parallel", "fsdp"]),
    "fsdp 4": (4, ["--parallel", "fsdp"]),
    "tp 2": (2, ["--tensor-parallel-size", "2"]),
    "tp 4": (4, ["--tensor-parallel-size", "4"]),
    "fsdp 2 x tp 2": (4, ["--parallel", "fsdp", "--tensor-parallel-size", "2"]),
}


def state_bytes(ranks: Ranks, flags: list[str]) -> dict[str, float]:
    """Bytes of this rank's parameters, gradients and optimizer state in its second update, counted
    on the tensors themselves.
    """
    args = parse_settings("train_ddp", flags, ranks.world)
    device = Device(torch.device("cpu"), "fp32", "")
    train, _, args = open_data(args)
    model = GPTModel(args.model, seed=0)
    parallel = ParallelModel(model, args, device, ranks)
    recompute_activations(model)
    optimizer, state = make_optimizer(model, args, parallel), RunState.fresh(device)
    found: dict[str, float] = {}

    def count(*_: Any) -> None:
        def own(tensors: list[Tensor]) -> float:
            local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
            return sum(t.nbytes for t in local) / 1e6

        parameters = list(model.parameters())
        found["parameters"] = own([p.detach() for p in parameters])
        found["gradients"] = own([p.grad for p in parameters if p.grad is not None])
        found["optimizer"] = own([v for s in optimizer.state.values() for v in s.values()])

    optimizer.register_step_post_hook(count)
    for step in range(2):
        batch = train.global_batch(step, args, parallel.dp_rank, parallel.dp_size)
        train_step(parallel.net, optimizer, batch, args, state, device, parallel)
    return found


def bench_layouts(args: BenchSettings) -> list[dict[str, Any]]:
    """MB that a process holds of GPT-2 small with AdamW: parameters, gradients, optimizer state."""
    rows: list[dict[str, Any]] = []
    for name, (world, flags) in _LAYOUTS.items():
        batch = ["--seq-len", "64", "--global-batch-size", "4", "--batch-size", "1"]
        small = [x for x in gpt2_small(4) if x not in ("--batch-size", "--global-batch-size", "4")]
        found = on_ranks(world, state_bytes, [*small, *batch, *flags, *args.trainer])
        row: dict[str, Any] = {"layout": name, **found, "total_mb": sum(found.values())}
        rows.append({**row, "of_one": row["total_mb"] / (rows or [row])[0]["total_mb"]})
    return rows


_MODELS = {
    "quickstart": [],
    "10M": [
        *("--arch", "gpt2", "--optimizer", "adamw", "--n-layers", "6", "--n-heads", "6"),
        *("--d-model", "360", "--seq-len", "256", "--ngram-rows", "0", "--global-batch-size", "8"),
    ],
}
_PROCESSES = {
    "1 process x 2 threads": (1, []),
    "2 processes x 1 thread, ddp": (2, []),
    "2 processes x 1 thread, fsdp": (2, ["--parallel", "fsdp"]),
    "2 processes x 1 thread, tp": (2, ["--use-tensor-parallel"]),
}


def bench_processes(args: BenchSettings) -> list[dict[str, Any]]:
    """Tokens per second of the trainers with the same global batch, in turns."""
    rows: list[dict[str, Any]] = []
    for model, flags in _MODELS.items():
        rates: dict[str, list[float]] = {name: [] for name in _PROCESSES}
        for _ in range(args.repeats):
            for name, (world, more) in _PROCESSES.items():
                rates[name].append(tokens_per_second(world, [*flags, *more, *args.trainer]))
        for name, some in rates.items():
            rate = statistics.median(some)
            row: dict[str, Any] = {"model": model, "processes": name, "tokens_per_s": rate}
            first = next((r for r in rows if r["model"] == model), row)
            rows.append({**row, "times": row["tokens_per_s"] / first["tokens_per_s"]})
    return rows


def tokens_per_second(world: int, flags: list[str]) -> float:
    """Of a run of about 10 s: of the later half of its steps."""
    root = Path(__file__).resolve().parent.parent
    steps = "60" if "--d-model" not in flags else "12"
    script = "train_minimal" if world == 1 else "train_ddp"
    launch = [sys.executable]
    if world > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    with tempfile.TemporaryDirectory() as folder:
        files = ["--checkpoint-path", f"{folder}/c.pt", "--log-dir", folder]
        short = ["--num-steps", steps, "--log-steps", "1", "--sample-tokens", "1"]
        short += ["--val-max-tokens", "1000"]
        command = [*launch, str(root / f"{script}.py"), *flags, *files, *short]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{script}.py failed: {done.stderr.strip()[-300:]}")
        records = read_records(Path(folder) / f"{script}.jsonl")
    found = [r["time"]["tokens_per_sec"] for r in records if r["event"] == "train"]
    return statistics.median(found[len(found) // 2 :])


def same(x: Any) -> Any:
    """x."""
    return x


def blocks_of(ranks: Ranks, ours: bool, repeats: int) -> dict[str, float]:
    """Seconds of a forward and a backward pass of blocks whose layers two ranks compute together,
    and MB that is kept between the two.
    """
    config = GPTConfig(n_layers=4, n_heads=6, d_model=384, vocab_size=512)
    model = GPTModel(config, seed=0)
    if ours:
        split_model(model, ranks.patient)  # type: ignore[arg-type]
        recompute_activations(model)
    else:
        plan = {
            "attn.qkv": ColwiseParallel(),
            "attn.proj": RowwiseParallel(),
            "mlp.fc": ColwiseParallel(),
            "mlp.proj": RowwiseParallel(),
        }
        mesh = init_device_mesh("cpu", (ranks.world,))
        for block in model.blocks:
            parallelize_module(block, mesh, plan)
    x = torch.randn(4, 256, config.d_model, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    times, kept = [], dict[int, int]()

    def keep(t: Any) -> Any:
        if isinstance(t, Tensor):
            local = t.to_local() if hasattr(t, "to_local") else t
            kept[storage_of(local)] = local.untyped_storage().nbytes()
        return t

    weights = {storage_of(getattr(p, "_local_tensor", p)) for p in model.parameters()}
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        y = x
        for block in model.blocks:
            y = block(y, None, None)
        y.sum().backward()
        times.append(time.perf_counter() - start)
    original = torch.autograd.graph.saved_tensors_hooks

    # Torch calls only the innermost hooks, so those of the model are wrapped too.
    def both(pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> Any:
        return original(lambda t: keep(pack(t)), unpack)

    with mock.patch.object(torch.autograd.graph, "saved_tensors_hooks", both), both(same, same):
        y = x
        for block in model.blocks:
            y = block(y, None, None)
    found = sum(n for storage, n in kept.items() if storage not in weights)
    return {"ms": 1e3 * statistics.median(times[1:]), "kept_mb": found / 1e6}


def bench_tensor_parallel(args: BenchSettings) -> list[dict[str, Any]]:
    """Four blocks of width 384, 1024 tokens, on 2 ranks: our parts and torch's."""
    sides = {"ours": True, "torch's parallelize_module": False}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(3):  # in turns
        for name, ours in sides.items():
            runs[name].append(on_ranks(2, blocks_of, ours, args.repeats))
    rows: list[dict[str, Any]] = []
    for name, some in runs.items():
        middle = {k: statistics.median(run[k] for run in some) for k in some[0]}
        rows.append({"side": name, **middle})
    return [{**row, "times_ours": row["ms"] / rows[0]["ms"]} for row in rows]
