"""Activation recomputation: computes again in the backward pass what would cost more to keep.

Nothing in model.py knows of it. Call `recompute_activations` once, after the model is compiled or
split over processes, and before DDP runs its first pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loss import compute_dtype
from model import GPTModel, Square

# Modules that cost little, and whose input autograd keeps anyway.
_CHEAP = (nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.SiLU, Square)


def recompute_activations(model: GPTModel) -> None:
    """Changes the blocks of a model, in place, so that autograd saves fewer activations for the
    backward pass. No number that they compute changes.

    With use_activation_checkpoint a block saves only its input, and its forward pass runs again in
    the backward pass (Chen et al. 2016). Without it see `recompute_inputs`; compiled blocks stay as
    they are, since the compiler decides what they save.
    """
    for block in model.blocks:
        if model.config.use_activation_checkpoint:
            block.forward = partial(_checkpointed, block, block.forward)
        elif not model.compiled:
            recompute_inputs(block)


def recompute_inputs(block: nn.Module, kept: Callable[[Tensor], object] = lambda x: None) -> None:
    """Has the linear layers of a block compute their input again in the backward pass instead of
    saving it, where it is the output of a norm or an activation function. Those save their own
    input, from which it follows. Of the 16 C numbers that autograd saves per token and block of
    GPT-2, 10 C are left, for 1 % more time.

    kept: called with each tensor that these linear layers still save.
    """
    # The modules get partials and not closures, so that a deep copy of the model gets its own.
    latest: list[_Output] = []
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, _CHEAP):
            module.register_forward_hook(partial(_remember, latest))
        elif weight is not None and weight.ndim == 2:
            module.forward = partial(_recomputing_input, latest, kept, module.forward)
    block.register_forward_hook(partial(_forget, latest), always_call=True)


class _Output(NamedTuple):
    """The latest output of a cheap module (see `_CHEAP`), with the module and its input."""

    module: nn.Module
    input: Tensor
    output: Tensor


def _remember(
    latest: list[_Output], module: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> None:
    if torch.is_grad_enabled():
        latest[:] = [_Output(module, args[0], output)]


def _forget(latest: list[_Output], *_: object) -> None:
    latest.clear()


def _recomputing_input(
    latest: list[_Output],
    kept: Callable[[Tensor], object],
    linear: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    """Returns linear(x). If x is the latest output of a cheap module, autograd does not save it but
    computes it again from the input of that module.
    """
    if not latest or storage_of(latest[0].output) != storage_of(x):
        return linear(x)
    module, source, _ = latest.pop()
    dtype = compute_dtype(x)
    x = x.to(dtype)
    own = storage_of(x)

    def pack(saved: Tensor) -> Tensor | torch.Size:
        if storage_of(saved) == own:
            return saved.shape
        kept(saved)
        return saved

    def unpack(saved: Tensor | torch.Size) -> Tensor:
        if not isinstance(saved, torch.Size):
            return saved
        return module.forward(source.detach()).to(dtype).view(saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return linear(x)


def _checkpointed(block: nn.Module, forward: Callable[..., Tensor], *args: object) -> Tensor:
    if not block.training:
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)


def storage_of(x: Tensor) -> int:
    """An integer that identifies the storage of x; views of one tensor have the same."""
    return x.untyped_storage()._cdata
