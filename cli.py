"""The command line, made from the dataclasses of config.py: one flag for each field."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

from config import (
    BEFORE,
    PRESETS,
    GPTConfig,
    NothingSaved,
    Settings,
    UserError,
    choose,
    default_checkpoint,
    flat,
    settings_from,
)
from console import accept_any_text, visible

_SPREAD = ("parallel", "tensor_parallel_size", "use_tensor_parallel", "threads")
_NO_MEMORY = ("out of memory", "can't allocate memory")  # in what torch says


def parse_settings(
    script: str,
    argv: list[str],
    world: int = 1,
    saved: Callable[[str], Mapping[str, Any]] | None = None,
    restarted: bool = False,
) -> Settings:
    """Settings of a trainer from its command line. Raises UserError.

    script: "train_minimal" or "train_ddp", for the default paths. world: number of processes, for
    the global batch. saved(path): the flat settings stored in a checkpoint, asked for with
    --resume. restarted: by a launcher that repeats the command. Then, and with --resume auto, a
    checkpoint that is there is of this very run, which continues.
    """
    typed = parse_flags(Settings, f"{script}.py", argv)
    path = typed.get("checkpoint_path") or default_checkpoint(script)
    repeated = restarted or typed.get("resume") == "auto"
    if "preset" in typed and typed.get("resume") and not repeated:
        raise UserError(
            "--preset with --resume: the run keeps its own settings; give single flags to "
            "change them, or --resume auto to start or continue with the same command"
        )
    found: dict[str, Any] = {}
    if saved is not None and (repeated or typed.get("resume")):
        try:
            found = dict(saved(path))
        except NothingSaved:
            if typed.get("resume") is True:
                raise
        typed["resume"] = bool(found)
    if repeated and found:
        typed.pop("micro_batch", None)  # settled when the run began
    if typed.get("micro_batch") == "auto" and {"batch_size", "grad_accum_steps"} & typed.keys():
        raise UserError(
            "--micro-batch auto chooses batch_size and grad_accum_steps; give neither, or leave it "
            "out (--global-batch-size says how much a step sees)"
        )
    if typed.get("allow_change") and not (typed.get("resume") or repeated):
        raise UserError("--allow-change is about a run to continue; give --resume too")
    if found:
        base = BEFORE | found
        _move_logs(base, path)
        if script != "train_ddp":  # how the run was spread is no part of what it is
            for name in _SPREAD:
                base.pop(name, None)
        if typed.get("no_amp") or typed.get("bf16"):
            base.pop("precision", None)
    else:
        base = dict(choose("preset", typed.get("preset", "quickstart"), PRESETS))
        if typed.get("data_mode") == "fineweb_npy" or typed.get("train_npy"):
            base.pop("tokenizer_name", None)  # shards need none, and its files may not be at hand
        if typed.get("arch") == "gpt2":
            base.pop("ngram_rows", None)  # a part of the other architecture
        if typed.get("optimizer") == "adamw" and base.get("optimizer") == "muon":
            # Without Muon's even steps, large rates need a warm-up and are still too large.
            base |= {"lr": 0.15 * base["lr"], "warmup_steps": base["num_steps"] // 16}
        if "num_steps" in typed:
            base["warmup_steps"] = min(base["warmup_steps"], typed["num_steps"] // 10)
    values = {**base, **typed, "checkpoint_path": path}
    if not values.get("max_position_embeddings"):
        values["max_position_embeddings"] = values.get("seq_len", 128)
    if values.get("use_tensor_parallel"):
        if typed.get("tensor_parallel_size", world) != world:
            raise UserError(
                f"--use-tensor-parallel means all {world} processes, not "
                f"{typed['tensor_parallel_size']}; give one of the two"
            )
        values["tensor_parallel_size"] = world
    args = settings_from(values)
    data_world = _settle_spread(script, args, world)
    if args.resume and repeated:  # perhaps on fewer ranks, which take more steps for one batch
        typed.pop("grad_accum_steps", None)
    args = _settle_batch(args, typed, data_world, base.get("global_batch_size", 0))
    if args.resume:
        _refuse_changes(base, args)
    return args


def _move_logs(saved: dict[str, Any], path: str) -> None:
    """Logs that lay below the folder of the checkpoint have gone where that is now, unless they
    are still there.
    """
    old, logs = os.path.dirname(saved.get("checkpoint_path", "")), saved.get("log_dir", "logs")
    below = os.path.relpath(logs, old or ".")
    new = os.path.normpath(os.path.join(os.path.dirname(path), below))
    if not below.startswith("..") and (os.path.isdir(new) or not os.path.isdir(logs)):
        saved["log_dir"] = new


def _settle_spread(script: str, args: Settings, world: int) -> int:
    """How many ranks see data of their own. Raises UserError where the processes don't fit."""
    parts = args.tensor_parallel_size
    if script != "train_ddp" and (args.parallel != "ddp" or parts > 1):
        raise UserError(
            "--parallel fsdp and tensor parallelism are for several processes: "
            "torchrun --nproc-per-node=N train_ddp.py"
        )
    if world % parts:
        raise UserError(
            f"tensor_parallel_size={parts} does not divide {world} processes; start a multiple of "
            f"{parts}, or give another --tensor-parallel-size"
        )
    return world // parts


def _refuse_changes(saved: Mapping[str, Any], args: Settings) -> None:
    """Raises UserError where a resumed run would no longer be the same run."""
    fixed = [
        field.name
        for kind in (GPTConfig, Settings)
        for field in dataclasses.fields(kind)
        if field.metadata.get("fixed") and field.name not in args.allow_change
    ]
    now = flat(args)
    changes = [f"{k} was {saved[k]}, is {now[k]}" for k in fixed if saved.get(k, now[k]) != now[k]]
    if changes:
        names = " ".join(change.split()[0] for change in changes)
        raise UserError(
            f"not the run to resume: {'; '.join(changes)}; if you mean it, --allow-change {names}"
        )


