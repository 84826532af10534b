"""Weights in files of nanoGPT and llm.c, both of GPT-2's shape. What else these files hold, such as
optimizer state, is left.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import GPTConfig
from conversion.names import gpt2_name, is_transposed
from conversion.weights import Weights, of_gpt2
from runtime.setting_fields import UserError

LLMC_MAGIC = 20240326
_LLMC_TYPES = {3: torch.float32, 5: torch.bfloat16}  # by the version in the header
_HEADER_BYTES = 256 * 4
_COMPILED, _MASK = "_orig_mod.", ".attn.bias"


def open_nanogpt(path: Path, content: dict[str, Any]) -> Weights:
    """The weights in a nanoGPT checkpoint, of which `content` is what torch.load returned. Its
    activation is the exact GELU. A LayerNorm or matrix without bias (bias=False) gets one of zeros,
    which computes the same. Raises UserError.
    """
    args = content["model_args"]
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content["model"].items()):
        raise UserError(f"{path}: its model holds more than tensors by their names")
    tensors = {
        k.removeprefix(_COMPILED).removeprefix("transformer."): v
        for k, v in content["model"].items()
        if not k.endswith(_MASK)  # the causal mask of versions without flash attention
    }
    try:
        config = GPTConfig(
            arch="gpt2",
            gelu="none",
            vocab_size=args["vocab_size"],
            max_position_embeddings=args["block_size"],
            n_layers=args["n_layer"],
            n_heads=args["n_head"],
            d_model=args["n_embd"],
        )
    except KeyError as missing:
        raise UserError(
            f"{path}: a checkpoint of nanoGPT without {missing} in model_args"
        ) from None
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("wte.weight", head)):
        raise UserError(f"{path}: its head is not tied to its embedding, as gpt2's is here")
    biases = bool(args.get("bias", True))

    def read(name: str) -> Tensor:
        weight = (
            tensors.get(f"{name.removesuffix('bias')}weight") if name.endswith("bias") else None
        )
        if weight is not None and not biases and name not in tensors:
            return torch.zeros(len(weight))
        if name not in tensors:
            raise UserError(f"{path}: a checkpoint of nanoGPT without {name}")
        return tensors[name].T if is_transposed(name) else tensors[name]

    notes = ["its GELU is nanoGPT's, exact: --gelu none"]
    notes += [] if biases else ["it has no biases, here they are zeros: it computes the same"]
    weights = of_gpt2(f"nanoGPT checkpoint {path}", config, read, notes)
    if unknown := sorted(tensors.keys() - {gpt2_name(name) for name in weights.shapes}):
        raise UserError(
            f"{path}: weights that its model_args do not explain: {', '.join(unknown)[:200]}"
        )
    return weights


def open_llmc(path: Path) -> Weights:
    """The weights in a GPT-2 model file of llm.c: a header of 256 int32, and all parameters of a
    kind after each other, blocks stacked. The rows that pad the vocabulary, which llm.c never reads
    as logits, are left out. Raises UserError.
    """
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256:
        raise UserError(f"{path}: the header of llm.c is cut off")
    version, positions, vocab, layers, heads, width, padded = (int(n) for n in header[1:8])
    if version not in _LLMC_TYPES:
        raise UserError(
            f"{path}: version {version} of llm.c's model files; read are 3 (float32) and 5 "
            "(bfloat16)"
        )
    config = GPTConfig(
        arch="gpt2",
        vocab_size=vocab,
        max_position_embeddings=positions,
        n_layers=layers,
        n_heads=heads,
        d_model=width,
    )
    stacks = _llmc_layout(padded, positions, layers, width)
    dtype, count = _LLMC_TYPES[version], sum(math.prod(s) for s in stacks.values())
    size, wanted = path.stat().st_size, _HEADER_BYTES + count * dtype.itemsize
    if size != wanted:
        raise UserError(f"{path}: {size:,} bytes, but its header makes it {wanted:,}")
    numbers = torch.from_file(str(path), False, size, dtype=torch.uint8)  # mapped, not read
    numbers = numbers[_HEADER_BYTES:].view(dtype)
    starts, start = dict[str, int](), 0
    for name, shape in stacks.items():
        starts[name], start = start, start + math.prod(shape)

    def read(name: str) -> Tensor:
        block = name.split(".")[1] if name.startswith("h.") else ""
        kind = name.removeprefix(f"h.{block}.")
        shape = stacks[kind]
        found = numbers[starts[kind] :][: math.prod(shape)].view(shape)
        if block:
            return found[int(block)].T if is_transposed(name) else found[int(block)]
        return found[:vocab] if kind == "wte.weight" else found

    kind = str(dtype).removeprefix("torch.")
    return of_gpt2(f"llm.c model {path} ({kind})", config, read, [])


def _llmc_layout(vocab: int, positions: int, L: int, C: int) -> dict[str, tuple[int, ...]]:
    """The shapes of llm.c's parameters in the order of its file, by the names of GPT2Model without
    the number of the block.
    """
    return {
        "wte.weight": (vocab, C),
        "wpe.weight": (positions, C),
        "ln_1.weight": (L, C),
        "ln_1.bias": (L, C),
        "attn.c_attn.weight": (L, 3 * C, C),
        "attn.c_attn.bias": (L, 3 * C),
        "attn.c_proj.weight": (L, C, C),
        "attn.c_proj.bias": (L, C),
        "ln_2.weight": (L, C),
        "ln_2.bias": (L, C),
        "mlp.c_fc.weight": (L, 4 * C, C),
        "mlp.c_fc.bias": (L, 4 * C),
        "mlp.c_proj.weight": (L, C, 4 * C),
        "mlp.c_proj.bias": (L, C),
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
    }
