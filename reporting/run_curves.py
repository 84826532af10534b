"""Reads the metrics files of runs for the report and the picture: columns of numbers, and what the
run was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reporting.metrics_file import read_records, run_as_known
from runtime.console import duration
from runtime.setting_fields import UserError
from settings.paths import variant_path

Column = list[float | None]  # null in the file, such as for NaN, is None
_TRAIN = ("step", "tokens", "train_loss", "lr", "grad_norm")
_TIMES = ("elapsed", "tokens_per_sec", "mfu", "memory_gb", "data_wait_seconds")
_EVAL = ("step", "tokens", "val_loss", "val_loss_se", "val_ppl", "val_bpb")
_SMOOTHED = (1 / 20, 4, 200)  # the smoothed loss looks back over this part; at least, at most


@dataclass
class RunCurves:
    """One run, as its metrics file tells. train, evals: columns by field name, of equal length; the
    fields of "time" stand among them, and train["smoothed"] is the mean training loss.
    """

    name: str
    path: Path
    about: dict[str, Any] = field(default_factory=dict)  # the first record, as last resumed
    train: dict[str, Column] = field(default_factory=dict)
    evals: dict[str, Column] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)  # steps

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run, by name."""
        return dict(self.about.get("settings", {}))

    def last(self, name: str) -> float | None:
        """The last value of a column of `train` or `evals`; None if there is none."""
        column = self.evals.get(name, []) if name in _EVAL[2:] else self.train.get(name, [])
        return column[-1] if column else None

    def steps(self) -> int:
        """The last step that the metrics tell of."""
        ends = [column["step"][-1] for column in (self.train, self.evals) if column["step"]]
        return max([int(x or 0) for x in ends] + self.resumed, default=0)

    def state(self) -> str:
        """Whether the run has finished, else how long ago it wrote its last record."""
        if self.steps() == self.settings.get("num_steps"):
            return "finished"
        ago = max(0.0, time.time() - self.path.stat().st_mtime)
        return f"at step {self.steps()}; its last record is of {duration(ago)} ago"

    def best(self) -> int | None:
        """The index of the evaluation with the lowest loss, of the first such; None without any."""
        losses = [math.inf if x is None else x for x in self.evals.get("val_loss", [])]
        return losses.index(min(losses)) if losses and min(losses) < math.inf else None

    def best_checkpoint(self) -> str:
        """Where the weights with the lowest validation loss are, as far as the metrics tell."""
        path, best = self.settings.get("checkpoint_path", ""), self.best()
        if not path or best is None or not self.evals["step"][best]:
            return ""
        return str(variant_path(path, "best"))


def read_run(path: Path, name: str = "") -> RunCurves:
    """Reads a metrics file. name: of the run in the report; "" = that of the file. Raises UserError
    if the file cannot be read or is not one of a run.
    """
    try:
        records = read_records(path)
    except OSError as reason:
        raise UserError(f"cannot read {path}: {reason.strerror}") from None
    if not records or records[0]["event"] != "run":
        raise UserError(
            f"{path} is not the metrics file of a run; a run names its own at its end, such as "
            "logs/train_minimal.jsonl"
        )
    of = {
        kind: [r for r in records if r["event"] == kind]
        for kind in ("train", "eval", "sample", "warning", "resume")
    }
    run = RunCurves(
        name or path.stem,
        path,
        run_as_known(records),
        _columns(of["train"], _TRAIN),
        _columns(of["eval"], _EVAL),
        of["sample"],
        of["warning"],
        [int(r["step"]) for r in of["resume"]],
    )
    run.train["smoothed"] = smoothed(run.train["train_loss"])
    return run


