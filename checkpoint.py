"""What a checkpoint holds: a whole run, by names, the same for every parallel layout.

`python checkpoint.py verify|show|compare FILE...` looks at checkpoints from the command line, and
`checkpoint.py tokenizer FILE OUT.json` takes the tokenizer out of one. Which files a run keeps, and
when it writes them, is in checkpointing/manager.py.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from checkpointing.file_format import (
    CheckpointReader,
    TensorRef,
    Unreadable,
    as_unreadable,
    open_verified,
    printable,
    size_of,
    tensor_bytes,
    write_with_checksum,
)
from config import Settings, from_dict, to_dict
from corpus.tokenizer import build_tokenizer, tokenizer_from_json
from model import GPTModel
from runtime.fields import NothingSaved, UserError, check_fields, choose, flag
from runtime.files import expanded
from runtime.flags import parse_flags
from runtime.script import run_script
from settings.paths import variant_path
from training.optimizers import lr_at, state_shapes
from training.step import RunState

FORMAT = 2
_PLAIN_STATE = ("step", "tokens", "best_val_loss", "best_step", "run_id", "wandb_run_id")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("model", "optimizer", "scaler", "settings", "data", "environment"), dict),
    **dict.fromkeys(("format", "step", "tokens", "best_step", "bad_in_row"), int),
    **dict.fromkeys(("run_id", "wandb_run_id"), str),
    "best_val_loss": float,
}
_DATA_SETTINGS: dict[str, tuple[str, ...]] = {  # which part of the data they decide
    "train": ("train_data", "train_npy", "max_tokens", "val_ratio", "tokenizer_name"),
    "val": ("val_data", "val_npy", "val_max_tokens", "val_ratio", "tokenizer_name"),
}
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_ID = r"(?!\.)[\w.-]{0,128}"  # folders get their names from them
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
_LARGEST_SMALL = 50_000  # of these together, as size_of counts
_SPACE = 1_000_000  # bytes of a checkpoint beside its tensors
_Result = TypeVar("_Result")


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    args: Settings,
    data: dict[str, Any] | None = None,
) -> None:
    """Writes the whole run to `path`: at any moment the file there is the whole old one or the
    whole new one. The old one stays as `name.previous.pt`.

    model: the bare module, not a DDP wrapper. data: what the run trains and validates on. Raises
    UserError where the file can't be written; what was at `path` before is then untouched.
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
    """What is written: nested dicts of plain values and of the tensors themselves, not copies.

    gather(name, tensor): all of what belongs to the parameter of this name, where ranks have parts.
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


def write_checkpoint(
    path: str | Path, content: dict[str, Any], *labels: str, keep_previous: bool = False
) -> None:
    """Puts content at `path`, as its latest state, and under the labels as second names of the same
    file. The latest before becomes the previous one, unless keep_previous leaves that as it is.
    Raises UserError; the file at `path` is then as before, or whole and new.
    """
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    on_cpu = _on_cpu(content)
    broken = [name for name, t in _tensors(on_cpu) if not _is_finite(t)]
    if broken:
        raise UserError(f"{broken[0]} is not finite, so this is no state to continue from")
    with _says_why(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target.parent, tensor_bytes(on_cpu))
        temporary.unlink(missing_ok=True)  # it may be a second name of a file to keep
        try:
            write_with_checksum(temporary, on_cpu)
            with open_checkpoint(temporary):  # is it as it was written, and can it be loaded?
                pass
            if target.exists() and not keep_previous:
                _second_name(target, variant_path(target, "previous"))
            os.replace(temporary, target)  # before the labels, so that what is there is resumed
            add_names(target, *labels)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


def add_names(path: Path, *labels: str) -> None:
    """Has the file also under these labels, where it is not yet. Raises UserError."""
    with _says_why(path):
        for name in (variant_path(path, label) for label in labels):
            if not (name.exists() and name.samefile(path)):
                _second_name(path, name)


def _on_cpu(tree: Any) -> Any:
    """The tree with tensors that lie on the CPU without gaps; those that do are not copied."""
    if isinstance(tree, dict):
        return {k: _on_cpu(v) for k, v in tree.items()}
    return tree.cpu().contiguous() if isinstance(tree, Tensor) else tree


def _tensors(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{path}{key} ")
        elif isinstance(value, (Tensor, TensorRef)):
            yield path + key, value


def _is_finite(t: Tensor) -> bool:
    if not t.is_floating_point() or not t.numel():
        return True
    low, high = torch.aminmax(t)  # one pass without a copy; a NaN becomes both
    return bool(low.isfinite() & high.isfinite())


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises OSError where a checkpoint with tensors of n_bytes has no room."""
    free = shutil.disk_usage(folder).free
    needed = n_bytes + _SPACE
    if free < needed:
        raise OSError(f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free")


def _second_name(file: Path, name: Path) -> None:
    """Makes `name` another name of the file, or a copy where the file system has no hard links;
    what had the name is replaced at once.
    """
    made = name.with_name(f"{name.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(file, made)
        except OSError:
            shutil.copyfile(file, made)
            with open(made, "rb") as copy:
                os.fsync(copy.fileno())
        os.replace(made, name)
    finally:
        made.unlink(missing_ok=True)  # a rename onto another name of the same file does nothing


@contextmanager
def _says_why(target: Path) -> Iterator[None]:
    """Turns failures of writing into one line with their cause and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as reason:  # torch.save hides a full disk in a RuntimeError
        cause = reason if isinstance(reason, OSError) else reason.__context__ or reason
        raise UserError(
            f"cannot write the checkpoint {target}: {cause}; free space or change --checkpoint-path"
        ) from reason


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure, where the file system knows how to."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as reason:
        if reason.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[CheckpointReader]:
    """A checkpoint whose bytes and description are checked, with its tensors still in the file.
    Raises Unreadable.
    """
    with open_verified(path) as contents:
        with as_unreadable(path):
            _check_description(contents.tree)
        yield contents


def _check_description(tree: Any) -> None:
    """Raises UserError unless it is what `build_checkpoint` makes. Takes memory for nothing."""
    if type(tree) is not dict or size_of({k: tree.get(k) for k in _SMALL}) > _LARGEST_SMALL:
        raise UserError("not a checkpoint: a description of another kind, or of absurd size")
    if tree.get("format") != FORMAT:
        raise UserError(
            f"checkpoint format {tree.get('format')!r:.40}, this version reads {FORMAT}"
        )
    wrong = [k for k, kind in _KINDS.items() if type(tree.get(k)) is not kind]
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
    problems = _differences_of_model(described, tree)
    if problems:
        raise UserError(f"its settings describe another model: {_some(problems)}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The whole content of a checkpoint, on the CPU, every byte checked. Never runs code from the
    file. Raises UserError.
    """
    with open_checkpoint(path) as contents:
        return contents.read(contents.tree)


def saved_settings(path: str | Path) -> dict[str, Any]:
    """The flat settings stored in a checkpoint. Raises UserError."""
    with open_checkpoint(path) as contents:
        return contents.tree["settings"]


def latest_valid(
    path: str | Path, use: Callable[[Path], _Result]
) -> tuple[_Result, Path, list[str]]:
    """What use(file) returns for the newest whole checkpoint of a run, that file, and what is
    wrong with a newer one. Raises UserError if none is whole.
    """
    wrong: list[str] = []
    target = Path(os.path.realpath(path))
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


def resumable_settings(path: str | Path) -> dict[str, Any]:
    """The flat settings of the checkpoint that --resume continues. Where their tokenizer can't be
    had any more, they name a copy of the one in the checkpoint, made now in cache_dir. Raises
    UserError.
    """
    return latest_valid(path, _settings_with_tokenizer)[0]


def _settings_with_tokenizer(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as contents:
        settings, stored = contents.tree["settings"], contents.tree["data"].get("tokenizer", "")
    name = settings.get("tokenizer_name", "")
    if not (name and stored) or os.path.isfile(name):
        return settings
    try:
        build_tokenizer(name)
    except UserError:
        cache = expanded(from_dict(settings).cache_dir, "--cache-dir")
        copy = cache / f"tokenizers/{hashlib.sha256(stored.encode()).hexdigest()[:16]}.json"
        _write_tokenizer(stored, path, copy)
        settings["tokenizer_name"] = str(copy)
    return settings


def _write_tokenizer(stored: str, path: str | Path, to: Path) -> None:
    tokenizer_from_json(stored, f"the tokenizer in {path}")  # or a file would be made of anything
    temporary = to.with_name(f"{to.name}.{os.getpid()}.tmp")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(stored, encoding="utf-8")
        os.replace(temporary, to)
    except OSError as reason:
        raise UserError(
            f"cannot write the tokenizer of {path} to {to}: {reason.strerror}"
        ) from None


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
    """Fills model and optimizer from a checkpoint and returns how far its run had come. Raises
    UserError.

    Parameters and their moments are matched by name; names, shapes, types and data are compared
    before a tensor is read, and all differences named at once. What may differ between args or
    environment and those of the file is noted in `state.pending_messages`. own_part(name, whole):
    what this rank has of a parameter, or of what the optimizer keeps for it.
    """
    own_part = own_part or (lambda name, whole: whole.to(model.get_parameter(name).device))
    with open_checkpoint(path) as contents:
        tree = contents.tree
        problems = _differences_of_model(model, tree)
        if optimizer is not None:
            problems += _differences_of_optimizer(model, optimizer, tree)
        notes = _changes(tree["settings"], to_dict(args), "") if args else []
        if environment and tree["environment"]:
            notes += _changes(tree["environment"], environment, "")
        other_val = False
        for part, names in _DATA_SETTINGS.items() if data else ():
            changed = changes_of_data(tree["data"].get(part, {}), (data or {})[part], part)
            if part == "val" and args and not args.has_val_files:  # it is part of the other data
                names = _DATA_SETTINGS["train"] + names
            if args and set(names) & set(args.allow_change):
                notes += changed
                other_val |= part == "val" and bool(changed)
            elif changed:
                problems += [f"{c} (if you mean it: --allow-change {names[0]})" for c in changed]
        if problems:
            raise UserError(f"{path} does not fit this run: {_some(problems)}")
        for name, p in model.named_parameters():  # one at a time: a rank may hold a part of each
            with torch.no_grad():
                p.copy_(own_part(name, contents.read(tree["model"][name])))
            if optimizer is not None and name in tree["optimizer"]:
                kept = contents.read(tree["optimizer"][name])
                optimizer.state[p] = {k: own_part(name, v) for k, v in kept.items()}
    state = state or RunState()
    for key in _PLAIN_STATE:
        setattr(state, key, tree[key])
    state.home = tree["settings"]["checkpoint_path"]
    state.bad_in_row = torch.tensor(
        float(tree["bad_in_row"]), device=next(model.parameters()).device
    )
    if other_val:  # another scale
        state.best_val_loss, state.best_step = math.inf, -1
    if state.scaler.enabled and tree["scaler"]:
        state.scaler.load_state_dict(tree["scaler"])
    if notes:
        state.pending_messages.append(f"changed since it was saved: {_some(notes)}")
    if args and (note := _rate_that_rises(from_dict(tree["settings"]), args, state.step)):
        state.pending_messages.append(note)
    return state


def _rate_that_rises(before: Settings, now: Settings, step: int) -> str:
    """What to say where a run that gets more steps goes on at this one with a rate well above its
    last.
    """
    if now.num_steps <= before.num_steps or not now.warmup_steps < step < now.num_steps:
        return ""
    last, first = lr_at(step - 1, before), lr_at(step, now)
    if first <= 1.5 * last:
        return ""
    return (
        f"the learning rate was {last:.3g} in step {step} and is {first:.3g} in the next: "
        f"{now.lr_scheduler} now ends at step {now.num_steps}, and a lower --lr than {now.lr:g} "
        "lowers the jump. To plan for more steps, start a run with --lr-scheduler wsd and "
        "--keep-every N, and resume a copy of its checkpoint from before the decay"
    )


def _some(problems: list[str]) -> str:
    more = f" (+{len(problems) - 20} more)" if len(problems) > 20 else ""
    return printable("; ".join(sorted(problems)[:20]) + more)


def _differences_of_model(model: GPTModel, tree: dict[str, Any]) -> list[str]:
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


def _differences_of_optimizer(
    model: GPTModel, optimizer: torch.optim.Optimizer, tree: dict[str, Any]
) -> list[str]:
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
    """How data differs from what a checkpoint recorded; where it lies on disk doesn't matter."""
    return _changes(recorded, {k: v for k, v in now.items() if k != "source"}, f"{part} data: ")


def _changes(recorded: dict[str, Any], now: dict[str, Any], label: str) -> list[str]:
    passing = ("resume", "allow_change", "checkpoint_path")
    return [
        f"{label}{k} was {recorded[k]!r}, is {now[k]!r}"
        for k in now
        if k not in passing and k in recorded and recorded[k] != now[k]
    ]


def load_model(path: str | Path) -> tuple[GPTModel, Settings, dict[str, Any]]:
    """(model on the CPU, settings of its run, record of its data) of a checkpoint. Raises
    UserError.
    """
    with open_checkpoint(path) as contents:
        settings = from_dict(contents.tree["settings"])
        tensors = contents.read(contents.tree["model"])
    model = GPTModel(settings.model)
    model.load_state_dict(tensors)
    return model, settings, contents.tree["data"]


@dataclass(frozen=True)
class CheckpointSettings:
    """Settings of checkpoint.py."""

    verb: tuple[str, ...] = flag(
        (),
        "verify FILES: are all bytes as they were written; show FILES: settings, steps, data and "
        "loss; compare A B: all differences (exit code 2 where there are any); tokenizer FILE "
        "OUT.json: writes its tokenizer, for --tokenizer-name",
        positional=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)


def verify(paths: tuple[str, ...]) -> None:
    """Says of each file whether it is whole. Raises UserError if one is not."""
    bad = 0
    for path in paths:
        try:
            with open_checkpoint(path) as contents:
                print(f"{path}: whole, step {contents.tree['step']}, {contents.size:,} bytes")
        except UserError as reason:
            bad += 1
            print(reason)
    if bad:
        raise UserError(f"{bad} of {len(paths)} not whole")


def show(paths: tuple[str, ...]) -> None:
    """Prints what is in each file."""
    for path in paths:
        with open_checkpoint(path) as contents:
            tree = contents.tree
        print(f"{path}: {contents.size:,} bytes, written by run {tree['run_id']}")
        for key in ("step", "tokens", "best_val_loss", "best_step"):
            print(f"  {key}: {tree[key]}")
        for part in ("environment", "settings"):
            print(printable(f"  {part}: " + _pairs(dict(sorted(tree[part].items())))))
        for part in ("train", "val"):
            print(printable(f"  {part} data: " + _pairs(tree["data"].get(part, {}))))
        for name, t in tree["model"].items():
            kept = ", ".join(sorted(tree["optimizer"].get(name, {})))
            print(f"  {name} {t.shape} {str(t.dtype).removeprefix('torch.')}; {kept}")


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in values.items())


def compare(paths: tuple[str, ...]) -> None:
    """Prints how two files differ. Raises UserError if weights or optimizer states do, so that
    scripts can tell.
    """
    if len(paths) != 2:
        raise UserError(f"compare takes two files, not {len(paths)}")
    about, state = differences(*paths)
    print("\n".join(map(printable, [*about, *state] or ["no difference"])))
    if state:
        raise UserError(f"{paths[0]} and {paths[1]} are different states")


def differences(one: str | Path, other: str | Path) -> tuple[list[str], list[str]]:
    """How two checkpoints differ: (in what is said about the runs, in the states themselves), the
    second empty if one continues exactly as the other. Raises UserError.
    """
    with open_checkpoint(one) as a, open_checkpoint(other) as b:
        about = [
            f"{part} {k}: {a.tree[part].get(k)!r:.200} | {b.tree[part].get(k)!r:.200}"
            for part in ("settings", "environment", "data")
            for k in sorted(a.tree[part].keys() | b.tree[part].keys())
            if a.tree[part].get(k) != b.tree[part].get(k)
        ]
        ids = ("run_id", "wandb_run_id")
        plain = [
            k for k in _KINDS if k not in ("model", "optimizer", "settings", "data", "environment")
        ]
        changed = {k: f"{k}: {a.tree[k]} | {b.tree[k]}" for k in plain if a.tree[k] != b.tree[k]}
        about += [line for k, line in changed.items() if k in ids]
        state = [line for k, line in changed.items() if k not in ids]
        ours, theirs = (
            dict(_tensors({k: c.tree[k] for k in ("model", "optimizer")})) for c in (a, b)
        )
        state += [f"{name}: in one file only" for name in sorted(ours.keys() ^ theirs.keys())]
        for name in sorted(ours.keys() & theirs.keys()):
            x, y = a.read(ours[name]), b.read(theirs[name])
            if x.shape != y.shape or x.dtype != y.dtype:
                state.append(f"{name}: {tuple(x.shape)} {x.dtype} | {tuple(y.shape)} {y.dtype}")
            elif not torch.equal(x, y):
                state.append(f"{name}: up to {float((x - y).abs().max()):.3g} apart")
    return about, state


def write_tokenizer(paths: tuple[str, ...]) -> None:
    """Writes the tokenizer that a checkpoint holds to a file for --tokenizer-name."""
    if len(paths) != 2:
        raise UserError(f"tokenizer takes a checkpoint and a file to write, not {len(paths)} files")
    path, to = paths
    if os.path.lexists(to):
        raise UserError(f"{to} is there already; give another name")
    with open_checkpoint(path) as contents:
        stored = contents.tree["data"].get("tokenizer", "")
    if not stored:
        raise UserError(f"{path} holds no tokenizer: its run was given token ids")
    _write_tokenizer(stored, path, Path(to))
    print(f"wrote {to}")


VERBS = {"verify": verify, "show": show, "compare": compare, "tokenizer": write_tokenizer}


def main(args: CheckpointSettings) -> None:
    """Runs one verb on the files."""
    if len(args.verb) < 2:
        raise UserError(f"say what to do with which files: checkpoint.py {'|'.join(VERBS)} FILE...")
    choose("verb", args.verb[0], VERBS)(args.verb[1:])


if __name__ == "__main__":
    run_script(
        lambda argv: main(
            CheckpointSettings(**parse_flags(CheckpointSettings, "checkpoint.py", argv))
        )
    )
