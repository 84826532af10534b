"""What a run would take: `--dry-run`."""

from __future__ import annotations

import math
import shutil
import time

from torch import nn, optim

from config import Settings
from corpus.token_dataset import TokenDataset
from model import GPTModel
from parallel.context import SINGLE_PROCESS, ParallelContext
from parallel.process_group import Ranks
from reporting.log_lines import header
from reporting.reference import read_reference
from reporting.report_text import sketch
from runtime.console import aligned, duration, say
from runtime.device import Device
from runtime.files import target_of
from settings.presets import origins_of_settings
from training.evaluation import evaluate, starts_with_evaluation
from training.flops import flops_per_token, peak_flops
from training.optimizers import lr_at, state_shapes
from training.prefetch import Prefetch
from training.step import RunState, train_step

_MEASURED_STEPS = 3  # after one that is not counted
_PARTS = {
    "wte": "token embedding", "wpe": "position embedding", "ngrams": "n-gram embedding",
    "lm_head": "head", "attn": "attention", "mlp": "MLP",
}  # fmt: skip


def dry_run(
    model: GPTModel,
    optimizer: optim.Optimizer,
    args: Settings,
    device: Device,
    train: TokenDataset,
    val: TokenDataset,
    parallel: ParallelContext = SINGLE_PROCESS,
    ranks: Ranks | None = None,
    net: nn.Module | None = None,
) -> int:
    """Prints what a run with these settings would take, after steps whose results are thrown away;
    writes no file. Returns the exit code, 0. Arguments are those of a run, and `net` is what it
    trains where that is not `model` itself; all ranks call it together, and rank 0 prints.
    """
    read_reference(args.check_reference, args)  # refuses one that the run could not use
    ranks = ranks or Ranks()
    seconds, of_evaluation = _measured(
        model, net or model, optimizer, args, device, train, val, parallel
    )
    if ranks.rank:
        return 0
    rate = args.global_batch_size * args.seq_len / seconds
    peak = peak_flops(device)
    lines = [
        *header(args, device, model, train, val, ranks.world),
        "",
        "parameters",
        *_indented(aligned(_parameters(model))),
        "",
        "data",
        *_data(args, model, train, val),
        "",
        "disk",
        *_disk(args, model, optimizer),
        "",
        "time",
        *_time(args, val, device, seconds, of_evaluation),
        f"  {rate:,.0f} tokens/s"
        + (
            f", mfu {rate * flops_per_token(args.model, args.seq_len) / peak / ranks.world:.0%}"
            if peak
            else ""
        ),
        "",
        f"learning rate over {args.num_steps} steps",
        *_schedule(args),
        "",
        "settings, and where they come from",
        *_indented(aligned(origins_of_settings(args))),
        "",
        "a dry run: no log and no checkpoint was written; without --dry-run this starts",
    ]
    say("\n".join(lines))
    return 0


def _measured(
    model: GPTModel,
    net: nn.Module,
    optimizer: optim.Optimizer,
    args: Settings,
    device: Device,
    train: TokenDataset,
    val: TokenDataset,
    parallel: ParallelContext,
) -> tuple[float, float]:
    """The seconds of an update, the median of three, and of an evaluation, from a part of it."""
    state, batches, seconds = RunState.fresh(device), Prefetch(train, args, device, parallel), []
    for _ in range(1 + _MEASURED_STEPS):
        start = time.perf_counter()
        float(
            train_step(net, optimizer, batches(state.step), args, state, device, parallel).grad_norm
        )
        seconds.append(time.perf_counter() - start)
    part = val.limited(1 + args.global_batch_size * (args.seq_len - 1))
    start = time.perf_counter()
    evaluate(model, part, args.batch_size, device, parallel)
    share = (val.num_tokens - 1) / (part.num_tokens - 1)
    return sorted(seconds[1:])[_MEASURED_STEPS // 2], (time.perf_counter() - start) * share


def _parameters(model: GPTModel) -> list[list[str]]:
    """Rows of a table: the numbers of trainable parameters by part of the model."""
    counts: dict[str, int] = {}
    for name, shape in model.shapes.items():
        known = (_PARTS[word] for word in name.split(".") if word in _PARTS)
        part = next(known, "norms and others")
        counts[part] = counts.get(part, 0) + math.prod(shape)
    whole = model.num_parameters()
    rows = [[part, f"{n:,}", f"{n / whole:.1%}"] for part, n in counts.items()]
    return [*rows, ["all", f"{whole:,}", ""]]


def _data(args: Settings, model: GPTModel, train: TokenDataset, val: TokenDataset) -> list[str]:
    tokens = args.num_steps * args.global_batch_size * (args.seq_len - 1)
    return [
        f"  {tokens:,} tokens are trained on, {tokens / train.num_tokens:.2g} epochs of "
        f"{train.num_tokens:,}; {tokens / model.num_parameters():.1f} tokens per parameter",
        f"  {val.num_tokens:,} tokens are validated on, {_evaluations(args)} times",
    ]


def _evaluations(args: Settings) -> int:
    return math.ceil(args.num_steps / args.eval_steps)


def _disk(args: Settings, model: GPTModel, optimizer: optim.Optimizer) -> list[str]:
    """Lines about the checkpoints: weights and optimizer state in float32."""
    size = 0
    for name, p in model.named_parameters():
        shapes = [model.shapes[name], *state_shapes(optimizer, p, model.shapes[name]).values()]
        size += 4 * sum(map(math.prod, shapes))
    kept = args.num_steps // args.keep_every if args.keep_every else 0
    needed = (4 + kept) * size
    folder = target_of(args.checkpoint_path).parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    lines = [
        f"  {4 + kept} checkpoints of {_bytes(size)}, {_bytes(needed)}: latest, previous, best, "
        f"one being written{f', {kept} kept by --keep-every' if kept else ''}",
        f"  {_bytes(free)} are free in {folder}",
    ]
    if needed > free:
        lines.append("  that is too little: see --keep-every and --checkpoint-path")
    return lines


def _bytes(n: float) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def _time(
    args: Settings, val: TokenDataset, device: Device, seconds: float, of_evaluation: float
) -> list[str]:
    times = _evaluations(args) + starts_with_evaluation(0, val, args, device)
    steps, evaluations = args.num_steps * seconds, times * of_evaluation
    return [
        f"  {duration(steps + evaluations)}: {args.num_steps} steps of {seconds:.3g} s, "
        f"{duration(steps)}; {times} evaluations of {of_evaluation:.3g} s, "
        f"{duration(evaluations)}; saving not counted",
    ]


def _schedule(args: Settings) -> list[str]:
    columns = min(60, args.num_steps)
    rates = [lr_at(args.num_steps * i // columns, args) for i in range(columns)]
    high = f"{max(rates):.3g}"
    picture = sketch(rates, rows=4, low=0.0)
    labels = [high, *[""] * (len(picture) - 2), "0"]
    return [f"  {label:>8} |{row}" for label, row in zip(labels, picture, strict=True)]


def _indented(lines: list[str]) -> list[str]:
    return ["  " + line for line in lines]
