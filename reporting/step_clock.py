"""The timings of a run."""

from __future__ import annotations

import time

from config import Settings
from runtime.device import Device, peak_memory
from training.flops import flops_per_token, peak_flops
from training.step import RunState

# Seconds of a run until it measures its peak for the first time: that takes a moment on a CPU, and
# a run that ends sooner does without. It measures again after twice as long, and so on, and keeps
# the highest, since another program may have slowed one measurement down.
_BEFORE_PEAK = 5.0


class StepClock:
    """Times updates, without what is done between them, and the whole run.

    A timing runs from the end of one report (`restart`) to the next `after_updates`.
    """

    def __init__(
        self, args: Settings, state: RunState, device: Device, world: int, elapsed: float
    ) -> None:
        """Starts the clock. elapsed: the seconds that the run took before it was resumed."""
        self.args, self.device, self.world = args, device, world
        self.peak, self.next_peak = 0.0, _BEFORE_PEAK  # FLOP/s of a process, and when to measure
        self.steps, self.waited = state.step, 0.0  # at the last report
        self.first: tuple[int, float] | None = None  # step and time of the first report
        self.step_seconds = 0.0
        self.mark = time.perf_counter()
        self.started = self.mark
        self.began = self.mark - elapsed

    def restart(self) -> None:
        """Leaves out of the timings what was done since the last report."""
        self.mark = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Leaves so many seconds out of the timings of the updates that are not reported yet."""
        self.mark += seconds

    def elapsed(self) -> float:
        """Seconds that the run has taken, over all its starts."""
        return time.perf_counter() - self.began

    def after_updates(self, step: int, n_tokens: int, waited: float) -> dict[str, float | None]:
        """The timings of the updates since the last report, as a train record has them. n_tokens:
        the tokens of one update; waited: the seconds for which this process has waited for data.
        """
        now, steps = time.perf_counter(), step - self.steps
        self.step_seconds = (now - self.mark) / steps
        rate = n_tokens / self.step_seconds
        wait, self.waited, self.steps = (waited - self.waited) / steps, waited, step
        if self.first is None:
            self.first = (step, now)
        if now - self.started > self.next_peak:
            self.peak = max(self.peak, peak_flops(self.device) or 0.0)
            self.next_peak = 2 * (now - self.started)
        per_token = flops_per_token(self.args.model, self.args.seq_len)
        return {
            "step_seconds": self.step_seconds,
            "tokens_per_sec": rate,
            "mfu": rate * per_token / (self.peak * self.world) if self.peak else None,
            "data_wait_seconds": wait,
            "memory_gb": peak_memory(self.device) / 1e9,
            "elapsed": now - self.began,
        }

    def seconds_left(self, step: int) -> float | None:
        """Seconds until the last step, if the rest of the run goes as all of it since the first
        report: with evaluations and saves, without compiling. None before that report.
        """
        if self.first is None:
            return None
        first, when = self.first
        each = self.step_seconds
        if step > first:
            each = (time.perf_counter() - when) / (step - first)
        return (self.args.num_steps - step) * each
