"""The records of a metrics file that say what a run is: its first one, and one for each resume."""

from __future__ import annotations

from typing import Any

from config import Settings, to_dict
from corpus.token_dataset import TokenDataset
from model import GPTModel
from runtime.device import Device, environment
from training.step import RunState


def record_of_run(
    args: Settings,
    state: RunState,
    device: Device,
    model: GPTModel,
    train: TokenDataset,
    val: TokenDataset,
    world: int,
) -> dict[str, Any]:
    """The first record of a metrics file: all that decides the numbers in it."""
    return {
        "run_id": state.run_id,
        "settings": to_dict(args),
        "parameters": model.num_parameters(),
        "train": train.describe(),
        "val": val.describe(),
        "environment": environment(device, world),
    }


def record_of_resume(state: RunState, run: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that goes on: the settings and the parts of its environment that are not
    as the metrics file knows them.
    """
    passing = ("resume", "allow_change")  # which are about this start, not about the run
    changed = {
        part: {
            k: v
            for k, v in run[part].items()
            if k not in passing and known.get(part, {}).get(k) != v
        }
        for part in ("settings", "environment")
    }
    return {"event": "resume", "step": state.step, **changed}
