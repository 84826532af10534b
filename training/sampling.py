"""Generates tokens: `generate` continues prompts of token ids, a batch of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kv_cache import KVCache
from model import GPTModel
from runtime.device import Device

# All but cuDNN's, which takes 80 ms to prepare for each new length (torch 2.11, H200).
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_LEAST, _MOST = 1e-30, 1e30  # beyond them float32 divides by zero or infinity


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits: with the meanings and in the order of Hugging Face's
    `generate`, that is repetition_penalty, temperature, top_k, top_p, min_p.

    temperature 0 takes the likeliest token. top_k draws among the k likeliest, 0 = all. top_p draws
    among the fewest likeliest tokens that together have at least this probability (Holtzman et al.
    2020). min_p leaves out tokens below this part of the highest probability (Nguyen et al. 2024).
    repetition_penalty divides the logits of tokens that have occurred, prompt included (Keskar et
    al. 2019; negative ones are multiplied); 1 = none.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def probabilities(self, logits: Tensor, occurred: Sequence[Sequence[int]]) -> Tensor:
        """The probabilities (B, V) float32 to draw the next token with. logits (B, V) float32;
        occurred: the token ids so far of each row.
        """
        if self.repetition_penalty != 1:
            logits = logits.clone()
            for row, ids in zip(logits, occurred, strict=True):
                seen = torch.tensor(sorted(set(ids)))
                x, penalty = row[seen], _within_float32(self.repetition_penalty)
                row[seen] = torch.where(x > 0, x / penalty, x * penalty)
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(1, best, 1.0)
        if 0 < self.top_k < logits.shape[-1]:
            floor = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < floor, float("-inf"))
        temperature = _within_float32(self.temperature)
        p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(dim=-1, descending=True, stable=True)
            out = ordered.cumsum(-1) - ordered >= self.top_p  # those before are enough
            out[:, 0] = False
            p = p.masked_fill(torch.zeros_like(out).scatter(1, order, out), 0.0)
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        return p / p.sum(-1, keepdim=True)


def _within_float32(divisor: float) -> float:
    return min(max(divisor, _LEAST), _MOST)


def window_start(length: int, context: int) -> int:
    """Where the part of `length` tokens begins that a model with this context sees: all of them, or
    the last ones, of which a quarter of the context is dropped at once. Since so many tokens are
    dropped together, the model computes its whole window again only once in as many tokens, and not
    for each token.
    """
    step = max(1, context // 4)
    return -(-max(0, length - context) // step) * step


@torch.no_grad()
def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    device: Device,
    sampling: Sampling = Sampling(),  # it is frozen
    seeds: Sequence[int] = (0,),
    allowed: Tensor | None = None,
    end_token: int | None = None,
    on_token: Callable[[int, int], bool] | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continues prompts of token ids, which may differ in length. Returns the new ids of each row:
    up to max_new_tokens, or up to end_token, with it.

    Each row draws with a generator of its own seed, so what is drawn does not depend on the other
    rows, and the global random state stays as it is. allowed (V,) bool: the ids that can be drawn,
    None = all. on_token(row, id) is called with each new id; the row ends where it returns True.
    The model sees max_position_embeddings tokens at most: see `window_start`. use_cache=False
    computes all of them for each new token, which gives the same probabilities. Raises ValueError
    for an empty prompt.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("the prompt has no tokens; give at least one")
    was_training = model.training
    model.eval()
    rows = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(s) for _, s in zip(rows, seeds, strict=True)]
    alive = list(range(len(rows)))
    window = _Window(model, device, max_new_tokens if use_cache else 0)
    # A compiled model would be compiled again for each length.
    eager = torch.compiler.set_stance("force_eager") if model.compiled else nullcontext()
    # Around all tokens: autocast keeps the weights that it has cast.
    with device.autocast(), sdpa_kernel(_ATTENTION), eager:
        for _ in range(max_new_tokens):
            logits = window.logits({i: rows[i] for i in alive})  # (B, V)
            if allowed is not None:
                logits = logits[:, : len(allowed)].masked_fill(~allowed, float("-inf"))
            p = sampling.probabilities(logits, [rows[i] for i in alive])
            ended = []
            for i, row_p in zip(alive, p, strict=True):
                if sampling.temperature == 0:
                    new = int(row_p.argmax())
                else:
                    new = int(torch.multinomial(row_p, 1, generator=generators[i]))
                rows[i].append(new)
                if (on_token is not None and on_token(i, new)) or new == end_token:
                    ended.append(i)
            alive = [i for i in alive if i not in ended]
            if not alive:
                break
    model.train(was_training)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def lay_out_for_generation(model: GPTModel, device: Device) -> None:
    """Stores the matrices that make a vector longer column by column, in place, if the model
    generates on a CPU. In a product with a single row, MKL then reads them at 18 instead of 12 GB/s
    (GPT-2 small on 2 cores of an AMD EPYC); the others are faster as they are.
    """
    if device.torch_device.type == "cpu":
        for p in model.parameters():
            if p.ndim == 2 and p.shape[0] > p.shape[1]:
                p.data = p.data.T.contiguous().T


class _Window:
    """What the model sees of several rows of tokens, and their keys and values. new: at most so
    many tokens will follow, for which the cache has room; 0 = no cache.
    """

    def __init__(self, model: GPTModel, device: Device, new: int) -> None:
        self.model, self.device, self.new = model, device, new
        self.starts: dict[int, int] = {}
        self.cache: KVCache | None = None
        self.mask: Tensor | None = None  # (B, T) int64, 0 = padding; None = there is none

    def logits(self, rows: dict[int, list[int]]) -> Tensor:
        """The logits of the next token of each row, (B, V) float32 on the CPU. From the second call
        on, the rows are those of the call before with one more token each, or some of them.
        """
        context = self.model.config.max_position_embeddings
        starts = {i: window_start(len(ids), context) for i, ids in rows.items()}
        if self.cache and starts == self.starts:
            ids = torch.tensor([row[-1:] for row in rows.values()])
            if self.mask is not None:
                self.mask = torch.cat((self.mask, self.mask.new_ones(len(rows), 1)), 1)
        else:
            self.starts = starts
            ids = self._begin([row[starts[i] :] for i, row in rows.items()])
        ids = ids.to(self.device.torch_device)
        logits, _ = self.model(ids, self.mask, logits_to_keep=1, cache=self.cache)
        return logits[:, -1].float().cpu()

    def _begin(self, windows: list[list[int]]) -> Tensor:
        """Starts with an empty cache. Returns the windows as one tensor of ids, (B, T) int64,
        padded on the left, so that all rows go on at the same place.
        """
        longest = max(map(len, windows))
        ids = torch.tensor([[0] * (longest - len(w)) + w for w in windows])
        mask = torch.tensor([[0] * (longest - len(w)) + [1] * len(w) for w in windows])
        self.mask = None if bool(mask.all()) else mask.to(self.device.torch_device)
        if self.new:  # a context may be long, and the text short
            config = self.model.config
            room = min(config.max_position_embeddings, longest + self.new)
            self.cache = KVCache(config.n_layers, room, config.ngram_longest)
        return ids
