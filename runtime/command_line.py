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
    WITH_ADAMW,
    GPTConfig,
    NothingSaved,
    Settings,
    UserError,
    default_checkpoint,
    expanded,
    from_dict,
    in_folder,
    preset_values,
    to_dict,
    wandb_mode,
)
from runtime.console import accept_any_text, visible

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
    path = in_folder(typed.get("checkpoint_path", ""), default_checkpoint(script))
    repeated = restarted or typed.get("resume") == "auto"
    if "preset" in typed and typed.get("resume") and not repeated:
        raise UserError(
            "--preset with --resume: the run keeps its own settings; give single flags to "
            "change them, or --resume auto to start or continue with the same command"
        )
    found: dict[str, Any] = {}
    if repeated or typed.get("resume"):
        try:
            found = dict(saved(path)) if saved else {}
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
        if "tensor_parallel_size" in typed:
            base.pop("use_tensor_parallel", None)
    else:
        base = preset_values(typed.get("preset", "quickstart"), typed)
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
    args = from_dict(values)
    _refuse_unread(typed, args)
    data_world = _settle_spread(script, args, world)
    if args.resume and repeated:  # perhaps on fewer ranks, which take more steps for one batch
        typed.pop("grad_accum_steps", None)
    args = _resolve_batch(args, typed, data_world, base.get("global_batch_size", 0))
    if args.resume:
        _refuse_changes(base, args)
    return args


# What nothing reads unless other settings are so: names, when they are read, and the flag for that.
_READ: tuple[tuple[tuple[str, ...], Callable[[Settings], bool], str], ...] = (
    (("decay_ratio",), lambda a: a.lr_scheduler == "wsd", "--lr-scheduler wsd"),
    (("min_lr",), lambda a: a.lr_scheduler != "none", "a --lr-scheduler that is not none"),
    (("muon_lr_ratio", "muon_momentum"), lambda a: a.optimizer == "muon", "--optimizer muon"),
    (("val_ratio",), lambda a: not a.has_val_files, "data without --val-data or --val-npy"),
    (("bin_dtype",), lambda a: a.data_mode == "fineweb_npy", "--train-npy"),
    (("document_separator",), lambda a: a.data_mode == "text", "text, as of --train-data"),
    (
        ("wandb_project", "wandb_run_name", "wandb_mode"),
        lambda a: a.use_wandb or a.wandb_mode == "disabled",
        "--use-wandb",
    ),
)


def _refuse_unread(typed: Mapping[str, Any], args: Settings) -> None:
    """Raises UserError where something was typed that means nothing here."""
    if -1 < typed.get("min_lr", 0) < 0:
        raise UserError(
            f"min_lr={args.min_lr} is below 0; give 0 or more, or -1 for a tenth of --lr"
        )
    if args.use_wandb:
        wandb_mode(args)
    for names, is_read, where in _READ:
        given = [_flag_of(name) for name in names if name in typed]
        if given and not is_read(args):
            raise UserError(f"{given[0]} goes with {where}; leave it out, or give that too")


def _flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


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
    now = to_dict(args)
    changes = [f"{k} was {saved[k]}, is {now[k]}" for k in fixed if saved.get(k, now[k]) != now[k]]
    if changes:
        names = " ".join(change.split()[0] for change in changes)
        raise UserError(
            f"not the run to resume: {'; '.join(changes)}; if you mean it, --allow-change {names}"
        )


def _resolve_batch(args: Settings, typed: Mapping[str, Any], world: int, known: int) -> Settings:
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


