"""How the time of a step grows with each dimension of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import (
    BenchSettings,
    Side,
    side_by_side,
)
from benchmarks.speed import build_trainer
from config import GPTConfig
from training.flops import flops_per_token

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
