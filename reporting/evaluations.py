"""Prints and records the results of eval.py. What is in a record or a row is in
evaluation_table.py.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from reporting.evaluation_table import (
    Evaluation,
    Row,
    as_csv,
    as_json,
    as_shown,
    curves,
    evaluation_lines,
    in_order,
)
from reporting.metrics_file import to_json
from reporting.plots import draw_evaluations
from runtime.console import aligned, say
from runtime.files import write_atomically
from runtime.setting_fields import UserError

_DRAW_SECONDS = 10.0  # between two pictures of checkpoints that are watched
_OTHER_TABLE = "another name for the table"


class EvalReport:
    """The output of eval.py: the terminal, eval.log, eval.jsonl and eval.png in the log folder, and
    the files of --csv and --json.
    """

    def __init__(self, log_dir: str, csv_file: str = "", json_file: str = "") -> None:
        """Raises UserError if a file cannot be written, before anything is evaluated."""
        self.folder = Path(log_dir)
        self.tables: dict[str, Callable[[list[Row]], str]] = {}
        self.tables |= {csv_file: as_csv} if csv_file else {}
        self.tables |= {json_file: as_json} if json_file else {}
        self.widths: list[int] = []  # of the columns of `say_row`
        self.drawn_at, self.drawn = -math.inf, False
        for name in ("eval.log", "eval.jsonl"):
            _said(partial(_try_to_write, self.folder / name), "--log-dir")
        for file in self.tables:
            _said(partial(_try_to_write, Path(file)), _OTHER_TABLE)

    def record(self, evaluation: Evaluation) -> None:
        """Appends the record to eval.jsonl. Raises UserError if that fails."""
        _said(lambda: self._append("eval.jsonl", [to_json(evaluation.record)]), "--log-dir")

    def say_row(self, evaluation: Evaluation) -> None:
        """Prints the row of one checkpoint, the first time with the names of the columns above."""
        row = as_shown(evaluation)
        rows = [list(row.values())] if self.widths else [list(row), list(row.values())]
        say("\n".join(aligned(rows, self.widths)))
        wanted = [max(map(len, column)) for column in zip(*rows, strict=True)]
        self.widths = [max(pair) for pair in zip(wanted, self.widths or wanted, strict=True)]

    def write_tables(self, evaluations: Sequence[Evaluation], last: bool = True) -> None:
        """Writes the files of --csv and --json anew, and draws the picture; if these are not the
        last evaluations, only where the one before is 10 s old. Raises UserError if that fails.
        """
        rows = [e.row for e in in_order(evaluations)]
        for file, text in self.tables.items():
            _said(partial(write_atomically, file, text(rows).encode()), _OTHER_TABLE)
        if last or time.monotonic() - self.drawn_at >= _DRAW_SECONDS:
            long = [curve for curve in curves(evaluations) if len(curve) > 2]
            if long:
                _said(lambda: draw_evaluations(long, self.folder / "eval.png"), "--log-dir")
                self.drawn = True
            self.drawn_at = time.monotonic()

    def finish(self, evaluations: Sequence[Evaluation], notes: Sequence[str] = ()) -> None:
        """Prints the results: lines for one checkpoint, a table for several, then the notes; the
        same goes to eval.log. Writes the tables. Raises UserError if that fails.
        """
        lines = [*evaluation_lines(in_order(evaluations)), *notes]
        say("\n".join(lines))
        stamped = [time.strftime("[%Y-%m-%d %H:%M:%S] ") + line for line in lines]
        _said(lambda: self._append("eval.log", stamped), "--log-dir")
        self.write_tables(evaluations)
        if len(evaluations) > 1:
            picture = [self.folder / "eval.png"] if self.drawn else []
            logs = [self.folder / "eval.log", self.folder / "eval.jsonl"]
            say(f"wrote {', '.join(map(str, [*logs, *self.tables, *picture]))}")

    def _append(self, name: str, lines: list[str]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)


def _said(write: Callable[[], object], instead: str) -> None:
    """Calls write(), and makes an OSError of it a UserError. instead: what to try."""
    try:
        write()
    except OSError as reason:
        raise UserError(
            f"cannot write {reason.filename}: {reason.strerror}; try {instead}"
        ) from reason


def _try_to_write(file: Path) -> None:
    """Raises OSError unless a file of this name can be written. Makes its folder, and no file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(file):
        open(file, "a").close()
        return
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as reason:
        raise OSError(reason.errno, reason.strerror, str(file)) from None
