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
from parallel.context import has_sparse_gradients
from runtime.device import Device, free_memory_of
from runtime.setting_fields import UserError
from training.activation_recompute import recompute_inputs, storage_of
from training.compilation import why_not_compiled

_SURE = 2.0  # times the free memory: no estimate is that far off
_USABLE = 0.9  # part of the free memory: allocators lose some between their blocks


@dataclass(frozen=True)
class Need:
    """The memory in bytes that one process needs at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # saved for the backward pass, and all else: see `_activations`

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in dataclasses.asdict(self).items())
        return f"{self.total / 1e9:.2f} GB ({parts})"


def estimate(args: Settings, device: Device, batch_size: int | None = None) -> Need:
    """Estimates the memory that a process needs to train with these settings, in micro-batches of
    batch_size sequences (None = as in the settings).
    """
    size = batch_size or args.batch_size
    parts = args.tensor_parallel_size * (_data_world(args) if args.parallel == "fsdp" else 1)
    whole, blocks = num_numbers(args.model)
    weights = 4.0 * whole / parts
    matrices = 4.0 * blocks / parts if args.optimizer == "muon" else 0.0
    activations = _activations(args, device, size)
    gradients, moments = weights, 2 * weights - matrices
    if args.ngram_optimizer == "rmsprop":  # keeps one number of each row
        rows, width = args.model.ngram_rows, args.model.d_model
        moments -= (8.0 * width - 4.0) * rows / parts
        if has_sparse_gradients(args, device, _data_world(args)):
            used = args.global_batch_size * args.seq_len * args.model.ngram_longest
            gradients -= 4.0 * width * max(0, rows - used)
    if args.parallel == "fsdp":  # gathers one block at a time, and the embeddings
        split = args.tensor_parallel_size
        activations += 8.0 * (whole - blocks + blocks / args.model.n_layers) / split
        if args.global_batch_size > size * _data_world(args):  # unsharded until the last micro-step
            gradients = 4.0 * whole / split
    return Need(weights, gradients, moments, activations)


def _data_world(args: Settings) -> int:
    """The number of data-parallel ranks, as it follows from the sizes of the batch."""
    return max(1, args.global_batch_size // (args.batch_size * max(1, args.grad_accum_steps)))


def fit_micro_batch(
    args: Settings,
    device: Device,
    local_world: int = 1,
    agree: Callable[..., list[int]] = lambda *wishes: list(wishes),
) -> Settings:
    """With micro_batch=auto, returns the settings with the largest batch_size whose step is
    estimated to fit into memory, and as many micro-steps as give the same global batch; else the
    settings as they are. Raises UserError if not even one sequence fits, or if a given batch_size
    cannot fit.

    local_world: the number of processes that share the main memory. agree: returns the maximum of a
    number over the ranks, which must all do the same (see `Ranks.agree`).
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
    """Raises UserError, on all ranks, if on one of them the weights, gradients and optimizer state
    need more memory than is free, or the whole step more than twice as much; --allow-memory turns
    this off. Arguments are those of `fit_micro_batch`.
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
    """The free memory in bytes per process: on a CPU, the processes of a machine share it."""
    return free_memory_of(device) / (local_world if device.torch_device.type == "cpu" else 1)


@functools.cache
def num_numbers(config: GPTConfig) -> tuple[int, int]:
    """The number of parameters of the whole model, and of the matrices in its blocks."""
    with torch.device("meta"):
        model = GPTModel(config)
    matrices = (p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    return model.num_parameters(), sum(matrices)


@functools.cache
def _kept_by_block(config: GPTConfig, dtype: torch.dtype, recompute: bool) -> float:
    """The bytes per token that autograd saves in a block, measured on a block of this shape with
    inputs of two lengths: their difference per token. recompute: with `recompute_inputs`.
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
    """The bytes held between the forward and the backward pass: saved activations, the gradient of
    the head, autocast's copies of weights, and one chunk of logits.
    """
    c, split = args.model, args.tensor_parallel_size
    recompute = not c.use_activation_checkpoint and why_not_compiled(args, device) != ""
    # Under tensor parallelism a rank saves its part of what a block saves, except for the inputs of
    # the block's two halves, which every rank saves in full.
    inputs = 2 * 4 * c.d_model
    block = inputs + (_kept_by_block(c, device.dtype, recompute) - inputs) / split
    layers = block * c.n_layers
    if c.use_activation_checkpoint:  # the inputs of all blocks, and one block's activations
        layers = 4 * c.d_model * c.n_layers + block
    ends = 16 * c.d_model  # the embedding, the last norm, and the gradient of what it gives
    head = 4.0 * c.vocab_size * c.d_model / split
    if device.amp:  # autocast's copies of the weights
        head += 2.0 * num_numbers(c)[1] / split
    workspace = workspace_bytes(c.vocab_size, device.amp, device.torch_device)
    return batch_size * args.seq_len * (layers + ends) + head + workspace
