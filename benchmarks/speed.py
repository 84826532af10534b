"""Speed and memory of whole training steps, and how they grow with the work."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.common import (
    BenchSettings,
    Side,
    build_matmul_peak,
    in_new_process,
    medians,
    memory,
    one_by_one,
    side_by_side,
    synchronize,
)
from config import GPTConfig, Settings
from dataset import open_data
from model import GPTModel
from reporting.profiler import activities, costliest
from runtime.device import Device, pick_device, tune
from settings.command_line import parse_settings
from training.activation_recompute import recompute_activations
from training.compilation import compile_model
from training.flops import flops_per_token, peak_flops
from training.memory import fit_micro_batch
from training.optimizers import make_optimizer
from training.prefetch import Prefetch
from training.step import RunState, train_step


def gpt2_small(batch: int, *flags: str, total: int = 0) -> list[str]:
    """Flags of a trainer for GPT-2 small on random tokens, in steps of total x 1024 of them, by
    default one micro-batch.
    """
    data = ["--preset", "gpt2-small", "--use-toy-data", "--tokenizer-name", "", *flags]
    size = ["--batch-size", str(batch), "--global-batch-size", str(total or batch)]
    return [*data, *size, "--vocab-size", "50257"]


# In place of GPT-2 small's sizes where a benchmark itself is tried out.
SMALL = ["--n-layers", "2", "--n-heads", "2", "--d-model", "64", "--seq-len", "64"]


class Parts:
    """Seconds of the parts of a step of one micro-batch, from hooks of the model and the optimizer.
    On a GPU, or without a model, only of the whole step: waiting for each part would make it
    slower there, and a compiler would look into the hooks.
    """

    def __init__(
        self, model: nn.Module | None, optimizer: torch.optim.Optimizer, device: str
    ) -> None:
        self.device, self.marks = device, dict[str, float]()
        if device == "cpu" and model is not None:
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
        self.marks.clear()
        self.mark("start")
        step()
        self.mark("end")
        ends: list[str] = [
            k for k in ("start", "data", "forward", "backward", "optimizer") if k in self.marks
        ]
        found = {name: self.marks[name] - self.marks[k] for k, name in itertools.pairwise(ends)}
        found["seconds"] = self.marks["end"] - self.marks["start"]
        cuda = self.device == "cuda"
        found["gb"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else memory("VmHWM") / 1e3
        return found


def make_trainer(flags: list[str]) -> tuple[Callable[[], None], Parts, dict[str, float]]:
    """A call that makes one step of our trainer with these flags, what times it, and what is known
    before.
    """
    args = parse_settings("train_minimal", flags)
    train, _, args = open_data(args)
    device = pick_device(args.device, args.precision)
    args = fit_micro_batch(args, device)
    tune(device, sparing=args.model.use_activation_checkpoint)
    model, start = GPTModel(args.model, seed=0).to(device.torch_device), time.perf_counter()
    compile_model(model, args, device)
    recompute_activations(model)
    known = {"compile_s": time.perf_counter() - start, "micro_batch": float(args.batch_size)}
    optimizer, state = make_optimizer(model, args), RunState.fresh(device)
    batches = Prefetch(train, args, device)
    parts = Parts(model, optimizer, device.torch_device.type)

    def step() -> None:
        train_step(model, optimizer, batches(state.step), args, state, device)

    return step, parts, known


def build_trainer(flags: list[str]) -> Callable[[], dict[str, float]]:
    """One step of our trainer, with these flags."""
    step, parts, known = make_trainer(flags)
    return lambda: {**parts.time(step), **known}


def hugging_face_model(c: GPTConfig) -> Any:
    """A fresh GPT2LMHeadModel of this shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.max_position_embeddings, n_embd=c.d_model,
        n_layer=c.n_layers, n_head=c.n_heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(shape)


def build_hugging_face(flags: list[str], compiled: bool = False) -> Callable[[], dict[str, float]]:
    """The same step by Hugging Face's GPT2LMHeadModel with torch's fused AdamW and clipping."""
    args = parse_settings("train_minimal", flags)
    device = Device(*device_of(args))  # not pick_device, which tunes this process
    model = hugging_face_model(args.model).to(device.torch_device)
    if device.torch_device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as tune does for ours
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    ids = torch.randint(args.model.vocab_size, (args.global_batch_size, args.seq_len))
    parts = Parts(None if compiled else model, optimizer, device.torch_device.type)
    if compiled:
        model.compile(dynamic=False)

    def step() -> None:
        for batch in ids.split(args.batch_size):
            batch = batch.to(device.torch_device)
            with device.autocast():
                loss = model(batch, labels=batch).loss
            (loss / args.grad_accum_steps).backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    known, start = {"micro_batch": float(args.batch_size)}, time.perf_counter()
    if compiled:
        step()
        known["compile_s"] = time.perf_counter() - start
    return lambda: {**parts.time(step), **known}


