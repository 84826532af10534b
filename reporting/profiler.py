"""Profiles a few steps of a run: a trace of all that happens in them, and a table of what takes
most of their time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from runtime.device import Device

_WAIT, _WARM_UP, _ACTIVE = 4, 1, 3  # steps
PROFILED_STEPS = _WAIT + _WARM_UP + _ACTIVE  # until the profile is complete
_ROWS = 20  # of the table
RANGES = ("data", "forward", "backward", "optimizer", "agree", "log")


class Profile:
    """The profile of updates 6 to 8 of a run, or of fewer if it ends before.

    In the trace, ProfilerStep#N lasts from the end of update N to the end of the next one. Below it
    are the ranges of RANGES; on a GPU, what they show is the CPU that starts kernels.
    """

    def __init__(self, base: Path, device: Device, say: Callable[[str], None]) -> None:
        """Starts to count steps. base: the path of the logs without their suffixes; the trace goes
        to base_trace.json. say: logs a line.
        """
        self.path, self.device, self.say = Path(f"{base}_trace.json"), device, say
        self.steps, self.over = 0, False
        self.profiler = torch.profiler.profile(
            activities=activities(device.torch_device.type == "cuda"),
            schedule=torch.profiler.schedule(wait=_WAIT, warmup=_WARM_UP, active=_ACTIVE, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )
        self.profiler.start()

    def step(self) -> None:
        """Called at the end of each update."""
        self.steps += 1
        if not self.over:
            self.profiler.step()
        if self.steps == PROFILED_STEPS:
            self.stop()

    def stop(self) -> None:
        """Called at the end of the run, which may be before that of the profile."""
        if not self.over:
            self.over = True
            self.profiler.stop()
            if self.steps <= _WAIT + _WARM_UP:
                self.say(f"no profile: it takes {PROFILED_STEPS} steps")

    def _write(self, profiler: Any) -> None:
        """Writes the trace and logs the table."""
        steps = min(self.steps - _WAIT - _WARM_UP, _ACTIVE)
        if steps < 1:
            return
        try:
            profiler.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as reason:
            self.say(f"the profile can't be written ({reason}); the run goes on without it")
            return
        last = _WAIT + _WARM_UP + steps
        times = times_of_ranges(profiler, steps)
        parts = ", ".join(f"{name} {ms:.2f}" for name, ms in times.items() if name != "step")
        self.say(
            f"profile of updates {last - steps + 1} to {last}: {times['step']:.2f} ms a step ("
            f"{parts}); {self.path} can be opened at ui.perfetto.dev"
        )
        rows = costliest(profiler, self.device.torch_device.type == "cuda", steps, times["step"])
        lines = [
            f"{row['ms']:9.3f} {row['share']:7.1%} {row['calls']:8.6g}  {row['kernel']}"
            for row in rows
        ]
        self.say("\n    ".join(["ms a step   share    calls  what", *lines]))


def activities(cuda: bool) -> list[torch.profiler.ProfilerActivity]:
    """What a profiler records: the CPU, and with cuda the GPU."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    return kinds if cuda else kinds[:1]


def times_of_ranges(profiler: Any, steps: int) -> dict[str, float]:
    """Milliseconds of a step, as means over `steps` profiled steps: "step", all of it; each of
    RANGES; and "rest", what lies in none of them.
    """
    sums = dict.fromkeys(("step", *RANGES), 0.0)
    for e in profiler.key_averages():
        name = "step" if e.key.startswith("ProfilerStep") else e.key
        if name in sums and str(e.device_type).endswith("CPU"):
            sums[name] += e.cpu_time_total / 1e3 / steps
    return {**sums, "rest": sums["step"] - sum(sums[name] for name in RANGES)}


def costliest(profiler: Any, cuda: bool, steps: int, step_ms: float) -> list[dict[str, Any]]:
    """The kernels, or without cuda the operators, that take most of the time: first all of them
    together, then the first _ROWS. Each has its milliseconds and calls a step, and its share of
    step_ms, the milliseconds of a step. steps: how many were profiled.
    """
    found = [
        (e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key)
        for e in profiler.key_averages()
        if not e.is_user_annotation and (not cuda or str(e.device_type).endswith("CUDA"))
    ]
    busy = sum(us for us, _, _ in found) / 1e3 / steps
    calls = sum(count for _, count, _ in found) / steps
    rows = [{"kernel": "all of them", "ms": busy, "share": busy / step_ms, "calls": calls}]
    for us, count, name in sorted(found, reverse=True)[:_ROWS]:
        ms = us / 1e3 / steps
        rows.append({"kernel": name[:90], "ms": ms, "share": ms / step_ms, "calls": count / steps})
    return rows
