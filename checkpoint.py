"""Saves and loads checkpoints. A checkpoint holds the state of a whole run, with unsharded tensors
by the names of their parameters, so it is the same for every parallel layout.

`python checkpoint.py verify|show|compare FILE...` inspects checkpoints from the command line, and
`checkpoint.py tokenizer FILE OUT.json` extracts the tokenizer. Which files a run keeps, and when it
writes them, is in checkpointing/manager.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpointing.commands import CheckpointSettings, run_command
from checkpointing.file_format import CheckpointReader
from checkpointing.reading import (
    FORMAT,
    changes,
    changes_of_data,
    differences_of_model,
    differences_of_optimizer,
    open_checkpoint,
    summary,
)
from checkpointing.writing import write_checkpoint
from config import Settings, from_dict, to_dict
from corpus.tokenizer import Tokenizer, stored_tokenizer
from model import GPTModel
from runtime.device import pick_device
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import UserError
from training.optimizers import note_on_rising_rate
from training.sampling import Sampling
from training.step import RunState
from training.text_generation import continue_texts

_PLAIN_STATE = ("step", "tokens", "best_val_loss", "best_step", "run_id", "wandb_run_id")
_DATA_SETTINGS: dict[str, tuple[str, ...]] = {  # part of the data -> the settings that determine it
    "train": ("train_data", "train_npy", "max_tokens", "val_ratio", "tokenizer_name"),
    "val": ("val_data", "val_npy", "val_max_tokens", "val_ratio", "tokenizer_name"),
}


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    args: Settings,
    data: dict[str, Any] | None = None,
) -> None:
    """Writes the state of the whole run to `path` atomically: at any moment the file there is the
    complete old one or the complete new one. The old one is kept as `name.previous.pt`.

    model: the bare module, not a DDP wrapper. data: the `data_record` of the run. Raises UserError
    if the file can't be written or a tensor is not finite; the file at `path` is then as before.
    """
    write_checkpoint(path, build_checkpoint(model, optimizer, state, args, data))


def build_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    args: Settings,
    data: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    gather: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Any]:
    """The content of a checkpoint: nested dicts of plain values and of tensors, not of copies of
    them.

    gather(name, tensor): returns the unsharded tensor, if ranks hold parts of the parameter of that
    name or of its optimizer state. environment: the record of `runtime.device.environment`.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {names[id(p)]: kept for p, kept in optimizer.state.items()}
    return {
        "format": FORMAT,
        "model": {k: gather(k, v.detach()) for k, v in model.state_dict().items()},
        "optimizer": {
            name: {k: gather(name, v) for k, v in moments[name].items() if v is not None}
            for name in names.values()
            if name in moments
        },
        "scaler": state.scaler.state_dict(),
        **{key: getattr(state, key) for key in _PLAIN_STATE},
        "bad_in_row": 0 if state.bad_in_row is None else int(state.bad_in_row),
        "settings": {**to_dict(args), "resume": False, "allow_change": []},
        "data": data or {},
        "environment": environment or {},
    }


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads the whole content of a checkpoint, with the tensors on the CPU, and verifies every
    byte. Never runs code from the file. Raises UserError.
    """
    with open_checkpoint(path) as contents:
        return contents.read(contents.tree)


def saved_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a checkpoint, as a flat dict (see `config.from_dict`). Raises UserError if
    the file is missing, damaged or no checkpoint.
    """
    with open_checkpoint(path) as contents:
        return contents.tree["settings"]


def load_checkpoint(
    path: str | Path,
    model: GPTModel,
    optimizer: torch.optim.Optimizer | None = None,
    state: RunState | None = None,
    data: dict[str, Any] | None = None,
    args: Settings | None = None,
    environment: dict[str, Any] | None = None,
    own_part: Callable[[str, Tensor], Tensor] | None = None,
) -> RunState:
    """Loads a checkpoint into model and optimizer and returns the state of its run. Raises
    UserError.

    Parameters and their optimizer state are matched by name. Names, shapes, dtypes and data are
    compared before any tensor is loaded, and one error names the differences (20 at most).
    Differences in args and environment that do not matter are noted in `state.pending_messages`.
    own_part(name, whole): returns this rank's part of a parameter, or of what the optimizer keeps
    for it, from the unsharded tensor.
    """
    with open_checkpoint(path) as contents:
        tree = contents.tree
        compared = _compare(tree, model, optimizer, data, args, environment)
        if compared.problems:
            raise UserError(f"{path} does not fit this run: {summary(compared.problems)}")
        _restore_tensors(contents, model, optimizer, own_part)
    state = state or RunState()
    _restore_state(state, tree, next(model.parameters()).device)
    if compared.other_val:  # losses on other data can't be compared with the best one
        state.best_val_loss, state.best_step = math.inf, -1
    if compared.notes:
        state.pending_messages.append(f"changed since it was saved: {summary(compared.notes)}")
    if args and (note := note_on_rising_rate(from_dict(tree["settings"]), args, state.step)):
        state.pending_messages.append(note)
    return state


@dataclass(frozen=True)
class _Comparison:
    """How a checkpoint differs from the run that loads it."""

    problems: list[str]  # differences that forbid loading it
    notes: list[str]  # differences that the log mentions
    other_val: bool  # the run validates on other data


