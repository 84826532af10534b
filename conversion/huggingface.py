"""A model of ours as one of transformers, with the same weights."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import GPTConfig
from conversion.names import gpt2_name, to_gpt2, to_nanochat
from corpus.tokenizer import Tokenizer
from model import GPTModel
from runtime.console import one_line
from runtime.setting_fields import UserError

MODELING = Path(__file__).with_name("modeling_rosetrainer.py")  # for models with n-grams
EPSILON = torch.finfo(torch.float32).eps  # of RMSNorm where none is given
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
# Activations of transformers by the `gelu` of our settings.
GELUS = {"tanh": ("gelu_new", "gelu_pytorch_tanh"), "none": ("gelu", "gelu_python")}


def import_transformers() -> Any:
    """The package transformers, which is told to print no progress. Raises UserError if missing."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "converting models needs a package: pip install transformers safetensors"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def to_huggingface(model: GPTModel, tokenizer: Tokenizer | None = None) -> Any:
    """The model as one of transformers with copies of its weights, in evaluation mode on the CPU:
    GPT2LMHeadModel, NanoChatForCausalLM, or RosetrainerForCausalLM of modeling_rosetrainer.py where
    it has n-grams. tokenizer: for the ids of start and end. Raises UserError.
    """
    transformers, end = import_transformers(), tokenizer.end_token if tokenizer else None
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    made: Any
    with torch.device("meta"):  # no memory, and no time for initial weights
        if model.config.arch == "gpt2":
            config = transformers.GPT2Config(**gpt2_entries(model.config), **ends)
            made = transformers.GPT2LMHeadModel(config)
        elif model.config.ngram_rows:
            ours = _modeling()
            config = ours.RosetrainerConfig(**nanochat_entries(model.config), **ends)
            config.auto_map = {
                "AutoConfig": f"{MODELING.stem}.RosetrainerConfig",
                "AutoModelForCausalLM": f"{MODELING.stem}.RosetrainerForCausalLM",
            }
            made = ours.RosetrainerForCausalLM(config)
        else:
            config = transformers.NanoChatConfig(**nanochat_entries(model.config), **ends)
            made = transformers.NanoChatForCausalLM(config)
    weights = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    return filled(made, huggingface_tensors(weights, model.config))


def load_huggingface(folder: Path) -> Any:
    """The model in a folder as transformers reads it, float32 in evaluation mode. No code from the
    folder runs: a model with n-grams is read by modeling_rosetrainer.py of ours.
    """
    transformers = import_transformers()
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    loader = transformers.AutoModelForCausalLM
    if kind == "rosetrainer":
        loader = _modeling().RosetrainerForCausalLM
    try:
        found = loader.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    except Exception as reason:  # of many kinds: an entry of config.json, quantized weights
        said = f"{type(reason).__name__}: {one_line(reason, 160)}"
        raise UserError(f"{folder}: transformers can't read it ({said})") from reason
    return found.eval()


def filled(made: Any, tensors: dict[str, Tensor]) -> Any:
    """The model of transformers, made on the meta device, with these tensors as its parameters, on
    the CPU in evaluation mode.
    """
    names = {name for name, _ in made.named_parameters()}
    if names != tensors.keys():
        raise UserError(
            f"this version of transformers has other parameters: {sorted(names ^ tensors.keys())}; "
            "conversions are tested with version 5"
        )
    made.load_state_dict(tensors, strict=False, assign=True)
    made.tie_weights()
    if hasattr(made.config, "rope_parameters"):  # a buffer that is not in a state dict
        made.model.rotary_emb = type(made.model.rotary_emb)(made.config)
    return made.float().eval().requires_grad_(False)


def huggingface_tensors(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our parameters by the names that transformers has for them, as it has them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if config.arch == "gpt2":
            tensors[f"transformer.{gpt2_name(name)}"] = to_gpt2(name, tensor, config)
        else:
            tensors |= to_nanochat(name, tensor, config)
    return tensors


def gpt2_entries(config: GPTConfig) -> dict[str, Any]:
    """The entries of a GPT2Config that say what the model computes."""
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_position_embeddings,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": GELUS[config.gelu][0],
        "layer_norm_epsilon": 1e-5,
        **dropouts,
    }


def nanochat_entries(config: GPTConfig) -> dict[str, Any]:
    """The entries of a NanoChatConfig that say what the model computes."""
    names = ("ngram_rows", "ngram_longest") if config.ngram_rows else ()
    ngrams = {name: getattr(config, name) for name in names}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "relu2",
        "attention_dropout": config.dropout,
        "rms_norm_eps": EPSILON,
        "rope_parameters": dict(ROTARY),
        "final_logit_softcapping": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        **ngrams,
    }


def _modeling() -> Any:
    """The module modeling_rosetrainer.py, as transformers would load it out of an exported folder:
    nothing here imports it by name, since it needs transformers.
    """
    if MODELING.stem in sys.modules:
        return sys.modules[MODELING.stem]
    spec = importlib.util.spec_from_file_location(MODELING.stem, MODELING)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODELING.stem] = module  # where its dataclasses look up their types
    spec.loader.exec_module(module)
    return module
