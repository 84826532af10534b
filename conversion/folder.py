"""Opens a folder of Hugging Face: its configuration, weights and tokenizer.

A configuration that computes something else than our models do is refused by the name of the entry.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import GPTConfig
from conversion.huggingface import EPSILON, GELUS, ROTARY, load_huggingface
from conversion.names import Read, from_nanochat, gpt2_name, nanochat_names
from conversion.tokenizer_json import tokenizer_in
from conversion.weights import Weights, of_gpt2
from runtime.console import one_line
from runtime.setting_fields import UserError

_HEAD = "lm_head.weight"
# Entries of config.json that our models have one value for, or a few: the value where the entry is
# missing, and those that are read.
_GPT2: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "layer_norm_epsilon": (1e-5, (1e-5,)),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "add_cross_attention": (False, (False,)),
    "tie_word_embeddings": (True, (True,)),
    "activation_function": ("gelu_new", tuple(a for names in GELUS.values() for a in names)),
}
_NANOCHAT: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "hidden_act": ("relu2", ("relu2",)),
    "rms_norm_eps": (1e-6, (EPSILON,)),
    "final_logit_softcapping": (15.0, (None,)),
    "attention_bias": (False, (False,)),
    "tie_word_embeddings": (False, (False,)),
    "head_dim": (None, (None,)),
    "rope_scaling": (None, (None,)),
}


def open_folder(folder: Path, stack: ExitStack) -> Weights:
    """The weights in a folder of Hugging Face; `stack` closes its files. Raises UserError."""
    entries = _json_in(folder / "config.json")
    kind = entries.get("model_type")
    source = f"{kind} of Hugging Face in {folder}"
    if kind not in ("gpt2", "nanochat", "rosetrainer"):
        raise UserError(
            f"{folder}: a model of type {kind!r:.40}; read are gpt2, nanochat, and rosetrainer, "
            "which hf.py export makes"
        )
    config = (_gpt2_config if kind == "gpt2" else _nanochat_config)(entries, source)
    read, names = _tensors_in(folder, stack)
    if kind == "gpt2":
        weights = _of_gpt2(source, config, read, names)
    else:
        weights = Weights(source, config, lambda name: from_nanochat(name, read, config))
        _refuse_unknown(source, names, {t for n in weights.shapes for t in nanochat_names(n)})
    tokenizer, notes = tokenizer_in(folder, config.vocab_size)
    return dataclasses.replace(
        weights, theirs=lambda: load_huggingface(folder), tokenizer=tokenizer, notes=notes
    )


def _of_gpt2(source: str, config: GPTConfig, read: Read, names: set[str]) -> Weights:
    """The weights of a GPT-2, whose names may have the prefix of GPT2LMHeadModel."""
    prefix = "transformer." if "transformer.wte.weight" in names else ""
    masks = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old files hold
    if _HEAD in names and not torch.equal(read(_HEAD), read(f"{prefix}wte.weight")):
        raise UserError(f"{source}: its head is not tied to its embedding, as gpt2's is here")
    weights = of_gpt2(source, config, lambda name: read(prefix + name), [])
    known = {prefix + gpt2_name(name) for name in weights.shapes}
    _refuse_unknown(source, {n for n in names if not n.endswith(masks)} - {_HEAD}, known)
    return weights


def _refuse_unknown(source: str, names: set[str], known: set[str]) -> None:
    if unknown := sorted(names - known):
        raise UserError(f"{source}: weights that no model here has: {', '.join(unknown)[:200]}")


def _gpt2_config(entries: dict[str, Any], source: str) -> GPTConfig:
    _refuse_others(entries, _GPT2, source)
    activation = entries.get("activation_function", "gelu_new")
    return GPTConfig(
        arch="gpt2",
        gelu=next(ours for ours, theirs in GELUS.items() if activation in theirs),
        vocab_size=entries.get("vocab_size", 50257),
        max_position_embeddings=entries.get("n_positions", 1024),
        n_layers=entries.get("n_layer", 12),
        n_heads=entries.get("n_head", 12),
        d_model=entries.get("n_embd", 768),
        d_ff=entries.get("n_inner") or 0,
    )


def _nanochat_config(entries: dict[str, Any], source: str) -> GPTConfig:
    heads, rotary = entries.get("num_attention_heads", 6), dict(ROTARY)
    given = entries.get("rope_parameters")
    rotary |= given if isinstance(given, dict) else {}
    rotary["rope_theta"] = entries.get("rope_theta", rotary["rope_theta"])
    shared = {"num_key_value_heads": (heads, (heads,))}
    _refuse_others(entries, {**_NANOCHAT, **shared}, source)
    _refuse_others(rotary, {k: (v, (v,)) for k, v in ROTARY.items()}, source)
    return GPTConfig(
        arch="modern",
        vocab_size=entries.get("vocab_size", 50304),
        max_position_embeddings=entries.get("max_position_embeddings", 2048),
        n_layers=entries.get("num_hidden_layers", 12),
        n_heads=heads,
        d_model=entries.get("hidden_size", 768),
        d_ff=entries.get("intermediate_size", 8192),
        ngram_rows=entries.get("ngram_rows", 0),
        ngram_longest=entries.get("ngram_longest", 4),
    )


def _refuse_others(
    entries: dict[str, Any], known: dict[str, tuple[Any, tuple[Any, ...]]], source: str
) -> None:
    """Raises UserError if an entry has a value that no model of ours computes."""
    for name, (usual, read) in known.items():
        value = entries.get(name, usual)
        if name == "num_key_value_heads" and value is None:
            continue
        if value not in read:
            allowed = " or ".join(json.dumps(v) for v in read)
            raise UserError(
                f"{source}: {name}={json.dumps(value)} in config.json; models here have {allowed}"
            )


def _json_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}, so it is no folder of Hugging Face"
        ) from None
    except (OSError, ValueError) as reason:
        raise UserError(f"{path}: not to be read ({str(reason)[:100]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a table of entries")
    return found


def _tensors_in(folder: Path, stack: ExitStack) -> tuple[Read, set[str]]:
    """A function that reads a tensor of the folder by its name, and all names. Raises UserError."""
    for single, opened in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickled)):
        index = folder / f"{single}.index.json"
        if index.is_file():
            where = _json_in(index).get("weight_map")
            if not isinstance(where, dict) or not all(
                isinstance(v, str) and Path(v).name == v for v in where.values()
            ):
                raise UserError(f"{index}: it does not say which tensor is in which file beside it")
        elif (folder / single).is_file():
            where = {}
        else:
            continue
        files = sorted(set(where.values())) or [single]
        readers: dict[str, Callable[[], Tensor]] = {}
        for name in files:
            readers |= opened(folder / name, stack)
        return _by_name(readers, folder), set(readers)
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _by_name(readers: dict[str, Callable[[], Tensor]], folder: Path) -> Read:
    def read(name: str) -> Tensor:
        if name not in readers:
            raise UserError(f"{folder}: its weights lack {name}")
        return readers[name]()

    return read


def _safetensors(path: Path, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path} needs a package: pip install safetensors") from None
    try:
        file = stack.enter_context(safe_open(str(path), "pt"))
    except (OSError, SafetensorError) as reason:
        raise UserError(f"{path}: not to be read ({str(reason)[:100]})") from None
    return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118


def _pickled(path: Path, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    tensors = load_pickled(path)
    return {k: partial(_same, v) for k, v in tensors.items() if isinstance(v, Tensor)}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def load_pickled(path: Path) -> dict[str, Any]:
    """What torch.load reads from a file without running code of it; tensors are mapped into memory
    where the format allows that. Raises UserError, also for a zip file with a wrong checksum, which
    torch.load does not look at.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path}: damaged: {damaged} in it has a wrong checksum")
    except zipfile.BadZipFile as reason:
        raise UserError(f"{path}: damaged: {reason}") from None
    try:
        try:
            found = torch.load(path, "cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 can't be mapped
            found = torch.load(path, "cpu", weights_only=True)
    except Exception as reason:  # a damaged file may fail anywhere in zipfile and pickle
        what = one_line(reason, 160)
        raise UserError(f"{path}: not to be read as weights alone ({what})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: it holds no table of weights, but a {type(found).__name__}")
    return found
