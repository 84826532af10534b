"""Writes lines for people: to the terminal, beside its progress bar, and to a text log."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from runtime.console import visible

_SHORT_LINE_SECONDS = 10.0


class Output:
    """Writes lines to the terminal and to a text log. If writing to one of them fails, as on a full
    disk or a closed terminal, that one gets no more lines, and the run goes on.
    """

    def __init__(self, text_path: Path, step: int, num_steps: int) -> None:
        """Opens the text log, and a progress bar that starts at `step`. Raises OSError if the text
        log cannot be opened.
        """
        self.broken = set[str]()
        self.short_line_time = -math.inf  # of the last one
        self.text = open(text_path, "a", encoding="utf-8")  # noqa: SIM115
        no_bar = True if os.environ.get("TERM") == "dumb" else None  # None: unless a terminal
        self.bar = tqdm(
            total=num_steps, initial=step, unit="step", disable=no_bar, dynamic_ncols=True
        )

    def line(self, text: str, short: str = "") -> None:
        """Writes one line, with the time before it. short: what a terminal with a progress bar
        shows in place of the text; the text log, a file and a pipe get the text.
        """
        stamped = time.strftime("[%Y-%m-%d %H:%M:%S] ") + visible(text)
        shown = stamped
        if short and not self.bar.disable:
            shown = time.strftime("[%H:%M:%S] ") + visible(short)
        self.safely("the terminal", lambda: tqdm.write(shown) or sys.stdout.flush())
        self.safely("the text log", lambda: print(stamped, file=self.text, flush=True))

    def progress(self, step: int, text: str) -> None:
        """Moves the bar to a step and shows a text beside it."""
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text)

    def short_line(self, text: str) -> None:
        """Writes a line if the terminal shows no bar, such as when output goes to a file; at most
        one in 10 seconds, so that a fast run does not fill the file.
        """
        now = time.monotonic()
        if self.bar.disable and now - self.short_line_time >= _SHORT_LINE_SECONDS:
            self.short_line_time = now
            self.safely("the terminal", lambda: print(text, flush=True))

    def safely(self, what: str, write: Callable[[], object]) -> None:
        """Calls write(). If that fails in any way, a line says so, and later calls with the same
        `what` do nothing. what: the output that write() writes to.
        """
        if what in self.broken:
            return
        try:
            write()
        except Exception as reason:  # no report is worth a run
            self.broken.add(what)
            if what == "the terminal":  # or the interpreter would try again at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.line(f"{what} can't be written any more ({reason}); the run goes on without it")

    def close(self) -> None:
        """Closes the text log."""
        self.safely("a log file", self.text.close)
