"""Parameter groups, optimizers, and `lr_at`, the only learning-rate formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from config import Settings
from model import GPTModel
from parallel.context import SINGLE_PROCESS, ParallelContext, local_part
from runtime.device import has_bf16_units

_STACK_NUMBERS = 1 << 25  # elements of the matrices orthogonalized at once, to bound memory


def make_optimizer(
    model: GPTModel, args: Settings, parallel: ParallelContext = SINGLE_PROCESS
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) for all parameters, but `Muon` for the matrices in blocks
    with optimizer=muon, and `RowwiseRMSprop` for the n-gram embedding with
    ngram_optimizer=rmsprop. Weight decay applies to matrices and embeddings, but not to biases,
    norms and rows of RowwiseRMSprop. Learning rates: see `part_of_rate`. parallel: see `Muon`.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    table = {k: p for k, p in named.items() if k.startswith("ngrams.")}
    rows = table if args.ngram_optimizer == "rmsprop" else {}
    matrices = {
        name: p
        for name, p in named.items()
        if args.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2
    }
    rest = {name: p for name, p in named.items() if name not in rows and name not in matrices}
    parts: list[torch.optim.Optimizer] = [Muon(matrices, model, args, parallel)] if matrices else []
    parts += [_adamw(rest, args)] if rest else []
    if rows:
        model.ngrams.sparse = parallel.sparse_gradients  # type: ignore[union-attr]
        parts.append(RowwiseRMSprop(list(rows.values()), args))
    return parts[0] if len(parts) == 1 else Together(parts)


def part_of_rate(name: str, ndim: int, args: Settings) -> float:
    """The learning rate of a parameter as a part of lr. With lr_width, lr is meant for a model of
    that width, and what a step changes in a layer's output is kept the same at other widths (Yang
    et al. 2022, table 8): the rates of AdamW for matrices, the head included, go with 1 / width,
    those of Muon, whose updates grow with the root of the width, with 1 / sqrt(width).
    """
    muon = args.optimizer == "muon" and name.startswith("blocks.") and ndim == 2
    ratio = args.muon_lr_ratio if muon else 1.0
    if args.lr_width and ndim == 2 and name.startswith(("blocks.", "lm_head.")):
        ratio *= (args.lr_width / args.model.d_model) ** (0.5 if muon else 1.0)
    return ratio


def _adamw(named: dict[str, nn.Parameter], args: Settings) -> torch.optim.AdamW:
    """AdamW of these parameters. It is fused on every device: one kernel, and the only AdamW of
    torch that can skip an update on the device (`found_inf`) without asking the host.
    """
    alike: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in named.items():
        alike.setdefault((p.ndim >= 2, part_of_rate(name, p.ndim, args)), []).append(p)
    groups = [
        {"params": ps, "weight_decay": args.weight_decay * decays, "lr_ratio": ratio}
        for (decays, ratio), ps in sorted(alike.items(), key=lambda group: group[0], reverse=True)
    ]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    # The moments are made here and not in the first step, where they would come to lie in gaps
    # between activations and keep them apart for good: 0.6 GB of GPT-2 small's 5.0 on a CPU.
    for p in named.values():
        moments = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
        adamw.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return adamw


class Together(torch.optim.Optimizer):
    """Several optimizers, each of parameters of its own, used as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {})
        self.parts, self.param_groups = parts, groups  # for whoever sets the learning rates
        for part in parts:
            self.state.update(part.state)
            part.state = self.state  # one mapping, for whoever saves and restores it
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Runs one update. If `found_inf` is 1, weights and moments stay as they are."""
        for part in self.parts:
            part.grad_scale, part.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
            part.step()


class RowwiseRMSprop(torch.optim.Optimizer):
    """RMSprop (Tieleman and Hinton 2012) with one step size per row, of the rows in use: a row that
    has a gradient g moves by lr g / sqrt(s), where s is the running mean, over the steps in which
    it had one, of the mean square of g, and loses the part lr ngram_weight_decay of itself. Other
    rows stay as they are, and cost nothing where the gradient is sparse
    (`ParallelContext.sparse_gradients`).

    A row of a rare n-gram has a gradient in few steps. AdamW would move it on in the steps between,
    and Adagrad less and less: see docs/experiments.md.
    """

    def __init__(self, tables: list[nn.Parameter], args: Settings) -> None:
        super().__init__(tables, {"lr": args.lr, "lr_ratio": 1.0})
        self.decay, self.weight_decay = args.beta2, args.ngram_weight_decay
        for p in tables:
            self.state[p] = {"mean_square": torch.zeros_like(p[:, :1])}
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Runs one update. If `found_inf` is 1, rows and mean squares stay as they are."""
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is None:
                continue
            table, kept, grad = (local_part(x) for x in (p, self.state[p]["mean_square"], p.grad))
            rows: slice | Tensor = slice(None)
            if grad.is_sparse:
                grad = grad.coalesce()
                rows, grad = grad.indices()[0], grad.values()
            if self.found_inf is not None:
                grad = grad.where(self.found_inf == 0, 0.0)
            square, before = grad.square().mean(1, keepdim=True), kept[rows]
            used = square > 0
            after = square.lerp(before, self.decay * (before > 0))  # the first counts whole
            after = after.where(used, before)
            kept[rows] = after
            step = grad / (after.sqrt() + 1e-12)
            if self.weight_decay:
                step.addcmul_(table[rows], used.to(step.dtype), value=self.weight_decay)
            table[rows] -= group["lr"] * step


