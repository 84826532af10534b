"""Windows of a token stream: which window is sample i of optimizer step k, and what is held out.

A `TokenDataset` is a range of a token source (corpus/shards.py) cut into windows of seq_len tokens
with stride seq_len - 1: a window of T tokens scores T - 1 of them, so neighbours share one token
and each token of the range is scored once.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Settings
from corpus.contamination import REFUSED_SHARE, refuse_copies, refuse_leak, repeated_files, some
from corpus.hashing import hash_of, permute
from corpus.shards import (
    JoinedTokens,
    Source,
    SourceFile,
    TokenShards,
    ToyTokens,
    find_shards,
)
from corpus.text import find_texts, stdlib_files
from corpus.token_files import TOKENIZER_FILE, note_on_documents, tokenize_files
from corpus.tokenizer import Tokenizer, build_tokenizer
from parallel.context import SINGLE_PROCESS, ParallelContext
from runtime.device import Device
from runtime.fields import UserError
from runtime.files import expanded

__all__ = [
    "FineWebNPYDataset",
    "TextDatasetForCausalLM",
    "TokenDataset",
    "ToyRandomDataset",
    "build_tokenizer",
    "open_data",
    "permute",
]


_LONGEST_PATTERN = 1_000_000  # samples after which a mixture repeats its pattern of sources


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
        """This rank's rows of the sequences of optimizer step `step`: (rows, T) int64.

        Together the ranks get samples step x global_batch_size and on: (seed, step) decides.
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


class Joined(TokenDataset):
    """Data sets one after the other, as one: the validation parts of a mixture."""

    def __init__(self, parts: Sequence[TokenDataset], weights: Sequence[Fraction]) -> None:
        joined = JoinedTokens([(p.source, p.start, p.stop) for p in parts])
        super().__init__(joined, parts[0].seq_len, tokenizer=parts[0].tokenizer)
        self._parts, self.weights = list(parts), list(weights)

    @property
    def parts(self) -> list[TokenDataset]:
        return self._parts

    def limited(self, max_tokens: int) -> TokenDataset:
        """The first tokens of each part, by weight, max_tokens in all; 0 = all."""
        if not max_tokens or max_tokens >= self.num_tokens:
            return self
        counts = share_out(max_tokens, [p.num_tokens for p in self.parts], self.weights)
        kept = [(p, n, w) for p, n, w in zip(self.parts, counts, self.weights, strict=True) if n]
        return Joined([p.limited(n) for p, n, _ in kept], [w for _, _, w in kept])


def share_out(total: int, sizes: Sequence[int], weights: Sequence[Fraction]) -> list[int]:
    """How much of `total` each one gives, by weight, where one can't give more than its size and
    the others then give the more.
    """
    counts = [0] * len(sizes)
    left, open_ones = total, set(range(len(sizes)))
    while open_ones:
        rate = left / sum(weights[i] for i in open_ones)
        full = {i for i in open_ones if sizes[i] <= rate * weights[i]}
        if not full:  # the rest of the division goes to the first ones
            for i in sorted(open_ones):
                counts[i] = int(rate * weights[i])
            for i in sorted(open_ones)[: total - sum(counts)]:
                counts[i] += 1
            break
        for i in full:
            counts[i], left = sizes[i], left - sizes[i]
        open_ones -= full
    return counts


