"""The report as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from reporting.run_curves import RunCurves, differences, summary_of
from runtime.console import aligned

_BARS, _WIDTH = "▁▂▃▄▅▆▇█", 24
_COLUMNS = (
    "steps",
    "validation loss",
    "best",
    "bits per byte",
    "training loss, smoothed",
    "tokens/s",
    "time",
)


def sparkline(values: Sequence[float | None], width: int = _WIDTH) -> str:
    """The values as at most `width` bars, each the mean of an equal part of them; the lowest value
    is the lowest bar. Like the picture, it leaves out first values far above the others: they are
    shown at full height.
    """
    finite = [x for x in values if x is not None]
    if not finite:
        return ""
    width = min(width, len(finite))
    parts = [
        finite[len(finite) * i // width : len(finite) * (i + 1) // width] for i in range(width)
    ]
    means = [sum(part) / len(part) for part in parts]
    return sketch(means, 1, min(means), max(means[len(means) // 10 :]))[0]


def sketch(
    values: Sequence[float], rows: int, low: float = 0.0, high: float | None = None
) -> list[str]:
    """The values as a chart of bars, one column each, as lines from above: `low` is the lowest bar,
    `high`, by default the largest value, fills all rows.
    """
    high = max(values) if high is None else high
    heights = rows * len(_BARS) - 1
    scale = heights / (high - low) if high > low else 0.0
    bars = [min(heights, round((x - low) * scale)) for x in values]
    lines = []
    for row in reversed(range(rows)):
        levels = [bar - row * len(_BARS) for bar in bars]
        lines.append(
            "".join(" " if n < 0 else _BARS[min(n, len(_BARS) - 1)] for n in levels).rstrip()
        )
    return lines


def report_text(runs: Sequence[RunCurves]) -> str:
    """The runs as a table, with the course of their losses and the settings that differ."""
    different = differences(runs)[:8] if len(runs) > 1 else []
    rows = [["run", *_COLUMNS, "training loss, on a scale of its own"]]
    for run in runs:
        summary = summary_of(run)
        cells = [summary[name] for name in _COLUMNS]
        rows.append([run.name, *cells, sparkline(run.train["smoothed"])])
    lines = aligned(rows)
    if different:
        lines += ["", *aligned([["run", *different], *(_values(run, different) for run in runs)])]
    for run in runs:
        lines += [f"{run.name}: {warning['text']}" for warning in run.warnings]
    return "\n".join(lines)


def _values(run: RunCurves, names: Sequence[str]) -> list[str]:
    return [run.name, *(str(run.settings.get(name, "")) for name in names)]
