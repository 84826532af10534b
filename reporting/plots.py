"""Pictures of runs, from their metrics files, and of evaluated checkpoints."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting.evaluation_table import Evaluation
from reporting.metrics_file import read_records
from runtime.files import write_atomically


def _limits(records: list[dict[str, Any]]) -> tuple[float, float] | None:
    """The lowest and the highest loss to show, if the losses in the first tenth of a run are so far
    above all later ones that these could not be told apart, else None.
    """
    losses = {
        (r["step"], r[name])
        for event, name in (("train", "train_loss"), ("eval", "val_loss"))
        for r in records
        if r["event"] == event and r[name] is not None
    }
    last = max((step for step, _ in losses), default=0)
    later = [loss for step, loss in losses if step > last / 10]
    if len(later) < 3:
        return None
    low, high = min(later), max(later)
    if max(loss for _, loss in losses) - low <= 2 * (high - low):
        return None
    margin = (high - low) / 20
    return low - margin, high + margin


def draw_losses(jsonl: Path, picture: Path) -> None:
    """Draws train and validation loss over steps, with tokens along the top, as a PNG. jsonl: the
    metrics file of the run; picture: the path of the PNG.
    """
    from matplotlib.figure import Figure  # here, since only the end of a run needs it

    records = read_records(jsonl)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for event, name, style in (("train", "train_loss", "-"), ("eval", "val_loss", "o-")):
        points = [
            (r["step"], r[name]) for r in records if r["event"] == event and r[name] is not None
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                style,
                label=name.replace("_", " "),
                linewidth=1,
                markersize=4,
            )
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)")
    if limits := _limits(records):
        axes.set_ylim(limits)
        axes.set_title("the first losses are above the picture", fontsize="small", loc="right")
    last = max((r for r in records if r.get("step")), key=lambda r: r["step"], default=None)
    if last:
        per_step = last["tokens"] / last["step"]
        top = axes.secondary_xaxis(
            "top", functions=(lambda s: s * per_step, lambda t: t / per_step)
        )
        top.set_xlabel("tokens seen")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=120)


def draw_evaluations(curves: Sequence[Sequence[Evaluation]], picture: Path) -> None:
    """Draws loss over steps with its standard error, one line for each curve, which is one run on
    one data set, by step. Writes a PNG at once. Raises OSError.
    """
    from matplotlib.figure import Figure  # here, since one checkpoint has no curve

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        first = min((e.checkpoint for e in curve), key=len)
        axes.errorbar(
            [e.step for e in curve],
            [e.result.loss for e in curve],
            yerr=[e.result.loss_se for e in curve],
            fmt="o-",
            label=f"{first} (run {curve[0].run_id})",
            linewidth=1,
            markersize=4,
            capsize=2,
        )
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token), with its standard error")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    write_atomically(picture, drawn.getvalue())
