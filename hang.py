"""A rank that hangs makes all others wait. Here each rank tells the others what it is doing, so
that those that wait can name the one that they wait for, with its Python stack, and end the job.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from watch import tell

_OVERDUE = 0.8  # part of the timeout after which a rank that waits looks at the others
_SILENT_REPORTS = 4  # missed in a row by a rank that does not answer
_HERE = str(Path(__file__).parent)


class Store(Protocol):
    """What is needed of a torch.distributed store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Report:
    """What a rank says about itself, several times within a timeout."""

    number: int
    idle: float  # seconds since its main thread got through a step
    waiting: bool  # for other ranks
    patient: bool  # may take its time: it is writing a checkpoint
    stack: list[str]  # of its main thread, then of those that work for it


class HangGuard:
    """Watches the ranks from a thread of each. `beat()` says that a step is done on all of them."""

    def __init__(self, store: Store, rank: int, world: int, timeout_seconds: float) -> None:
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout_seconds
        self.pause = min(1.0, timeout_seconds / 40)
        self.beaten: float | None = None  # nothing is judged before the first step
        self.ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def beat(self) -> None:
        """All ranks have come as far as this one."""
        self.beaten = time.monotonic()

    def end(self) -> None:
        """The ranks part: from now on none is missed."""
        self.ended.set()

    def _run(self) -> None:
        number, seen = 0, dict[int, tuple[int, int]]()  # rank: its last report, when it was new
        while not self.ended.wait(self.pause):
            number += 1
            mine = own_report(number)
            beaten, now = self.beaten, time.monotonic()
            idle = 0.0 if beaten is None else now - beaten
            try:
                self.store.set(f"rank{self.rank}", to_json(mine, idle))
                if idle < _OVERDUE * self.timeout:
                    seen.clear()
                    continue
                reports = self._reports()
            except Exception:  # the launcher is gone, and its store with it
                if idle > self.timeout and mine.waiting:
                    tell(f"rank {self.rank}: the launcher is gone, and no rank gets on; ended")
                    os._exit(1)
                continue
            for rank, report in reports.items():
                if rank not in seen or seen[rank][0] != report.number:
                    seen[rank] = (report.number, number)
            silent = [r for r in reports if number - seen[r][1] >= _SILENT_REPORTS]
            verdict = judge(reports, silent, self.timeout)
            if verdict and self.beaten == beaten:
                if self.rank == min((r for r in reports if r not in silent), default=0):
                    tell(verdict)
                time.sleep(2 * self.pause)  # for the one that prints
                os._exit(1)

    def _reports(self) -> dict[int, Report]:
        keys = {rank: f"rank{rank}" for rank in range(self.world)}
        there = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: Report(**json.loads(self.store.get(key))) for rank, key in there.items()}


def own_report(number: int) -> Report:
    """What the stacks of this process say."""
    frames, main = sys._current_frames(), threading.main_thread()
    stack = traceback.extract_stack(frames[main.ident or 0])
    last = stack[-1]
    waiting = "torch/distributed" in last.filename or last.name == "_engine_run_backward"
    patient = any(Path(f.filename).name == "saver.py" for f in stack)
    lines = _lines(stack)
    for thread in threading.enumerate():
        if thread is not main and not thread.daemon and thread.ident in frames:
            lines += [
                f"thread {thread.name}:",
                *_lines(traceback.extract_stack(frames[thread.ident])),
            ]
    return Report(number, 0.0, waiting, patient, lines)


def _lines(stack: traceback.StackSummary) -> list[str]:
    return [f"{os.path.relpath(f.filename, _HERE)}:{f.lineno} in {f.name}" for f in stack[-12:]]


def to_json(report: Report, idle: float) -> str:
    """A report as it is published."""
    return json.dumps({**report.__dict__, "idle": idle})


def judge(reports: dict[int, Report], silent: list[int], timeout: float) -> str | None:
    """Who is stuck, if anybody is: some rank waits, and another neither waits nor gets on. Slow
    steps are no hang, as long as nobody waits for them.
    """
    waiting = [r for r, report in reports.items() if report.waiting and r not in silent]
    stuck = [
        r
        for r, report in reports.items()
        if r not in silent
        and not (report.waiting or report.patient)
        and report.idle >= _OVERDUE * timeout / 2
    ]
    if not waiting or not (silent or stuck):
        return None
    lines = []
    for r in sorted((*silent, *stuck)):
        how = "does not answer (stopped, or its machine is gone)" if r in silent else "is stuck"
        lines.append(
            f"error: rank {r} {how}: the others have waited {reports[waiting[0]].idle:.0f} s for "
            "it (--timeout-seconds). Its Python stack, innermost last:"
        )
        lines += [f"  {line}" for line in reports[r].stack]
    return "\n".join([*lines, "the run continues from its last checkpoint with --resume"])