class Mixture(TokenDataset):
    """Several data sets, each giving its share of the samples; each keeps its own epochs.

    The shares are exact: of the first n samples, part i gets n x weight[i], less than one sample
    off for any n that is a multiple of the pattern, and at most len(parts) off anywhere else.
    """

    def __init__(self, parts: Sequence[TokenDataset], weights: Sequence[Fraction]) -> None:
        joined = JoinedTokens([(p.source, p.start, p.stop) for p in parts])
        super().__init__(joined, parts[0].seq_len, tokenizer=parts[0].tokenizer)
        self._parts, total = list(parts), sum(weights, Fraction())
        self.weights = [w / total for w in weights]
        period = math.lcm(*(w.denominator for w in self.weights))
        if period > _LONGEST_PATTERN:
            raise UserError(f"weights {', '.join(map(str, weights))} are too fine; use 3 digits")
        self.counts = np.array([int(w * period) for w in self.weights])
        # Smooth weighted round-robin: who is most behind its share goes next.
        owed, pattern = np.zeros(len(parts), np.int64), []
        for _ in range(period):
            owed += self.counts
            pattern.append(int(owed.argmax()))
            owed[pattern[-1]] -= period
        self.pattern = np.array(pattern)
        self.before = np.array(
            [np.cumsum(self.pattern == i) - (self.pattern == i) for i in range(len(parts))]
        )  # (parts, period)

    @property
    def parts(self) -> list[TokenDataset]:
        return self._parts

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts)

    def samples(self, first: int, count: int, seed: int) -> Tensor:
        """As in TokenDataset; each sample from the part that the pattern names."""
        cycle, place = np.divmod(np.arange(first, first + count), len(self.pattern))
        rows = torch.empty(count, self.seq_len, dtype=torch.int64)
        for i, part in enumerate(self.parts):
            here = self.pattern[place] == i
            own = cycle[here] * self.counts[i] + self.before[i][place[here]]
            rows[torch.from_numpy(here)] = part.rows(part.ordered(own, hash_of(seed, i)))
        return rows

    def limited(self, max_tokens: int) -> TokenDataset:
        if max_tokens:
            raise UserError("--max-tokens with weighted sources is ambiguous; limit num_steps")
        return self

    def describe(self) -> dict[str, Any]:
        shares = {"weights": [str(w) for w in self.weights]}
        return {**super().describe(), **shares}


class TextDatasetForCausalLM(TokenDataset):
    """Text, tokenized once into a cache. paths: files, folders, globs (see
    `corpus.text.find_sources`); none = the Python standard library's source. document_separator:
    what parts the documents of a plain text; "" = each file is one.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        tokenizer: Tokenizer,
        seq_len: int,
        cache_dir: str | Path = "~/.cache/rosetrainer",
        document_separator: str = "",
    ) -> None:
        files, notes = find_texts(paths) if paths else (stdlib_files(), [])
        cache = expanded(cache_dir, "--cache-dir")
        shards, made = tokenize_files(files, tokenizer, cache, document_separator)
        name = f"source of the Python standard library ({len(files)} files)"
        name = ", ".join(map(str, paths)) or name
        texts = [(t["path"], t["sha256"], t["bytes"]) for t in made["sources"]]
        source = TokenShards(shards, tokenizer.vocab_size, name, made["key"], texts=texts)
        super().__init__(source, seq_len, tokenizer=tokenizer)
        self.notes = notes + note_on_documents(made, document_separator)


class FineWebNPYDataset(TokenDataset):
    """Shards of token ids that already exist, such as FineWeb-Edu's; needs no tokenizer."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        seq_len: int,
        vocab_size: int = 50257,
        tokenizer: Tokenizer | None = None,
        bin_dtype: str = "auto",
    ) -> None:
        shards = TokenShards(paths, vocab_size, bin_dtype=bin_dtype)
        super().__init__(shards, seq_len, tokenizer=tokenizer)
        self.notes = list(shards.notes)
        largest = shards.largest_id_seen()
        if tokenizer is None and 4 * (largest + 1) <= vocab_size:
            self.notes.append(
                f"the largest id seen in {shards.name} is {largest:,}, and the model has "
                f"{vocab_size:,} of them; --vocab-size {largest + 1} fits it to what was seen"
            )


class ToyRandomDataset(TokenDataset):
    """Random tokens: no model can get below ln(vocab_size), so anything else than that is a bug."""

    def __init__(
        self, vocab_size: int, seq_len: int, num_tokens: int = 1_000_000, seed: int = 0
    ) -> None:
        super().__init__(ToyTokens(num_tokens, vocab_size, seed), seq_len)


