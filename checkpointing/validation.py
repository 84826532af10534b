"""The data that eval.py evaluates a checkpoint on."""

from __future__ import annotations

import dataclasses
from typing import Any

from checkpoint import TrainedModel
from checkpointing.reading import changes_of_data
from config import Settings
from corpus.token_dataset import TokenDataset
from dataset import open_validation, refuse_missing
from runtime.setting_fields import UserError
from settings.eval_and_generate import EvalSettings


def validation_of(
    args: EvalSettings, settings: Settings, run: TrainedModel, where: str
) -> TokenDataset:
    """The data to evaluate a checkpoint on: the validation data that it recorded, or the files that
    the flags name. settings, run: of the checkpoint; where: its path, for messages. Raises
    UserError if the data are missing, too short, or not those recorded.
    """
    if args.val_data and not run.tokenizer:
        raise UserError(f"{where} names no tokenizer for --val-data; say which: --tokenizer-name")
    now = _changed(args, settings, where)
    other_files = bool(args.val_data or args.val_npy)
    if "imported" in run.data and not other_files:
        raise UserError(
            f"{where} holds the weights of {run.data['imported']}, and no data; say what to "
            "evaluate them on with --val-data or --val-npy"
        )
    if not other_files:
        other = "--val-npy" if settings.data_mode == "fineweb_npy" else "--val-data"
        refuse_missing(
            now.val_data or now.val_npy or now.train_data or now.train_npy,
            f"this name is from {where}: start eval.py in the folder where that was trained, or "
            f"give other data to evaluate on with {other}",
        )
    val = open_validation(now, run.tokenizer)
    if not other_files:
        problems = changes_of_data(run.data.get("val", {}), val.describe(), "validation")
        if problems:
            raise UserError(f"{where} recorded other data: {'; '.join(problems)}")
    val = val.limited(args.max_tokens)
    if val.num_tokens < 2:
        raise UserError(f"{val.num_tokens} tokens leave none to score; raise --max-tokens")
    val.notes += _note_on_trained(val, run.data.get("train", {}), where)
    return val


def _changed(args: EvalSettings, settings: Settings, where: str) -> Settings:
    """The settings of the run, with those about its data replaced by what the flags of eval.py say.
    Raises UserError if a flag does not suit the model or the recorded data.
    """
    longest = settings.model.max_position_embeddings
    if args.seq_len > longest:
        raise UserError(
            f"seq_len={args.seq_len} is beyond the {longest} positions of the model of {where}; "
            f"give at most --seq-len {longest}, or leave it out"
        )
    changes: dict[str, Any] = {
        k: getattr(args, k) for k in ("seq_len", "cache_dir", "text_column") if getattr(args, k)
    }
    if args.bin_dtype != "auto":
        changes["bin_dtype"] = args.bin_dtype
    if args.val_data or args.val_npy:
        changes |= {
            "data_mode": "text" if args.val_data else "fineweb_npy",
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
    return dataclasses.replace(settings, **changes)


def _note_on_trained(val: TokenDataset, trained: dict[str, Any], where: str) -> list[str]:
    """A list with one line of warning if tokens of `val` were trained on, else an empty list.
    trained: the checkpoint's record of its training data; where: its path.
    """
    if trained.get("fingerprint") != val.describe()["fingerprint"]:
        return []
    both = min(trained["stop"], val.stop) - max(trained["start"], val.start)
    if both <= 0:
        return []
    return [
        f"{both:,} of {val.num_tokens:,} tokens are from what {where} was trained on; without "
        "--val-data and --val-npy it is evaluated on what was held out"
    ]
