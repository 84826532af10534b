"""Speed and memory of whole training steps, and how they grow with the work."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import (
    BenchSettings,
    Side,
    build_matmul_peak,
    flops_per_token,
    medians,
    memory,
    side_by_side,
    synchronize,
)
from cli import parse_settings
from config import GPTConfig, Settings
from dataset import Prefetch, open_data
from device import Device, compile_model, pick_device, tune
from model import GPTModel
from optim import make_optimizer
from step import RunState, rehearse, train_step

# Dense bfloat16 matrix products, FLOP/s, as their maker's data sheets say.
_KNOWN_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def gpt2_small(batch: int, *flags: str) -> list[str]:
    """Flags of a trainer for GPT-2 small on random tokens, one step of batch x 1024 of them."""
    size = str(batch)
    data = ["--preset", "gpt2-small", "--use-toy-data", "--tokenizer-name", "", *flags]
    return [*data, "--batch-size", size, "--global-batch-size", size, "--vocab-size", "50257"]


class Parts:
    """Seconds of the parts of a step, from hooks of the model and the optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        self.device, self.marks = device, dict[str, float]()
        model.register_forward_pre_hook(lambda *_: self.mark("data"))
        model.register_forward_hook(lambda *_: self.mark("forward"))
        optimizer.register_step_pre_hook(lambda *_: self.mark("backward"))
        optimizer.register_step_post_hook(lambda *_: self.mark("optimizer"))

    def mark(self, name: str) -> None:
        """The part called name ends now."""
        synchronize(self.device)
        self.marks[name] = time.perf_counter()

    def time(self, step: Callable[[], None]) -> dict[str, float]:
        """Seconds of one step, whole and in parts, and the process's peak memory."""
        self.mark("start")
        step()
        self.mark("end")
        found, names = {}, ("start", "data", "forward", "backward", "optimizer")
        for before, name in itertools.pairwise(names):
            found[name] = self.marks[name] - self.marks[before]
        found["seconds"] = self.marks["end"] - self.marks["start"]
        cuda = self.device == "cuda"
        found["gb"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else memory("VmHWM") / 1e3
        return found


def build_trainer(flags: list[str]) -> Callable[[], dict[str, float]]:
    """One step of our trainer, with these flags."""
    args = parse_settings("train_minimal", flags)
    train, _, args = open_data(args)
    device = pick_device(args.device, args.precision)
    tune(device, sparing=args.model.use_activation_checkpoint)
    model = GPTModel(args.model, seed=0).to(device.torch)
    optimizer, state = make_optimizer(model, args), RunState.fresh(device)
    compile_model(model, args.compile, device, lambda: rehearse(model, args, device))
    batches = Prefetch(train, args, device)
    parts = Parts(model, optimizer, device.torch.type)

    def step() -> None:
        train_step(model, optimizer, batches(state.step), args, state, device)

    return lambda: parts.time(step)


def build_hugging_face(flags: list[str]) -> Callable[[], dict[str, float]]:
    """The same step by Hugging Face's GPT2LMHeadModel with torch's fused AdamW and clipping."""
    from transformers import GPT2Config, GPT2LMHeadModel

    args = parse_settings("train_minimal", flags)
    c = args.model
    device = Device(*device_of(args))  # not pick_device, which tunes this process
    shape = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.max_position_embeddings, n_embd=c.d_model,
        n_layer=c.n_layers, n_head=c.n_heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(shape)
    model.to(device.torch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    ids = torch.randint(c.vocab_size, (args.batch_size, args.seq_len))
    parts = Parts(model, optimizer, device.torch.type)

    def step() -> None:
        batch = ids.to(device.torch)
        with device.autocast():
            loss = model(batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda: parts.time(step)


def device_of(args: Settings) -> tuple[torch.device, str, str]:
    """What pick_device would choose, without tuning this process."""
    kind = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    auto = "bf16" if kind == "cuda" else "fp32"
    return torch.device(kind), auto if args.precision == "auto" else args.precision, ""


def bench_train(args: BenchSettings) -> list[dict[str, Any]]:
    """GPT-2 small, steps of batch-size x 1024 tokens: ours, ours with activations recomputed, and
    Hugging Face's model; FLOPs are those of `flops_per_token`. Flags after -- change ours.
    """
    flags = gpt2_small(args.batch_size, *args.trainer)
    settings = parse_settings("train_minimal", flags)
    device, precision, _ = device_of(settings)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    sides = {
        "matmul": Side(build_matmul_peak, device.type, dtype),
        "ours": Side(build_trainer, flags),
        "ours, recomputing": Side(build_trainer, [*flags, "--use-activation-checkpoint"]),
    }
    try:
        sides["Hugging Face"] = Side(build_hugging_face, gpt2_small(args.batch_size))
    except ImportError:
        print("transformers is not installed, so there is nothing to compare with")
    runs = side_by_side(sides, args.repeats)
    peak = sorted(runs.pop("matmul"))[args.repeats // 2]
    known = next((v for k, v in _KNOWN_PEAKS.items() if k in _name_of(device)), None)
    tokens = args.batch_size * (settings.seq_len)
    work = flops_per_token(settings.model, settings.seq_len) * tokens
    rows, reference = (
        list[dict[str, Any]](),
        medians(runs["Hugging Face" if "Hugging Face" in runs else "ours"]),
    )
    for name, some in runs.items():
        m = medians(some)
        gb = m.pop("gb")
        row: dict[str, Any] = {"side": name, "tokens_per_s": tokens / m["seconds"]}
        row |= {"times_hf": reference["seconds"] / m["seconds"], **m}
        row |= {
            "gflop_per_s": work / m["seconds"] / 1e9,
            "of_matmul_peak": work / m["seconds"] / peak,
        }
        row |= {"mfu": work / m["seconds"] / known if known else "n/a", "peak_gb": gb}
        rows.append(row)
    rows.append({**dict.fromkeys(rows[0], ""), "side": "matmul", "gflop_per_s": peak / 1e9})
    return rows


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else ""


_BASE = {"batch": 4, "tokens": 256, "layers": 4, "channels": 256, "vocabulary": 8192}


def build_growth(shape: dict[str, int]) -> Callable[[], float]:
    """Seconds of a step of a `modern` model of this shape."""
    flags = ["--preset", "toy", "--use-toy-data", "--dropout", "0", "--arch", "modern"]
    names = {
        "batch": "--batch-size", "tokens": "--seq-len", "layers": "--n-layers",
        "channels": "--d-model", "vocabulary": "--vocab-size",
    }  # fmt: skip
    for name, value in shape.items():
        flags += [names[name], str(value)]
    step = build_trainer([*flags, "--d-ff", str(4 * shape["channels"])])
    return lambda: step()["seconds"]


def growth_shapes() -> Iterator[tuple[str, dict[str, int]]]:
    """The base shape with one size at a time from an eighth of it to 8 times it."""
    for name, size in _BASE.items():
        for power in range(-2, 4):
            value = int(size * 2.0**power)
            yield name, {**_BASE, name: value}


def bench_growth(args: BenchSettings) -> list[dict[str, Any]]:
    """Seconds of a step as batch, tokens, layers, channels and vocabulary grow, one at a time; the
    power is the slope on a log-log scale to the size before. Draws docs/growth.png.
    """
    rows: list[dict[str, Any]] = []
    for name, shape in growth_shapes():
        runs = side_by_side({"": Side(build_growth, shape)}, args.repeats, warm_up=2)[""]
        seconds, before = sorted(runs)[args.repeats // 2], rows[-1] if rows else {}
        flops = flops_per_token(_config(shape), shape["tokens"]) * shape["batch"] * shape["tokens"]
        row = {"grows": name, "size": shape[name], "seconds": seconds}
        power: Any = ""
        if before.get("grows") == name:
            power = math.log2(seconds / before["seconds"])
        rows.append({**row, "power": power, "gflop_per_s": flops / seconds / 1e9})
    _draw_growth(rows)
    return rows


def _config(shape: dict[str, int]) -> GPTConfig:
    return GPTConfig(
        arch="modern", vocab_size=shape["vocabulary"], max_position_embeddings=shape["tokens"],
        n_layers=shape["layers"], n_heads=4, d_model=shape["channels"],
    )  # fmt: skip


def _draw_growth(rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, base in _BASE.items():
        points = [(r["size"] / base, r["seconds"]) for r in rows if r["grows"] == name]
        axes.plot(*zip(*points, strict=True), "o-", label=f"{name} (1 = {base})")
    axes.set(xscale="log", yscale="log", xlabel="size, relative", ylabel="seconds per step")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    path = Path(__file__).resolve().parent.parent / "docs" / "growth.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
