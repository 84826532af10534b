"""Makes the settings of a training run from its command line. Typed flags win over the checkpoint
(with --resume) or the preset, and these over the defaults.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from config import BEFORE, GPTConfig, Settings, from_dict, to_dict
from runtime.console import aligned
from runtime.flags import Help, flag_name, parse_flags
from runtime.setting_fields import NothingSaved, UserError, choose
from settings.batch import data_parallel_size, resolve_batch
from settings.given_weights import values_from_weights
from settings.paths import default_checkpoint, in_folder
from settings.presets import PRESETS, WITH_ADAMW, preset_values
from settings.wandb_mode import wandb_mode

_SPREAD = ("parallel", "tensor_parallel_size", "use_tensor_parallel", "threads")


def parse_settings(
    script: str,
    argv: list[str],
    world: int = 1,
    saved: Callable[[str], Mapping[str, Any]] | None = None,
    weights: Callable[[str, str], Mapping[str, Any]] | None = None,
    restarted: bool = False,
) -> Settings:
    """Returns the settings of a training run from its command line. Raises UserError.

    script: "train_minimal" or "train_ddp", for the default paths. world: number of processes, for
    the global batch. saved(path): returns the flat settings stored in a checkpoint; called if the
    run may be one to resume. restarted: the launcher has repeated the command after a failure.
    Then, and with --resume auto, a checkpoint at the path is taken as one of this very run, which
    continues. weights(path, cache_dir): the settings that the weights of --init-from determine;
    called if the run starts from them.
    """
    typed = trainer_flags(script, argv)
    path = in_folder(typed.get("checkpoint_path", ""), default_checkpoint(script))
    repeated = restarted or typed.get("resume") == "auto"
    _refuse_contradictions(typed, repeated)
    found = _found(path, typed, repeated, saved)
    if found:
        base = _resumed(found, typed, script, path)
        if repeated:  # the micro-batch was settled when the run began, perhaps on other ranks
            typed.pop("micro_batch", None)
            typed.pop("grad_accum_steps", None)
    else:
        base = _new(typed, weights)
    values = {**base, **typed, "checkpoint_path": path, "resume": bool(found)}
    if not values.get("max_position_embeddings"):
        values["max_position_embeddings"] = values.get("seq_len", 128)
    if values.get("use_tensor_parallel"):
        values["tensor_parallel_size"] = world
    args = from_dict(values)
    _refuse_unread(typed, args)
    dp_size = data_parallel_size(script, args, typed, world)
    args = resolve_batch(args, typed, dp_size, base.get("global_batch_size", 0))
    if args.resume:
        _refuse_changes(base, args)
    return args


def _new(
    typed: Mapping[str, Any], weights: Callable[[str, str], Mapping[str, Any]] | None
) -> dict[str, Any]:
    """The settings of a new run that no flag gives: of its preset, and of given weights."""
    path = typed.get("init_from", "")
    preset = typed.get("preset", "finetune" if path else "quickstart")
    base = {**preset_values(preset, typed), "preset": preset}
    if preset == "finetune" and not path:
        raise UserError(
            "--preset finetune goes with --init-from, whose weights have the shape of the model; "
            "give that too, or another preset"
        )
    if not (path and weights):
        return base
    cache = typed.get("cache_dir", Settings.cache_dir)
    return values_from_weights(base, typed, weights(path, cache))


def _found(
    path: str,
    typed: Mapping[str, Any],
    repeated: bool,
    saved: Callable[[str], Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """The settings stored in the checkpoint to continue; empty if a new run is to start. Raises
    NothingSaved if there is no checkpoint and --resume was typed without auto.
    """
    if not (repeated or typed.get("resume")):
        return {}
    try:
        return dict(saved(path)) if saved else {}
    except NothingSaved:
        if typed.get("resume") is True:
            raise
        return {}


def _resumed(
    found: dict[str, Any], typed: Mapping[str, Any], script: str, path: str
) -> dict[str, Any]:
    """The settings of the checkpoint to continue, without those that the typed flags or the script
    replace; the log folder is the one where the logs are now.
    """
    base = BEFORE | found
    _move_logs(base, path)
    if script != "train_ddp":  # how a run is spread over processes may change
        for name in _SPREAD:
            base.pop(name, None)
    if typed.get("no_amp") or typed.get("bf16"):
        base.pop("precision", None)
    if "tensor_parallel_size" in typed:
        base.pop("use_tensor_parallel", None)
    return base


def _refuse_contradictions(typed: dict[str, Any], repeated: bool) -> None:
    """Raises UserError if typed flags exclude each other. Replaces hyphens by underscores in the
    names of --allow-change.
    """
    if "preset" in typed and typed.get("resume") and not repeated:
        raise UserError(
            "--preset with --resume: the run keeps its own settings; give single flags to "
            "change them, or --resume auto to start or continue with the same command"
        )
    if typed.get("init_from") and typed.get("resume") and not repeated:
        raise UserError(
            "--init-from with --resume: the run goes on with its own weights; leave one of them "
            "out, or give --resume auto to start or continue with the same command"
        )
    if typed.get("minutes") and typed.get("resume") and not repeated:
        raise UserError(
            "--minutes with --resume: the run keeps what was chosen for it; --num-steps sets "
            "another end, and --resume auto starts or continues with the same command"
        )
    if typed.get("dry_run") and typed.get("resume"):
        raise UserError("--dry-run is about a new run; leave out --resume")
    if typed.get("micro_batch") == "auto" and {"batch_size", "grad_accum_steps"} & typed.keys():
        raise UserError(
            "--micro-batch auto chooses batch_size and grad_accum_steps; give neither, or leave it "
            "out (--global-batch-size says how much a step sees)"
        )
    if typed.get("allow_change"):
        names = [f.name for kind in (GPTConfig, Settings) for f in dataclasses.fields(kind)]
        typed["allow_change"] = tuple(name.replace("-", "_") for name in typed["allow_change"])
        for name in typed["allow_change"]:
            choose("allow_change", name, dict.fromkeys(names))
        if not (typed.get("resume") or repeated):
            raise UserError("--allow-change is about a run to continue; give --resume too")


# Settings that only some runs read: their names, which runs do, and what to give for such a run.
_READ: tuple[tuple[tuple[str, ...], Callable[[Settings], bool], str], ...] = (
    (("decay_ratio",), lambda a: a.lr_scheduler == "wsd", "--lr-scheduler wsd"),
    (("min_lr",), lambda a: a.lr_scheduler != "none", "a --lr-scheduler that is not none"),
    (
        ("ngram_longest", "ngram_optimizer", "ngram_dropout"),
        lambda a: a.model.ngram_rows > 0,
        "--ngram-rows, as --arch modern has them",
    ),
    (
        ("ngram_weight_decay",),
        lambda a: a.ngram_optimizer == "rmsprop",
        "--ngram-optimizer rmsprop",
    ),
    (("gelu",), lambda a: a.model.arch == "gpt2", "--arch gpt2"),
    (("muon_lr_ratio", "muon_momentum"), lambda a: a.optimizer == "muon", "--optimizer muon"),
    (("val_ratio",), lambda a: not a.has_val_files, "data without --val-data or --val-npy"),
    (("bin_dtype",), lambda a: a.data_mode == "fineweb_npy", "--train-npy"),
    (("document_separator",), lambda a: a.data_mode == "text", "text, as of --train-data"),
    (
        ("wandb_project", "wandb_run_name", "wandb_mode", "wandb_group", "wandb_tags"),
        lambda a: a.use_wandb or a.wandb_mode == "disabled",
        "--use-wandb",
    ),
)


def _refuse_unread(typed: Mapping[str, Any], args: Settings) -> None:
    """Raises UserError if a typed flag has no effect together with the other settings, if min_lr or
    WANDB_MODE has no allowed value, or if a package is missing.
    """
    if -1 < typed.get("min_lr", 0) < 0:
        raise UserError(
            f"min_lr={args.min_lr} is below 0; give 0 or more, or -1 for a tenth of --lr"
        )
    if args.use_wandb:
        wandb_mode(args)
    if args.use_tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "--use-tensorboard needs the package tensorboard: pip install tensorboard, or leave it "
            "out"
        )
    for names, is_read, where in _READ:
        given = [flag_name(name) for name in names if name in typed]
        if given and not is_read(args):
            raise UserError(f"{given[0]} goes with {where}; leave it out, or give that too")


def _move_logs(saved: dict[str, Any], path: str) -> None:
    """Corrects log_dir in the saved settings of a run whose folder was moved. Logs that lay below
    the folder of the checkpoint are now looked for below the folder of `path`, unless only the old
    log folder exists.
    """
    old, logs = os.path.dirname(saved.get("checkpoint_path", "")), saved.get("log_dir", "logs")
    below = os.path.relpath(logs, old or ".")
    new = os.path.normpath(os.path.join(os.path.dirname(path), below))
    if not below.startswith("..") and (os.path.isdir(new) or not os.path.isdir(logs)):
        saved["log_dir"] = new


def _refuse_changes(saved: Mapping[str, Any], args: Settings) -> None:
    """Raises UserError if settings that define a run (`fixed`) are not as in its checkpoint, unless
    --allow-change names them.
    """
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


def trainer_flags(script: str, argv: list[str]) -> dict[str, Any]:
    """Returns the flags of a trainer that the user typed, as field name -> value. If argv asks for
    --help, prints each flag with the value that the rest of the command line gives it, and exits.
    Raises UserError.
    """

    def describe() -> Help:
        shown = _values_of_command(script, argv)
        about = f"[value]: what this command line uses, with preset {shown['preset']}."
        return Help(shown, about, _preset_table())

    return parse_flags(Settings, f"{script}.py", argv, describe)


def _values_of_command(script: str, argv: list[str]) -> dict[str, Any]:
    """The flat settings of a command line that also asks for help. If the rest of it is not valid
    alone, these are the settings of the script without flags.
    """
    rest = [x for x in argv if x not in ("-h", "--help")]
    try:
        args = parse_settings(script, rest)
    except UserError:
        args = parse_settings(script, [])
    return {**to_dict(args), "min_lr": args.final_lr}


def _preset_table() -> str:
    """A text table of the presets, one per line, with the settings in which they differ."""
    columns = ["arch", "n_layers", "n_heads", "d_model", "seq_len", "global_batch_size"]
    columns += ["num_steps", "optimizer", "lr", "lr_scheduler", "warmup_steps"]
    usual = {f.name: f.default for k in (GPTConfig, Settings) for f in dataclasses.fields(k)}
    rows = [["preset", *columns]]
    for name, values in PRESETS.items():
        if "arch" not in values:  # of finetune, the shape is that of the weights
            values = {**dict.fromkeys(columns[:4], "-"), **values}
        rows.append([name, *(str((usual | values)[c]) for c in columns)])
    lines = aligned(rows)
    lines += [
        f"{name} with --optimizer adamw: " + ", ".join(f"{k} {v}" for k, v in values.items())
        for name, values in WITH_ADAMW.items()
    ]
    lines.append("With --resume, the settings of the checkpoint take the place of the preset's.")
    return "\n".join(lines)
