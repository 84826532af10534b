"""Which learning rate is best at which width, and whether lr_width makes it the same for all."""

from __future__ import annotations

import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.common import BenchSettings
from dataset import open_data
from model import GPTModel
from runtime.device import pick_device, tune
from settings.command_line import parse_settings
from training.evaluation import evaluate
from training.optimizers import make_optimizer
from training.step import RunState, train_step
from training.time_budget import RATE_WIDTH, RATES

WIDTHS = (64, 128, 256, 512)
FACTORS = [2.0 ** (i / 2) for i in range(-5, 6)]  # around the rates of --minutes


def bench_rates(args: BenchSettings) -> tuple[list[dict[str, Any]], str]:
    """Validation losses by width and peak rate, with the learning rate as it is for all widths and
    with --lr-width 64; a last line says how far the best rates are from that of width 64.
    """
    widths = WIDTHS[:2] if args.small else WIDTHS
    factors = FACTORS[::4] if args.small else FACTORS
    grid = [
        (optimizer, scaled, width, RATES[optimizer] * factor)
        for width in reversed(widths)  # the slow ones first
        for optimizer in RATES
        for scaled in (True, False)
        for factor in factors
    ]
    cuda = torch.cuda.is_available() and args.device in ("auto", "cuda")
    workers = max(1, (os.cpu_count() or 2) - 2) if cuda else 1
    jobs = [(args.recipe_steps, *point) for point in grid]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        losses = dict(zip(grid, pool.map(_loss, jobs), strict=True))
    rows = []
    for optimizer in RATES:
        for scaled in (False, True):
            for width in widths:
                found = {
                    f"x {factor:.2f}": losses[optimizer, scaled, width, RATES[optimizer] * factor]
                    for factor in factors
                }
                best = best_factor(factors, list(found.values()))
                rate = {"lr_width": RATE_WIDTH if scaled else 0, "width": width}
                rows.append({"optimizer": optimizer, **rate, "best": f"x {best:.2f}", **found})
    return rows, _verdict(rows)


def best_factor(factors: list[float], losses: list[float]) -> float:
    """The factor at the minimum of the parabola, in log(factor), through the lowest loss and its
    neighbours.
    """
    i = min(range(len(losses)), key=lambda k: losses[k])
    if not 0 < i < len(losses) - 1:
        return factors[i]
    left, low, right = losses[i - 1 : i + 2]
    step = math.log(factors[i + 1] / factors[i])
    return factors[i] * math.exp(0.5 * step * (left - right) / (left - 2 * low + right))


def _verdict(rows: list[dict[str, Any]]) -> str:
    lines = []
    for optimizer in RATES:
        for scaled in (0, RATE_WIDTH):
            best = [
                float(row["best"][2:])
                for row in rows
                if row["optimizer"] == optimizer and row["lr_width"] == scaled
            ]
            far = max(max(b / best[0], best[0] / b) for b in best)
            lines.append(f"{optimizer}, lr_width {scaled}: within {far:.2f} times")
    return "; ".join(lines)


def _loss(job: tuple[int, str, bool, int, float]) -> float:
    """The validation loss, in nats per byte, of the quickstart model at another width and rate."""
    steps, optimizer, scaled, width, lr = job
    torch.set_num_threads(1 if torch.cuda.is_available() else torch.get_num_threads())
    flags = ["--d-model", str(width), "--n-heads", str(width // 32), "--optimizer", optimizer]
    flags += [
        "--lr",
        str(lr),
        "--lr-width",
        str(RATE_WIDTH if scaled else 0),
        "--precision",
        "auto",
    ]
    flags += ["--num-steps", str(steps), "--warmup-steps", str(steps // 10), "--compile", "off"]
    settings = parse_settings("train_minimal", flags)
    device = pick_device(settings.device, settings.precision)
    tune(device)
    train, val, settings = open_data(settings)
    model = GPTModel(settings.model, seed=0).to(device.torch_device)
    optimizer_of_run, state = make_optimizer(model, settings), RunState.fresh(device)
    while state.step < steps:
        batch = train.global_batch(state.step, settings)
        train_step(model, optimizer_of_run, batch, settings, state, device)
    return evaluate(model, val, 4 * settings.batch_size, device).loss
