"""Presets: named sets of defaults, and how typed flags change them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from config import Settings
from runtime.setting_fields import choose

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
    "gpt2-xl": dict(_GPT2, n_layers=48, n_heads=25, d_model=1600, lr=2e-4),
}

# Values of presets made for Muon that --optimizer adamw replaces: Muon's updates are even in size,
# and AdamW needs smaller rates and a warm-up.
WITH_ADAMW: dict[str, dict[str, Any]] = {
    "quickstart": dict(lr=3e-3, warmup_steps=50),
    "modern-small": dict(lr=9e-4, warmup_steps=1250),
}
# fmt: on


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
