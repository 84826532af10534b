"""Prints and records the results of eval.py."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting.metrics_file import to_json
from runtime.console import say
from runtime.setting_fields import UserError
from training.evaluation import EvalResult


def report_evaluations(
    log_dir: str,
    paths: Sequence[str],
    results: Sequence[EvalResult],
    data_of: Sequence[dict[str, Any]] = (),
    by_source: Sequence[dict[str, EvalResult]] = (),
) -> None:
    """Prints the results of eval.py, as lines for one checkpoint, as a table for several; appends
    them to eval.log and eval.jsonl. Raises UserError if those cannot be written.

    For each path: data_of, what it was evaluated on, as `TokenDataset.describe` returns it;
    by_source, the results of the single sources in that, by name.
    """
    lines = _evaluation_lines(paths, results, data_of, by_source)
    say("\n".join(lines))
    folder = Path(log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "eval.log", "a", encoding="utf-8") as text:
            text.writelines(time.strftime("[%Y-%m-%d %H:%M:%S] ") + line + "\n" for line in lines)
        with open(folder / "eval.jsonl", "a", encoding="utf-8") as jsonl:
            for i, (path, r) in enumerate(zip(paths, results, strict=True)):
                record = {"event": "eval", "checkpoint": path, **dataclasses.asdict(r)}
                if data_of:
                    record["data"] = data_of[i]
                if by_source and by_source[i]:
                    parts = {k: dataclasses.asdict(v) for k, v in by_source[i].items()}
                    record["sources"] = {k: json.loads(to_json(v)) for k, v in parts.items()}
                jsonl.write(to_json(record) + "\n")
    except OSError as reason:
        raise UserError(
            f"cannot write {reason.filename}: {reason.strerror}; try --log-dir"
        ) from reason


def _evaluation_lines(
    paths: Sequence[str],
    results: Sequence[EvalResult],
    data_of: Sequence[dict[str, Any]],
    by_source: Sequence[dict[str, EvalResult]],
) -> list[str]:
    labels = _data_labels(data_of)
    rows = [
        {
            "checkpoint": path,
            "avg_loss": f"{r.loss:.6f}",
            "loss_se": f"{r.loss_se:.6f}",
            "ppl": f"{r.ppl:.4f}",
            "bpb": "n/a" if r.bpb is None else f"{r.bpb:.6f}",
            "tokens": str(r.tokens),
        }
        for path, r in zip(paths, results, strict=True)
    ]
    if len(set(labels)) > 1:
        rows = [{**row, "data": label} for row, label in zip(rows, labels, strict=True)]
    if len(rows) == 1:
        lines = [f"{name}: {value}" for name, value in rows[0].items()]
    else:
        widths = {k: max(len(k), *(len(row[k]) for row in rows)) for k in rows[0]}
        header = {k: k for k in widths}
        lines = [
            "  ".join(row[k].ljust(widths[k]) for k in widths).rstrip() for row in (header, *rows)
        ]
    for path, sources in zip(paths, by_source, strict=False):
        lines += [
            f"{path} on {name}: avg_loss {r.loss:.6f}, ppl {r.ppl:.4f}, tokens {r.tokens}"
            for name, r in sources.items()
        ]
    return lines + _data_lines(data_of, labels)


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
