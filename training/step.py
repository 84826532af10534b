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
from torch.profiler import record_function

from config import Settings
from corpus.hashing import hash_of
from parallel.context import SINGLE_PROCESS, ParallelContext
from runtime.console import progress
from runtime.device import Device, seed_dropout
from runtime.setting_fields import UserError
from training.optimizers import lr_at

_FP16_RETRIES = 30  # halve the first scale, 2**16, to 2**-14: then the gradients are broken
_BAD_UPDATES_IN_A_ROW = 5
_GROWTH, _BACKOFF, _GROWTH_INTERVAL = 2.0, 0.5, 2000  # of the fp16 loss scale


@dataclass
class GradScaler:
    """The loss scale of fp16: the loss is multiplied with it, so that small gradients do not become
    0. It is halved when a gradient overflows, and doubled after 2000 updates in a row without that
    (Micikevicius et al. 2018, sec. 3.2).

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
        """The state, under the names of torch.amp.GradScaler; empty if the loss is not scaled."""
        constants = {"growth_factor": _GROWTH, "backoff_factor": _BACKOFF}
        state = {"scale": self.scale, **constants, "growth_interval": _GROWTH_INTERVAL}
        return {**state, "_growth_tracker": self.good} if self.enabled else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores what `state_dict` returned."""
        self.scale, self.good = float(state["scale"]), int(state["_growth_tracker"])


@dataclass
class RunState:
    """How far a run has come. All else that a step needs follows from the settings and `step`."""

    step: int = 0  # updates finished
    tokens: int = 0  # tokens scored by them, over all ranks
    best_val_loss: float = math.inf  # nats per token
    best_step: int = -1  # the step with best_val_loss
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])  # tells runs apart
    wandb_run_id: str = ""
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    bad_in_row: Tensor | None = None  # () float32: updates skipped since the last good one
    skipped: Tensor | None = None  # () float32: updates skipped since this process started
    stop: int = 0  # the signal that ends the run, on all ranks after the same step
    home: str = ""  # the path that a resumed checkpoint was written to
    unsaved: bool = False  # whether the last save failed
    left_reference: bool = False  # whether the losses left the curve of check_reference
    pending_messages: list[str] = field(default_factory=list)  # lines for the log, not logged yet
    pending_warnings: list[str] = field(default_factory=list)  # likewise, of what went wrong

    def stopped_by(self, args: Settings) -> int:
        """The signal that ended the run before its last step; 0 = none did."""
        return self.stop if self.step < args.num_steps else 0

    def exit_code(self, args: Settings) -> int:
        """128 + n where signal n ended the run; 2 where the last step is not saved, and where a run
        left its reference curve; else 0.
        """
        stopped = self.stopped_by(args)
        if stopped and not self.unsaved:
            return 128 + stopped
        return 2 if self.unsaved or self.left_reference else 0

    def update_best(self, val_loss: float) -> None:
        """Records the validation loss of this step, nats per token; a NaN is never the best."""
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step = val_loss, self.step

    @property
    def is_best(self) -> bool:
        """Whether this step was evaluated, and is the best so far."""
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

    @record_function("agree")
    def summed(self, parallel: ParallelContext) -> StepStats:
        """The statistics over all ranks; n_tokens, lr and grad_norm are global already."""
        return dataclasses.replace(self, nll_sum=parallel.sum(self.nll_sum))


@dataclass(frozen=True)
class Due:
    """What to do after an update. If anything else is planned, the update is logged too, so that
    timings of steps never include it.
    """

    log: bool
    eval: bool
    sample: bool
    save: bool


def due(state: RunState, args: Settings, overdue: int = 0) -> Due:
    """Decides what to do now that state.step updates are finished; at the last step, all of it.

    overdue: 1 if a save is due by the clock. That save, and the one of a run that stops, adds
    nothing to the metrics: they are the same as without it.
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
    data nor the schedule moves on; UserError after 30 tries. In another precision, an update with a
    non-finite gradient is skipped on all ranks, weights and moments untouched.
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
        with record_function("optimizer"):
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
    """Runs the forward and backward passes of all micro-batches. Their gradients add up to those of
    weight x the summed loss x the loss scale of fp16. Returns the summed loss, () float32 nats.
    """
    micro_batches = batch.split(args.batch_size)
    nll_sum = torch.zeros((), device=device.torch_device)
    told = parallel.dp_rank > 0 or state.skipped is not None  # progress is shown for one step only
    steps = progress(micro_batches, f"step {state.step + 1}", len(micro_batches), quiet=told)
    for i, ids in enumerate(steps):
        if args.model.drops:
            # The seed depends on the run, the step and the place in the global batch, so that
            # neither the number of ranks nor a resume changes the masks.
            seed_dropout(
                device, hash_of(args.seed, state.step, parallel.dp_rank * len(micro_batches) + i)
            )
        ids = ids.to(device.torch_device, non_blocking=True)  # (B, T)
        with nullcontext() if i == len(micro_batches) - 1 else parallel.no_sync():
            with record_function("forward"), device.autocast():
                nll = model(ids, labels=ids, reduction="sum", return_logits=False)[1]
            with record_function("backward"):
                # A non-finite loss makes the gradients NaN, and with them those of all ranks.
                factor = torch.where(nll.detach().isfinite(), weight, math.nan)
                scale = state.scaler.scale if state.scaler.enabled else 1.0
                (nll * (factor * scale)).backward()
        nll_sum += nll.detach()
    return nll_sum


def check_finite(state: RunState, args: Settings, way_back: Callable[[int], str]) -> None:
    """Raises UserError after five skipped updates in a row. Waits for the device, so call it when
    logging. way_back(step): the advice to give if the weights after this step are no good.
    """
    found_inf = 0 if state.bad_in_row is None else int(state.bad_in_row)
    if found_inf >= _BAD_UPDATES_IN_A_ROW:
        first, size = state.step - found_inf, args.global_batch_size
        raise UserError(
            f"the loss or the gradients of the last {found_inf} updates were not finite: steps "
            f"{first + 1} to {state.step}, samples {first * size} to {state.step * size - 1}. All "
            f"were skipped, so the weights are those of step {first}; {way_back(first)}"
        )
