"""`python checkpoint.py verify|show|compare|tokenizer FILE...`: looks at checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpointing.file_format import (
    printable,
)
from checkpointing.reading import (
    ENTRIES,
    open_checkpoint,
)
from checkpointing.writing import named_tensors
from corpus.tokenizer import write_tokenizer_file
from runtime.setting_fields import UserError, check_fields, choose, flag


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
    """Prints for each file whether all its bytes are intact. Raises UserError if one is not."""
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
    """Prints the counters, settings, data and tensors of each file."""
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
    if (about or state) and not any(line.startswith("model ") for line in state):
        print("the weights are equal, bit for bit")
    if state:
        raise UserError(f"{paths[0]} and {paths[1]} are different states")


def differences(one: str | Path, other: str | Path) -> tuple[list[str], list[str]]:
    """Returns two lists of differences between two checkpoints: in what they say about their runs,
    and in their states. The second is empty if one continues exactly as the other. Raises UserError
    if one cannot be read.
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
            k for k in ENTRIES if k not in ("model", "optimizer", "settings", "data", "environment")
        ]
        changed = {k: f"{k}: {a.tree[k]} | {b.tree[k]}" for k in plain if a.tree[k] != b.tree[k]}
        about += [line for k, line in changed.items() if k in ids]
        state = [line for k, line in changed.items() if k not in ids]
        ours, theirs = (
            dict(named_tensors({k: c.tree[k] for k in ("model", "optimizer")})) for c in (a, b)
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
    """Writes the tokenizer that a checkpoint holds to a file for --tokenizer-name. paths:
    checkpoint and file.
    """
    if len(paths) != 2:
        raise UserError(f"tokenizer takes a checkpoint and a file to write, not {len(paths)} files")
    path, to = paths
    if os.path.lexists(to):
        raise UserError(f"{to} is there already; give another name")
    with open_checkpoint(path) as contents:
        stored = contents.tree["data"].get("tokenizer", "")
    if not stored:
        raise UserError(f"{path} holds no tokenizer: its run was given token ids")
    write_tokenizer_file(stored, path, Path(to))
    print(f"wrote {to}")


VERBS = {"verify": verify, "show": show, "compare": compare, "tokenizer": write_tokenizer}


def run_command(args: CheckpointSettings) -> None:
    """Runs a command of checkpoint.py: args.verb is its name, followed by the files."""
    if len(args.verb) < 2:
        raise UserError(f"say what to do with which files: checkpoint.py {'|'.join(VERBS)} FILE...")
    choose("verb", args.verb[0], VERBS)(args.verb[1:])
