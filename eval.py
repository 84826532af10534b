"""Evaluation: `evaluate(...)`, used by the trainers, and the command line `python eval.py
--checkpoint-path FILE...`.

The number of processes and the batch size change neither which tokens are scored nor, beyond
float32 rounding inside the model, any of the results.
"""

from __future__ import annotations

import startup  # noqa: F401  # before torch loads

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alone import ALONE, Alone
from checkpoint import changes_of_data, load_model, saved_settings
from cli import parse_flags, run_script
from config import BEFORE, EvalSettings, Settings, UserError, checkpoint_in, settings_from
from console import progress
from dataset import TokenDataset, open_validation, refuse_missing
from device import Device, pick_device, tune
from loss import IGNORE
from model import GPTModel
from tokenizer import Tokenizer, stored_tokenizer

_LONG_ON_CPU = 1e12  # tokens x parameters; with 2 FLOP each, 20 s at 100 GFLOP/s


@dataclass(frozen=True)
class EvalResult:
    """Of one evaluation. bpb is None where the text behind the tokens is not known."""

    loss: float  # nats per token
    loss_se: float  # its standard error
    ppl: float  # perplexity, exp(loss); inf where that overflows
    bpb: float | None  # bits per byte of text
    tokens: int  # scored


@torch.no_grad()
def evaluate(
    model: GPTModel,
    val: TokenDataset,
    batch_size: int,
    device: Device,
    share: Alone = ALONE,
) -> EvalResult:
    """Loss of the model on every token of `val` but the first, each scored once, over all ranks
    together.

    share: of several ranks, what is this one's. The standard error takes windows as the
    independent samples, since tokens of one window are not (ratio estimator: Cochran 1977, sec.
    2.11). The model's mode is left as it was.
    """
    was_training = model.training
    model.eval()
    there, sums = device.torch, torch.zeros(7, dtype=torch.float64)
    windows = math.ceil((val.num_tokens - 1) / (val.seq_len - 1))
    batches = val.batches(batch_size, share.rank, share.world)
    total = math.ceil(windows / (share.world * batch_size))
    for ids, labels in progress(batches, "evaluating", total, quiet=share.rank > 0):
        with device.autocast():
            nll = model(ids.to(there), None, labels.to(there), "none", return_logits=False)[1]
        scored = labels[:, 1:] != IGNORE
        s, n = nll.cpu().double().sum(1), scored.sum(1).double()  # (B,) nats, tokens of each window
        sums[:6] += torch.stack((s, n, s * s, s * n, n * n, (n > 0).double())).sum(1)
        sums[6] += _bytes_of(labels[:, 1:][scored], val.tokenizer)
    model.train(was_training)
    nll, tokens, ss, sn, nn, windows, n_bytes = share.sum(sums).tolist()
    loss = nll / tokens
    spread = max(ss - 2 * loss * sn + loss * loss * nn, 0.0)  # sum over windows of (s - loss n)^2
    return EvalResult(
        loss=loss,
        loss_se=math.sqrt(spread * windows / max(windows - 1, 1)) / tokens,
        ppl=perplexity(loss),
        bpb=nll / math.log(2) / n_bytes if n_bytes else None,
        tokens=int(tokens),
    )


def starts_with_evaluation(
    step: int, model: GPTModel, val: TokenDataset, args: Settings, device: Device
) -> bool:
    """Whether a run that is at this step evaluates before it trains: a new one, as eval_at_start
    says, and with auto unless that takes long, which is told by sizes and so the same in each run.
    """
    if step or args.eval_at_start != "auto":
        return step == 0 and args.eval_at_start == "on"
    work = val.num_tokens * model.num_parameters()
    return device.torch.type != "cpu" or work <= _LONG_ON_CPU


def _bytes_of(ids: Tensor, tokenizer: Tokenizer | None) -> int:
    """Bytes of text that these ids stand for; 0 where that is not known."""
    if tokenizer is None:
        return 0
    table = tokenizer.token_bytes
    return int(table[ids.numpy()[ids.numpy() < len(table)]].sum())


