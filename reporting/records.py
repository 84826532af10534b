"""The records of a metrics file that say what a run is: its first one, and one for each resume; and
what of the others Weights & Biases and TensorBoard get.
"""

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


def tracked_values(record: dict[str, Any], device: Device, world: int) -> dict[str, float]:
    """What Weights & Biases and TensorBoard get of a record, under the names that they show; empty
    for a record that is neither of an update nor of an evaluation. world: the number of processes.
    """
    values: dict[str, float | None] = {}
    if record["event"] == "eval":
        values = {f"val/{name}": record.get(f"val_{name}") for name in ("loss", "ppl", "bpb")}
    elif record["event"] == "train":
        timing = record.get("time", {})
        rate = timing.get("tokens_per_sec")
        values = {
            "train/loss": record.get("train_loss"),
            "grad_norm": record.get("grad_norm"),
            "lr": record.get("lr"),
            "tokens": record.get("tokens"),
            "tokens_per_sec_per_rank": None if rate is None else rate / world,
            "global_tokens_per_sec": rate,
            **{name: timing.get(name) for name in ("mfu", "data_wait_seconds", "memory_gb")},
            "amp": int(device.amp),
            "bf16": int(device.precision == "bf16"),
        }
    return {name: value for name, value in values.items() if value is not None}
