"""The sentences of the log: what a run is, how it stands, and what can be done with it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from config import Settings
from corpus.token_dataset import TokenDataset
from model import GPTModel
from runtime.console import command, duration
from runtime.device import Device, free_memory_of
from settings.paths import default_checkpoint
from settings.presets import notes_on_preset
from training.evaluation import EvalResult, starts_with_evaluation
from training.memory import estimate
from training.optimizers import lr_at
from training.step import RunState


def header(
    args: Settings,
    device: Device,
    model: GPTModel,
    train: TokenDataset,
    val: TokenDataset,
    world: int,
) -> list[str]:
    """The lines that are logged when a run starts: device, data, model, memory and schedule. world:
    the number of processes.
    """
    config = args.model
    ranks = f", {world} processes" if world > 1 else ""
    tokenizer = train.tokenizer.name if train.tokenizer else "none"
    epochs = args.num_steps * args.global_batch_size / len(train)
    return [
        *args.chosen.splitlines(),
        f"device: {device.description}{ranks}",
        f"data: {train.source.name}; tokenizer: {tokenizer}; {train.num_tokens:,} tokens to train "
        f"on, {val.num_tokens:,} held out for validation",
        *(f"data: {note}" for note in train.notes),
        f"model: {config.arch}, {config.n_layers} layers, {config.n_heads} heads, "
        f"{config.d_model} channels, vocabulary {config.vocab_size:,}: "
        f"{model.num_parameters():,} parameters",
        _memory(args, device),
        f"run: preset {args.preset}, {args.num_steps} steps of {args.global_batch_size} x "
        f"{args.seq_len} tokens (global batch {args.global_batch_size}, micro-batch "
        f"{args.batch_size}; {epochs:.2g} epochs), {args.optimizer}, lr {args.lr:g}, seed "
        f"{args.seed}",
    ]


def _memory(args: Settings, device: Device) -> str:
    free, need = free_memory_of(device), estimate(args, device)
    there = "" if free == math.inf else f"; {free / 1e9:.2f} GB are still free"
    if need.total > free:
        there += ": too few, it seems; a lower --batch-size needs less"
    return f"memory: training takes about {need}{there}"


def notes_at_start(args: Settings, step: int, val: TokenDataset, device: Device) -> list[str]:
    """The lines about what may surprise in a run that starts, or resumes, at this step."""
    notes = [] if args.resume else notes_on_preset(args)
    if not step and not starts_with_evaluation(0, val, args, device):
        notes.append("no evaluation before the first step (--eval-at-start on does one)")
    if args.resume and step == args.num_steps:
        notes.append(
            f"nothing left to do: all {args.num_steps} steps are done; --num-steps with more of "
            "them goes on"
        )
    return notes


def evaluation_line(
    args: Settings,
    state: RunState,
    result: EvalResult,
    update: Mapping[str, Any],
    epoch: int,
    seconds: float,
    seconds_left: float | None,
    world: int,
    amp: bool,
) -> str:
    """The one line that says how a run stands. update: the record of the last update that was
    logged, empty before the first one; seconds: since the last such line; seconds_left: until the
    end of the run, None if unknown; world: the number of processes.
    """

    def last(name: str, digits: int, scale: float = 1.0, unit: str = "") -> str:
        return f"{update[name] * scale:.{digits}f}{unit}" if name in update else "n/a"

    def percent(name: str, of: str = "") -> str:
        whole = update.get(of) if of else 1.0
        return f"{update[name] / whole:.1%}" if update.get(name) is not None and whole else "n/a"

    fields = {
        "lr": last("lr", 6),
        "step time": last("step_seconds", 2),
        "toks/s (per rank)": last("tokens_per_sec", 2, 1 / world),
        "grad norm": last("grad_norm", 4),
        "train loss": last("train_loss", 4),
        "val loss": f"{result.loss:.4f}",
        "val ppl": f"{result.ppl:.2f}",
        "val bpb": "n/a" if result.bpb is None else f"{result.bpb:.4f}",
        "tokens": f"{state.tokens}",
        "dt": f"{seconds:.2f}s",
        "eta": "n/a" if seconds_left is None else f"{seconds_left / 3600:.2f}h",
        "amp": amp,
        "mfu": percent("mfu"),
        "data wait": percent("data_wait_seconds", "step_seconds"),
        "memory": last("memory_gb", 2, 1.0, "GB"),
    }
    text = " | ".join(f"{name}: {value}" for name, value in fields.items())
    return f"epoch {epoch} step {state.step} / {args.num_steps} | {text}"


_COLUMNS = 109  # of a terminal of 120, without the time of day


def short_evaluation_line(
    args: Settings,
    state: RunState,
    result: EvalResult,
    update: Mapping[str, Any],
    seconds_left: float | None,
) -> str:
    """What a terminal shows of `evaluation_line`, in at most 120 columns with the time before it.
    Of parts for which there is no room, the last are left out. Arguments are those of
    `evaluation_line`.
    """
    parts = [f"step {state.step}/{args.num_steps}"]
    if "train_loss" in update:
        parts.append(f"train {update['train_loss']:.4f}")
    parts.append(f"val {result.loss:.4f} +-{result.loss_se:.4f}")
    if result.bpb is not None:
        parts.append(f"bpb {result.bpb:.4f}")
    parts.append(f"ppl {result.ppl:.4g}")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} to go")
    if "tokens_per_sec" in update:
        parts.append(f"{update['tokens_per_sec'] / 1e3:,.1f}k tokens/s")
    if update.get("mfu") is not None:
        parts.append(f"mfu {update['mfu']:.0%}")
    if "lr" in update:
        parts.append(f"lr {update['lr']:.3g}")
    while len(" | ".join(parts)) > _COLUMNS:
        parts.pop()
    return " | ".join(parts)


def time_kept(args: Settings, state: RunState, seconds: float) -> list[str]:
    """The line about how long a run with --minutes took, and why it is not that long; else none.
    seconds: since the process began.
    """
    if not args.minutes or args.resume or state.stopped_by(args):
        return []
    line = f"took {seconds / 60:.2f} of its {args.minutes:g} minutes"
    off = seconds / 60 / args.minutes - 1
    if off < -0.05 and args.num_steps == args.most_steps:
        line += ": more epochs of these data may not help"
    elif abs(off) > 0.05:
        speed = "slower" if off > 0 else "faster"
        line += f": since its last step was fixed, it has been {speed} than expected"
    return [line]


def next_commands(
    script: str, args: Settings, state: RunState, world: int, prompt: str
) -> list[str]:
    """The last lines of a log: the commands that evaluate, continue and sample. world: the number
    of processes. prompt: for the sample, quoted for a shell; "" if the run has no tokenizer.
    """
    path = shlex.quote(args.checkpoint_path)
    usual = args.checkpoint_path == default_checkpoint(script)
    where = "" if usual else f" --checkpoint-path {path}"
    start = command(f"{script}.py", world if script == "train_ddp" else 0)
    guessing = math.log(args.model.vocab_size)
    failed = math.inf > state.best_val_loss > 1.02 * guessing
    lines, flags = [], ""
    if failed:
        lines.append(
            f"the best validation loss, {state.best_val_loss:.4f}, is above that of guessing, "
            f"ln {args.model.vocab_size} = {guessing:.4f}: this model has learned nothing; try "
            f"a lower --lr than {args.lr:g}"
        )
    if not state.stopped_by(args):
        flags, note = _more_steps(args, state.step)
        lines += [note] if note else []
    lines.append(f"evaluate: {command('eval.py')} --checkpoint-path {path}")
    if not failed:
        lines.append(f"continue: {start} --resume{flags}{where}")
    sample = f"{command('generate.py')} --checkpoint-path {path}"
    if prompt:
        lines.append(f"sample:   {sample} --prompt {prompt}")
    elif args.data_mode != "toy":
        lines.append(
            "sample:   these token ids name no tokenizer; if they are GPT-2's, "
            f"{sample} --tokenizer-name gpt2"
        )
    return lines


def _more_steps(args: Settings, step: int) -> tuple[str, str]:
    """Returns the flags that continue a finished run, and a note on them or "". If its learning
    rate has decayed, the flags have it decay anew, from about a tenth of the peak.
    """
    last, more = lr_at(args.num_steps - 1, args), f" --num-steps {2 * step}"
    if last > args.lr / 2:
        return more, ""
    share = 0.1 if args.lr_scheduler == "wsd" else 0.2  # the others are half way down by then
    lr = max(share * args.lr, args.min_lr)
    note = (
        f"the learning rate has decayed to {last:.3g}; the command below that continues this "
        f"run has --lr {lr:.3g}, since with {args.lr:g} it would jump up to "
        f"{args.lr if args.lr_scheduler == 'wsd' else args.lr / 2:.3g}"
    )
    return f"{more} --lr {lr:.3g}", note
