"""Presets: named sets of defaults, and how typed flags change them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from config import GPTConfig, Settings, to_dict
from runtime.setting_fields import choose

_TOLD = (
    *("arch", "n_layers", "n_heads", "d_model", "dropout", "seq_len", "global_batch_size"),
    *("batch_size", "optimizer", "lr", "min_lr", "lr_scheduler", "warmup_steps", "weight_decay"),
    *("beta1", "beta2", "muon_lr_ratio", "muon_momentum", "grad_clip_norm", "num_steps"),
    *("eval_steps", "save_steps"),
)
_DEFAULTS = {f.name: f.default for kind in (GPTConfig, Settings) for f in dataclasses.fields(kind)}

# fmt: off
_GPT2 = dict(
    arch="gpt2", vocab_size=50257, max_position_embeddings=1024, seq_len=1024,
    tokenizer_name="gpt2", batch_size=8, global_batch_size=480, num_steps=20_000,
    warmup_steps=700, eval_steps=250, save_steps=1000, val_max_tokens=1_048_576,
)

PRESETS: dict[str, dict[str, Any]] = {
    # Learns visibly in about a minute on two CPU cores.
    "quickstart": dict(
        arch="modern", vocab_size=0, max_position_embeddings=0, n_layers=2, n_heads=2, d_model=64,
        ngram_rows=10_500, seq_len=128, batch_size=24, global_batch_size=24, num_steps=800,
        optimizer="muon", lr=0.02, muon_lr_ratio=0.4, min_lr=0.0, lr_scheduler="linear",
        warmup_steps=0, eval_steps=100, save_steps=200, val_max_tokens=100_000,
    ),
    "toy": dict(
        arch="gpt2", vocab_size=10_000, max_position_embeddings=0, n_layers=2, n_heads=4,
        d_model=128, d_ff=512, dropout=0.1, seq_len=32, batch_size=8, global_batch_size=8,
        num_steps=50, lr=3e-4, warmup_steps=5, eval_steps=10, log_steps=1, val_max_tokens=10_000,
    ),
    # Shapes: Radford et al. 2019, table 2. Learning rates: Brown et al. 2020, table 2.1.
    "gpt2-small": dict(_GPT2, n_layers=12, n_heads=12, d_model=768, lr=6e-4),
    "gpt2-medium": dict(_GPT2, n_layers=24, n_heads=16, d_model=1024, lr=3e-4),
    "gpt2-large": dict(_GPT2, n_layers=36, n_heads=20, d_model=1280, lr=2.5e-4),
    # The recipe of quickstart at the size of GPT-2 small; its rates are those that trainers of that
    # size publish (matrices: 0.02 of Jordan et al. 2024 is 0.0036 here), not measured here.
    "modern-small": dict(
        _GPT2 | dict(arch="modern"), n_layers=12, n_heads=12, d_model=768, ngram_rows=50_304,
        optimizer="muon", lr=6e-3, muon_lr_ratio=0.6, min_lr=0.0, lr_scheduler="linear",
    ),
    # For --init-from, which gives the shape. Rate: the highest of Devlin et al. 2019, sec. A.3.
    "finetune": dict(
        seq_len=256, batch_size=4, global_batch_size=16, num_steps=400, lr=5e-5, min_lr=0.0,
        lr_scheduler="linear", warmup_steps=40, eval_steps=50, save_steps=100,
        val_max_tokens=100_000,
    ),
    "gpt2-xl": dict(_GPT2, n_layers=48, n_heads=25, d_model=1600, lr=2e-4),
}

# Values of presets made for Muon that --optimizer adamw replaces: Muon's updates are even in size,
# and AdamW needs smaller rates and a warm-up.
WITH_ADAMW: dict[str, dict[str, Any]] = {
    "quickstart": dict(lr=3e-3, warmup_steps=50),
    "modern-small": dict(lr=9e-4, warmup_steps=1250),
}
# Why settings have the values that they have where no flag says otherwise.
_ABOUT_PRESETS = {
    "quickstart": "learns visibly in about a minute on two CPU cores; measured in docs/speed.md",
    "toy": "small enough to try out commands",
    "gpt2-small": "shape: Radford et al. 2019, table 2; rate: Brown et al. 2020, table 2.1",
    "gpt2-medium": "shape: Radford et al. 2019, table 2; rate: Brown et al. 2020, table 2.1",
    "gpt2-large": "shape: Radford et al. 2019, table 2; rate: Brown et al. 2020, table 2.1",
    "gpt2-xl": "shape: Radford et al. 2019, table 2; rate: Brown et al. 2020, table 2.1",
    "finetune": "goes on from --init-from; rate: the highest of Devlin et al. 2019, sec. A.3",
    "modern-small": "quickstart's recipe at the size of GPT-2 small; rates of public trainers",
}
_ABOUT_DEFAULTS = {
    **dict.fromkeys(("beta1", "beta2", "weight_decay", "grad_clip_norm"),
                    "Brown et al. 2020, appendix B"),
    "lr_scheduler": "Loshchilov and Hutter 2017, eq. 5", "muon_momentum": "Jordan et al. 2024",
    "min_lr": "-1 = a tenth of lr, as Brown et al. 2020, appendix B",
}
# fmt: on


def origins_of_settings(args: Settings) -> list[list[str]]:
    """Rows of a table about the settings that decide what is learned: name, value, and where the
    value comes from: a flag, the preset, or a default, and why it was chosen.
    """
    preset = PRESETS.get(args.preset, {})
    values = to_dict(args)
    rows = []
    for name in _TOLD:
        if name.startswith("muon_") and args.optimizer != "muon":
            continue
        value, default = values[name], _DEFAULTS[name]
        if name in preset and value == preset[name]:
            origin = f"preset {args.preset}"
        elif value == default and name not in preset:
            about = _ABOUT_DEFAULTS.get(name, "")
            origin = f"default{f': {about}' if about else ''}"
        else:
            origin = "given, or follows from what is given"
        rows.append([name, f"{value:g}" if isinstance(value, float) else str(value), origin])
    return [*rows, [f"preset {args.preset}", "", _ABOUT_PRESETS.get(args.preset, "")]]


def preset_values(preset: str, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a preset, without those that the typed flags make meaningless, and with the
    AdamW rates or a shorter warm-up if the flags ask for AdamW or few steps. Raises UserError for
    an unknown preset.
    """
    values = dict(choose("preset", preset, PRESETS))
    if typed.get("data_mode") == "fineweb_npy" or typed.get("train_npy"):
        values.pop("tokenizer_name", None)  # shards need none, and its files may not be at hand
    if typed.get("arch") == "gpt2":
        values.pop("ngram_rows", None)  # a part of the other architecture
    if typed.get("optimizer") == "adamw":
        values |= WITH_ADAMW.get(preset, {})
    if "num_steps" in typed:
        values["warmup_steps"] = min(values["warmup_steps"], typed["num_steps"] // 10)
    return values


def notes_on_preset(args: Settings) -> list[str]:
    """Notes for the log: whether the learning rate or the warm-up is not the preset's usual one
    because of a flag that does not name it.
    """
    preset = PRESETS.get(args.preset, {})
    own = WITH_ADAMW.get(args.preset, {}) if args.optimizer == "adamw" else {}
    planned = (preset | own).get("warmup_steps", 0)
    notes = []
    if own and args.lr == own["lr"]:
        notes.append(
            f"lr is {args.lr:g}, which preset {args.preset} has with adamw (with muon "
            f"{preset['lr']:g}); --lr sets another"
        )
    if args.warmup_steps == args.num_steps // 10 < planned:
        notes.append(
            f"warm-up is {args.warmup_steps} steps, a tenth of --num-steps, where preset "
            f"{args.preset} has {planned}; --warmup-steps sets another"
        )
    return notes
