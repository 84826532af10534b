"""What the environment decides where a setting is auto."""

from __future__ import annotations

import os

from config import Settings
from runtime.setting_fields import choose


def wandb_mode(args: Settings) -> str:
    """online, offline or disabled: what the settings say, or with auto the environment. Raises
    UserError for a WANDB_MODE that is none of those that wandb knows.
    """
    if args.wandb_mode != "auto":
        return args.wandb_mode
    found = os.environ.get("WANDB_MODE") or "online"
    known = {"online": "online", "offline": "offline", "disabled": "disabled"}
    return str(choose("WANDB_MODE", found, known | {"run": "online", "dryrun": "offline"}))
