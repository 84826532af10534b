"""A copy in memory of what a checkpoint holds, from which a background thread writes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from checkpointing.file_format import tensor_bytes


def copy_bytes(tree: Any, pinned: bool = False) -> int:
    """The memory in bytes that copies of all tensors in nested dicts take. pinned: as page-locked
    memory, of which torch gives each tensor a block of the next power of two.
    """
    if isinstance(tree, dict):
        return sum(copy_bytes(value, pinned) for value in tree.values())
    size = tensor_bytes(tree)
    return 1 << (size - 1).bit_length() if pinned and size else size


def copied(tree: Any, into: dict[str, Any], pinned: bool = False) -> dict[str, Any]:
    """Copies nested dicts of tensors to the CPU, into the tensors of `into`; those that it lacks
    are added. pinned: into page-locked memory, asynchronously, so synchronize before reading.
    """
    result = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result[key] = copied(value, into.setdefault(key, {}), pinned)
        elif isinstance(value, Tensor):
            if key not in into:
                into[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
            result[key] = into[key].copy_(value, non_blocking=pinned)
        else:
            result[key] = value
    return result
