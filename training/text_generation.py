"""Generates text: `continue_texts` continues prompts, and hands out the text while it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from config import GPTConfig, Settings
from corpus.read_text import USUAL_SEPARATOR
from corpus.token_dataset import TokenDataset
from corpus.tokenizer import Tokenizer
from model import GPTModel
from parallel.context import SINGLE_PROCESS, ParallelContext
from runtime.device import Device
from training.sampling import Sampling, generate, window_start

_TAIL = 16  # ids of the prompt that a decoder is given before the first new one


class TextStream:
    """Turns ids that come one by one into text that can be shown at once: a character that has not
    all of its bytes yet is held back, and so is what may be the beginning of a stop string.

    prompt: the ids before the first new one. stop: strings that end the text; they are not part of
    it. The attribute `stopped_by` is the one that has ended it, "" before.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._ids = list(prompt[-_TAIL:])  # a tokenizer may decode an id by those before it
        self._context = 0  # the ids from here on are decoded, to see what the new ones add
        self._shown = len(self._ids)  # so many of these ids have given their text
        self._held = ""
        self.stopped_by = ""

    def add(self, new: int) -> str:
        """The text that can be shown, now that this id is there: often a word, possibly ""."""
        self._ids.append(new)
        text = self._decoded()
        if text.endswith("\ufffd"):  # the first bytes of a character, most likely
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return self._until_stop(self._held + text)

    def finish(self) -> str:
        """The text that is still held back. Call it after the last id."""
        rest = "" if self.stopped_by else self._held + self._decoded()
        self._held, self._shown = "", len(self._ids)
        return rest

    def _decoded(self) -> str:
        """What the ids that are not shown yet add to the text."""
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]

    def _until_stop(self, text: str) -> str:
        found = [(place, s) for s in self._stop if (place := text.find(s)) >= 0]
        if found:
            place, self.stopped_by = min(found)
            return text[:place]
        waits = max(
            (n for s in (*self._stop, "\r\n") for n in range(1, len(s)) if text.endswith(s[:n])),
            default=0,
        )
        self._held = text[len(text) - waits :]
        return text[: len(text) - waits]


@dataclass(frozen=True)
class Continuation:
    """What a model has written after a prompt. ids: the new token ids. end: why it has ended:
    "document" (the end token was drawn), "stop" (a stop string), "length" (max_new_tokens).
    """

    text: str
    ids: list[int]
    end: str

    @property
    def end_mark(self) -> str:
        """How the end of a document is shown; "" where the text has ended otherwise."""
        return USUAL_SEPARATOR if self.end == "document" else ""

    def __str__(self) -> str:
        return self.text + self.end_mark


def continue_texts(
    model: GPTModel, tokenizer: Tokenizer, prompts: Sequence[str], *others: Any, **options: Any
) -> list[Continuation]:
    """Continues texts: `continue_ids` for prompts as text. An empty one is the start of a document.
    others, options: see there.
    """
    encoded = [prompt_ids(tokenizer, printable(prompt)) for prompt in prompts]
    return continue_ids(model, tokenizer, encoded, *others, **options)


def continue_ids(
    model: GPTModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    device: Device,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  # it is frozen
    seeds: Sequence[int] = (0,),
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] = lambda row, text: None,
) -> list[Continuation]:
    """Continues prompts of token ids as one batch, each to the end of its document, a stop string,
    or max_new_tokens. Ids that stand for nothing are never drawn. seeds: one of each prompt.

    on_text(i, text) is called with each piece of text i as soon as it can be shown.
    """
    streams = [TextStream(tokenizer, ids, stop) for ids in prompts]
    texts = [""] * len(prompts)

    def show(row: int, text: str) -> None:
        if text:
            texts[row] += text
            on_text(row, text)

    def on_token(row: int, new: int) -> bool:
        if new != tokenizer.end_token:
            show(row, streams[row].add(new))
        return bool(streams[row].stopped_by)

    limits = drawable(tokenizer), tokenizer.end_token
    written = generate(
        model, prompts, max_new_tokens, device, sampling, seeds, *limits, on_token=on_token
    )
    for row, stream in enumerate(streams):
        show(row, stream.finish())
    ends = [
        "stop" if s.stopped_by else "document" if ids[-1:] == [tokenizer.end_token] else "length"
        for s, ids in zip(streams, written, strict=True)
    ]
    return [Continuation(*parts) for parts in zip(texts, written, ends, strict=True)]


def printable(prompt: str) -> str:
    """The prompt with bytes of the command line that are not UTF-8 as U+FFFD."""
    return prompt.encode("utf-8", "surrogateescape").decode(errors="replace")


def note_on_context(prompt: int, new: int, config: GPTConfig) -> str:
    """What to say where a prompt of so many tokens and the new ones exceed the context of a model;
    "" where they fit.
    """
    context = config.max_position_embeddings
    if prompt + new <= context:
        return ""
    least = context + 1 - window_start(context + 1, context)  # when a part was just dropped
    return (
        f"a prompt of {prompt} and {new} new tokens exceed the model's context of {context} "
        f"(max_position_embeddings): it sees the last {least} to {context} of them"
    )


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt; of an empty one the end token, after which a document starts."""
    return tokenizer.encode(prompt).tolist() or [tokenizer.end_token]


def drawable(tokenizer: Tokenizer) -> torch.Tensor:
    """Which ids can be drawn, (V,) bool: those that stand for some text, and the end token."""
    allowed = torch.from_numpy(tokenizer.is_text.copy())
    allowed[tokenizer.end_token] = True
    return allowed


def fitting_prompt(data: TokenDataset) -> str:
    """A few words of the data, as a prompt to try its model with: from the first document that
    starts in it, or else from its first complete line. "" if there are none, or no tokenizer.
    """
    tokenizer = data.tokenizer
    if tokenizer is None:
        return ""
    ids = data.source.read(data.start, min(4000, data.num_tokens))
    mark_started, *documents = np.split(ids, np.flatnonzero(ids == tokenizer.end_token) + 1)
    lines = [x for d in documents for x in tokenizer.decode(d.tolist()).splitlines()]
    for line in lines + tokenizer.decode(mark_started.tolist()).splitlines()[1:]:
        words = line.split()
        if len(words) > 1 and line.isprintable() and "\ufffd" not in line:
            return " ".join(words[: min(3, len(words) - 1)])[:40]
    return ""


def sample(
    model: GPTModel,
    tokenizer: Tokenizer | None,
    args: Settings,
    device: Device,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> str | None:
    """A short continuation of args.sample_prompt for the log; None without a tokenizer."""
    if tokenizer is None:
        return None
    prompt, tokens = args.sample_prompt or "\n", args.sample_tokens
    with parallel.gathered():
        written = continue_texts(model, tokenizer, [prompt], device, tokens, seeds=[args.seed])
        return prompt + str(written[0])