def runs_in(folder: Path) -> list[Path]:
    """The metrics files of runs in a folder, the oldest first. Raises UserError without any."""
    files = [p for p in folder.glob("*.jsonl") if not p.name.endswith(".cut.jsonl")]
    found = [p for p in files if p.is_file() and _is_of_run(p)]
    if not found:
        raise UserError(
            f"{folder} has no metrics file of a run; they are in the folder of --log-dir, usually "
            "logs, and not beside the checkpoints"
        )
    return sorted(found, key=lambda p: (p.stat().st_mtime, p.name))


def _is_of_run(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(20).startswith(b'{"event": "run"')


def _number(value: object) -> float | None:
    fine = isinstance(value, (int, float)) and math.isfinite(value)
    return value if fine else None  # type: ignore[return-value]


def _columns(records: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Column]:
    """The columns of these names, and of the timings in `time`. An older record lacks some."""
    columns = {name: [_number(r.get(name)) for r in records] for name in names}
    for name in _TIMES:
        columns[name] = [_number(r.get("time", {}).get(name)) for r in records]
    return columns


def smoothed(values: Sequence[float | None]) -> Column:
    """The exponential moving average of the values, which looks back over a twentieth of them, but
    at least over 4 and not over more than 200, with the bias of its start divided out (Kingma and
    Ba 2015, sec. 3). None counts as no value.
    """
    part, least, most = _SMOOTHED
    keep = 1 - 1 / min(most, max(least, len(values) * part))
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        if value is not None:
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        found.append(mean / weight if weight else None)
    return found


def thinned(columns: dict[str, Column], by: str, most: int) -> dict[str, Column]:
    """The columns at no more than about `most` of their rows: the first and the last, and of each
    of equally many rows between them those with the lowest and the highest value of the column
    `by`. No value is changed.
    """
    values = columns[by]
    if len(values) <= most:
        return columns
    size, keep = math.ceil(2 * len(values) / most), {0, len(values) - 1}
    for start in range(0, len(values), size):
        rows = [i for i in range(start, min(start + size, len(values))) if values[i] is not None]
        if rows:
            keep |= {
                min(rows, key=lambda i: values[i] or 0),
                max(rows, key=lambda i: values[i] or 0),
            }
    return {name: [column[i] for i in sorted(keep)] for name, column in columns.items()}


def differences(runs: Sequence[RunCurves]) -> list[str]:
    """The names of the settings that are not the same in all runs, in the order of the first."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [n for n in names if len({repr(run.settings.get(n)) for run in runs}) > 1]


def summary_of(run: RunCurves) -> dict[str, str]:
    """What a run has reached, as texts by what they are: also the columns of `report.py --text`."""
    best, last = run.best(), run.last("val_loss")
    error = run.last("val_loss_se")
    elapsed = [x for x in (*run.train["elapsed"], *run.evals["elapsed"]) if x is not None]
    rates = [x for x in run.train["tokens_per_sec"] if x is not None]
    at = "" if best is None else f" at step {run.evals['step'][best]:.0f}"
    return {
        "steps": f"{run.steps()} of {run.settings.get('num_steps', '?')}",
        "validation loss": "none" if last is None else f"{last:.4f} ± {error or 0:.4f}",
        "best": "none" if best is None else f"{run.evals['val_loss'][best]:.4f}{at}",
        "perplexity": _figure(run.last("val_ppl"), ".4g"),
        "bits per byte": _figure(run.last("val_bpb"), ".4f"),
        "training loss, smoothed": _figure(run.last("smoothed"), ".4f"),
        "tokens": _figure(run.last("tokens"), ",.0f"),
        "time": duration(max(elapsed)) if elapsed else "none",
        "tokens/s": f"{sorted(rates)[len(rates) // 2]:,.0f}" if rates else "none",
        "mfu": _figure(run.last("mfu"), ".1%"),
        "memory": _figure(run.last("memory_gb"), ".2f") + (" GB" if run.last("memory_gb") else ""),
        "warnings": str(len(run.warnings)),
    }


def _figure(value: float | None, shape: str) -> str:
    return "none" if value is None else format(value, shape)