def device_of(args: Settings) -> tuple[torch.device, str, str]:
    """What pick_device would choose, without tuning this process."""
    kind = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    auto = "bf16" if kind == "cuda" else "fp32"
    return torch.device(kind), auto if args.precision == "auto" else args.precision, ""


def bench_train(args: BenchSettings) -> list[dict[str, Any]]:
    """GPT-2 small, steps of global-batch-size x 1024 tokens: ours and Hugging Face's model, on a
    GPU compiled and not; FLOPs are those of `flops_per_token`. Flags after -- change ours.
    """
    small = SMALL if args.small else []
    plain = gpt2_small(
        args.batch_size, "--device", args.device, *small, total=args.global_batch_size
    )
    flags = [*plain, *args.trainer]
    modern = [*flags, "--preset", "modern-small"]
    settings = parse_settings("train_minimal", flags)
    device, precision, _ = device_of(settings)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    sides: dict[str, tuple[Any, ...]] = {"matmul": (build_matmul_peak, device.type, dtype)}
    if device.type == "cpu" and not args.small:
        sides["ours"] = (build_trainer, flags)
        sides["ours, recomputing"] = (build_trainer, [*flags, "--use-activation-checkpoint"])
        sides["Hugging Face"] = (build_hugging_face, plain)
        runs = side_by_side({name: Side(*side) for name, side in sides.items()}, args.repeats)
    else:
        on, auto = ["--compile", "on"], ["--micro-batch", "auto"]
        sides["ours"] = (build_trainer, [*flags, *on])
        sides["Hugging Face, compiled"] = (build_hugging_face, plain, True)
        sides["modern-small, Muon"] = (build_trainer, [*modern, *on])
        sides["ours, not compiled"] = (build_trainer, [*flags, "--compile", "off"])
        sides["ours, recomputing"] = (build_trainer, [*flags, *on, "--use-activation-checkpoint"])
        sides["Hugging Face"] = (build_hugging_face, plain)
        runs = one_by_one({name: Side(*side) for name, side in sides.items()}, args.repeats)
        where = flags.index("--batch-size")  # which --micro-batch auto chooses
        largest = {"ours, micro-batch auto": [*flags[:where], *flags[where + 2 :], *on, *auto]}
        runs |= one_by_one({k: Side(build_trainer, v) for k, v in largest.items()}, args.repeats)
    peak = sorted(runs.pop("matmul"))[args.repeats // 2]
    return _rows_of_train(runs, peak, settings, device)


def _rows_of_train(
    runs: dict[str, Any], peak: float, settings: Settings, device: torch.device
) -> list[dict[str, Any]]:
    most = peak_flops(Device(device, device_of(settings)[1], ""))
    if device.type == "cpu":  # which a run measures again and again, and keeps the highest
        most = max(most or 0.0, peak)
    tokens = settings.global_batch_size * settings.seq_len
    work = flops_per_token(settings.model, settings.seq_len) * tokens
    figures = {name: medians(some) for name, some in runs.items() if type(some) is list}
    theirs = [m["seconds"] for name, m in figures.items() if name.startswith("Hugging Face")]
    rows: list[dict[str, Any]] = []
    for name, some in runs.items():
        if name not in figures:
            rows.append({"side": f"{name}: {some}"})
            continue
        m = figures[name]
        rate = work / m["seconds"]
        row: dict[str, Any] = {"side": name, "tokens_per_s": tokens / m["seconds"]}
        row |= {"times_hf": min(theirs) / m["seconds"] if theirs else "n/a"}
        row |= {"gflop_per_s": rate / 1e9, "of_matmul_peak": rate / peak}
        row |= {"mfu": rate / most if most else "n/a", "peak_gb": m.pop("gb"), **m}
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows.append({"side": "matrix products alone", "gflop_per_s": peak / 1e9})
    return [{name: row.get(name, "") for name in names} for row in rows]


def profile_of(flags: list[str], steps: int) -> list[dict[str, Any]]:
    """The kernels, or on a CPU the operators, that take most of the time of our trainer's step."""
    step, parts, _ = make_trainer(flags)
    cuda = parts.device == "cuda"
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=activities(cuda)) as profiler:
        whole = sum(parts.time(step)["seconds"] for _ in range(steps)) * 1e3 / steps
    first = {"kernel": "whole step", "ms": whole, "share": 1.0, "calls": 1}
    return [first, *costliest(profiler, cuda, steps, whole)]


def bench_profile(args: BenchSettings) -> list[dict[str, Any]]:
    """Three steps of GPT-2 small, compiled: the 20 kernels that take most of their time."""
    small = [*SMALL, "--compile", "on"] if args.small else []
    flags = gpt2_small(args.batch_size, "--device", args.device, *small, *args.trainer)
    return in_new_process(profile_of, flags, 3)
