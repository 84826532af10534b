"""Pictures of runs, from their metrics files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file. Lines that are none are left out, such as the last one that a
    crash cut short.
    """
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "event" in record:
            records.append(record)
    return records


def run_of(path: Path) -> str:
    """The id of the run that a metrics file is of; "" if its first line does not say."""
    with open(path, "rb") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return ""
    return str(first.get("run_id", "")) if isinstance(first, dict) else ""


def comparable(path: Path) -> list[dict[str, Any]]:
    """The records without what may differ between two runs that are the same: timings, names of
    files and of the run itself.
    """
    records = read_records(path)
    first = [{k: r[k] for k in ("event", "train", "val")} for r in records[:1]]
    return first + [{k: v for k, v in r.items() if k != "time"} for r in records[1:]]


def first_difference(one: Path, other: Path) -> str:
    """Where the metrics of two runs first differ; "" if they are the same."""
    ours, theirs = comparable(one), comparable(other)
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            names = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
            what = ", ".join(f"{k} {a.get(k)} | {b.get(k)}" for k in names)
            return f"step {a.get('step', 'none')}: {what}"
    return "" if len(ours) == len(theirs) else f"{len(ours)} | {len(theirs)} records"


def draw_losses(jsonl: Path, picture: Path) -> None:
    """Train and validation loss over steps, with tokens along the top, as a PNG."""
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
