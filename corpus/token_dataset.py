"""Windows of a token stream: which window is sample i of optimizer step k.

A `TokenDataset` is a range of a token source (corpus/shards.py) cut into windows of seq_len tokens
with stride seq_len - 1: a window of T tokens scores T - 1 of them, so neighbours share one token
and each token of the range is scored once.
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
        self.notes: list[str] = []  # what a reader of the run's log should know of it

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

    def sample_windows(self, first: int, count: int, seed: int) -> np.ndarray:
        """The windows of samples first .. first + count - 1: (count,) int64, nothing else decides.

        Each epoch visits every window once, in an order of its own.
        """
        return self.ordered(np.arange(first, first + count), seed)

    def ordered(self, samples: np.ndarray, seed: int) -> np.ndarray:
        """The windows of these samples: sample i is number i % len(self) of epoch i //
        len(self).
        """
        epoch, position = np.divmod(samples, len(self))
        windows = np.empty(len(samples), np.int64)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            windows[here] = permute(position[here], len(self), hash_of(seed, e))
        return windows

    def samples(self, first: int, count: int, seed: int) -> Tensor:
        """The sequences of samples first .. first + count - 1: (count, T) int64."""
        return self.rows(self.sample_windows(first, count, seed))

    def global_batch(self, step: int, args: Settings, rank: int = 0, world: int = 1) -> Tensor:
        """This rank's rows of the global batch of optimizer step `step`: (global_batch_size /
        world, T) int64.

        The global batch holds the samples from step x global_batch_size on, of which the ranks have
        consecutive blocks. The step and the data seed determine it, and nothing else does.
        """
        share = args.global_batch_size // world
        return self.samples(step * args.global_batch_size + rank * share, share, args.data_seed)

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of (input_ids, labels), each (B, T) int64, that score every token but
        the first once.

        All batches of all ranks have the same shape, and all ranks get the same number of them: a
        compiled model meets no other shape, and ranks may have to compute a batch together. What is
        missing in the last ones is padding, whose labels are -100 and never scored.
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

    @property
    def parts(self) -> list[TokenDataset]:
        """The sources that it joins; itself where it is one."""
        return [self]

    def files(self) -> list[tuple[SourceFile, int, int]]:
        """The files that its tokens are from, each with the range of its own tokens."""
        return self.source.files_in(self.start, self.stop)

    def describe(self) -> dict[str, Any]:
        """What must be the same for numbers to be comparable; stored in checkpoints and logs."""
        return {
            "source": self.source.name,
            "fingerprint": self.source.fingerprint,
            "start": self.start,
            "stop": self.stop,
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else "",
        }
