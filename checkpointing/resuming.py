"""The settings of the run that --resume continues."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from checkpointing.reading import latest_valid, open_checkpoint
from config import from_dict
from corpus.tokenizer import build_tokenizer, write_tokenizer_file
from runtime.files import expanded
from runtime.setting_fields import UserError


def resumable_settings(path: str | Path) -> dict[str, Any]:
    """The flat settings of the checkpoint that --resume continues. If the tokenizer that they name
    can't be found any more, they name a copy of the one stored in the checkpoint, which is then
    written into cache_dir. Raises UserError.
    """
    return latest_valid(path, _settings_with_tokenizer)[0]


def _settings_with_tokenizer(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as contents:
        settings, data = contents.tree["settings"], contents.tree["data"]
    if "imported" in data:
        raise UserError(
            f"{path} holds the weights of {data['imported']}, which no run has trained; start one "
            f"from them with --init-from {path} and another --checkpoint-path"
        )
    stored = data.get("tokenizer", "")
    name = settings.get("tokenizer_name", "")
    if not (name and stored) or os.path.isfile(name):
        return settings
    try:
        build_tokenizer(name)
    except UserError:
        cache = from_dict(settings).cache_dir
        settings["tokenizer_name"] = cached_tokenizer(stored, path, cache)
    return settings


def cached_tokenizer(stored: str, path: str | Path, cache_dir: str) -> str:
    """Writes a tokenizer, as `to_json` gives it, into cache_dir and returns the file's path. path:
    where it is from, for messages. Raises UserError.
    """
    cache = expanded(cache_dir, "--cache-dir")
    copy = cache / f"tokenizers/{hashlib.sha256(stored.encode()).hexdigest()[:16]}.json"
    write_tokenizer_file(stored, path, copy)
    return str(copy)
