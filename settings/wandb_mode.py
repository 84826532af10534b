"""The mode of Weights & Biases, from the settings or the environment."""

from __future__ import annotations

import os

from config import Settings
from runtime.setting_fields import choose


def wandb_mode(args: Settings) -> str:
    """The mode of Weights & Biases, "online", "offline" or "disabled": that of the settings, or if
    they say auto, that of the environment variable WANDB_MODE, or online. Raises UserError for a
    WANDB_MODE that wandb does not know.
    """
    if args.wandb_mode != "auto":
        return args.wandb_mode
    found = os.environ.get("WANDB_MODE") or "online"
    known = {"online": "online", "offline": "offline", "disabled": "disabled"}
    return str(choose("WANDB_MODE", found, known | {"run": "online", "dryrun": "offline"}))
