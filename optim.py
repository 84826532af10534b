"""Parameter groups, optimizers, and `lr_at`, the only learning-rate formula."""

from __future__ import annotations

import math

import torch
from torch import nn

from config import Settings


def make_optimizer(model: nn.Module, args: Settings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices and embeddings, but no bias and no
    norm.

    Fused on every device: one kernel, and the only AdamW of torch that can skip an update on the
    device (`found_inf`) without asking the host.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)


def state_shapes(
    optimizer: torch.optim.Optimizer, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """The tensors that the optimizer keeps for a parameter of this shape, all of them float32;
    nothing for one that is not known here.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    return {}


def lr_at(step: int, args: Settings) -> float:
    """Learning rate of update `step` (0 = the first): linear warm-up to lr, then the course of
    lr_scheduler to min_lr.

    cosine: Loshchilov and Hutter 2017, eq. 5. wsd: stable, then linear over the last decay_ratio
    (Hu et al. 2024).
    """
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    progress = min(1.0, (step - args.warmup_steps) / (args.num_steps - args.warmup_steps))
    if args.lr_scheduler == "none":
        share = 1.0
    elif args.lr_scheduler == "linear":
        share = 1.0 - progress
    elif args.lr_scheduler == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        decay_steps = max(1.0, args.decay_ratio * args.num_steps)
        share = min(1.0, max(0.0, (args.num_steps - step) / decay_steps))
    return args.final_lr + (args.lr - args.final_lr) * share