def _settle_batch(args: Settings, typed: Mapping[str, Any], world: int, known: int) -> Settings:
    """The settings with their global batch, and with micro-batches that divide it. world: ranks
    that see data of their own. known: the global batch of the preset or of the run to resume.
    """
    total = _global_batch(args, typed, world, known)
    if args.resume and known and total != known and "global_batch_size" not in args.allow_change:
        raise UserError(
            f"the run to resume has global_batch_size={known}, not {total}; another "
            "one would repeat or leave out data; leave it, and give --batch-size to save memory "
            "(or --allow-change global_batch_size)"
        )
    micro = _micro_batch(args, typed, world, total)
    accum = total // world // micro
    return dataclasses.replace(
        args, global_batch_size=total, batch_size=micro, grad_accum_steps=accum
    )


def _global_batch(args: Settings, typed: Mapping[str, Any], world: int, known: int) -> int:
    """Sequences per optimizer step: the number that was typed, or batch_size x grad_accum_steps x
    ranks where both of those were, or the known one. A new run rounds a preset's to a multiple of
    the ranks, which the preset did not foresee.
    """
    micro, accum = typed.get("batch_size"), typed.get("grad_accum_steps")
    if typed.get("global_batch_size"):
        return args.global_batch_size
    if (micro and accum) or not known:
        return args.batch_size * (args.grad_accum_steps or 1) * world
    return known if args.resume else world * max(1, round(known / world))


def _micro_batch(args: Settings, typed: Mapping[str, Any], world: int, total: int) -> int:
    """Sequences per rank and micro-step: what was typed, or what grad_accum_steps that was typed
    makes of the global batch, or the largest that divides it and is no larger than args.batch_size.
    Raises UserError where a rank's part of the global batch is no multiple of it.
    """
    micro, accum = typed.get("batch_size"), typed.get("grad_accum_steps")
    rows = total // world
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    size = micro or rows // (accum or 1)
    if not (micro or accum):
        size = max((n for n in sizes if n <= args.batch_size), default=0)
    if total == rows * world and size in sizes and (not accum or size * accum == rows):
        return size
    unit = world * (micro or 1) * (accum or 1)
    near = [n for n in (total // unit * unit, (total // unit + 1) * unit) if n]
    close = sorted(sorted(sizes, key=lambda n: (abs(n - (micro or n)), n))[:2])
    tries = []
    if micro and total == rows * world and not accum:
        tries.append(f"--batch-size {_either(close)}")
    tries.append(
        "other --nproc-per-node" if args.resume else f"--global-batch-size {_either(near)}"
    )
    raise UserError(
        f"global_batch_size={total} is not {world} ranks x batch_size {micro or 'N'} x "
        f"grad_accum_steps {accum or 'N'} with whole numbers N; try {', or '.join(tries)}"
    )


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help lists all flags")


def parse_flags(kind: type, program: str, argv: list[str]) -> dict[str, Any]:
    """What the user typed, and nothing else: field name -> value. Raises UserError for flags and
    values that don't fit.
    """
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    classes = (GPTConfig, kind) if kind is Settings else (kind,)
    for owner in classes:
        hints = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if field.metadata:
                _add_flag(parser, field, hints[field.name])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [s for s in parser._option_string_actions if s.startswith("--")]
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=2)
        raise UserError(
            f"unknown argument {unknown[0]}"
            + (f"; did you mean {' or '.join(close)}?" if close else "; --help lists all flags")
        )
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(known).items()}


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], kind: Any) -> None:
    name = "--" + field.name.replace("_", "-")
    default = "" if field.default in ((), "", False) else f" (default {field.default})"
    choices = " {" + ",".join(field.metadata["choices"]) + "}" if field.metadata["choices"] else ""
    text = (field.metadata["help"] + choices + default).replace("%", "%%")
    if field.metadata["positional"]:
        parser.add_argument(field.name, nargs="*", metavar="PATH", help=text)
    elif word := field.metadata["word"]:
        parser.add_argument(name, nargs="?", const=True, choices=[word], metavar=word, help=text)
        parser.add_argument(
            f"--no-{field.name}",
            dest=field.name,
            action="store_const",
            const=False,
            help=argparse.SUPPRESS,
        )
    elif kind is bool and not field.name.startswith("no_"):
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
    elif kind is bool:
        parser.add_argument(name, action="store_true", help=text)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(name, nargs="+", metavar="FILE", help=text)
    else:
        parser.add_argument(name, type=kind, metavar=field.name.split("_")[-1].upper(), help=text)


def _rank_prefix() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def run_script(
    body: Callable[[list[str]], int | None], first_to_say: Callable[[str], bool] = lambda text: True
) -> None:
    """Runs a script's body on the command line; it returns the exit code, None for 0. A user's
    mistake ends it with one line and exit code 2. first_to_say(line): whether no other rank has
    printed it.
    """
    accept_any_text()
    try:
        code = body(sys.argv[1:])
    except UserError as mistake:
        if first_to_say(str(mistake)):
            rank = "" if mistake.of_all else _rank_prefix()
            print(f"{rank}error: {visible(str(mistake))}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (RuntimeError, MemoryError) as reason:
        if not (isinstance(reason, MemoryError) or any(x in str(reason) for x in _NO_MEMORY)):
            raise
        print(
            f"{_rank_prefix()}error: out of memory; lower --batch-size. A trainer keeps the same "
            "tokens per step with --global-batch-size, chooses itself with --micro-batch auto, and "
            "needs less with --use-activation-checkpoint",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # who read the output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if code:
        sys.exit(code)
