"""--init-from: a new run starts from given weights; optimizer, schedule, data and steps are new."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from checkpointing.manager import CheckpointManager
from checkpointing.resuming import cached_tokenizer
from config import Settings
from conversion.opening import open_weights
from conversion.weights import Weights
from corpus.tokenizer import Tokenizer, build_tokenizer
from model import GPTModel
from runtime.setting_fields import UserError
from training.step import RunState


def settings_of_weights(path: str, cache_dir: str) -> dict[str, Any]:
    """The settings that the weights at a path determine, by name: the shape of the model, and
    tokenizer_name, "" where they come without one. A tokenizer that has no name is copied into
    cache_dir. Raises UserError.
    """
    with open_weights(path) as weights:
        shape = dataclasses.asdict(weights.config)
        tokenizer = weights.tokenizer
    for name in ("dropout", "use_activation_checkpoint"):  # about training, not about the weights
        del shape[name]
    return {**shape, "tokenizer_name": _name_of(tokenizer, path, cache_dir) if tokenizer else ""}


def _name_of(tokenizer: Tokenizer, path: str, cache_dir: str) -> str:
    """The name or the file by which `build_tokenizer` finds a tokenizer."""
    try:
        if build_tokenizer(tokenizer.name).fingerprint == tokenizer.fingerprint:
            return tokenizer.name
    except UserError:
        pass
    return cached_tokenizer(tokenizer.to_json(), path, cache_dir)


def restore(checkpoints: CheckpointManager, tokenizer: Tokenizer | None) -> None:
    """Continues the run at the checkpoint path with --resume, else loads the weights of --init-from
    on all ranks. tokenizer: of the training data. Raises UserError.
    """
    if checkpoints.args.resume:
        return checkpoints.load()
    ranks, sharded = checkpoints.ranks, checkpoints.sharded_state
    parts = (checkpoints.args, checkpoints.model, checkpoints.state, tokenizer)
    bits = ranks.each(start_from_weights, *parts, sharded.part if sharded else None)
    ranks.must_agree({"weights to start from": bits})


def start_from_weights(
    args: Settings,
    model: GPTModel,
    state: RunState,
    tokenizer: Tokenizer | None,
    own_part: Callable[[str, Tensor], Tensor] | None = None,
) -> str:
    """Loads the weights that args.init_from names into the model, and leaves lines about it in
    `state.pending_messages`. Returns a sum over all bits that were read.

    own_part(name, whole): returns this rank's part of a parameter. Raises UserError if the weights
    do not fit the model, or the data are of another tokenizer.
    """
    own_part = own_part or (lambda name, whole: whole.to(model.get_parameter(name).device))
    notes, bits = list[str](), 0
    with open_weights(args.init_from) as weights, torch.no_grad():
        notes += _about_tokenizers(args, weights, tokenizer)
        if differ := sorted(model.shapes.keys() ^ weights.shapes.keys()):
            raise UserError(f"{weights.source} and the model differ in {', '.join(differ)[:200]}")
        for name, p in model.named_parameters():  # one at a time: a rank may hold a part of each
            read = weights.read(name)
            bits += int(read.view(torch.int32).sum())
            p.copy_(own_part(name, _fitted(name, read, model.shapes[name], weights.source, notes)))
        known = weights.config.max_position_embeddings
        if args.model.arch == "modern" and args.model.max_position_embeddings > known:
            notes.append(f"the weights have seen {known:,} positions; rotary ones beyond are new")
    state.pending_messages += [f"starts from {weights.source}", *notes]
    return f"{bits:x}"


def _fitted(
    name: str, read: Tensor, wanted: tuple[int, ...], source: str, notes: list[str]
) -> Tensor:
    """The weights with the rows that the model has: those of new ids are the mean of all, so that
    they change the other probabilities least (Hewitt 2021); those of new positions are the last.
    """
    rows, more = len(read), wanted[0] - len(read)
    if tuple(read.shape) == wanted:
        return read
    if read.shape[1:] != wanted[1:] or name not in ("wte.weight", "lm_head.weight", "wpe.weight"):
        raise UserError(f"{source}: {name} is {tuple(read.shape)}, and the model has {wanted}")
    if name == "wpe.weight":
        if more < 0:
            notes.append(f"the last {-more:,} of {rows:,} learned positions are left out")
            return read[: wanted[0]]
        notes.append(f"{more:,} new positions start as a copy of the last of {rows:,}")
        return torch.cat((read, read[-1:].expand(more, -1)))
    if more < 0:
        raise UserError(f"{source}: {name} has {rows:,} rows, and vocab_size is {wanted[0]:,}")
    notes.append(f"{more:,} new rows of {name} start as the mean of its {rows:,}")
    return torch.cat((read, read.mean(0, keepdim=True).expand(more, -1)))


def _about_tokenizers(args: Settings, weights: Weights, tokenizer: Tokenizer | None) -> list[str]:
    """A note if the data are of another tokenizer than the weights. Raises UserError if nobody
    typed that: then it is that of the token shards.
    """
    theirs = weights.tokenizer
    if not (tokenizer and theirs) or tokenizer.fingerprint == theirs.fingerprint:
        return []
    both = f"the data are of tokenizer {tokenizer.name}, and {weights.source} of {theirs.name}"
    if not args.tokenizer_name:
        raise UserError(
            f"{both}: the same ids stand for other text; give data of {theirs.name}, or if you "
            f"mean it, --tokenizer-name {tokenizer.name}"
        )
    return [f"{both}: its embeddings start out as those of other text"]
