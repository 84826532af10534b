"""The settings of a run that starts from given weights (--init-from), which determine its shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.flags import flag_name
from runtime.setting_fields import UserError

_SHAPE = ("arch", "n_layers", "n_heads", "d_model", "d_ff", "ngram_rows", "gelu", "ngram_longest")


def values_from_weights(
    base: Mapping[str, Any], typed: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a preset (base) with those that the weights determine. typed: the flags that
    the user typed; weights: the shape of the weights, and `tokenizer_name`, "" if they come
    without. Raises UserError if a typed flag contradicts them.
    """
    start, values = typed["init_from"], dict(base)
    for name in _SHAPE:
        given = typed.get(name, weights[name])
        if given != weights[name] and not (name == "d_ff" and given == 0):
            raise UserError(
                f"{name}={given}, but the weights in {start} have {weights[name]}; leave out "
                f"{flag_name(name)}"
            )
        values[name] = weights[name]
    known, longest = weights["vocab_size"], weights["max_position_embeddings"]
    if 0 < typed.get("vocab_size", 0) < known:
        raise UserError(
            f"vocab_size={typed['vocab_size']} is below the {known} of the weights in {start}, of "
            "which none can be left out; leave out --vocab-size, or give more"
        )
    values["vocab_size"], values["max_position_embeddings"] = known, longest
    values["seq_len"] = min(values["seq_len"], typed.get("max_position_embeddings") or longest)
    values["tokenizer_name"] = _tokenizer(typed, weights["tokenizer_name"])
    return values


def _tokenizer(typed: Mapping[str, Any], named: str) -> str:
    """The tokenizer of text: the one of the weights, unless one was typed. Other data have theirs.
    Raises UserError if nobody names one.
    """
    shards = typed.get("train_npy") or typed.get("data_mode") == "fineweb_npy"
    if shards or typed.get("use_toy_data") or typed.get("data_mode") == "toy":
        return ""
    if not named and not typed.get("tokenizer_name"):
        raise UserError(
            f"{typed['init_from']} holds no tokenizer; say of which one its ids are with "
            "--tokenizer-name, such as gpt2"
        )
    return named
