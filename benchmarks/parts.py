"""Speed and memory of single parts: the loss, the optimizers, evaluation."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    BenchSettings,
    Side,
    build_matmul_peak,
    give_memory_back,
    medians,
    memory,
    one_by_one,
    side_by_side,
    synchronize,
)
from benchmarks.speed import device_of, gpt2_small
from dataset import ToyRandomDataset, open_data
from loss import next_token_loss
from model import GPTModel
from runtime.device import pick_device, tune
from settings.command_line import parse_settings
from training.evaluation import evaluate
from training.flops import flops_per_token
from training.optimizers import Together, make_optimizer


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The summed loss with all logits at once."""
    logits = F.linear(hidden, weight).float()[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours."""
    return next_token_loss(hidden, weight, labels)[0]


def fused_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours, as it is where the model is compiled."""
    return next_token_loss(hidden, weight, labels, fused=True)[0]


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch.nn.functional.linear_cross_entropy, since torch 2.13."""
    rows = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.linear_cross_entropy(rows[0], weight, rows[1], reduction="sum")


def liger_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The fused kernel of the package liger-kernel."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    rows = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    half = torch.is_autocast_enabled(hidden.device.type)
    given = [x.bfloat16() if half else x for x in (weight, rows[0])]
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(*given, rows[1])


def known_losses(device: str) -> dict[str, Callable[..., Tensor]]:
    """The ways to compute the loss that can be had here."""
    ways = {"plain": plain_loss, "chunked": chunked_loss}
    if device == "cuda":
        ways["chunked, fused"] = fused_loss
        if hasattr(F, "linear_cross_entropy"):
            ways["torch's linear_cross_entropy"] = torch_loss
        if importlib.util.find_spec("liger_kernel"):
            ways["liger-kernel"] = liger_loss
    return ways


def _loss_problem(tokens: int, device: str, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, tokens // 4, 768, generator=draw)
    weight = torch.randn(vocab_size, 768, generator=draw) * 0.05
    labels = torch.randint(vocab_size, hidden.shape[:2], generator=draw)
    return hidden.to(device), weight.to(device), labels.to(device)


def build_loss(
    loss: Callable[..., Tensor], tokens: int, vocab_size: int, device: str, dtype: torch.dtype
) -> Callable[[], dict[str, float]]:
    """Loss and both gradients of `tokens` tokens: seconds, and GB beyond inputs and gradients."""
    inputs = _loss_problem(tokens, device, vocab_size)
    given = [x.requires_grad_() for x in inputs[:2]]
    give_memory_back()
    if device == "cpu":
        tune(pick_device("cpu"))
    before = memory("VmRSS") + sum(x.numel() * 4 / 1e6 for x in given)

    def run() -> dict[str, float]:
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            value = loss(*inputs)
        torch.autograd.grad(value, given)
        synchronize(device)
        seconds = time.perf_counter() - start
        if device == "cuda":
            most = torch.cuda.max_memory_allocated() - sum(x.nbytes for x in (*inputs, *given))
            return {"seconds": seconds, "gb": most / 1e9}
        return {"seconds": seconds, "gb": (memory("VmHWM") - before) / 1e3}

    return run


def loss_errors(
    loss: Callable[..., Tensor], vocab_size: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Relative errors against float64 of the loss and, in norm, of both gradients; 1024 tokens."""
    hidden, weight, labels = _loss_problem(1024, device, vocab_size)

    def values(h: Tensor, w: Tensor, way: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        given = (h.requires_grad_(), w.requires_grad_())
        value = way(*given, labels)
        return value.detach(), *torch.autograd.grad(value, given)

    exact = values(hidden.double(), weight.double(), plain_float64)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        found = values(hidden, weight, loss)
    names = ("error_loss", "error_d_hidden", "error_d_weight")
    return {
        name: float((f.double() - e).norm() / e.norm())
        for name, f, e in zip(names, found, exact, strict=True)
    }


def plain_float64(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The reference."""
    logits = F.linear(hidden, weight)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


def bench_loss(args: BenchSettings) -> list[dict[str, Any]]:
    """The chunked loss against the plain one, 4096 tokens (on a GPU 32768) x 50257 x 768."""
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    tokens, vocab_size = (64, 500) if args.small else (32768 if device == "cuda" else 4096, 50257)
    ways = known_losses("cuda" if args.small else device)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        sides = {k: Side(build_loss, w, tokens, vocab_size, device, dtype) for k, w in ways.items()}
        for name, runs in one_by_one(sides, args.repeats, warm_up=3).items():
            kind = f"{name}, {str(dtype).removeprefix('torch.')}"
            if type(runs) is not list:
                rows.append({"side": f"{kind}: {runs}"})
                continue
            errors = loss_errors(ways[name], vocab_size, device, dtype)
            rows.append({"side": kind, **medians(runs), **errors})
    return [{name: row.get(name, "") for name in rows[0]} for row in rows]


def build_optimizer_step(flags: list[str], kind: str) -> Callable[[], float]:
    """Seconds of one optimizer step with random gradients: "adamw", "muon" in float32, "bf16" for
    the same with --bf16, or "torch" for torch.optim.Muon on the matrices and AdamW on the rest.
    """
    precision = "bf16" if kind in ("bf16", "adamw") else "fp32"
    more = ["--optimizer", "muon", "--precision", precision]
    args = parse_settings("train_minimal", [*flags, *more])
    _, _, args = open_data(args)
    device = pick_device(args.device)
    tune(device)
    model = GPTModel(args.model, seed=0).to(device.torch_device)
    if kind == "adamw":
        args = dataclasses.replace(args, optimizer="adamw")
    optimizer = make_optimizer(model, args)
    optimizers: list[torch.optim.Optimizer] = [optimizer]
    if kind == "torch":
        assert isinstance(optimizer, Together)
        muon, adamw = optimizer.parts
        optimizers = [torch.optim.Muon(muon.param_groups[0]["params"]), adamw]
    for p in model.parameters():
        p.grad = torch.randn_like(p)

    def run() -> float:
        synchronize(device.torch_device.type)
        start = time.perf_counter()
        for each in optimizers:
            each.step()
        synchronize(device.torch_device.type)
        return time.perf_counter() - start

    return run


def bench_optim(args: BenchSettings) -> list[dict[str, Any]]:
    """One optimizer step of GPT-2 small and of the quickstart model."""
    rows, there = [], ["--device", args.device]
    models = {"gpt2-small": gpt2_small(1, *there), "quickstart": there}
    if args.small:
        del models["gpt2-small"]
    for model, flags in models.items():
        sides = {
            k: Side(build_optimizer_step, flags, k) for k in ("adamw", "muon", "bf16", "torch")
        }
        runs = side_by_side(sides, args.repeats)
        times = {k: sorted(some)[args.repeats // 2] for k, some in runs.items()}
        names = {
            "adamw": "AdamW, fused",
            "muon": "Muon, ours",
            "bf16": "Muon, ours, --bf16",
            "torch": "torch.optim.Muon, in bfloat16",
        }
        for kind, seconds in times.items():
            row = {"model": model, "optimizer": names[kind], "ms": seconds * 1e3}
            rows.append({**row, "times_ours": seconds / times["muon"]})
    return rows


def build_evaluation(batch: int, flags: list[str]) -> Callable[[], float]:
    """Tokens per second of `evaluate` on GPT-2 small."""
    args = parse_settings("train_minimal", flags)
    device = pick_device(args.device, args.precision)
    tune(device)
    model = GPTModel(args.model, seed=0).to(device.torch_device)
    val = ToyRandomDataset(50257, 1024, num_tokens=2 * batch * 1023 + 1)

    def run() -> float:
        start = time.perf_counter()
        tokens = evaluate(model, val, batch, device).tokens
        return tokens / (time.perf_counter() - start)

    return run


def bench_eval(args: BenchSettings) -> list[dict[str, Any]]:
    """Evaluation of GPT-2 small against the matrix products of its forward pass alone."""
    flags = gpt2_small(args.batch_size, *args.trainer)
    settings = parse_settings("train_minimal", flags)
    device, precision, _ = device_of(settings)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    sides = {
        "matmul": Side(build_matmul_peak, device.type, dtype),
        "evaluate": Side(build_evaluation, args.batch_size, flags),
    }
    found = {
        k: sorted(runs)[args.repeats // 2] for k, runs in side_by_side(sides, args.repeats).items()
    }
    limit = found["matmul"] / (flops_per_token(settings.model, 1024) / 3)
    return [
        {"side": "matrix products alone", "tokens_per_s": limit, "of_limit": 1.0},
        {
            "side": "evaluate",
            "tokens_per_s": found["evaluate"],
            "of_limit": found["evaluate"] / limit,
        },
    ]
