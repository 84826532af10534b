"""A rank that hangs makes all others wait. Here each rank tells the others what it is doing, so
that those that wait can name the one that they wait for, with its Python stack, and end the job.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from watch import tell

_WAITED = 0.8  # part of the timeout after which a rank that waits looks for the one to blame
_STUCK = 0.4  # part of the timeout in which a rank that works gets on to another line
_SILENT_SECONDS = 10.0  # without a report: far longer than a busy rank needs for one
_PATIENT = ("saver.py", "token_files.py", "leak.py")
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
    still: float  # seconds for which its main thread has been at the same lines
    waiting: bool  # for other ranks
    patient: bool  # may take its time: it is writing a checkpoint, or reading a new text
    stack: list[str]  # of its main thread, then of those that work for it; innermost last


class HangGuard:
    """Watches the ranks from a thread of each, from the first to the last time they wait for each
    other. Slow steps are no hang, however long they take.
    """

    def __init__(self, store: Store, rank: int, world: int, timeout_seconds: float) -> None:
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout_seconds
        self.pause = min(1.0, timeout_seconds / 40)
        self.silence = min(_SILENT_SECONDS, timeout_seconds / 4)
        self.ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def end(self) -> None:
        """The ranks part: from now on none is missed."""
        self.ended.set()

    def _run(self) -> None:
        number, calls, moved = 0, [("", 0, "")], time.monotonic()
        heard: dict[int, tuple[int, float]] = {}  # rank: its last report, and when it came
        while not self.ended.wait(self.pause):
            number, now = number + 1, time.monotonic()
            if calls != (
                calls := calls_of(sys._current_frames()[threading.main_thread().ident or 0])
            ):
                moved = now
            mine = report_of(calls, number, now - moved)
            try:
                self.store.set(f"rank{self.rank}", json.dumps(asdict(mine)))
                if not mine.waiting or mine.still < _WAITED * self.timeout / 2:
                    heard.clear()
                    continue
                reports = self._reports()
            except Exception:  # the launcher is gone, and its store with it
                if mine.waiting and mine.still > self.timeout:
                    tell(f"rank {self.rank}: the launcher is gone, and no rank gets on; ended")
                    os._exit(1)
                continue
            for rank, report in reports.items():
                if rank not in heard or heard[rank][0] != report.number:
                    heard[rank] = (report.number, now)
            silent = [r for r in reports if now - heard[r][1] >= self.silence]
            verdict = judge(reports, silent, self.timeout)
            if verdict:
                if self.rank == min(r for r in reports if r not in silent):
                    tell(verdict)
                time.sleep(2 * self.pause)  # for the one that prints
                os._exit(1)

    def _reports(self) -> dict[int, Report]:
        keys = {rank: f"rank{rank}" for rank in range(self.world)}
        there = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: Report(**json.loads(self.store.get(key))) for rank, key in there.items()}


def calls_of(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """(file, line, function) of each call on a stack, innermost last. Unlike the traceback module
    it reads no source files.
    """
    calls = []
    while frame is not None:
        calls.append((frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name))
        frame = frame.f_back
    return calls[::-1]


def report_of(calls: list[tuple[str, int, str]], number: int, still: float) -> Report:
    """What the stack of the main thread says, and those of the threads that work for it."""
    file, _, function = calls[-1]
    waiting = "torch/distributed" in file or function == "_engine_run_backward"
    patient = any(Path(file).name in _PATIENT for file, _, _ in calls)
    lines, frames = _lines(calls), sys._current_frames()
    for thread in threading.enumerate():
        main = thread is threading.main_thread()
        if not main and not thread.daemon and thread.ident in frames:
            lines += [f"thread {thread.name}:", *_lines(calls_of(frames[thread.ident]))]
    return Report(number, still, waiting, patient, lines)


def _lines(calls: list[tuple[str, int, str]]) -> list[str]:
    return [f"{os.path.relpath(file, _HERE)}:{n} in {name}" for file, n, name in calls[-12:]]


def judge(reports: dict[int, Report], silent: list[int], timeout: float) -> str | None:
    """Who is stuck, if anybody is: some rank has waited long, and another neither waits nor gets
    from one line to the next, or says nothing at all.
    """
    waited = [
        report.still
        for r, report in reports.items()
        if r not in silent and report.waiting and report.still >= _WAITED * timeout
    ]
    stuck = [
        r
        for r, report in reports.items()
        if r not in silent
        and not (report.waiting or report.patient)
        and report.still >= _STUCK * timeout
    ]
    if not waited or not (silent or stuck):
        return None
    lines = []
    for r in sorted((*silent, *stuck)):
        how = "does not answer (stopped, or its machine is gone)" if r in silent else "is stuck"
        lines.append(
            f"error: rank {r} {how}: others have waited {max(waited):.0f} s for it "
            "(--timeout-seconds). Its Python stack, innermost last:"
        )
        lines += [f"  {line}" for line in reports[r].stack]
    return "\n".join([*lines, "the run continues from its last checkpoint with --resume"])
