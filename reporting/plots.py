"""Pictures of runs, from their metrics, and of evaluated checkpoints."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting.evaluation_table import Evaluation
from reporting.run_curves import Column, RunCurves
from runtime.files import write_atomically


def draw_losses(runs: Sequence[RunCurves], picture: Path) -> None:
    """Draws training and validation loss over steps, with tokens along the top, as a PNG: the
    training loss of each record pale, its mean as a line, validation with its standard error.
    """
    from matplotlib.figure import Figure  # here, since only the end of a run needs it

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    many = len(runs) > 1
    for i, run in enumerate(runs):
        train, val = f"C{2 * i % 10}", f"C{2 * i % 10 if many else 1}"
        name = f"{run.name}, " if many else ""
        axes.plot(*_points(run.train, "train_loss"), color=train, alpha=0.3, linewidth=0.8)
        axes.plot(*_points(run.train, "smoothed"), color=train, label=f"{name}train, smoothed")
        if run.evals["step"]:
            axes.errorbar(
                *_points(run.evals, "val_loss"),
                yerr=[x or 0.0 for x in run.evals["val_loss_se"]],
                color=val,
                fmt="o--" if many else "o-",
                label=f"{name}validation",
                linewidth=1,
                markersize=3,
            )
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)")
    if limits := _limits(runs):
        axes.set_ylim(limits)
        axes.set_title("the first losses are above the picture", fontsize="small", loc="right")
    if per_step := _tokens_per_step(runs):
        to_tokens: Any = lambda steps: steps * per_step  # noqa: E731
        to_steps: Any = lambda tokens: tokens / per_step  # noqa: E731
        top = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
        top.set_xlabel("tokens seen")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(picture, dpi=120, format="png")


def _points(columns: dict[str, Column], name: str) -> tuple[list[float], list[float]]:
    """Steps and values; NaN, which leaves a gap, for a value that is missing."""
    values = [float("nan") if y is None else y for y in columns[name]]
    return [x or 0.0 for x in columns["step"]], values


def _tokens_per_step(runs: Sequence[RunCurves]) -> float:
    """The tokens of one step, if all runs have the same, else 0."""
    found = set()
    for run in runs:
        steps, tokens = run.train["step"], run.train["tokens"]
        if steps and steps[-1]:
            found.add((tokens[-1] or 0) / steps[-1])
    return found.pop() if len(found) == 1 else 0.0


def _limits(runs: Sequence[RunCurves]) -> tuple[float, float] | None:
    """The lowest and the highest loss to show, if the losses in the first tenth of a run are so far
    above all later ones that these could not be told apart, else None.
    """
    losses = {
        (step or 0.0, loss)
        for run in runs
        for columns, name in ((run.train, "train_loss"), (run.evals, "val_loss"))
        for step, loss in zip(columns["step"], columns[name], strict=True)
        if loss is not None
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
            [e.result.loss for e in curve if e.result],
            yerr=[e.result.loss_se for e in curve if e.result],
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
