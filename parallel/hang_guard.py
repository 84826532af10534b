"""Ends a run in which a rank hangs, and names that rank. Each rank reports to a shared store what
it is doing. Ranks that have waited too long read there which rank they wait for, print its Python
stack, and exit.

A guard must not be able to end a healthy run. So it reads only what the main thread publishes about
itself and, if that does not change, the stacks that faulthandler writes. It never touches a frame
object: on CPython 3.10 and 3.11 making one (sys._current_frames, f_back) can collect garbage, which
lets other threads run; the main thread then leaves the very frame that is being read.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from runtime.signals import print_stderr

PATIENT_SECONDS = 7200  # how long a save, or reading a new text, may take
_WAITED = 0.8  # part of a limit after which a waiting rank looks for the rank to blame
_STUCK = 0.4  # part of the timeout in which a working rank reaches another line of code
_STORE_SECONDS = 15.0  # longer than any call of the store takes: see store_of_launcher
_SILENT_SECONDS = 10.0  # without a report, at most, until a rank counts as silent
_HERE = str(Path(__file__).resolve().parent.parent)
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+) ")
_CALL = re.compile(r'  File "(.*)", line (\d+) in (.*)')

Call = tuple[str, int, str]  # file, line, function


@dataclass
class Progress:
    """What the main thread of this process publishes about itself, for its guard to read."""

    exchanges: int = 0  # how many exchanges with other ranks are finished
    long_work: int = 0  # how many `may_take_long` blocks it is inside of


_progress = Progress()


def exchange_finished() -> None:
    """Called by the main thread after each collective operation, to show that it makes progress."""
    _progress.exchanges += 1


@contextmanager
def may_take_long() -> Iterator[None]:
    """Context manager for work that may take this rank long while the others wait for it, such as
    reading a new text. Inside it the rank counts as stuck only after 0.8 * PATIENT_SECONDS on the
    same lines of code (of the timeout, if that is longer), or if it no longer reports at all.
    """
    _progress.long_work += 1
    try:
        yield
    finally:
        _progress.long_work -= 1


class Store(Protocol):
    """The methods of torch.distributed.Store that the hang guard calls."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Report:
    """What a rank reports about itself, several times within a timeout. `stack` is empty if the
    rank has finished an exchange since the report before.
    """

    number: int  # of this rank's reports
    still: float  # seconds for which its main thread has been at the same lines
    waiting: bool  # whether it waits for other ranks
    patient: bool  # whether it is inside of `may_take_long`
    stack: list[str]  # of its main thread, then of its worker threads; innermost call last


