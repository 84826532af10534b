"""Cuts a token stream into windows, and decides which windows an optimizer step sees.

A `TokenDataset` is a range of a token source (corpus/shards.py) cut into windows of seq_len tokens
with stride seq_len - 1: a window of T tokens scores T - 1 of them, so neighbours share one token
and each token of the range but the first is scored once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Settings
from corpus.hashing import hash_of, permute
from corpus.shards import (
    Source,
    SourceFile,
)
from corpus.tokenizer import Tokenizer


class TokenDataset(torch.utils.data.Dataset):
    """The windows of tokens start .. stop - 1 of a source; stop None = its end. len() is the number
    of full windows, which are the ones used in training. T is seq_len. shuffle_seed: of the order
    in which data[i] gives them; None = the order of the source.
    """

    def __init__(
        self,
        source: Source,
        seq_len: int,
        start: int = 0,
        stop: int | None = None,
        tokenizer: Tokenizer | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self.source, self.seq_len, self.tokenizer = source, seq_len, tokenizer
        self.start, self.stop = start, source.num_tokens if stop is None else stop
        self.num_tokens, self.shuffle_seed = self.stop - self.start, shuffle_seed
        self.notes: list[str] = []  # what the run's log should say about this data

    def __len__(self) -> int:
        return max(self.num_tokens - 1, 0) // (self.seq_len - 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Window `index`, or with a shuffle_seed the sample `index` of that, as a dict of the
        model's inputs: input_ids, attention_mask (ones) and labels (equal to input_ids, since the
        model shifts them), each (T,) int64. Raises IndexError.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = np.array([index])
        if self.shuffle_seed is not None:
            window = self.ordered(window, self.shuffle_seed)
        ids = self.rows(window)[0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def rows(self, windows: np.ndarray) -> Tensor:
        """The windows with these indices: (len(windows), T) int64."""
        ids = np.empty((len(windows), self.seq_len), np.int64)
        for row, window in zip(ids, windows.tolist(), strict=True):
            row[:] = self.source.read(self.start + window * (self.seq_len - 1), self.seq_len)
        return torch.from_numpy(ids)

    def sample_windows(self, first: int, count: int, seed: int) -> np.ndarray:
        """The indices of the windows that are samples first .. first + count - 1 of training:
        (count,) int64. They depend on the arguments and len(self) alone.

        Each epoch visits every window once, in an order of its own.
        """
        return self.ordered(np.arange(first, first + count), seed)

    def ordered(self, samples: np.ndarray, seed: int) -> np.ndarray:
        """The indices of the windows that are these samples: sample i is number i % len(self) of
        the shuffled epoch i // len(self).
        """
        epoch, position = np.divmod(samples, len(self))
        windows = np.empty(len(samples), np.int64)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            windows[here] = permute(position[here], len(self), hash_of(seed, e))
        return windows

    def samples(self, first: int, count: int, seed: int) -> Tensor:
        """The sequences of training samples first .. first + count - 1: (count, T) int64."""
        return self.rows(self.sample_windows(first, count, seed))

    def global_batch(self, step: int, args: Settings, rank: int = 0, world: int = 1) -> Tensor:
        """This rank's rows of the global batch of optimizer step `step`: (global_batch_size /
        world, T) int64. rank and world: of the data-parallel ranks.

        The global batch consists of the samples from step x global_batch_size on, of which each
        rank has a consecutive block. It is determined by the step and the data seed, and by nothing
        else.
        """
        share = args.global_batch_size // world
        return self.samples(step * args.global_batch_size + rank * share, share, args.data_seed)

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over this rank's batches for an evaluation: (input_ids, labels), each (B, T)
        int64. Together, the batches of all ranks score every token but the first exactly once.

        All batches of all ranks have the same shape, and all ranks get the same number of them: a
        compiled model sees no other shape, and ranks may have to compute a batch together. The last
        batches are filled up with padding, whose labels are -100 and never scored.
        """
        stride = self.seq_len - 1
        count = math.ceil((self.num_tokens - 1) / stride)
        window = np.arange(batch_size)[:, None] * stride + np.arange(self.seq_len)
        for start in range(0, count, world * batch_size):
            position = self.start + (start + rank * batch_size) * stride
            here = min(self.stop - position, batch_size * stride + 1)
            stream = self.source.read(position, here) if here > 1 else np.empty(0)
            missing = batch_size * stride + 1 - len(stream)
            ids = np.pad(stream.astype(np.int64), (0, missing))
            labels = np.pad(stream.astype(np.int64), (0, missing), constant_values=-100)
            yield torch.from_numpy(ids[window]), torch.from_numpy(labels[window])

    def limited(self, max_tokens: int) -> TokenDataset:
        """The data set of the first max_tokens tokens of this one; 0 = all."""
        stop = min(self.stop, self.start + max_tokens) if max_tokens else self.stop
        return TokenDataset(self.source, self.seq_len, self.start, stop, self.tokenizer)

    def split(self, val_ratio: float) -> tuple[TokenDataset, TokenDataset]:
        """Returns (training part, validation part): the last val_ratio of the tokens is held out.
        The parts share no token.
        """
        cut = self.stop - round(self.num_tokens * val_ratio)
        return (
            TokenDataset(self.source, self.seq_len, self.start, cut, self.tokenizer),
            TokenDataset(self.source, self.seq_len, cut, self.stop, self.tokenizer),
        )

    @property
    def parts(self) -> list[TokenDataset]:
        """The data sets that this one joins; a list of itself if it joins none."""
        return [self]

    def files(self) -> list[tuple[SourceFile, int, int]]:
        """The files that the tokens come from, each as (file, low, high): these are tokens low ..
        high - 1 of that file.
        """
        return self.source.files_in(self.start, self.stop)

    def describe(self) -> dict[str, Any]:
        """A record that identifies these tokens, stored in checkpoints and logs: losses are
        comparable if the records are equal.
        """
        return {
            "source": self.source.name,
            "fingerprint": self.source.fingerprint,
            "start": self.start,
            "stop": self.stop,
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else "",
        }
