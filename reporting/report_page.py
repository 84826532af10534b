"""The report: one HTML page about runs, which needs nothing but itself.

The charts are SVG drawn by report_page.js. A plotting library was not embedded: plotly's script
alone has over 4 MB, bokeh's over 1 MB, and neither follows a browser's dark mode or prints.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reporting.run_curves import Column, RunCurves, differences, summary_of, thinned
from runtime.files import write_atomically

_POINTS = 2000  # of a line; more could not be told apart, and the page would grow
_SAMPLES = 20  # of a run, the last ones
_HERE = Path(__file__).resolve().parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_SHOWN = {
    "train": ("step", "tokens", "elapsed", "train_loss", "smoothed", "lr", "grad_norm"),
    "evals": ("step", "tokens", "elapsed", "val_loss", "val_loss_se"),
}


def write_report(runs: Sequence[RunCurves], path: Path, reload_seconds: float = 0) -> None:
    """Writes the report of the runs; a browser that loads it meanwhile gets the page of before.
    reload_seconds: after how long the page loads itself anew; 0 = never. Raises OSError.
    """
    write_atomically(path, report_page(runs, reload_seconds).encode())


def report_page(runs: Sequence[RunCurves], reload_seconds: float = 0) -> str:
    """The report as HTML."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    data = {"runs": [_numbers(run) for run in runs], "reload_seconds": reload_seconds}
    # In a script element, only "<" could end it.
    numbers = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = [
        _section("Runs", _table_of_runs(runs)),
        _section("Warnings and resumes", _warnings(runs)),
        _section("Settings that differ" if len(runs) > 1 else "Settings", _settings(runs)),
        _section("Environment", _environments(runs)),
        _section("Samples", _samples(runs)),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{(_HERE / "report_page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p class="dim">{html.escape(_notes(runs))}</p>
<div class="controls">
<label>over <select id="x"><option value="step">steps</option><option value="tokens">tokens</option>
<option value="elapsed">seconds</option></select></label>
<label><input type="checkbox" id="log"> logarithmic</label>
<label><input type="checkbox" id="all"> first losses too</label>
<button id="reset">reset zoom</button>
<span class="dim">drag over a chart to zoom</span>
</div>
<noscript><p class="warn">The charts need JavaScript; the tables below do not.</p></noscript>
<div class="charts" id="charts"></div>
<div class="tables">
{"".join(parts)}</div>
<script type="application/json" id="data">{numbers}</script>
<script>
{(_HERE / "report_page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _numbers(run: RunCurves) -> dict[str, Any]:
    """What the charts show of a run."""
    train, evals = (
        thinned(run.train, "train_loss", _POINTS),
        thinned(run.evals, "val_loss", _POINTS),
    )
    columns: dict[str, dict[str, Column]] = {"train": train, "evals": evals}
    found: dict[str, Any] = {"name": run.name}
    for part, names in _SHOWN.items():
        found[part] = {name: columns[part][name] for name in names}
    found["train"]["tokens_per_sec"] = train["tokens_per_sec"]
    return found


def _notes(runs: Sequence[RunCurves]) -> str:
    """How far the runs are, and what of them is shown."""
    states = "; ".join(f"{run.name}: {run.state()}" for run in runs[:8])
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {states}{'; ...' if len(runs) > 8 else ''}."
    longest = max(len(run.train["step"]) for run in runs)
    if longest <= _POINTS:
        return text
    return (
        f"{text} Of up to {longest:,} records of a run, the charts show about {_POINTS:,}: those "
        "with the lowest and the highest loss of each stretch. The smoothed loss is of all."
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}\n</section>\n" if content else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td{_kind(c)}>{c}</td>" for c in row) + "</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _kind(cell: str) -> str:
    return ' class="number"' if cell[:1].isdigit() or cell[:1] == "-" else ""


def _swatch(runs: Sequence[RunCurves], i: int) -> str:
    name = html.escape(runs[i].name)
    return f'<span class="swatch" style="background:var(--c{i % 8})"></span>{name}'


def _table_of_runs(runs: Sequence[RunCurves]) -> str:
    names = ["run", *summary_of(runs[0]), "best checkpoint"]
    rows = [
        [
            _swatch(runs, i),
            *map(html.escape, summary_of(r).values()),
            html.escape(r.best_checkpoint()),
        ]
        for i, r in enumerate(runs)
    ]
    turned = [[name, *(row[k] for row in rows)] for k, name in enumerate(names)]
    note = (
        "± is the standard error of the validation loss, with windows of text as the samples. Runs "
        "that were validated on the same tokens differ by less chance than that: the same windows "
        "are hard for both."
    )
    return f'{_table(turned[0], turned[1:])}<p class="dim">{note}</p>'


def _warnings(runs: Sequence[RunCurves]) -> str:
    lines = [
        f"<li>{_swatch(runs, i)}: {html.escape(str(w['text']))}</li>"
        for i, run in enumerate(runs)
        for w in run.warnings
    ]
    lines += [
        f'<li class="dim">{_swatch(runs, i)}: resumed at step {step}</li>'
        for i, run in enumerate(runs)
        for step in run.resumed
    ]
    return f'<ul class="warn">{"".join(lines)}</ul>' if lines else ""


def _settings(runs: Sequence[RunCurves]) -> str:
    different = differences(runs) if len(runs) > 1 else []
    names = dict.fromkeys(name for run in runs for name in run.settings)
    header = ["setting", *(_swatch(runs, i) for i in range(len(runs)))]

    def table(some: Iterable[str]) -> str:
        rows = [[html.escape(n), *(_value(r.settings.get(n)) for r in runs)] for n in some]
        return _table(header, rows)

    everything = table(names)
    if len(runs) == 1:
        return f"<details open><summary>{len(names)} settings</summary>{everything}</details>"
    shown = table(different) if different else "<p>None: all settings are the same.</p>"
    return f"{shown}<details><summary>all {len(names)} settings</summary>{everything}</details>"


def _value(value: object) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return html.escape("" if value is None else str(value))


def _environments(runs: Sequence[RunCurves]) -> str:
    about = [
        {"run id": r.about.get("run_id"), "parameters": r.about.get("parameters")} for r in runs
    ]
    for found, run in zip(about, runs, strict=True):
        found |= {
            f"{part} data": run.about.get(part, {}).get("source") for part in ("train", "val")
        }
        found |= run.about.get("environment", {})
    names = dict.fromkeys(name for found in about for name in found)
    rows = [[html.escape(n), *(_value(found.get(n)) for found in about)] for n in names]
    return _table(["", *(_swatch(runs, i) for i in range(len(runs)))], rows)


def _samples(runs: Sequence[RunCurves]) -> str:
    parts = []
    for i, run in enumerate(runs):
        for sample in run.samples[-_SAMPLES:]:
            text = html.escape(str(sample["text"]))
            parts.append(f"<p>{_swatch(runs, i)}, step {sample['step']}</p><pre>{text}</pre>")
    return "".join(parts)
