"""Where a parameter of ours is in the models of Hugging Face, and how its numbers lie there.

Ours keeps the rows of query, key and value together head by head, (H, 3, D). GPT-2 has them one
after the other, (3, H, D), and stores each matrix transposed (`Conv1D`). NanoChat has a matrix for
each, and rotates the other way: with the second half of each query and key negated, each product of
two numbers is the same as ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from config import GPTConfig

Read = Callable[[str], Tensor]  # a tensor by its name in the other model

_GPT2 = {
    "norm_1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
    "norm_f": "ln_f",
}
_NANOCHAT = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc": "mlp.fc1",
    "mlp.proj": "mlp.fc2",
    "wte": "model.embed_tokens",
    "ngrams": "model.ngrams",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def _parts_of(name: str) -> tuple[str, str, str]:
    """The number of the block ("" outside of them), the module and the kind of a parameter."""
    found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert found is not None, name
    return found[1] or "", found[2], found[3]


def gpt2_name(name: str) -> str:
    """The name of our parameter in Hugging Face's GPT2Model, which GPT2LMHeadModel prefixes with
    `transformer.`
    """
    block, module, kind = _parts_of(name)
    return f"{f'h.{block}.' if block else ''}{_GPT2.get(module, module)}.{kind}"


def is_transposed(gpt2: str) -> bool:
    """Whether GPT-2 stores the parameter of this name as a Conv1D does: (in, out)."""
    return ".c_" in gpt2 and gpt2.endswith(".weight")


def to_gpt2(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """Our parameter as `gpt2_name(name)` has it."""
    if ".qkv." in name:
        heads = config.n_heads
        tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return (tensor.T if is_transposed(gpt2_name(name)) else tensor).contiguous()


def from_gpt2(name: str, read: Read, config: GPTConfig) -> Tensor:
    """Our parameter from GPT-2's; the inverse of `to_gpt2`."""
    tensor = read(gpt2_name(name))
    if is_transposed(gpt2_name(name)):
        tensor = tensor.T
    if ".qkv." in name:
        heads = config.n_heads
        tensor = tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    return tensor.contiguous()


def nanochat_names(name: str) -> list[str]:
    """The names of the parameters of NanoChatForCausalLM that hold ours: three for `qkv`."""
    block, module, kind = _parts_of(name)
    layer = f"model.layers.{block}." if block else ""
    if module == "attn.qkv":
        return [f"{layer}self_attn.{part}.{kind}" for part in _QKV]
    return [f"{layer}{_NANOCHAT.get(module, module)}.{kind}"]


def _turned(matrix: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys with the second half of each head negated."""
    first, second = matrix.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.stack((first, -second), 1).flatten(0, 2)


def to_nanochat(name: str, tensor: Tensor, config: GPTConfig) -> dict[str, Tensor]:
    """Our parameter as NanoChat has it, by the names of `nanochat_names`."""
    names, heads = nanochat_names(name), config.n_heads
    if len(names) == 1:
        return {names[0]: tensor.contiguous()}
    q, k, v = (m.flatten(0, 1) for m in tensor.unflatten(0, (heads, 3, -1)).unbind(1))
    parts = (_turned(q, heads), _turned(k, heads), v.contiguous())
    return dict(zip(names, parts, strict=True))


def from_nanochat(name: str, read: Read, config: GPTConfig) -> Tensor:
    """Our parameter from NanoChat's; the inverse of `to_nanochat`."""
    names, heads = nanochat_names(name), config.n_heads
    if len(names) == 1:
        return read(names[0]).contiguous()
    q, k, v = (read(n) for n in names)
    parts = (m.unflatten(0, (heads, -1)) for m in (_turned(q, heads), _turned(k, heads), v))
    return torch.stack(tuple(parts), 1).flatten(0, 2)
