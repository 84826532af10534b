"""When a run saves, in which files, and who may use them. What a file holds is in checkpoint.py.

Of a run at `name.pt`: the latest state there, the one before as `name.previous.pt`, the one with
the best validation loss as `name.best.pt`, and with --keep-every `name.step000500.pt` and so on.
Names of the same step are hard links to one file, where the file system has them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import build_checkpoint, load_checkpoint
from checkpointing.file_format import Unreadable
from checkpointing.memory_copy import copied, copy_bytes
from checkpointing.reading import latest_valid, open_checkpoint
from checkpointing.writing import add_names, check_space, lock_path, write_checkpoint
from config import Settings
from model import GPTModel
from parallel.context import SINGLE_PROCESS, ParallelContext
from parallel.hang_guard import may_take_long
from parallel.process_group import Ranks
from runtime.device import Device, environment, free_memory
from runtime.files import target_of
from runtime.setting_fields import UserError
from settings.paths import archive_existing, free_number, log_base, run_files, variant_path
from training.step import RunState


@dataclass(frozen=True)
class _Step:
    """The content of the checkpoint of step `number`, and the labels that it also gets ("best")."""

    content: dict[str, Any]
    number: int
    labels: list[str]


class CheckpointManager:
    """Saves and loads the checkpoints of one run. Rank 0 writes; all ranks load, and under FSDP and
    tensor parallelism the others send their parts to rank 0. Messages for the log are left in
    `state.pending_messages`.
    """

    def __init__(
        self,
        args: Settings,
        model: GPTModel,
        optimizer: torch.optim.Optimizer,
        state: RunState,
        data: dict[str, Any],
        device: Device,
        ranks: Ranks | None = None,
        parallel: ParallelContext = SINGLE_PROCESS,
    ) -> None:
        """Takes the lock on the checkpoint path, which is kept until the process ends. Raises
        UserError if it cannot save there. data: what the run trains and validates on; ranks: all
        ranks of the run; parallel: how the model is spread over them.
        """
        self.args, self.model, self.optimizer, self.state = args, model, optimizer, state
        self.data, self.device = data, device
        self.ranks = ranks or Ranks()
        self.rank, self.sharded_state = self.ranks.rank, parallel.sharded_state
        self.environment = environment(device, self.ranks.world)
        self.path = Path(args.checkpoint_path)
        self.saved_at = time.monotonic()
        self.writing: threading.Thread | None = None
        self.wrong: list[str] = []  # errors of the files newer than the resumed one
        self.latest = -1  # step of the file at the path, as far as this run knows it
        self.copies: dict[str, Any] = {}  # CPU buffers for all tensors, reused by each save
        self.best: _Step | None = None  # the best step so far, not written yet
        self.best_copies: dict[str, Any] = {}  # CPU buffers for `best`
        if self.rank == 0:
            self.lock = lock_path(self.path)
            self.number = free_number(self.path, log_base(args))  # for files of earlier runs
            try:
                check_space(target_of(self.path).parent, 12 * model.num_parameters())
            except OSError as reason:
                raise UserError(
                    f"cannot save to {self.path}: {reason}; free space or change --checkpoint-path"
                ) from reason

    def load(self) -> None:
        """Restores the newest intact checkpoint. Raises UserError if there is none, or if it does
        not fit this run.
        """
        state, steps = self.state, self.args.num_steps
        with may_take_long():
            _, file, self.wrong = latest_valid(self.path, self._load)
        self.latest = -1 if self.wrong else state.step
        state.pending_messages.append(f"resumed {file} at step {state.step}")
        if self.wrong:
            state.pending_messages.append(f"not the latest, since {'; '.join(self.wrong)}")
        if state.step > steps:
            raise UserError(f"{file} is at step {state.step} already, beyond --num-steps {steps}")
        if target_of(state.home) != target_of(self.path) and _has_run(state.home, state.run_id):
            # This is a copy, whose original may go on: with one run id they would share metrics.
            state.pending_messages.append(
                f"a branch of run {state.run_id}, whose checkpoint is {state.home}"
            )
            known = f"{state.run_id} {target_of(self.path)}"  # so that all ranks have the same
            state.run_id = hashlib.sha256(known.encode()).hexdigest()[:12]
            state.wandb_run_id = ""
        self.ranks.must_agree({"run to resume": state.run_id, "step to resume": state.step})

    def changed(self, args: Settings, state: RunState) -> None:
        """Saves these settings from now on."""
        self.args = args

    def begin(self) -> None:
        """Takes over the checkpoint path: files of an earlier run, or a damaged file, that are
        there get other names.
        """
        if self.rank == 0 and not self.args.resume:
            self.state.pending_messages += archive_existing(run_files(self.path), self.number)
        elif self.rank == 0 and self.wrong:  # or the next save would make it the previous one
            self.state.pending_messages += archive_existing([target_of(self.path)], self.number)
        elif self.rank == 0 and self.state.step:  # a kill may have come before its other names
            add_names(target_of(self.path), *self._labels())
        self.ranks.barrier()

    def _load(self, file: Path) -> None:
        args, state = self.args, self.state
        load_checkpoint(
            file, self.model, self.optimizer, state, self.data, args, self.environment,
            self.sharded_state.part if self.sharded_state else None,
        )  # fmt: skip

    @property
    def overdue(self) -> bool:
        """Whether --save-minutes have passed since the last save; always False on ranks but 0."""
        seconds = 60 * self.args.save_minutes
        return self.rank == 0 and 0 < seconds <= time.monotonic() - self.saved_at

    def save(self) -> float:
        """Saves the current step; all ranks call it together. Returns the seconds for which the run
        had to wait. A save that fails is noted in `state.unsaved`, and the run goes on.
        """
        return self._save(self._write_this_step)

    def keep_best(self) -> float:
        """Keeps the current step as the best so far, in memory if there is room for it; the next
        save writes it as name.best.pt, before its own step. So a run that gets better with every
        evaluation writes at most two checkpoints for each save that is due, and a killed run loses
        nothing: it goes on from its last save, and evaluates again. All ranks call it together;
        returns seconds, as `save` does.
        """
        return self._save(self._hold_this_step)

    def _save(self, use: Callable[[_Step], None]) -> float:
        """Builds the content of a checkpoint of the current step, and has rank 0 call `use` with
        it. Returns the seconds that this took.
        """
        start = time.perf_counter()
        self.finish()
        if self.sharded_state is not None:
            self.sharded_state.reshard()
        if self.rank == 0 or self.sharded_state is not None:
            content = build_checkpoint(
                self.model, self.optimizer, self.state, self.args, self.data, self.environment,
                self._gather,
            )  # fmt: skip
            if self.rank == 0:
                with may_take_long():
                    use(_Step(content, self.state.step, self._labels()))
        seconds = time.perf_counter() - start
        self.ranks.barrier()
        return seconds

    def _write_this_step(self, step: _Step) -> None:
        self.saved_at = time.monotonic()
        before = [self.best] if self.best and not self.state.is_best else []
        self.best = None
        if copy := self._copied(step, self.copies):
            thread = threading.Thread(target=self._write, args=([*before, copy],))
            try:
                thread.start()
                self.writing = thread
                return
            except RuntimeError as reason:
                self.state.pending_messages.append(f"not saved in the background ({reason})")
        self._write([*before, step])

    def _hold_this_step(self, step: _Step) -> None:
        self.best = self._copied(step, self.best_copies)
        if self.best is None:
            self._write_this_step(step)

    def _copied(self, step: _Step, copies: dict[str, Any]) -> _Step | None:
        """Copies the tensors of a step to `copies`, from which a thread can write them while
        training goes on. Returns None if --checkpoint-async is off, or there is not enough memory.
        """
        cuda = self.device.torch_device.type == "cuda"
        if self.args.checkpoint_async == "off":
            return None
        needed = 2 * copy_bytes(step.content, pinned=cuda)
        if self.args.checkpoint_async == "auto" and not copies and needed >= free_memory():
            return None
        if self.sharded_state is not None:  # `_gather` has made a copy
            return step
        try:
            content = copied(step.content, copies, pinned=cuda)
        except (MemoryError, RuntimeError) as reason:
            copies.clear()
            self.state.pending_messages.append(f"no memory to save in the background ({reason})")
            return None
        if cuda:
            torch.cuda.synchronize(self.device.torch_device)
        return dataclasses.replace(step, content=content)

    def _labels(self) -> list[str]:
        """The labels that the current step gets besides its path: "best", "step000500"."""
        step, keep = self.state.step, self.args.keep_every
        labels = ["best"] if self.state.is_best else []
        return labels + ([f"step{step:06d}"] if keep and step % keep == 0 else [])

    def _gather(self, name: str, tensor: Tensor) -> Tensor:
        """The unsharded tensor. If ranks hold parts, it is a copy on the CPU of rank 0, and empty
        on the others.
        """
        if self.sharded_state is None:
            return tensor
        whole = self.sharded_state.gather(name, tensor)
        return torch.empty(0) if self.rank else whole.to("cpu", copy=whole is tensor)

    def _write(self, steps: list[_Step]) -> None:
        for step in steps:
            # While updates are skipped, the weights stay the same. The previous file has earlier
            # ones and is kept then: nobody knows yet whether the present weights are any good.
            again = self.latest >= step.number - step.content["bad_in_row"]
            try:
                write_checkpoint(self.path, step.content, *step.labels, keep_previous=again)
            except Exception as reason:  # in a thread of its own it would else be lost
                self.state.unsaved = True
                self.state.pending_warnings.append(
                    f"step {step.number} was not saved: {reason}; the run goes on"
                )
            else:
                self.state.unsaved, self.latest = False, step.number
                names = [variant_path(target_of(self.path), label).name for label in step.labels]
                self.state.pending_messages.append(
                    f"saved {' and '.join([str(self.path), *names])} at step {step.number}"
                )

    def way_back(self, step: int) -> str:
        """The advice in an error message if the weights of this step are no good. If there is an
        earlier checkpoint, --resume continues that one from now on: later ones are renamed. All
        ranks call it together.
        """
        self.finish()
        (earlier,) = self.ranks.agree(0 if self.rank else 1 + self._go_back(step))
        exact = "" if self.device.precision == "fp32" else ", or with --precision fp32"
        if not earlier:
            return f"no checkpoint has earlier ones; start anew with a lower --lr{exact}"
        return f"--resume continues step {earlier - 1} of {self.path}; give it a lower --lr{exact}"

    def _go_back(self, step: int) -> int:
        """Has --resume find the latest checkpoint before `step`; returns its step, or -1."""
        target = target_of(self.path)
        if self.best and self.best.number < step:
            self._write([self.best])
        for file in (target, variant_path(target, "previous")):
            try:
                with open_checkpoint(file) as contents:
                    found: int = contents.tree["step"]
            except Unreadable:
                continue
            if found < step:
                if file != target:
                    archive_existing([target], free_number(target, log_base(self.args)))
                return found
        return -1

    def finish(self) -> None:
        """Waits, on all ranks, until the last save is on disk or failed (see `state.unsaved`)."""
        if self.writing is not None:
            with may_take_long():
                self.writing.join()
            self.writing = None
        self.ranks.barrier()


def _has_run(path: str, run_id: str) -> bool:
    """Whether the checkpoint at `path` is of this run; True if it is there but cannot be read."""
    if not os.path.exists(path):
        return False
    try:
        with open_checkpoint(path) as contents:
            return bool(contents.tree["run_id"] == run_id)
    except Unreadable:
        return True