class Muon(torch.optim.Optimizer):
    """Steepest descent in the spectral norm (Jordan et al. 2024, "Muon"): a matrix moves by its
    momentum with all singular values made about 1.

    The update of a matrix (m, n) is scaled by 0.2 sqrt(max(m, n)), so that its numbers are as large
    as those of AdamW, and lr and weight_decay mean the same for both (Liu et al. 2025, sec. 2.2).
    Matrices of one shape are orthogonalized together: for small ones, calling kernels costs more
    than computing. parallel.distribute shares the work among the ranks, and gathers the matrices
    that are sharded.
    """

    def __init__(
        self,
        matrices: dict[str, nn.Parameter],
        model: GPTModel,
        args: Settings,
        parallel: ParallelContext,
    ) -> None:
        ratio, shapes = part_of_rate(next(iter(matrices)), 2, args), model.shapes
        defaults = {"lr": args.lr * ratio, "lr_ratio": ratio, "weight_decay": args.weight_decay}
        super().__init__(matrices.values(), defaults)
        self.matrices = list(matrices.values())
        # One shape and one place in the block for each stack: the place decides how it is sharded.
        places = {name: (shapes[name], name.split(".", 2)[2]) for name in matrices}
        in_order = sorted(matrices, key=lambda name: places[name])  # stable: the same each run
        self.stacks = [
            [(name, matrices[name]) for name in alike]
            for (shape, _), group in groupby(in_order, key=lambda name: places[name])
            for alike in _pieces(list(group), most_alike(shape, parallel.world_size))
        ]
        self.update_scales = [0.2 * math.sqrt(max(shapes[stack[0][0]])) for stack in self.stacks]
        self.momentum, self.distribute = args.muon_momentum, parallel.distribute
        # Uses bfloat16 only where other products do: --precision fp32 holds for all of them.
        device = self.matrices[0].device
        half = args.precision != "fp32" and (args.precision != "auto" or device.type == "cuda")
        fast = half and has_bf16_units(device)
        self.orthogonalize = partial(orthogonalize, dtype=torch.bfloat16 if fast else torch.float32)
        for p in self.matrices:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Runs one update. If `found_inf` is 1, weights and moments stay as they are."""
        group = self.param_groups[0]
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        for stack, size in zip(self.stacks, self.update_scales, strict=True):
            ps = [local_part(p) for _, p in stack]
            moments = [local_part(self.state[p]["momentum_buffer"]) for _, p in stack]
            grads = [local_part(p.grad) for _, p in stack if p.grad is not None]
            if self.found_inf is not None:
                grads = [
                    g.where(self.found_inf == 0, m) for g, m in zip(grads, moments, strict=True)
                ]
            torch._foreach_lerp_(moments, grads, 1 - self.momentum)
            ahead = torch.stack(torch._foreach_lerp(grads, moments, self.momentum))  # Nesterov's
            updates = self.distribute(self.orthogonalize, stack[0][0], ahead)
            go = 1.0 if self.found_inf is None else 1.0 - self.found_inf
            for p, update in zip(ps, updates, strict=True):
                p.mul_(1 - decay * go).sub_(update * (size * lr * go))


def most_alike(shape: tuple[int, ...], world_size: int) -> int:
    """The number of matrices of this shape to orthogonalize together, on world_size ranks that do a
    part each: at least one for each rank, or some would have nothing to do.
    """
    return max(1, _STACK_NUMBERS // math.prod(shape)) * world_size


def _pieces(names: list[str], most: int) -> Iterator[list[str]]:
    yield from (names[i : i + most] for i in range(0, len(names), most))


def orthogonalize(stack: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximates the nearest (semi-)orthogonal matrix of each: (N, m, n) float32 to (N, m, n) of
    dtype. Singular values above 0.05 of the Frobenius norm become 0.7 to 1.2 (Jordan et al. 2024).

    Runs five steps of a Newton-Schulz iteration in dtype, with the coefficients of that paper.
    """
    x = stack.mT if stack.shape[1] > stack.shape[2] else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x.mT if stack.shape[1] > stack.shape[2] else x


def state_shapes(
    optimizer: torch.optim.Optimizer, p: nn.Parameter, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """The optimizer state of a parameter, as names and shapes of its float32 tensors; empty for an
    optimizer that `make_optimizer` does not make.

    shape: that of the parameter when it is not split over ranks. The count of updates, "step", is a
    scalar.
    """
    parts = optimizer.parts if isinstance(optimizer, Together) else [optimizer]
    for part in parts:
        if any(p is own for group in part.param_groups for own in group["params"]):
            if isinstance(part, Muon):
                return {"momentum_buffer": shape}
            if isinstance(part, RowwiseRMSprop):
                return {"mean_square": (shape[0], 1)}
            if isinstance(part, torch.optim.AdamW):
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


def note_on_rising_rate(before: Settings, now: Settings, step: int) -> str:
    """A line that warns if a resumed run with more num_steps continues after update `step` with a
    rate over 1.5 times the last; else "". before: settings of the checkpoint; now: of this run.
    """
    if now.num_steps <= before.num_steps or not now.warmup_steps < step < now.num_steps:
        return ""
    last, first = lr_at(step - 1, before), lr_at(step, now)
    if first <= 1.5 * last:
        return ""
    return (
        f"the learning rate was {last:.3g} in step {step} and is {first:.3g} in the next: "
        f"{now.lr_scheduler} now ends at step {now.num_steps}, and a lower --lr than {now.lr:g} "
        "lowers the jump. To plan for more steps, start a run with --lr-scheduler wsd and "
        "--keep-every N, and resume a copy of its checkpoint from before the decay"
    )
