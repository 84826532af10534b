"""Windows of a token stream: which window is sample i of optimizer step k, and what is held out.

A `TokenDataset` is a range of a token source (shards.py) cut into windows of seq_len tokens with
stride seq_len - 1: a window of T tokens scores T - 1 of them, so neighbours share one token and
each token of the range is scored once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Settings, UserError, with_vocab
from shards import Source, TokenShards, ToyTokens, hash_of, mix
from text import stdlib_files, tokenize_files
from tokenizer import Tokenizer, build_tokenizer

__all__ = [
    "FineWebNPYDataset",
    "TextDatasetForCausalLM",
    "TokenDataset",
    "ToyRandomDataset",
    "build_tokenizer",
    "open_data",
    "permute",
]


def permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a permutation of range(n), chosen by key, sends these positions; O(1) memory, any n
    below 2**62.

    A six-round Feistel network on the next power of 4, walked until it lands below n (Black and
    Rogaway 2002, sec. 3).
    """
    half = np.uint64(max(3, (n.bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = mix(
        np.uint64(key) + np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        return (left << half) | right

    x = network(positions.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


class TokenDataset(torch.utils.data.Dataset):
    """The windows of tokens start .. stop - 1 of a source. len() counts the whole ones, used in
    training.
    """

    def __init__(
        self,
        source: Source,
        seq_len: int,
        start: int = 0,
        stop: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.source, self.seq_len, self.tokenizer = source, seq_len, tokenizer
        self.start, self.stop = start, source.num_tokens if stop is None else stop
        self.num_tokens = self.stop - self.start

    def __len__(self) -> int:
        return max(self.num_tokens - 1, 0) // (self.seq_len - 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Window `index` as a model takes it: input_ids, attention_mask, labels, each (T,)
        int64.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = self.rows(np.array([index]))[0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def rows(self, windows: np.ndarray) -> Tensor:
        """These windows: (len(windows), T) int64."""
        ids = np.empty((len(windows), self.seq_len), np.int64)
        for row, window in zip(ids, windows.tolist(), strict=True):
            row[:] = self.source.read(self.start + window * (self.seq_len - 1), self.seq_len)
        return torch.from_numpy(ids)

    def sample_windows(self, step: int, batch: int, seed: int) -> np.ndarray:
        """The windows of optimizer step `step`, in order: (batch,) int64, a function of the
        arguments alone.

        Each epoch visits every window once, in an order of its own; a batch may reach into the next
        epoch.
        """
        epoch, position = np.divmod(step * batch + np.arange(batch), len(self))
        windows = np.empty(batch, np.int64)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            windows[here] = permute(position[here], len(self), hash_of(seed, e))
        return windows

    def global_batch(self, step: int, args: Settings, rank: int = 0, world: int = 1) -> Tensor:
        """This rank's rows of the sequences of optimizer step `step`: (global_batch_size /
        world, T) int64.
        """
        windows = self.sample_windows(step, args.global_batch_size, args.data_seed)
        share = args.global_batch_size // world
        return self.rows(windows[rank * share : (rank + 1) * share])

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of (input_ids, labels), each (B, T) int64, that score every token but
        the first once.

        The last window may be short: the labels of its padding are -100, which is never scored.
        """
        stride = self.seq_len - 1
        count = math.ceil((self.num_tokens - 1) / stride)
        for first in range(rank * batch_size, count, world * batch_size):
            size = min(batch_size, count - first)
            position = self.start + first * stride
            stream = self.source.read(
                position, min(self.stop - position, size * stride + 1)
            ).astype(np.int64)
            missing = size * stride + 1 - len(stream)
            window = np.arange(size)[:, None] * stride + np.arange(self.seq_len)
            ids, labels = (
                np.pad(stream, (0, missing)),
                np.pad(stream, (0, missing), constant_values=-100),
            )
            yield torch.from_numpy(ids[window]), torch.from_numpy(labels[window])

    def limited(self, max_tokens: int) -> TokenDataset:
        """The first max_tokens tokens of it; 0 = all."""
        stop = min(self.stop, self.start + max_tokens) if max_tokens else self.stop
        return TokenDataset(self.source, self.seq_len, self.start, stop, self.tokenizer)

    def split(self, val_ratio: float) -> tuple[TokenDataset, TokenDataset]:
        """(training part, validation part): the last val_ratio of the tokens is held out; they
        share no token.
        """
        cut = self.stop - round(self.num_tokens * val_ratio)
        return (
            TokenDataset(self.source, self.seq_len, self.start, cut, self.tokenizer),
            TokenDataset(self.source, self.seq_len, cut, self.stop, self.tokenizer),
        )

    def describe(self) -> dict[str, Any]:
        """What must be the same for numbers to be comparable; stored in checkpoints and logs."""
        return {
            "source": self.source.name,
            "fingerprint": self.source.fingerprint,
            "start": self.start,
            "stop": self.stop,
            "tokenizer": self.tokenizer.name if self.tokenizer else "",
        }


class TextDatasetForCausalLM(TokenDataset):
    """Text files (UTF-8), tokenized once into a cache. paths: files; none = the Python standard
    library's source.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        tokenizer: Tokenizer,
        seq_len: int,
        cache_dir: str | Path = "~/.cache/rosetrainer",
    ) -> None:
        files = [Path(p) for p in paths] or stdlib_files()
        shard = tokenize_files(files, tokenizer, Path(cache_dir).expanduser())
        name = (
            ", ".join(map(str, paths))
            or f"source of the Python standard library ({len(files)} files)"
        )
        super().__init__(
            TokenShards([shard], tokenizer.vocab_size, name), seq_len, tokenizer=tokenizer
        )


class FineWebNPYDataset(TokenDataset):
    """Shards of token ids that already exist, such as FineWeb-Edu's; needs no tokenizer."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        seq_len: int,
        vocab_size: int = 50257,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(TokenShards(paths, vocab_size), seq_len, tokenizer=tokenizer)


class ToyRandomDataset(TokenDataset):
    """Random tokens: no model can get below ln(vocab_size), so anything else than that is a bug."""

    def __init__(
        self, vocab_size: int, seq_len: int, num_tokens: int = 1_000_000, seed: int = 0
    ) -> None:
        super().__init__(ToyTokens(num_tokens, vocab_size, seed), seq_len)


def open_source(args: Settings, held_out: bool = False) -> TokenDataset:
    """The whole data set that the settings name for training, or for validation if held_out."""
    if args.data_mode == "toy":
        return ToyRandomDataset(args.model.vocab_size or 10_000, args.seq_len, seed=args.data_seed)
    if args.data_mode == "fineweb_npy":
        tokenizer = build_tokenizer(args.tokenizer_name) if args.tokenizer_name else None
        vocab_size = args.model.vocab_size or (tokenizer.vocab_size if tokenizer else 50257)
        return FineWebNPYDataset(
            args.val_npy if held_out else args.train_npy, args.seq_len, vocab_size, tokenizer
        )
    tokenizer = build_tokenizer(args.tokenizer_name or "bytes")
    return TextDatasetForCausalLM(
        args.val_data if held_out else args.train_data, tokenizer, args.seq_len, args.cache_dir
    )


def open_validation(args: Settings) -> TokenDataset:
    """What the settings hold out: their validation files, or the last part of the training data.

    Raises UserError.
    """
    return _held_out(args, open_source(args, held_out=args.has_val_files))


def _held_out(args: Settings, source: TokenDataset) -> TokenDataset:
    val = source if args.has_val_files else source.split(args.val_ratio)[1]
    if val.num_tokens < 2:
        raise UserError(
            f"the validation part has {val.num_tokens} tokens, too few to score one; "
            "give more data, or raise --val-ratio"
        )
    return val.limited(args.val_max_tokens)


def open_data(args: Settings) -> tuple[TokenDataset, TokenDataset, Settings]:
    """(training part, validation part, settings with what the data settles filled in).

    Raises UserError.
    """
    train_files, val_files = (
        {os.path.realpath(p) for p in paths}
        for paths in (args.train_data + args.train_npy, args.val_data + args.val_npy)
    )
    for path in sorted(train_files & val_files):
        raise UserError(
            f"{path} is named for training and for validation; use other files, or none for "
            "validation (--val-ratio then holds out a part)"
        )
    whole = open_source(args)
    val = _held_out(args, open_source(args, held_out=True) if args.has_val_files else whole)
    train = whole if args.has_val_files else whole.split(args.val_ratio)[0]
    train = train.limited(args.max_tokens)
    if not len(train):
        raise UserError(
            f"the training part has {train.num_tokens} tokens, fewer than one window of "
            f"seq_len={args.seq_len}; give more data, or lower --seq-len or --val-ratio"
        )
    if args.sample_prompt and not whole.tokenizer:
        raise UserError(
            "--sample-prompt needs a tokenizer, and this data names none; try --tokenizer-name gpt2"
        )
    name = whole.tokenizer.name if whole.tokenizer else ""
    return train, val, with_vocab(args, whole.source.vocab_size, name)


def same_data(recorded: dict[str, Any], val: TokenDataset) -> None:
    """Raises UserError where the data is not what a checkpoint recorded."""
    now = val.describe()
    changed = [
        f"{k} was {recorded.get(k)!r}, is {now[k]!r}"
        for k in now
        if k != "source" and recorded.get(k) != now[k]
    ]
    if changed:
        raise UserError(
            f"the data is not that of the checkpoint ({recorded.get('source')}): "
            f"{'; '.join(changed)}"
        )
