"""One evaluated checkpoint, and tables of several: for the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reporting.metrics_file import to_json
from runtime.console import aligned
from training.evaluation import EvalResult
from training.tasks import TaskScores

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What eval.py found out about one checkpoint."""

    checkpoint: str  # its path
    run_id: str
    step: int
    result: EvalResult | None  # None: only tasks were scored
    seconds: float = 0.0  # that the evaluation took, without reading the checkpoint and the data
    data: dict[str, Any] = field(default_factory=dict)  # as `TokenDataset.describe` returns it
    sources: dict[str, EvalResult] = field(default_factory=dict)  # single ones of a mixture
    also: tuple[str, ...] = ()  # paths of other files that hold the same state
    tasks: dict[str, TaskScores] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """The record in eval.jsonl."""
        found = {
            "event": "eval",
            "checkpoint": self.checkpoint,
            "also": list(self.also),
            "run_id": self.run_id,
            "step": self.step,
            **(dataclasses.asdict(self.result) if self.result else {}),
            "data": self.data,
            "time": {"seconds": self.seconds},
        }
        if self.sources:
            parts = {k: dataclasses.asdict(v) for k, v in self.sources.items()}
            found["sources"] = {k: json.loads(to_json(v)) for k, v in parts.items()}
        if self.tasks:
            found["tasks"] = {name: scores.record for name, scores in self.tasks.items()}
        return found

    @property
    def task_metrics(self) -> dict[str, float]:
        """The scores of tasks without their standard errors: `hellaswag/acc` and so on."""
        return {
            f"{name}/{metric}": value
            for name, scores in self.tasks.items()
            for metric, value in scores.values.items()
        }

    @property
    def values(self) -> dict[str, float | None]:
        """The results by their names, for Weights & Biases."""
        r = self.result
        losses = {"loss": r.loss, "ppl": r.ppl, "bpb": r.bpb} if r else {}
        return {**losses, **self.task_metrics}

    @property
    def row(self) -> Row:
        """The row of the table as --csv and --json write it, with numbers as they are."""
        r, d = self.result, self.data
        return {
            "checkpoint": self.checkpoint,
            "also": list(self.also),
            "run_id": self.run_id,
            "step": self.step,
            "avg_loss": r and r.loss,
            "loss_se": r and r.loss_se,
            "ppl": r and r.ppl,
            "bpb": r and r.bpb,
            "tokens": r and r.tokens,
            "seconds": self.seconds,
            **self.task_metrics,
            "data": f"{d['source']}, tokens {d['start']}..{d['stop'] - 1}" if d else "",
        }


def in_order(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations sorted by run and step; the runs are in the order of their first ones."""
    runs = list(dict.fromkeys(e.run_id for e in evaluations))
    return sorted(evaluations, key=lambda e: (runs.index(e.run_id), e.step))


def as_csv(rows: list[Row]) -> str:
    """The table as CSV: full precision, an empty field for what is not known."""
    text = io.StringIO()
    names = list(rows[0]) if rows else []
    table = csv.DictWriter(text, names, lineterminator="\n")
    if rows:
        table.writeheader()
    table.writerows({**row, "also": "; ".join(row["also"])} for row in rows)
    return text.getvalue()


def as_json(rows: list[Row]) -> str:
    """The table as a JSON list of objects, one a line; numbers that JSON lacks become null."""
    return "[\n" + ",\n".join(map(to_json, rows)) + "\n]\n"


def curves(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """The evaluations of each run on each data set, by step."""
    evaluations = [e for e in evaluations if e.result]
    labels = _data_labels([e.data for e in evaluations])
    found: dict[tuple[str, str], list[Evaluation]] = {}
    for e, label in zip(evaluations, labels, strict=True):
        found.setdefault((e.run_id, label), []).append(e)
    return [sorted(curve, key=lambda e: e.step) for curve in found.values()]


def as_shown(e: Evaluation) -> dict[str, str]:
    """The row of one checkpoint as the terminal shows it."""
    r = e.result
    return {
        "checkpoint": e.checkpoint,
        "step": str(e.step),
        "avg_loss": f"{r.loss:.6f}" if r else "n/a",
        "loss_se": f"{r.loss_se:.6f}" if r else "n/a",
        "ppl": f"{r.ppl:.4f}" if r else "n/a",
        "bpb": "n/a" if r is None or r.bpb is None else f"{r.bpb:.6f}",
        "tokens": str(r.tokens) if r else "n/a",
        "seconds": f"{e.seconds:.1f}",
        **{name: f"{value:.4f}" for name, value in e.task_metrics.items()},
    }


def evaluation_lines(evaluations: Sequence[Evaluation]) -> list[str]:
    """What eval.py prints at its end: lines for one checkpoint, a table for several."""
    labels = _data_labels([e.data for e in evaluations if e.data])
    rows = [as_shown(e) for e in evaluations]
    if len(set(labels)) > 1:
        rows = [{**row, "data": label} for row, label in zip(rows, labels, strict=True)]
    if len(rows) == 1:  # who parses these lines knows no others
        (one,) = evaluations
        left_out = {"step", "seconds", *one.task_metrics}
        left_out |= set() if one.result else rows[0].keys() - {"checkpoint"}
        lines = [f"{k}: {v}" for k, v in rows[0].items() if k not in left_out]
        lines += [scores.line(name) for name, scores in one.tasks.items()]
    else:
        lines = aligned([list(row) for row in rows[:1]] + [list(row.values()) for row in rows])
    for e in evaluations:
        lines += [
            f"{e.checkpoint} on {name}: avg_loss {r.loss:.6f}, ppl {r.ppl:.4f}, tokens {r.tokens}"
            for name, r in e.sources.items()
        ]
    lines += [f"{name}: the same state as {e.checkpoint}" for e in evaluations for name in e.also]
    return lines + _data_lines([e.data for e in evaluations if e.data], labels)


def _data_labels(data_of: Sequence[dict[str, Any]]) -> list[str]:
    """A number for each description of data: the same number where the same tokens were scored,
    wherever they lie on disk.
    """
    names: dict[str, str] = {}
    keys = [repr([v for k, v in sorted(d.items()) if k != "source"]) for d in data_of]
    return [names.setdefault(key, str(len(names) + 1)) for key in keys]


def _data_lines(data_of: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    """The lines that say what data the labels stand for, and whether rows can be compared."""
    tokenizers = {d.get("tokenizer", "") for d in data_of}
    about = {
        label: f"{d['source']}, tokens {d['start']}..{d['stop'] - 1}"
        + (f" of tokenizer {d['tokenizer'][:12] or 'unknown'}" if len(tokenizers) > 1 else "")
        for label, d in reversed(list(zip(labels, data_of, strict=True)))
    }
    if len(about) < 2:
        return [f"data: {text}" for text in about.values()]
    lines = [f"data {label}: {about[label]}" for label in sorted(about, key=int)]
    if len(tokenizers) > 1:
        advice = (
            "loss and ppl are per token, and these tokenizers make other tokens; bits per byte "
            "(bpb) can be compared, where the whole of the same text was scored"
        )
    else:
        advice = (
            "rows of different data can't be compared; --val-data or --val-npy gives all "
            "checkpoints the same"
        )
    return [*lines, advice]
