"""Activation memory: computes again in the backward pass what would cost more to keep.

Nothing in model.py knows of it. `recompute_activations` is called once, when the model is compiled
or split over processes, and before DDP runs its first pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import GPTModel, Square

# Modules that cost little, and whose input autograd keeps anyway.
_CHEAP = (nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.SiLU, Square)


def recompute_activations(model: GPTModel) -> None:
    """Changes the blocks of a model, in place, so that they keep less for the backward pass. No
    number that they compute changes.

    With use_activation_checkpoint a block keeps only its input, and its forward pass runs again
    (Chen et al. 2016). Without it see `recompute_inputs`; compiled blocks stay as they are, since
    the compiler decides what they keep.
    """
    for block in model.blocks:
        if model.config.use_activation_checkpoint:
            block.forward = _checkpointed(block)
        elif not model.compiled:
            recompute_inputs(block)


def recompute_inputs(block: nn.Module, kept: Callable[[Tensor], object] = lambda x: None) -> None:
    """Has each linear layer of the block that multiplies what a norm or an activation function
    gives compute this input again in the backward pass, instead of keeping it: norm and activation
    function keep their own input, from which it follows. Of 16 C numbers per token and block of
    GPT-2, 10 C are left, for 1 % more time.

    kept: called with each tensor that these linear layers keep all the same.
    """
    latest: list[tuple[nn.Module, Tensor, Tensor]] = []  # module, input and output

    def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            latest[:] = [(module, args[0], output)]

    def forget(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        latest.clear()

    def recomputing(linear: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not latest or storage_of(latest[0][2]) != storage_of(x):
                return linear(x)
            module, source, _ = latest.pop()
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
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

        return forward

    for module in block.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, _CHEAP):
            module.register_forward_hook(remember)
        elif weight is not None and weight.ndim == 2:
            module.forward = recomputing(module.forward)
    block.register_forward_hook(forget, always_call=True)


def _checkpointed(block: nn.Module) -> Callable[..., Tensor]:
    forward = block.forward

    def recomputed(*args: object) -> Tensor:
        if not block.training:
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    return recomputed


def storage_of(x: Tensor) -> int:
    """The memory that x lies in, as a number: views of one tensor have the same."""
    return x.untyped_storage()._cdata