# How other trainers call a setting: what to give here. Underscores are hyphens there.
_FOREIGN = {
    **dict.fromkeys(("learning-rate", "max-lr", "peak-lr"), "--lr"),
    **dict.fromkeys(
        ("epochs", "num-epochs", "num-train-epochs", "max-epochs"),
        "--num-steps: runs are counted in optimizer steps; the log says how many epochs they are",
    ),
    **dict.fromkeys(
        ("max-iters", "max-steps", "steps", "iters", "num-iterations", "lr-decay-iters"),
        "--num-steps",
    ),
    **dict.fromkeys(
        ("block-size", "context-length", "context-size", "sequence-length", "max-seq-len"),
        "--seq-len",
    ),
    **dict.fromkeys(("n-layer", "num-layers", "depth", "num-hidden-layers"), "--n-layers"),
    **dict.fromkeys(("n-head", "num-heads", "num-attention-heads"), "--n-heads"),
    **dict.fromkeys(("n-embd", "n-embed", "emb-dim", "embed-dim", "hidden-size"), "--d-model"),
    **dict.fromkeys(
        ("weight-tying", "tie-weights", "tie-word-embeddings"),
        "nothing: the embedding and the output head always share their weights",
    ),
    **dict.fromkeys(
        ("gradient-accumulation-steps", "accumulation-steps", "grad-accum"), "--grad-accum-steps"
    ),
    **dict.fromkeys(
        ("micro-batch-size", "device-batch-size", "per-device-train-batch-size"), "--batch-size"
    ),
    "total-batch-size": "--global-batch-size, which counts sequences",
    **dict.fromkeys(("grad-clip", "max-grad-norm", "clip-grad-norm"), "--grad-clip-norm"),
    **dict.fromkeys(("warmup-iters", "warmup"), "--warmup-steps"),
    **dict.fromkeys(("eval-interval", "eval-every"), "--eval-steps"),
    "log-interval": "--log-steps",
    **dict.fromkeys(("save-interval", "save-every"), "--save-steps"),
    **dict.fromkeys(("dtype", "amp", "mixed-precision", "fp16"), "--precision"),
    **dict.fromkeys(("out-dir", "output-dir"), "--checkpoint-path and --log-dir"),
    **dict.fromkeys(("data", "dataset", "data-dir", "input"), "--train-data or --train-npy"),
    **dict.fromkeys(("ckpt", "checkpoint"), "--checkpoint-path"),
    "gradient-checkpointing": "--use-activation-checkpoint",
    "no-compile": "--compile off",
    **dict.fromkeys(
        ("init-from", "from-pretrained", "model-name-or-path", "pretrained"),
        "nothing: a run starts from fresh weights, or with --resume from a checkpoint of its own",
    ),
    **dict.fromkeys(("wandb", "wandb-log"), "--use-wandb"),
    **dict.fromkeys(("num-tokens", "length"), "--max-new-tokens"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help lists all flags")


class _Format(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def parse_flags(kind: type, program: str, argv: list[str]) -> dict[str, Any]:
    """What the user typed, and nothing else: field name -> value. Raises UserError for flags and
    values that don't fit. --help shows what the rest of the command line would use, and exits.
    """
    classes = (GPTConfig, kind) if kind is Settings else (kind,)
    fields = [f for owner in classes for f in dataclasses.fields(owner) if f.metadata]
    shown = {f.name: f.default for f in fields}
    about, presets = "[value]: what is used where the flag is not given.", ""
    if kind is Settings and {"-h", "--help"} & set(argv):
        shown = _values_of_command(program.removesuffix(".py"), argv)
        about = f"[value]: what this command line uses, with preset {shown['preset']}."
        presets = _preset_table()
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Format,
        description=about,
        epilog=presets,
    )
    hints = {k: v for owner in classes for k, v in typing.get_type_hints(owner).items()}
    for field in fields:
        _add_flag(parser, field, hints[field.name], shown[field.name])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [s for s in parser._option_string_actions if s.startswith("--")]
        raise UserError(f"unknown argument {unknown[0]}{_hint(unknown[0], flags, fields)}")
    paths = [f.name for f in fields if "PATH" in _metavar(f, hints[f.name])]
    return {k: _plain(v, _flag_of(k) if k in paths else "") for k, v in vars(known).items()}


def _plain(value: Any, path_flag: str) -> Any:
    """What the parser found as a field has it: lists as tuples, and in paths no ~."""
    if isinstance(value, list):
        return tuple(_plain(v, path_flag) for v in value)
    if path_flag and isinstance(value, str) and value.startswith("~"):
        return str(expanded(value, path_flag))
    return value


def _hint(given: str, flags: list[str], fields: list[dataclasses.Field[Any]]) -> str:
    """What to type in place of an argument that is not known."""
    name = given.split("=")[0].lstrip("-").replace("_", "-").lower()
    for field in fields:
        if field.metadata["short_for"] and f"--{name}" == f"--no-{_flag_of(field.name)[2:]}":
            long = field.metadata["short_for"]
            return (
                f": {_flag_of(field.name)} is short for {long} and has no opposite; give "
                f"{long.split()[0]}"
            )
    instead = _FOREIGN.get(name, "")
    if instead and (not instead.startswith("--") or instead.split()[0].rstrip(",:") in flags):
        return f"; here that is {instead}"
    close = (
        [f"--{name}"]
        if f"--{name}" in flags
        else difflib.get_close_matches(f"--{name}", flags, n=2)
    )
    return f"; did you mean {' or '.join(close)}?" if close else "; --help lists all flags"


def _values_of_command(script: str, argv: list[str]) -> dict[str, Any]:
    """The settings of a command line that also asks for help; where it is not complete, those of
    the script alone.
    """
    rest = [x for x in argv if x not in ("-h", "--help")]
    try:
        args = parse_settings(script, rest)
    except UserError:
        args = parse_settings(script, [])
    return {**to_dict(args), "min_lr": args.final_lr}


def _preset_table() -> str:
    """The presets, a line for each, with what tells them apart."""
    columns = ["arch", "n_layers", "n_heads", "d_model", "seq_len", "global_batch_size"]
    columns += ["num_steps", "optimizer", "lr", "lr_scheduler", "warmup_steps"]
    usual = {f.name: f.default for k in (GPTConfig, Settings) for f in dataclasses.fields(k)}
    rows = [["preset", *columns]]
    for name, values in PRESETS.items():
        rows.append([name, *(str((usual | values)[c]) for c in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    lines += [
        f"{name} with --optimizer adamw: " + ", ".join(f"{k} {v}" for k, v in values.items())
        for name, values in WITH_ADAMW.items()
    ]
    lines.append("With --resume, the settings of the checkpoint take the place of the preset's.")
    return "\n".join(line.rstrip() for line in lines)


def _metavar(field: dataclasses.Field[Any], kind: Any) -> str:
    """What --help calls the value of a flag."""
    known = field.metadata["metavar"]
    if field.metadata["choices"]:
        known = "{" + ",".join(field.metadata["choices"]) + "}"
    usual = {int: "N", float: "X", str: "NAME", bool: ""}
    return known or usual.get(kind, "PATH")


def _as_shown(value: Any) -> str:
    """A value as --help shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        value = " ".join(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("\n", "\\n") or "none"


def _add_flag(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], kind: Any, shown: Any
) -> None:
    name, metavar = _flag_of(field.name), _metavar(field, kind)
    text = f"{field.metadata['help']} [{_as_shown(shown)}]".replace("%", "%%")
    if field.metadata["positional"]:
        text = field.metadata["help"].replace("%", "%%")
        parser.add_argument(field.name, nargs="*", metavar=metavar, help=text)
    elif word := field.metadata["word"]:
        parser.add_argument(name, nargs="?", const=True, choices=[word], metavar=word, help=text)
        parser.add_argument(
            f"--no-{field.name}",
            dest=field.name,
            action="store_const",
            const=False,
            help=argparse.SUPPRESS,
        )
    elif kind is bool and (field.metadata["short_for"] or field.name.startswith("no_")):
        parser.add_argument(name, action="store_true", help=text)
    elif kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(name, nargs="+", metavar=metavar, help=text)
    else:
        parser.add_argument(name, type=kind, metavar=metavar, help=text)


def _rank_prefix() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def run_script(
    body: Callable[[list[str]], int | None],
    is_first_reporter: Callable[[str], bool] = lambda text: True,
) -> None:
    """Runs a script's body on the command line; it returns the exit code, None for 0. A user's
    mistake ends it with one line and exit code 2. is_first_reporter(line): whether no other rank
    has printed it.
    """
    accept_any_text()
    try:
        code = body(sys.argv[1:])
    except UserError as mistake:
        if is_first_reporter(str(mistake)):
            rank = "" if mistake.of_all else _rank_prefix()
            print(f"{rank}error: {visible(str(mistake))}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (RuntimeError, MemoryError) as reason:
        if not (isinstance(reason, MemoryError) or any(x in str(reason) for x in _NO_MEMORY)):
            raise
        print(
            f"{_rank_prefix()}error: out of memory; lower --batch-size, with which a trainer keeps "
            "its global batch. It chooses itself with --micro-batch auto, and needs less with "
            "--use-activation-checkpoint",
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
