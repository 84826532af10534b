"""Signals that ask a run to stop, and processes that must not outlive the one that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

from runtime.locks import need_locks

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
_STOPPING = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
_ONE_EVENT_SECONDS = 2.0  # torchrun forwards a signal that its workers have also got themselves


class StopSignals:
    """A context manager that lets signals stop a run after its current step. Once `install()` was
    called, the first SIGTERM, SIGINT (Ctrl-C), SIGHUP or SIGUSR1 is only noted in `signal`, for the
    training loop to end; the same signal a second time (under torchrun, after 2 s) ends the process
    at once. A signal that was ignored before, as under nohup, stays ignored.

    A thread receives the signals, so a second Ctrl-C need not wait until the main thread has
    finished a long computation.
    """

    def __init__(self, after: str = "this step") -> None:
        """after: what is done before the program ends, for the line about a signal."""
        self.after = after
        self.signal = 0  # number of the signal that was noted; 0 = none
        self._heard_at = 0.0
        self._one_event = _ONE_EVENT_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._old: dict[signal.Signals, Any] = {}  # handlers before install()

    def __enter__(self) -> StopSignals:
        """Raises UserError, before anything is read, on a system without file locks, which keep two
        runs apart. No signal is caught before `install()`.
        """
        need_locks()
        return self

    def install(self) -> None:
        """Starts to catch the signals. Before this call a signal ends the process as usual, since
        there is nothing to save yet.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._write, self._old_fd = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._old = {
            s: signal.signal(s, lambda *_: None)  # _listen notes it; this replaces the default
            for s in _STOPPING
            if signal.getsignal(s) != signal.SIG_IGN
        }
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._old:
            for number, handler in self._old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_fd)
            os.close(self._write)  # ends the thread

    def _listen(self, pipe: int) -> None:
        while heard := os.read(pipe, 1):
            number = heard[0]
            if number not in self._old:
                continue
            if not self.signal:
                self.signal, self._heard_at = number, time.monotonic()
                print_stderr(
                    f"{signal.Signals(number).name}: stopping after {self.after}; again = at once"
                )
            elif number == self.signal and time.monotonic() - self._heard_at > self._one_event:
                os._exit(128 + number)
        os.close(pipe)


def print_stderr(text: str) -> None:
    """Prints a line on standard error; if writing fails, as to a closed pipe, nothing happens."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def end_with_parent() -> None:
    """Starts a thread that sends this process a SIGTERM once the process that started it has ended;
    torchrun's workers and pool workers would otherwise live on. It polls each second, since
    PR_SET_PDEATHSIG exists on Linux alone.
    """
    parent = os.getppid()

    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=poll, daemon=True).start()
