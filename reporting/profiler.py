"""Profiles a few steps of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.device import Device

PROFILED_STEPS = 8  # steps until the profile is complete


def start_profiler(base: Path, device: Device) -> Any:
    """Starts a profiler that writes updates 6 to 8 as a trace for chrome://tracing or Perfetto."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.torch_device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(
        activities=kinds,
        schedule=torch.profiler.schedule(wait=4, warmup=1, active=PROFILED_STEPS - 5, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(f"{base}_trace.json"),
    )
    profiler.start()
    return profiler