def perplexity(loss: float) -> float:
    """exp(loss), or inf where a float64 can't hold it."""
    return math.exp(loss) if loss < 709 else math.inf if loss == loss else math.nan


def validation_of(
    args: EvalSettings, settings: Settings, data: dict[str, Any], where: str
) -> TokenDataset:
    """What to evaluate a checkpoint on: the data it recorded, or the files that the flags name.
    Raises UserError.
    """
    tokenizer = stored_tokenizer(
        data.get("tokenizer", ""), args.tokenizer_name, where, settings.model.vocab_size
    )
    if args.val_data and not tokenizer:
        raise UserError(f"{where} names no tokenizer for --val-data; say which: --tokenizer-name")
    longest = settings.model.max_position_embeddings
    if args.seq_len > longest:
        raise UserError(
            f"seq_len={args.seq_len} is beyond the {longest} positions of the model of {where}; "
            f"give at most --seq-len {longest}, or leave it out"
        )
    changes: dict[str, Any] = {
        k: getattr(args, k) for k in ("seq_len", "cache_dir") if getattr(args, k)
    }
    if args.bin_dtype != "auto":
        changes["bin_dtype"] = args.bin_dtype
    if args.val_data or args.val_npy:
        mode = "text" if args.val_data else "fineweb_npy"
        changes |= {
            "data_mode": mode,
            "val_data": args.val_data,
            "val_npy": args.val_npy,
            "val_max_tokens": 0,
            "train_data": (),
            "train_npy": args.val_npy,
            "use_toy_data": False,
        }
    elif args.data_mode not in ("auto", settings.data_mode):
        raise UserError(
            f"data_mode={args.data_mode}, but the checkpoint recorded {settings.data_mode} data; "
            "name the files with --val-data or --val-npy"
        )
    now = dataclasses.replace(settings, **changes)
    if not (args.val_data or args.val_npy):
        other = "--val-npy" if settings.data_mode == "fineweb_npy" else "--val-data"
        refuse_missing(
            now.val_data or now.val_npy or now.train_data or now.train_npy,
            f"this name is from {where}: start eval.py in the folder where that was trained, or "
            f"give other data to evaluate on with {other}",
        )
    val = open_validation(now, tokenizer)
    if not (args.val_data or args.val_npy):
        problems = changes_of_data(data.get("val", {}), val.describe(), "validation")
        if problems:
            raise UserError(f"{where} recorded other data: {'; '.join(problems)}")
    val = val.limited(args.max_tokens)
    if val.num_tokens < 2:
        raise UserError(f"{val.num_tokens} tokens leave none to score; raise --max-tokens")
    return val


def main(args: EvalSettings) -> None:
    """Evaluates each checkpoint, alone or under torchrun; rank 0 prints and logs the results."""
    from ranks import process_group  # below this module in the layout: only the
    from run_log import report_evaluations  # command line needs them

    paths = [checkpoint_in(path) for path in args.checkpoint_path]
    saved = [settings_from(BEFORE | saved_settings(path)) for path in paths]  # all readable?
    results, data_of, by_source = [], [], []
    with process_group(args) as ranks:
        for path, settings in zip(paths, saved, strict=True):
            precision = "fp32" if args.no_amp else settings.precision
            device = pick_device(args.device, precision, ranks.local_rank)
            tune(device)
            model, _, data = ranks.each(load_model, path)
            val = ranks.each(validation_of, args, settings, data, path)
            size = args.batch_size or settings.batch_size
            model.to(device.torch)
            results.append(evaluate(model, val, size, device, ranks))
            data_of.append(val.describe())
            parts = [p for p in val.parts if args.by_source and p.num_tokens > 1]
            by_source.append(
                {p.source.name: evaluate(model, p, size, device, ranks) for p in parts}
            )
        if ranks.rank == 0:
            report_evaluations(args.log_dir, paths, results, data_of, by_source)


if __name__ == "__main__":
    run_script(lambda argv: main(EvalSettings(**parse_flags(EvalSettings, "eval.py", argv))))