def _compare(
    tree: dict[str, Any],
    model: GPTModel,
    optimizer: torch.optim.Optimizer | None,
    data: dict[str, Any] | None,
    args: Settings | None,
    environment: dict[str, Any] | None,
) -> _Comparison:
    """Compares a checkpoint's settings, shapes and records with what is given of the run (not
    None).
    """
    problems, other_val = differences_of_model(model, tree), False
    if optimizer is not None:
        problems += differences_of_optimizer(model, optimizer, tree)
    notes = changes(tree["settings"], to_dict(args), "") if args else []
    if environment and tree["environment"]:
        notes += changes(tree["environment"], environment, "")
    for part, names in _DATA_SETTINGS.items() if data else ():
        changed = changes_of_data(tree["data"].get(part, {}), (data or {})[part], part)
        if part == "val" and args and not args.has_val_files:  # it is split off the training data
            names = _DATA_SETTINGS["train"] + names
        if args and set(names) & set(args.allow_change):
            notes += changed
            other_val |= part == "val" and bool(changed)
        elif changed:
            problems += [f"{c} (if you mean it: --allow-change {names[0]})" for c in changed]
    return _Comparison(problems, notes, other_val)


def _restore_tensors(
    contents: CheckpointReader,
    model: GPTModel,
    optimizer: torch.optim.Optimizer | None,
    own_part: Callable[[str, Tensor], Tensor] | None,
) -> None:
    """Copies the tensors of a checkpoint into the model, and into the optimizer if there is one."""
    own_part = own_part or (lambda name, whole: whole.to(model.get_parameter(name).device))
    tree = contents.tree
    for name, p in model.named_parameters():  # one at a time: a rank may hold a part of each
        with torch.no_grad():
            p.copy_(own_part(name, contents.read(tree["model"][name])))
        if optimizer is not None and name in tree["optimizer"]:
            kept = contents.read(tree["optimizer"][name])
            optimizer.state[p] = {k: own_part(name, v) for k, v in kept.items()}


def _restore_state(state: RunState, tree: dict[str, Any], device: torch.device) -> None:
    """Sets the fields of `state` that a checkpoint stores, and its original path as `home`."""
    for key in _PLAIN_STATE:
        setattr(state, key, tree[key])
    state.home = tree["settings"]["checkpoint_path"]
    state.bad_in_row = torch.tensor(float(tree["bad_in_row"]), device=device)
    if state.scaler.enabled and tree["scaler"]:
        state.scaler.load_state_dict(tree["scaler"])


@dataclass(frozen=True)
class TrainedModel:
    """A model loaded from a checkpoint, in evaluation mode and on the CPU, with what is needed to
    use it.

    tokenizer: None where the run was given token ids that name none. data: the `data_record` of
    what the model was trained and validated on.
    """

    model: GPTModel
    tokenizer: Tokenizer | None
    settings: Settings
    data: dict[str, Any]

    def encode(self, text: str) -> Tensor:
        """The token ids of a text, in the shape of the model's input: (1, T) int64. Raises
        UserError without a tokenizer.
        """
        return torch.from_numpy(self._tokenizer.encode(text).astype("int64"))[None]

    def decode(self, ids: Tensor) -> str:
        """The text of token ids, of any shape. Raises UserError without a tokenizer."""
        return self._tokenizer.decode(ids.flatten().tolist())

    def continue_text(
        self,
        prompt: str,
        max_new_tokens: int = 100,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        **sampling: float,
    ) -> str:
        """The prompt and what the model writes after it, up to the end of the document or a stop
        string. sampling: the fields of `training.sampling.Sampling`, such as temperature=0 or
        top_p=0.9. Raises UserError without a tokenizer.
        """
        device = pick_device(str(next(self.model.parameters()).device), "fp32")
        written = continue_texts(
            self.model,
            self._tokenizer,
            [prompt],
            device,
            max_new_tokens,
            Sampling(**sampling),  # type: ignore[arg-type]
            [seed],
            [stop] if isinstance(stop, str) else stop,
        )
        return prompt + str(written[0])

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this checkpoint holds no tokenizer: its run was given token ids")
        return self.tokenizer


def load_model(path: str | Path, tokenizer_name: str = "") -> TrainedModel:
    """Loads the model in a checkpoint, ready to use. tokenizer_name: a name or file (see
    `build_tokenizer`) for a checkpoint that holds no tokenizer. Raises UserError.
    """
    with open_checkpoint(path) as contents:
        return model_in(contents, tokenizer_name)


def model_in(contents: CheckpointReader, tokenizer_name: str = "") -> TrainedModel:
    """The model in an open checkpoint, as `load_model` returns it. Raises UserError."""
    settings, data = from_dict(contents.tree["settings"]), contents.tree["data"]
    model = GPTModel(settings.model)
    model.load_state_dict(contents.read(contents.tree["model"]))
    stored, vocab_size = data.get("tokenizer", ""), model.config.vocab_size
    tokenizer = stored_tokenizer(stored, tokenizer_name, str(contents.path), vocab_size)
    return TrainedModel(model.eval(), tokenizer, settings, data)


if __name__ == "__main__":
    run_script(
        lambda argv: run_command(
            CheckpointSettings(**parse_flags(CheckpointSettings, "checkpoint.py", argv))
        )
    )