def tokenizer_of(args: Settings) -> Tokenizer | None:
    """The tokenizer that the settings name; for shards, else the one stored beside them, if any."""
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
    """The data sets that the settings name for training, or for validation, with their weights.

    One without weight stands for all files together.
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
            paths, tokenizer, args.seq_len, args.cache_dir, args.document_separator
        )

    text, shards = (args.val_data, args.val_npy) if held_out else (args.train_data, args.train_npy)
    named = weighted(text or shards)
    if held_out and any(weight is not None for _, weight in named):
        raise UserError("validation data takes no weights: every token of it is scored once")
    if named and named[0][1] is not None:
        return [(open_one([path]), weight) for path, weight in named]
    return [(open_one([path for path, _ in named]), None)]


def weighted(paths: Sequence[str]) -> list[tuple[str, Fraction | None]]:
    """("a.npy", 7/10) of "a.npy:0.7"; the weight is None for a plain path. Raises UserError."""
    found: list[tuple[str, Fraction | None]] = []
    for path in paths:
        name, colon, number = path.rpartition(":")
        if colon and re.fullmatch(r"[0-9.]+", number) and not os.path.exists(path):
            try:
                found.append((name, Fraction(number)))
            except ValueError:
                raise UserError(f"{path}: {number} is not a weight; try {name}:0.5") from None
        else:
            found.append((path, None))
    given = [weight for _, weight in found if weight is not None]
    if given and (len(given) < len(found) or min(given) <= 0):
        raise UserError(f"{' '.join(paths)}: give every source a weight above 0, or none of them")
    return found


def refuse_missing(paths: Sequence[str], hint: str) -> None:
    """Raises UserError that names the first file of data that is not there, with a hint."""
    for path, _ in weighted(paths):
        if not os.path.lexists(path) and not glob.glob(path, recursive=True):
            raise UserError(f"{path}: no such file in {os.getcwd()}; {hint}")


def open_validation(args: Settings, tokenizer: Tokenizer | None = None) -> TokenDataset:
    """What the settings hold out: their validation files, or the last part of the training data.

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
    """(training part, validation part, settings with what the data settles filled in).

    Raises UserError.
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
    """Looks in the training part for text of the validation part. Returns notes on what was found,
    for the log; raises UserError where it is a copy.
    """
    default_corpus = args.data_mode == "text" and not args.train_data
    allow = args.allow_leak or default_corpus  # its code pages are alike, and no one chose them
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
    """What a checkpoint stores of its data: what it trains and validates on, and the tokenizer."""
    tokenizer = train.tokenizer.to_json() if train.tokenizer else ""
    return {"train": train.describe(), "val": val.describe(), "tokenizer": tokenizer}


class Prefetch:
    """Calls give the global batch of a step, read while the step before was computed.

    What a batch holds is decided by its step alone, so this changes when it is read and nothing
    else. On CUDA it lies in pinned memory, from which copies overlap with computing.
    """

    def __init__(
        self,
        train: TokenDataset,
        args: Settings,
        device: Device,
        parallel: ParallelContext = SINGLE_PROCESS,
    ) -> None:
        self._read = lambda step: train.global_batch(step, args, parallel.dp_rank, parallel.dp_size)
        self._pin, self._pool = device.torch.type == "cuda", ThreadPoolExecutor(1, "prefetch")
        self._next: tuple[int, Future[Tensor]] | None = None

    def __call__(self, step: int) -> Tensor:
        """This rank's rows of optimizer step `step`: (rows, T) int64."""
        ahead = self._next
        batch = ahead[1].result() if ahead and ahead[0] == step else self._fetch(step)
        self._next = (step + 1, self._pool.submit(self._fetch, step + 1))
        return batch

    def _fetch(self, step: int) -> Tensor:
        batch = self._read(step)
        return batch.pin_memory() if self._pin else batch


def with_vocab_size(args: Settings, vocab_size: int, tokenizer_name: str) -> Settings:
    """The same settings with what the data settles: the tokenizer's name, and a vocabulary size
    that holds its ids.
    """
    if args.model.vocab_size and args.model.vocab_size < vocab_size:
        raise UserError(
            f"vocab_size={args.model.vocab_size} is below the tokenizer's {vocab_size} ids; "
            f"try --vocab-size {vocab_size}"
        )
    model = dataclasses.replace(args.model, vocab_size=args.model.vocab_size or vocab_size)
    return dataclasses.replace(args, model=model, tokenizer_name=tokenizer_name)