class HangGuard:
    """A thread in each rank that watches all ranks, from before they first wait for each other
    until the `with` block of the guard is left, also by an error. A slow step is no hang, as long
    as its rank gets from one line of code to the next.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        timeout_seconds: float,
        gpu_is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """store: shared by all ranks. gpu_is_busy(): whether this rank's GPU still has queued work.
        Collectives are kernels on a GPU: a main thread that waits for its GPU may in fact wait for
        other ranks.
        """
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout_seconds
        self.gpu_is_busy = gpu_is_busy
        self.pause = min(1.0, timeout_seconds / 40)
        self.silence = min(_SILENT_SECONDS, max(2.0, timeout_seconds / 4))
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def __enter__(self) -> HangGuard:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()  # from now on no rank is reported as missing
        # A daemon thread that comes out of the store's C++ code while Python ends is unwound by
        # force, which C++ answers with std::terminate: the process would end by SIGABRT.
        self.thread.join(_STORE_SECONDS)

    def gone(self) -> list[int]:
        """The ranks that have ended: those whose guards report nothing new for a while. If the
        store has ended, so has rank 0, which held it.
        """
        try:
            before = self._reports()
            time.sleep(3 * self.pause + 0.5)
            now = self._reports()
        except Exception:  # torch raises many kinds
            return [0] if self.rank else []
        return [r for r in range(self.world) if r not in now or now[r] == before.get(r)]

    def _run(self) -> None:
        number, moved, before = 0, time.monotonic(), replace(_progress)
        calls: list[Call] = []
        heard: dict[int, tuple[int, float]] = {}  # rank: its last report, and when it came
        nothing = Report(0, 0.0, False, False, [])
        while not self.ended.wait(self.pause):
            number, now = number + 1, time.monotonic()
            stacks = {} if before != _progress else stacks_of_threads()
            main = stacks.get(threading.main_thread().ident or 0, [])
            if not main or main != calls:
                moved = now
            before, calls = replace(_progress), main
            mine = report_of(stacks, number, now - moved, self.gpu_is_busy)
            try:
                self.store.set(f"rank{self.rank}", json.dumps(asdict(mine)))
                if not mine.waiting or mine.still < _WAITED * self.timeout / 2:
                    heard.clear()
                    continue
                reports = self._reports()
            except Exception:  # the launcher is gone, and its store with it
                if mine.waiting and mine.still > self.timeout:
                    self._end_run(f"rank {self.rank}: the launcher is gone, and no rank gets on")
                continue
            for rank in range(self.world):
                report = reports.setdefault(rank, nothing)
                if rank not in heard or heard[rank][0] != report.number:
                    heard[rank] = (report.number, now)
            silent = [r for r in reports if now - heard[r][1] >= self.silence]
            verdict = judge(reports, silent, self.timeout)
            if verdict:
                first = self.rank == min(r for r in reports if r not in silent)
                self._end_run(verdict if first else "")

    def _end_run(self, verdict: str) -> None:
        if self.ended.is_set():
            return
        if verdict:
            print_stderr(verdict)
        time.sleep(2 * self.pause)  # for the rank that prints
        os._exit(1)

    def _reports(self) -> dict[int, Report]:
        keys = {rank: f"rank{rank}" for rank in range(self.world)}
        there = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: Report(**json.loads(self.store.get(key))) for rank, key in there.items()}


def stacks_of_threads() -> dict[int, list[Call]]:
    """The call stack of each thread, by thread identity, innermost call last; empty if no temporary
    file can be made. faulthandler writes the stacks in C, where it makes no Python object and lets
    no other thread run meanwhile.
    """
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[int, list[Call]] = {}
    calls: list[Call] = []
    for line in lines:
        if thread := _THREAD.match(line):
            calls = found[int(thread[1], 16)] = []
        elif call := _CALL.match(line):
            calls.insert(0, (call[1], int(call[2]), call[3]))
    return found


def report_of(
    stacks: dict[int, list[Call]], number: int, still: float, gpu_is_busy: Callable[[], bool]
) -> Report:
    """The report of this rank, from the stacks of its main thread and of that thread's workers,
    which are the non-daemon threads. number, still: as in `Report`.
    """
    main = threading.main_thread()
    calls = stacks.get(main.ident or 0, [])
    lines = _lines(calls)
    for thread in threading.enumerate() if calls else ():
        if thread is not main and not thread.daemon and thread.ident in stacks:
            lines += [f"thread {thread.name}:", *_lines(stacks[thread.ident])]
    waiting = bool(calls) and (_waits(calls[-1]) or gpu_is_busy())
    return Report(number, still, waiting, _progress.long_work > 0, lines)


def _waits(call: Call) -> bool:
    """Whether a main thread with this innermost call waits for other ranks, in a process without a
    GPU: inside torch.distributed, or in the backward pass, where DDP waits in C++.
    """
    file, _, function = call
    return "torch/distributed" in file or function == "_engine_run_backward"


def _lines(calls: list[Call]) -> list[str]:
    return [f"{os.path.relpath(file, _HERE)}:{n} in {name}" for file, n, name in calls[-12:]]


def judge(reports: dict[int, Report], silent: list[int], timeout: float) -> str | None:
    """The message about stuck ranks, or None if none is stuck. A rank is stuck if it neither waits
    nor gets from one line to the next while another has waited long, or if it is silent meanwhile.
    reports: by rank; silent: the ranks that report no more; timeout: in seconds.
    """
    waited = [
        report.still
        for r, report in reports.items()
        if r not in silent and report.waiting and report.still >= _WAITED * timeout
    ]
    patience = _WAITED * max(PATIENT_SECONDS, timeout)
    stuck = [
        r
        for r, report in reports.items()
        if r not in silent
        and not report.waiting
        and report.still >= (patience if report.patient else _STUCK * timeout)
    ]
    if not waited or not (silent or stuck):
        return None
    lines = []
    for r in sorted((*silent, *stuck)):
        how = "does not answer (stopped, or its machine is gone)" if r in silent else "is stuck"
        said = f"error: rank {r} {how}: others have waited {max(waited):.0f} s for it"
        stack = reports[r].stack
        where = ". Its Python stack, innermost last:" if stack else ""
        lines += [f"{said} (--timeout-seconds){where}", *(f"  {line}" for line in stack)]
    return "\n".join([*lines, "where a checkpoint was saved, --resume continues the run from it"])
