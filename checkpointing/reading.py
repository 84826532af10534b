"""Opens checkpoints: checks the description in a file, finds the newest whole file of a run, and
says how a checkpoint differs from a run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from checkpointing.file_format import (
    CheckpointReader,
    Unreadable,
    as_unreadable,
    open_verified,
    printable,
)
from checkpointing.safe_pickle import TensorRef, size_of
from config import from_dict
from model import GPTModel
from runtime.files import target_of
from runtime.setting_fields import NothingSaved, UserError
from settings.paths import variant_path
from training.optimizers import state_shapes

FORMAT = 2
ENTRIES: dict[str, type] = {
    **dict.fromkeys(("model", "optimizer", "scaler", "settings", "data", "environment"), dict),
    **dict.fromkeys(("format", "step", "tokens", "best_step", "bad_in_row"), int),
    **dict.fromkeys(("run_id", "wandb_run_id"), str),
    "best_val_loss": float,
}

_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_ID = r"(?!\.)[\w.-]{0,128}"  # ids of runs, after which folders are named
_SMALL = (
    "format",
    "settings",
    "environment",
    "scaler",
    "step",
    "tokens",
    "best_step",
    "bad_in_row",
)

_LARGEST_SMALL = 50_000  # limit of all entries of _SMALL together, as `size_of` counts


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[CheckpointReader]:
    """A context manager that opens a checkpoint, verifies all its bytes and its description, and
    gives a CheckpointReader. In its `tree` each tensor is a TensorRef, which is read from the file
    on demand. Raises Unreadable if the file is missing, damaged or no checkpoint.
    """
    with open_verified(path) as contents:
        with as_unreadable(path):
            _check_description(contents.tree)
        yield contents


def _check_description(tree: Any) -> None:
    """Raises UserError unless `tree` has the form that `build_checkpoint` makes. Allocates no
    tensor.
    """
    if type(tree) is not dict or size_of({k: tree.get(k) for k in _SMALL}) > _LARGEST_SMALL:
        raise UserError("not a checkpoint: a description of another kind, or of absurd size")
    if tree.get("format") != FORMAT:
        raise UserError(
            f"checkpoint format {tree.get('format')!r:.40}, this version reads {FORMAT}"
        )
    wrong = [k for k, kind in ENTRIES.items() if type(tree.get(k)) is not kind]
    if not wrong:
        parts = (tree["model"], *tree["optimizer"].values())
        counts = [tree[k] for k in ("step", "tokens", "bad_in_row")]
        scaler, data = tree["scaler"], tree["data"]
        sound = {
            "tensors": all(
                type(p) is dict and all(type(v) is TensorRef for v in p.values()) for p in parts
            ),
            "counts": all(0 <= n < 2**62 for n in counts) and -1 <= tree["best_step"] < 2**62,
            "run_id, wandb_run_id": all(
                re.fullmatch(_ID, tree[k]) for k in ("run_id", "wandb_run_id")
            ),
            "data": all(type(data.get(k, {})) is dict for k in ("train", "val"))
            and type(data.get("tokenizer", "")) is str,
            "scaler": not scaler
            or (scaler.keys() == _SCALER and all(type(v) in (int, float) for v in scaler.values())),
        }
        wrong = [name for name, good in sound.items() if not good]
    if wrong:
        raise UserError(f"missing, or not what it must be: {', '.join(wrong)}")
    config, tensors = from_dict(tree["settings"]).model, tree["model"]
    first = [tensors.get(f"blocks.{i}.attn.qkv.weight") for i in range(config.n_layers)]
    if not config.vocab_size or any(
        t is None or t.shape != (3 * config.d_model, config.d_model) for t in first
    ):
        raise UserError("its settings describe another model than the one in it")
    with torch.device("meta"):  # shapes without memory
        described = GPTModel(config)
    problems = differences_of_model(described, tree)
    if problems:
        raise UserError(f"its settings describe another model: {summary(problems)}")


def summary(problems: list[str]) -> str:
    """The first 20 problems in one line, and how many more there are."""
    more = f" (+{len(problems) - 20} more)" if len(problems) > 20 else ""
    return printable("; ".join(sorted(problems)[:20]) + more)


def differences_of_model(model: GPTModel, tree: dict[str, Any]) -> list[str]:
    """How names, shapes and types of the parameters in a checkpoint differ from the model's."""
    wanted, found = model.shapes, tree["model"]
    problems = [f"{k} is missing" for k in wanted.keys() - found.keys()]
    problems += [f"{k} is unknown" for k in found.keys() - wanted.keys()]
    for k in wanted.keys() & found.keys():
        if found[k].shape != wanted[k]:
            problems.append(f"{k} is {found[k].shape}, expected {wanted[k]}")
        dtype = model.get_parameter(k).dtype
        if found[k].dtype != dtype:
            problems.append(f"{k} is {found[k].dtype}, expected {dtype}")
    return problems


