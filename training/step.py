"""One optimizer step: forward, backward, accumulation, clipping, update. The only place where
gradients are made.
"""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from config import Settings
from corpus.hashing import hash_of
from parallel.context import SINGLE_PROCESS, ParallelContext
from runtime.console import progress
from runtime.device import Device, seed_dropout
from runtime.setting_fields import UserError
from training.optimizers import lr_at

_FP16_RETRIES = 30  # 2**16, the first scale, is then below 2**-14: the gradients are broken
_BAD_UPDATES_IN_A_ROW = 5
_GROWTH, _BACKOFF, _GROWTH_INTERVAL = 2.0, 0.5, 2000  # of the fp16 loss scale


@dataclass
class GradScaler:
    """What an fp16 loss is multiplied with, so that small gradients are not lost: halved when one
    overflows, doubled after 2000 updates without (Micikevicius et al. 2018, sec. 3.2).

    torch.amp.GradScaler does the same, but looks at the gradients of this process alone: ranks that
    have different parts of them would go on with different scales.
    """

    enabled: bool
    scale: float = 2.0**16
    good: int = 0  # updates since the last that overflowed

    def update(self, found_inf: bool) -> None:
        """Adjusts the scale after an update. found_inf: a gradient overflowed, so the update was
        skipped. Then the scale is halved; after 2000 updates in a row without that it is doubled.
        """
        self.good = 0 if found_inf else self.good + 1
        self.scale *= _BACKOFF if found_inf else _GROWTH if self.good == _GROWTH_INTERVAL else 1.0
        self.good %= _GROWTH_INTERVAL

    def state_dict(self) -> dict[str, float]:
        """With the names of GradScaler; empty where there is no scaling."""
        constants = {"growth_factor": _GROWTH, "backoff_factor": _BACKOFF}
        state = {"scale": self.scale, **constants, "growth_interval": _GROWTH_INTERVAL}
        return {**state, "_growth_tracker": self.good} if self.enabled else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continues that of a checkpoint."""
        self.scale, self.good = float(state["scale"]), int(state["_growth_tracker"])


@dataclass
class RunState:
    """How far a run has come. All else that a step needs follows from the settings and `step`."""

    step: int = 0  # updates finished
    tokens: int = 0  # tokens scored by them, over all ranks
    best_val_loss: float = math.inf  # nats per token
    best_step: int = -1  # at which that was measured
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])  # tells runs apart
    wandb_run_id: str = ""
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    bad_in_row: Tensor | None = None  # () float32: updates skipped since the last good one
    skipped: Tensor | None = None  # () float32: updates skipped since this process started
    stop: int = 0  # the signal that ends the run, on all ranks after the same step
    home: str = ""  # the path that a resumed checkpoint was written to
    unsaved: bool = False  # the last save failed
    pending_messages: list[str] = field(default_factory=list)  # what the log has yet to say

    def stopped_by(self, args: Settings) -> int:
        """The signal that ended the run before its last step; 0 = none did."""
        return self.stop if self.step < args.num_steps else 0

    def exit_code(self, args: Settings) -> int:
        """2 where the last step is not saved, 128 + n where signal n ended the run, else 0."""
        stopped = self.stopped_by(args)
        return 2 if self.unsaved else 128 + stopped if stopped else 0

    def update_best(self, val_loss: float) -> None:
        """Records the validation loss of this step, nats per token; a NaN is never the best."""
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step = val_loss, self.step

    @property
    def is_best(self) -> bool:
        """Whether the last evaluation was of this very step, and the best so far."""
        return self.step == self.best_step

    @classmethod
    def fresh(cls, device: Device) -> RunState:
        """The state of a run that has not begun; fp16 gets its loss scaler."""
        return cls(scaler=GradScaler(enabled=device.precision == "fp16"))


@dataclass(frozen=True)
class StepStats:
    """Statistics of one update. A GPU may still be computing the tensors: reading one waits for it,
    so read them only when they are logged.
    """

    nll_sum: Tensor  # () float32: nats over this rank's scored tokens
    n_tokens: int  # scored tokens over all ranks
    grad_norm: Tensor  # () float32: global norm before clipping
    lr: float

    def summed(self, parallel: ParallelContext) -> StepStats:
        """The statistics over all ranks; n_tokens, lr and grad_norm are global already."""
        return dataclasses.replace(self, nll_sum=parallel.sum(self.nll_sum))


@dataclass(frozen=True)
class Due:
    """What is to be done after an update. Where anything else is planned, the update is logged too,
    so that timings of steps never include it.
    """

    log: bool
    eval: bool
    sample: bool
    save: bool


def due(state: RunState, args: Settings, overdue: int = 0) -> Due:
    """What is due now that state.step updates are finished; at the last step, all of it.

    overdue: a save is, by the clock. This one, and the one of a run that stops, add nothing to the
    metrics, which are those of a run without them.
    """
    step = state.step
    last = step == args.num_steps
    evaluate = last or step % args.eval_steps == 0
    keep = args.keep_every > 0 and step % args.keep_every == 0
    planned = last or keep or step % args.save_steps == 0
    sample = last or (evaluate and bool(args.sample_prompt))
    log = evaluate or planned or step % args.log_steps == 0
    return Due(log, evaluate, sample, planned or overdue + state.stop > 0)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    args: Settings,
    state: RunState,
    device: Device,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> StepStats:
    """One update on this rank's rows of the global batch; advances `state`.

    batch (rows, T) int64, split into micro-batches of args.batch_size. parallel: the data-parallel
    context; gradients are averaged over its ranks in the last backward pass of a step. With fp16,
    an update whose gradients overflow is tried again with half the loss scale, so that neither the
    data nor the schedule moves on. Otherwise an update with a non-finite gradient is skipped on all
    ranks, weights and moments untouched. Raises UserError when that does not end.
    """
    lr = lr_at(state.step, args)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    n_tokens = args.global_batch_size * (args.seq_len - 1)  # windows are always full
    limit = args.grad_clip_norm or math.inf
    for _ in range(_FP16_RETRIES):
        nll_sum = _backward(
            model, batch, args, state, device, parallel, parallel.dp_size / n_tokens
        )
        if state.scaler.enabled:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(1.0 / state.scaler.scale)
        norm = parallel.clip(model.parameters(), limit)
        found_inf = (~norm.isfinite()).float()
        optimizer.grad_scale, optimizer.found_inf = None, found_inf  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not state.scaler.enabled:
            break
        state.scaler.update(bool(found_inf))
        if not found_inf:
            break
    else:
        raise UserError(
            f"step {state.step}: fp16 gradients overflow at any loss scale; try --bf16 or a lower "
            "--lr"
        )
    state.bad_in_row = found_inf if state.bad_in_row is None else (state.bad_in_row + 1) * found_inf
    state.skipped = found_inf if state.skipped is None else state.skipped + found_inf
    state.step += 1
    state.tokens += n_tokens
    return StepStats(nll_sum, n_tokens, norm, lr)


def _backward(
    model: nn.Module,
    batch: Tensor,
    args: Settings,
    state: RunState,
    device: Device,
    parallel: ParallelContext,
    weight: float,
) -> Tensor:
    """Adds the gradients of weight x the summed loss over the micro-batches, times the loss scale
    of fp16; returns that sum.
    """
    micro_batches = batch.split(args.batch_size)
    nll_sum = torch.zeros((), device=device.torch_device)
    told = parallel.dp_rank > 0 or state.skipped is not None  # only of the first step there
    steps = progress(micro_batches, f"step {state.step + 1}", len(micro_batches), quiet=told)
    for i, ids in enumerate(steps):
        if args.model.dropout:
            # Of the run, the step, and the place in the global batch: no rank and no resume
            # changes the masks.
            seed_dropout(
                device, hash_of(args.seed, state.step, parallel.dp_rank * len(micro_batches) + i)
            )
        ids = ids.to(device.torch_device, non_blocking=True)  # (B, T)
        with nullcontext() if i == len(micro_batches) - 1 else parallel.no_sync():
            with device.autocast():
                nll = model(ids, labels=ids, reduction="sum", return_logits=False)[1]
            # A loss that is not finite makes the gradients so, and with them those of all ranks.
            factor = torch.where(nll.detach().isfinite(), weight, math.nan)
            scale = state.scaler.scale if state.scaler.enabled else 1.0
            (nll * (factor * scale)).backward()
        nll_sum += nll.detach()
    return nll_sum


def check_finite(state: RunState, args: Settings, way_back: Callable[[int], str]) -> None:
    """Raises UserError after several skipped updates in a row. Waits for the device, so call it
    when logging. way_back(step): what to do where the weights of this step are no good.
    """
    found_inf = 0 if state.bad_in_row is None else int(state.bad_in_row)
    if found_inf >= _BAD_UPDATES_IN_A_ROW:
        first, size = state.step - found_inf, args.global_batch_size
        raise UserError(
            f"the loss or the gradients of the last {found_inf} updates were not finite: steps "
            f"{first + 1} to {state.step}, samples {first * size} to {state.step * size - 1}. All "
            f"were skipped, so the weights are those of step {first}; {way_back(first)}"
        )
