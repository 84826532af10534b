"""The metrics of a run: a file of JSON records, one a line, which is the truth about the run. The
terminal, the picture and Weights & Biases show numbers of these records.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from config import Settings
from runtime.files import write_atomically
from runtime.locks import hold
from settings.paths import archive_existing, free_number, log_base
from training.step import RunState

_PASSING = ("resume", "settings", "warning")  # events of how a run went, not of what it computed


class MetricsFile:
    """The metrics file of one run, which no other run writes to. Messages for the log are left in
    `state.pending_messages`.
    """

    def __init__(self, args: Settings, state: RunState) -> None:
        """Opens the file. A resumed run continues its own, under whatever name in the folder that
        is; a file of another run is renamed. Raises UserError if another run has the file open, and
        OSError if it cannot be written.
        """
        base = log_base(args)
        base.parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(f"{base}.jsonl")
        self.kept: list[dict[str, Any]] = []  # records of a resumed run up to its step
        self._lock = hold(Path(f"{self.path}.lock"), str(self.path), "--log-dir")
        number = free_number(Path(args.checkpoint_path), base)  # that of its CheckpointManager
        self.continued = args.resume and self._continue(state, number)
        if not self.continued:
            state.pending_messages += archive_existing([self.path], number)
            if args.resume:
                state.pending_messages.append(
                    f"{base.parent} has no metrics of this run before step {state.step}: they stay "
                    "where it was started, and go on here"
                )
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def _continue(self, state: RunState, number: int) -> bool:
        """Finds the metrics of a resumed run, and moves the records beyond its step, which it will
        make again, to name.cut.jsonl. Returns False if the run has no metrics in the folder.
        """
        path = self.path
        names = (path, *sorted(path.parent.glob("*.jsonl")))
        file = next((f for f in names if f.is_file() and run_of(f) == state.run_id), None)
        if file is None:
            return False
        records = read_records(file)
        if file != path:  # it had another name, or another run was here meanwhile
            state.pending_messages += archive_existing([path], number)
        self.kept = [r for r in records if r.get("step", 0) <= state.step]
        lines = {to_json(r) for r in self.kept}
        dropped = [
            x for x in file.read_bytes().splitlines() if x.decode(errors="replace") not in lines
        ]
        aside = path.with_suffix(".cut.jsonl")
        if dropped:
            with open(aside, "ab") as cut:
                cut.write(b"".join(line + b"\n" for line in dropped))
            state.pending_messages.append(
                f"{len(dropped)} records beyond step {state.step} are now in {aside}"
            )
        write_atomically(path, "".join(to_json(r) + "\n" for r in self.kept).encode())
        if file != path:
            file.unlink()
        return True

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record. Raises OSError or ValueError where that fails."""
        print(to_json(record), file=self.file, flush=True)

    def sync(self) -> None:
        """Fsyncs the file, so that a power failure leaves all records so far."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file and lets other runs have it."""
        try:
            self.file.close()
        finally:
            self._lock.close()


def to_json(record: dict[str, Any]) -> str:
    """One line of JSON; numbers that JSON lacks (NaN, infinities) become null."""
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(clean)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file. Lines that are not records are skipped, such as a last line
    that a crash cut short.
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
    """The id of the run that wrote a metrics file; "" if its first line has none."""
    with open(path, "rb") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return ""
    return str(first.get("run_id", "")) if isinstance(first, dict) else ""


def run_as_known(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The first record of a run, {} if there is none, with its settings and environment as of the
    last time that the run was resumed, or its number of steps fixed.
    """
    known = dict(records[0]) if records else {}
    for record in records:
        if record["event"] in ("resume", "settings"):
            for part in ("settings", "environment"):
                known[part] = {**known.get(part, {}), **record.get(part, {})}
    return known


def comparable(path: Path) -> list[dict[str, Any]]:
    """The records without what may differ between two runs that compute the same: timings, where a
    run was resumed or its length fixed, warnings, and of the first record all but the data.
    """
    records = [r for r in read_records(path) if r["event"] not in _PASSING]
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
