"""How much memory a step takes, and the largest micro-batch that fits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config import GPTConfig, Settings
from loss import workspace_bytes
from model import Block, GPTModel, rotary_table
from runtime.device import Device, free_memory
from runtime.setting_fields import UserError
from training.activation_recompute import recompute_inputs, storage_of
from training.compilation import why_not_compiled

_SURE = 2.0  # times what is free: no estimate is that far off
_USABLE = 0.9  # of the free memory: allocators lose some between their blocks


@dataclass(frozen=True)
class Need:
    """Bytes that one process needs at the highest point of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept for the backward pass, and the logits of a chunk

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in dataclasses.asdict(self).items())
        return f"{self.total / 1e9:.2f} GB ({parts})"


def estimate(args: Settings, device: Device, batch_size: int | None = None) -> Need:
    """What training with these settings needs, for micro-batches of batch_size sequences."""
    size = batch_size or args.batch_size
    parts = args.tensor_parallel_size * (_data_world(args) if args.parallel == "fsdp" else 1)
    whole, blocks = _numbers(args.model)
    weights = 4.0 * whole / parts
    matrices = 4.0 * blocks / parts if args.optimizer == "muon" else 0.0
    activations = _activations(args, device, size)
    gradients = weights
    if args.parallel == "fsdp":  # of one block at a time, and the embeddings, whole
        split = args.tensor_parallel_size
        activations += 8.0 * (whole - blocks + blocks / args.model.n_layers) / split
        if args.global_batch_size > size * _data_world(args):  # whole until the last micro-step
            gradients = 4.0 * whole / split
    return Need(weights, gradients, 2 * weights - matrices, activations)


def _data_world(args: Settings) -> int:
    """Ranks that see data of their own, as the sizes of the batch say."""
    return max(1, args.global_batch_size // (args.batch_size * max(1, args.grad_accum_steps)))


def fit_micro_batch(
    args: Settings,
    device: Device,
    local_world: int = 1,
    agree: Callable[..., list[int]] = lambda *wishes: list(wishes),
) -> Settings:
    """With micro_batch=auto, the settings with the largest batch_size whose step is estimated to
    fit, and as many micro-steps as give the same global batch; else as they are. Raises UserError
    where not even one sequence fits, or with a given batch_size where it cannot fit.

    local_world: processes that share the main memory. agree: the largest of a number over the
    ranks, which must all do the same.
    """
    if args.micro_batch != "auto":
        refuse_what_cannot_fit(args, device, local_world, agree)
        return args
    if free_memory_of(device) == math.inf:
        raise UserError(
            "--micro-batch auto: this system does not say how much memory is free; "
            "give --batch-size instead"
        )
    rows = args.global_batch_size // _data_world(args)
    limit = _USABLE * _free_memory_each(device, local_world)
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    fitting = [n for n in sizes if estimate(args, device, n).total <= limit]
    size = -agree(-max(fitting, default=0))[0]
    if not size:
        raise UserError(
            f"one sequence of {args.seq_len} tokens needs {estimate(args, device, 1)}, and "
            f"{limit / 1e9:.2f} GB can be used; lower --seq-len, --d-model or --n-layers, or try "
            "--use-activation-checkpoint"
        )
    return dataclasses.replace(
        args, batch_size=size, grad_accum_steps=rows // size, micro_batch="given"
    )


def refuse_what_cannot_fit(
    args: Settings,
    device: Device,
    local_world: int = 1,
    agree: Callable[..., list[int]] = lambda *wishes: list(wishes),
) -> None:
    """Raises UserError, on all ranks, where on one of them the weights, gradients and optimizer
    alone need more memory than is free, or the whole step twice as much; --allow-memory starts it
    all the same. Arguments as of `fit_micro_batch`.
    """
    free = _free_memory_each(device, local_world)
    need = estimate(args, device)
    state = need.total - need.activations
    (too_much,) = agree(int(state > free or need.total > _SURE * free))
    if too_much and not args.allow_memory:
        lower = "lower --batch-size or --seq-len, or try --use-activation-checkpoint"
        if state > free:
            lower = "weights, gradients and optimizer alone are too much, for any batch; lower "
            lower += "--n-layers or --d-model"
            if args.parallel != "fsdp":
                where = "GPUs" if device.torch_device.type == "cuda" else "machines"
                lower += f", or spread it over several {where} with --parallel fsdp"
        each = "in each process " if local_world > 1 else ""
        raise UserError(
            f"training takes {each}about {need}, and {free / 1e9:.2f} GB are free for it; {lower}, "
            "or start it all the same with --allow-memory"
        )


def _free_memory_each(device: Device, local_world: int) -> float:
    """Bytes for each of the processes of this machine, which share its main memory."""
    return free_memory_of(device) / (local_world if device.torch_device.type == "cpu" else 1)


def free_memory_of(device: Device) -> float:
    """Bytes that this process can still take where it computes."""
    if device.torch_device.type == "cuda":
        return float(torch.cuda.mem_get_info(device.torch_device)[0])
    return free_memory()


@functools.cache
def _numbers(config: GPTConfig) -> tuple[int, int]:
    """The parameters of the whole model, and those of the matrices in its blocks."""
    with torch.device("meta"):
        model = GPTModel(config)
    matrices = (p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    return model.num_parameters(), sum(matrices)


@functools.cache
def _kept_by_block(config: GPTConfig, dtype: torch.dtype, recompute: bool) -> float:
    """Bytes per token that a block keeps for its backward pass, measured on a block of this very
    shape: what two lengths of input differ in. recompute: with `recompute_inputs`.
    """
    with torch.device("meta"):
        block = Block(config)
    block.to_empty(device="cpu")  # the numbers in it don't matter, and take no memory unwritten
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[storage_of(x)] = x
        return x

    if recompute:
        recompute_inputs(block, keep)
    found = []
    for tokens in (8, 24):
        kept.clear()
        rotary = None
        if config.arch == "modern":
            rotary = rotary_table(tokens, config.d_model // config.n_heads)
        x = torch.zeros(1, tokens, config.d_model, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            block(x, None, rotary)
        found.append(sum(x.untyped_storage().nbytes() for x in kept.values()))
    return (found[1] - found[0]) / (24 - 8)


def _activations(args: Settings, device: Device, batch_size: int) -> float:
    """Bytes kept between the forward and the backward pass, the gradient of the head among them."""
    c, split = args.model, args.tensor_parallel_size
    compiled = not why_not_compiled(args, device)
    sizes = (_kept_by_block(c, device.dtype, again) for again in (False, not compiled))
    # Under tensor parallelism a rank has its part of what a block keeps, but for the two inputs of
    # the block's halves, which it has whole.
    inputs = 2 * 4 * c.d_model
    whole, recomputing = (inputs + (size - inputs) / split for size in sizes)
    layers = recomputing * c.n_layers
    if c.use_activation_checkpoint:  # the inputs of all blocks, and one block that keeps it all
        layers = 4 * c.d_model * c.n_layers + whole
    ends = 16 * c.d_model  # the embedding, the last norm, and the gradient of what it gives
    head = 4.0 * c.vocab_size * c.d_model / split
    if device.amp:  # autocast's copies of the weights
        head += 2.0 * _numbers(c)[1] / split
    workspace = workspace_bytes(c.vocab_size, device.amp, device.torch_device)
    return batch_size * args.seq_len * (layers + ends) + head + workspace
