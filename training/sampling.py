"""Samples from a model: `generate` continues token ids, `continue_text` continues a text."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Settings
from corpus.read_text import USUAL_SEPARATOR
from corpus.token_dataset import TokenDataset
from corpus.tokenizer import Tokenizer
from model import GPTModel
from runtime.device import Device

_COLDEST, _HOTTEST = 1e-30, 1e30  # beyond them float32 divides by zero or infinity
_END = USUAL_SEPARATOR  # how the end of a document is shown


@torch.no_grad()
def generate(
    model: GPTModel,
    ids: Tensor,
    max_new_tokens: int,
    device: Device,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    vocab_size: int | None = None,
    end_token: int | None = None,
) -> Tensor:
    """Continues ids (B, T) int64 by max_new_tokens: (B, T + max_new_tokens) on the CPU, or fewer
    columns if all rows end before. Reads no global random state: it draws with `seed`.

    temperature 0 takes the likeliest token; top_k 0 draws among all. vocab_size: never draw ids at
    or above it. end_token: a row that has drawn it draws nothing else, and once all rows have,
    drawing stops. The model sees the last max_position_embeddings tokens. Raises ValueError for an
    empty prompt.
    """
    if not ids.shape[1]:
        raise ValueError("the prompt has no tokens; give at least one")
    was_training = model.training
    model.eval()
    generator, prompt_length = torch.Generator().manual_seed(seed), ids.shape[1]
    temperature = temperature and min(max(temperature, _COLDEST), _HOTTEST)
    # A compiled model would be compiled again for each length.
    eager = torch.compiler.set_stance("force_eager") if model.compiled else nullcontext()
    for _ in range(max_new_tokens):
        seen = ids[:, -model.config.max_position_embeddings :].to(device.torch_device)
        with device.autocast(), eager:
            logits, _ = model(seen, logits_to_keep=1)
        logits = logits[:, -1].float().cpu()[:, :vocab_size]  # (B, V)
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            if 0 < top_k < logits.shape[-1]:
                floor = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < floor, float("-inf"))
            new = torch.multinomial(
                ((logits - logits.amax(-1, True)) / temperature).softmax(-1), 1, generator=generator
            )
        if end_token is not None:
            ended = (ids[:, prompt_length:] == end_token).any(1, keepdim=True)
            new = new.masked_fill(ended, end_token)
        ids = torch.cat((ids, new), dim=1)
        if end_token is not None and bool((new == end_token).all()):
            break
    model.train(was_training)
    return ids


def continue_text(
    model: GPTModel, tokenizer: Tokenizer, prompt: str, device: Device, **options: Any
) -> str:
    """The prompt and what the model writes after it, up to the end of the document, which is shown
    as <|endoftext|>. An empty prompt is the start of a document. options: those of `generate`,
    max_new_tokens among them.
    """
    prompt = prompt.encode("utf-8", "surrogateescape").decode(errors="replace")  # as typed
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.end_token]
    limits = {"vocab_size": tokenizer.vocab_size, "end_token": tokenizer.end_token}
    out = generate(model, torch.tensor([ids]), device=device, **limits, **options)[0].tolist()
    ended = out[-1] == tokenizer.end_token and len(out) > len(ids)
    return tokenizer.decode(out) + (_END if ended else "")


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
    model: GPTModel, tokenizer: Tokenizer | None, args: Settings, device: Device
) -> str | None:
    """A short continuation of args.sample_prompt for the log; None without a tokenizer."""
    if tokenizer is None:
        return None
    prompt = args.sample_prompt or "\n"
    return continue_text(
        model, tokenizer, prompt, device, max_new_tokens=args.sample_tokens, seed=args.seed
    )
