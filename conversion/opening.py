"""Opens the weights in a file or folder, whoever wrote it.

What it is is told by its content: a checkpoint of ours, a folder of Hugging Face (a GPT-2, or a
NanoChat that computes what our modern does), a checkpoint of nanoGPT, a model file of llm.c.
Nothing runs code from it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from checkpointing.file_format import is_sealed
from checkpointing.reading import open_checkpoint
from config import from_dict
from conversion.folder import load_pickled, open_folder
from conversion.other_trainers import LLMC_MAGIC, open_llmc, open_nanogpt
from conversion.weights import Weights
from corpus.tokenizer import stored_tokenizer
from runtime.setting_fields import UserError


@contextmanager
def open_weights(path: str | Path) -> Iterator[Weights]:
    """Context manager that opens the weights at a path, and yields them. Raises UserError."""
    path = Path(path)
    with ExitStack() as stack:
        if path.is_dir():
            yield open_folder(path, stack)
        elif not path.is_file():
            raise UserError(
                f"{path}: no such file or folder; weights are read from a checkpoint of ours or of "
                "nanoGPT, a folder of Hugging Face, or a model file of llm.c (hf.py import NAME "
                "OUT.pt fetches a model of that name)"
            )
        else:
            yield _open_file(path, stack)


def read_weights(path: str | Path) -> Weights:
    """The weights at a path, all in memory. Raises UserError."""
    with open_weights(path) as opened:
        kept = opened.state_dict
    return Weights(
        opened.source, opened.config, kept.__getitem__, None, opened.tokenizer, opened.notes
    )


def _open_file(path: Path, stack: ExitStack) -> Weights:
    with open(path, "rb") as file:
        start, sealed = file.read(4), is_sealed(file)
    if sealed:
        return _open_ours(path, stack)
    if int.from_bytes(start, "little") == LLMC_MAGIC:
        return open_llmc(path)
    if (path.parent / "config.json").is_file():
        raise UserError(f"{path} is part of a folder of Hugging Face: give {path.parent}")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: neither a whole checkpoint of ours or of nanoGPT, nor a model file of llm.c; "
            "of Hugging Face's models give the folder"
        )
    content = load_pickled(path)
    if isinstance(content.get("model"), dict) and isinstance(content.get("model_args"), dict):
        return open_nanogpt(path, content)
    raise UserError(
        f"{path}: not a checkpoint of nanoGPT, which has model and model_args, and without the "
        f"checksum of ours; it has {', '.join(map(str, content))[:100]}"
    )


def _open_ours(path: Path, stack: ExitStack) -> Weights:
    contents = stack.enter_context(open_checkpoint(path))
    tree, config = contents.tree, from_dict(contents.tree["settings"]).model
    stored = tree["data"].get("tokenizer", "")
    tokenizer = stored_tokenizer(stored, "", os.fspath(path), config.vocab_size)
    source = f"checkpoint {path} (step {tree['step']})"
    return Weights(source, config, lambda n: contents.read(tree["model"][n]), None, tokenizer)
