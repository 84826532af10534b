"""Opens the data of a run (text, token shards or random tokens), and holds out its validation part.

All data is a `TokenDataset` (corpus/token_dataset.py): a range of tokens cut into windows of
seq_len. The windows of step k depend on the seed and k alone, so a resumed run sees the same
sequences as one that was not interrupted.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from config import Settings
from corpus.contamination import REFUSED_SHARE, refuse_copies, refuse_leak, repeated_files, some
from corpus.data_kinds import FineWebNPYDataset, TextDatasetForCausalLM, ToyRandomDataset
from corpus.hashing import permute
from corpus.mixtures import Joined, Mixture, weighted
from corpus.shards import find_shards
from corpus.token_dataset import TokenDataset
from corpus.tokenizer import Tokenizer, build_tokenizer
from corpus.tokenizing import TOKENIZER_FILE
from runtime.files import expanded
from runtime.setting_fields import UserError

__all__ = [
    "FineWebNPYDataset",
    "TextDatasetForCausalLM",
    "TokenDataset",
    "ToyRandomDataset",
    "build_tokenizer",
    "open_data",
    "permute",
]


def tokenizer_of(args: Settings) -> Tokenizer | None:
    """The tokenizer that the settings name. Without a name it is that of bytes for text; for shards
    the one stored beside them, if there is one, else None.
    """
    if args.tokenizer_name or args.data_mode == "text":
        return build_tokenizer(args.tokenizer_name or "bytes")
    beside = {
        p.parent / TOKENIZER_FILE for p in find_shards([w[0] for w in weighted(args.train_npy)])
    }
    if args.data_mode == "fineweb_npy" and len(beside) == 1 and (path := beside.pop()).is_file():
        return build_tokenizer(str(path))
    return None


def open_source(
    args: Settings, held_out: bool = False, tokenizer: Tokenizer | None = None
) -> list[tuple[TokenDataset, Fraction | None]]:
    """Opens the training data, or with held_out the validation files, that the settings name.
    Returns (data set, weight) for each source of a mixture; without weights, all files together as
    one data set with the weight None. Raises UserError.
    """
    if args.data_mode == "toy":
        vocab_size = args.model.vocab_size or 10_000
        return [(ToyRandomDataset(vocab_size, args.seq_len, seed=args.data_seed), None)]
    vocab_size = args.model.vocab_size or (tokenizer.vocab_size if tokenizer else 50257)

    def open_one(paths: Sequence[str]) -> TokenDataset:
        if args.data_mode == "fineweb_npy":
            return FineWebNPYDataset(paths, args.seq_len, vocab_size, tokenizer, args.bin_dtype)
        assert tokenizer is not None
        return TextDatasetForCausalLM(
            paths,
            tokenizer,
            args.seq_len,
            args.cache_dir,
            args.document_separator,
            args.text_column,
        )

    text, shards = (args.val_data, args.val_npy) if held_out else (args.train_data, args.train_npy)
    named = weighted(text or shards)
    if held_out and any(weight is not None for _, weight in named):
        raise UserError("validation data takes no weights: every token of it is scored once")
    if named and named[0][1] is not None:
        return [(open_one([path]), weight) for path, weight in named]
    return [(open_one([path for path, _ in named]), None)]


def refuse_missing(paths: Sequence[str], hint: str) -> None:
    """Raises UserError if a data file does not exist. hint: the end of the error message."""
    for path, _ in weighted(paths):
        if not os.path.lexists(path) and not glob.glob(path, recursive=True):
            raise UserError(f"{path}: no such file in {os.getcwd()}; {hint}")


def open_validation(args: Settings, tokenizer: Tokenizer | None = None) -> TokenDataset:
    """The validation data that the settings name, or else the last part of their training data.

    tokenizer: None = the one that the settings name. Raises UserError.
    """
    tokenizer = tokenizer or tokenizer_of(args)
    return _held_out(args, open_source(args, args.has_val_files, tokenizer))


def _held_out(args: Settings, sources: list[tuple[TokenDataset, Fraction | None]]) -> TokenDataset:
    if args.has_val_files:
        parts = [data for data, _ in sources]
    else:
        parts = [data.split(args.val_ratio)[1] for data, _ in sources]
    val = parts[0]
    if len(parts) > 1:
        val = Joined(parts, [weight or Fraction(1) for _, weight in sources])
        if not args.val_by_weight:
            val = TokenDataset(val.source, args.seq_len, tokenizer=val.tokenizer)
    val = val.limited(args.val_max_tokens)
    if val.num_tokens < 2:
        way = "give more of it" if args.has_val_files else "give more data, or raise --val-ratio"
        raise UserError(
            f"the validation part has {val.num_tokens} tokens, too few to score one; {way}"
        )
    return val


def open_data(args: Settings) -> tuple[TokenDataset, TokenDataset, Settings]:
    """Opens the data of a run. Returns (training data, validation data, the settings with the
    vocabulary size and the tokenizer's name filled in).

    Raises UserError, also if validation text occurs in the training data.
    """
    if args.resume:
        for name in ("train_data", "train_npy", "val_data", "val_npy"):
            refuse_missing(
                getattr(args, name),
                "with --resume, names of data that are not typed come from the checkpoint; give "
                f"--{name.replace('_', '-')} with the files where they are now",
            )
    tokenizer = tokenizer_of(args)
    sources = open_source(args, tokenizer=tokenizer)
    val_sources = open_source(args, True, tokenizer) if args.has_val_files else sources
    val = _held_out(args, val_sources)
    parts = [data if args.has_val_files else data.split(args.val_ratio)[0] for data, _ in sources]
    for part in parts:
        if not len(part):
            raise UserError(
                f"the training part of {part.source.name} has {part.num_tokens} tokens, fewer than "
                f"one window of seq_len={args.seq_len}; give more data, or lower --seq-len or "
                "--val-ratio"
            )
    weights = [weight for _, weight in sources if weight is not None]
    train = (Mixture(parts, weights) if weights else parts[0]).limited(args.max_tokens)
    if not len(train):
        raise UserError(f"max_tokens={args.max_tokens} is less than one window of {args.seq_len}")
    opened = {id(data): data for data, _ in (*sources, *val_sources)}.values()
    train.notes = [note for data in opened for note in data.notes]
    for part, weight in zip(parts, weights, strict=True) if weights else ():
        share = float(weight / sum(weights))
        epochs = share * args.num_steps * args.global_batch_size / len(part)
        train.notes.append(
            f"{share:.3g} of the sequences are from {part.source.name}: {part.num_tokens:,} "
            f"tokens, {epochs:.2g} epochs"
        )
    if args.data_mode != "toy":  # whose tokens are random
        train.notes += _check_apart(args, train, val)
    if args.sample_prompt and not tokenizer:
        raise UserError(
            "--sample-prompt needs a tokenizer, and this data names none; try --tokenizer-name gpt2"
        )
    name = args.tokenizer_name or (tokenizer.name if args.data_mode == "text" and tokenizer else "")
    needed = max(train.source.vocab_size, tokenizer.vocab_size if tokenizer else 0)
    return train, val, with_vocab_size(args, needed, name)


def _check_apart(args: Settings, train: TokenDataset, val: TokenDataset) -> list[str]:
    """Searches the training data for text of the validation data. Returns notes for the log; raises
    UserError if a large part is found.
    """
    default_corpus = args.data_mode == "text" and not args.train_data
    allow = args.allow_leak or default_corpus  # the standard library's encodings are alike
    notes, copies = [], refuse_copies(train, val, allow)
    if twice := repeated_files(train):
        notes.append(f"the training data holds some text twice: {some(twice)}")
    hint = f": {some(copies)}" if copies else ""
    for part in val.parts:
        cache = expanded(args.cache_dir, "--cache-dir")
        share = refuse_leak(train, part, cache, allow, hint)
        if share > REFUSED_SHARE or copies:
            notes.append(
                f"{share:.0%} of the different text of the validation data ({part.source.name}) "
                f"also stands in the training data{hint}; on that the validation loss measures "
                "memory"
            )
    return notes


def data_record(train: TokenDataset, val: TokenDataset) -> dict[str, Any]:
    """The record of its data that a checkpoint stores: what identifies the training and the
    validation data, and the tokenizer as JSON.
    """
    tokenizer = train.tokenizer.to_json() if train.tokenizer else ""
    return {"train": train.describe(), "val": val.describe(), "tokenizer": tokenizer}


def with_vocab_size(args: Settings, vocab_size: int, tokenizer_name: str) -> Settings:
    """The settings with what the data determines: the tokenizer's name, and, where they have no
    vocabulary size, the given one. Raises UserError if they have a smaller one than that.
    """
    if args.model.vocab_size and args.model.vocab_size < vocab_size:
        hint = f"try --vocab-size {vocab_size}"
        if args.init_from:
            hint = f"{args.init_from} was trained with another one: leave out --tokenizer-name"
        raise UserError(
            f"vocab_size={args.model.vocab_size} is below the tokenizer's {vocab_size} ids; {hint}"
        )
    model = dataclasses.replace(args.model, vocab_size=args.model.vocab_size or vocab_size)
    return dataclasses.replace(args, model=model, tokenizer_name=tokenizer_name)