def differences_of_optimizer(
    model: GPTModel, optimizer: torch.optim.Optimizer, tree: dict[str, Any]
) -> list[str]:
    """How the optimizer state in a checkpoint differs from what the optimizer keeps."""
    saved, shapes = tree["optimizer"], model.shapes
    parameters = {
        name: state_shapes(optimizer, p, shapes[name]) for name, p in model.named_parameters()
    }
    problems = [
        f"optimizer state of {k}, a parameter unknown here" for k in saved.keys() - parameters
    ]
    if saved or (tree["step"] and any(parameters.values())):
        problems += [f"optimizer state of {k} is missing" for k in parameters.keys() - saved]
    for name in parameters.keys() & saved.keys():
        moments, shape = saved[name], shapes[name]
        if name not in tree["model"] or tree["model"][name].shape != shape:
            continue  # said already
        expected = parameters[name] or {k: shape if v.shape else () for k, v in moments.items()}
        if moments.keys() != expected.keys():
            problems.append(f"optimizer state of {name} is {sorted(moments)}")
        problems += [
            f"optimizer state of {name} ({k}) is {v.shape} {v.dtype}, not {expected[k]} float32"
            for k, v in moments.items()
            if k in expected and (v.shape, v.dtype) != (expected[k], torch.float32)
        ]
    return problems


def changes_of_data(recorded: dict[str, Any], now: dict[str, Any], part: str) -> list[str]:
    """How the data of a run differ from those that a checkpoint recorded, a line for each
    difference; where they lie on disk doesn't matter. part: what the lines call the data.
    """
    return changes(recorded, {k: v for k, v in now.items() if k != "source"}, f"{part} data: ")


def changes(recorded: dict[str, Any], now: dict[str, Any], label: str) -> list[str]:
    """One line, after the label, for each recorded value that is another one now."""
    passing = ("resume", "allow_change", "checkpoint_path")
    return [
        f"{label}{k} was {recorded[k]!r}, is {now[k]!r}"
        for k in now
        if k not in passing and k in recorded and recorded[k] != now[k]
    ]


_Result = TypeVar("_Result")


def latest_valid(
    path: str | Path, use: Callable[[Path], _Result]
) -> tuple[_Result, Path, list[str]]:
    """Calls use(file) with the checkpoint at path, and if that raises Unreadable, with the previous
    one beside it. Returns the result, the file, and messages about a newer file that could not be
    read.

    Raises UserError if neither can be read, and NothingSaved if neither exists.
    """
    wrong: list[str] = []
    target = target_of(path)
    for file in (Path(path), variant_path(target, "previous")):
        try:
            return use(file), file, wrong
        except Unreadable as reason:
            wrong.append(str(reason))
    stem = re.escape(target.stem)
    others = [
        p.name
        for p in sorted(target.parent.glob("*"))
        if re.fullmatch(rf"{stem}(\.\d+)?\.(best|step\d+|\d+)\.\w+", p.name)
    ]
    more = f"; there are also {', '.join(others)}" if others else ""
    if not os.path.lexists(path) and not os.path.lexists(file):
        raise NothingSaved(f"{wrong[0]} to resume; start without --resume{more}")
    raise UserError(f"no whole checkpoint: {'; '.join(wrong)}{more}")
