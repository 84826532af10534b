"""The log of a run: terminal, text log, metrics (JSONL), loss picture, Weights & Biases and
TensorBoard.

Metrics are made here and nowhere else. The metrics file is the truth: all else shows numbers of its
records.
"""

from __future__ import annotations

import math
import shlex
import signal
import time
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from config import Settings
from corpus.token_dataset import TokenDataset
from model import GPTModel
from parallel.process_group import Ranks
from reporting.log_lines import (
    evaluation_line,
    header,
    next_commands,
    notes_at_start,
    short_evaluation_line,
    time_kept,
)
from reporting.log_output import Output
from reporting.loss_spikes import SpikeDetector
from reporting.metrics_file import MetricsFile, run_as_known
from reporting.plots import draw_losses
from reporting.profiler import Profile
from reporting.records import record_of_resume, record_of_run, tracked_values
from reporting.reference import read_reference
from reporting.report_page import write_report
from reporting.run_curves import RunCurves, read_run
from reporting.step_clock import StepClock
from reporting.tensorboard_log import TensorBoard
from reporting.wandb_log import WandB
from runtime.console import duration
from runtime.device import Device
from runtime.setting_fields import UserError
from runtime.start_time import seconds_since_start
from settings.paths import log_base
from training.evaluation import EvalResult
from training.step import RunState, StepStats
from training.text_generation import fitting_prompt


class RunLog:
    """Reports what happens in a run. Only rank 0 has one; the others have a `SilentLog`.

    Timings cover fetching and computing of steps, never evaluation, sampling or saving: the clock
    runs from the end of one report to the next train(), and anything else is reported right after a
    train() (see `training.step.due`).
    """

    def __init__(
        self,
        script: str,
        args: Settings,
        state: RunState,
        device: Device,
        model: GPTModel,
        train: TokenDataset,
        val: TokenDataset,
        world: int = 1,
    ) -> None:
        """Opens all files and logs what will run. Raises UserError if a file cannot be written.
        script: "train_minimal" or "train_ddp". world: the number of processes.
        """
        self.script, self.args, self.device, self.world = script, args, device, world
        self.prompt = shlex.quote(fitting_prompt(val)) if val.tokenizer else ""
        self.epoch_windows = len(train)
        self.last_update: dict[str, Any] = {}  # values of the last train() record
        self.skips_reported = 0
        self.reference = read_reference(args.check_reference, args)
        base = log_base(args)
        if base.name == "eval":
            raise UserError(
                f"{args.checkpoint_path}: the logs of this run would be those of eval.py; give "
                "another --checkpoint-path"
            )
        try:
            self.metrics = MetricsFile(args, state)
            self.output = Output(Path(f"{base}.log"), state.step, args.num_steps)
        except OSError as reason:
            raise UserError(
                f"cannot write {reason.filename}: {reason.strerror}; try --log-dir"
            ) from reason
        kept = self.metrics.kept
        self.spikes = SpikeDetector(r["train_loss"] for r in kept if "train_loss" in r)
        elapsed = max((r["time"].get("elapsed", 0.0) for r in kept if "time" in r), default=0.0)
        self.clock = StepClock(args, state, device, world, elapsed)
        self.trackers: list[WandB | TensorBoard] = []
        self._say_pending(state)
        for line in header(args, device, model, train, val, world):
            self.output.line(line)
        run = record_of_run(args, state, device, model, train, val, world)
        if self.metrics.continued:
            self._write(record_of_resume(state, run, run_as_known(self.metrics.kept)))
        else:
            self._write({"event": "run", **run})
        notes = notes_at_start(args, state.step, val, device)
        for line in [*notes, *self.reference.notes(run)]:
            self.output.line(line)
        if args.use_wandb:
            self.trackers.append(WandB(args, state, run, self.output.line))
        if args.use_tensorboard:
            self.trackers.append(TensorBoard(base, state, run, self.output.line))
        for record in self.metrics.kept:  # a tracker takes what a killed run did not give it
            self._track(record)
        self.profile = Profile(base, device, self.output.line) if args.use_profiler else None
        self.line_time = time.perf_counter()
        self.clock.restart()

    def _write(self, record: dict[str, Any]) -> None:
        self.output.safely("the metrics file", lambda: self.metrics.write(record))
        self._track(record)

    def _track(self, record: dict[str, Any]) -> None:
        values = tracked_values(record, self.device, self.world)
        for tracker in self.trackers:
            if values:
                tracker.log(values, record["step"])
            if record["event"] == "sample":
                tracker.text("sample", record["text"], record["step"])

    def _say_pending(self, state: RunState) -> None:
        while state.pending_messages:
            self.output.line(state.pending_messages.pop(0))
        while state.pending_warnings:
            self._warn(state, state.pending_warnings.pop(0))

    def _warn(self, state: RunState, text: str) -> None:
        """Logs a line about something that went wrong, and records it."""
        self.output.line(text)
        self._write({"event": "warning", "step": state.step, "text": text})

    def changed(self, args: Settings, state: RunState) -> None:
        """Records that the run has another number of steps from now on."""
        self.args = self.clock.args = args
        self.output.bar.total = args.num_steps
        changed = {"num_steps": args.num_steps, "open_end": args.open_end}
        self._write({"event": "settings", "step": state.step, "settings": changed})

    def after_step(self, state: RunState) -> None:
        """Called after each update: logs the lines that are left in state.pending_messages, such as
        that of a finished background save.
        """
        self._say_pending(state)
        if self.profile:  # it has to know where an update ends
            self.profile.step()

    @record_function("log")
    def train(self, state: RunState, stats: StepStats, waited: float) -> None:
        """Records the update just finished. stats: already summed over ranks; waited: the seconds
        for which this process has waited for data so far. Waits for the GPU.
        """
        loss, norm = float(stats.nll_sum) / stats.n_tokens, float(stats.grad_norm)  # waits here
        timing = self.clock.after_updates(state.step, stats.n_tokens, waited)
        values = {"train_loss": loss, "lr": stats.lr, "grad_norm": norm}
        self.last_update = {**values, **timing}
        self._write(
            {"event": "train", "step": state.step, "tokens": state.tokens, **values, "time": timing}
        )
        if spike := self.spikes.found(loss):
            guess = math.log(self.args.model.vocab_size)
            self._warn(
                state,
                f"step {state.step}: loss spike, {spike} and guessing has {guess:.4f}; grad norm "
                f"{norm:.4f}",
            )
        self._say_skipped(state)
        self.output.progress(state.step, f"train loss {loss:.4f}")
        if state.step % self.args.eval_steps and state.step < self.args.num_steps:
            self.output.short_line(
                f"step {state.step} / {self.args.num_steps} | train loss: {loss:.4f} | "
                f"{duration(self.clock.seconds_left(state.step) or 0.0)} to go"
            )
        self.clock.restart()

    def _say_skipped(self, state: RunState) -> None:
        skipped = 0 if state.skipped is None else int(state.skipped)
        if skipped > self.skips_reported:
            new, self.skips_reported = skipped - self.skips_reported, skipped
            self._warn(
                state, f"step {state.step}: {new} updates skipped: loss or gradients not finite"
            )

    def eval(self, state: RunState, result: EvalResult) -> None:
        """Records an evaluation and logs the one line that says how the run stands."""
        names = ("loss", "loss_se", "ppl", "bpb", "tokens")
        record = {"event": "eval", "step": state.step, "tokens": state.tokens}
        record |= {f"val_{name}": getattr(result, name) for name in names}
        self._write(record | {"time": {"elapsed": self.clock.elapsed()}})
        if told := self.reference.told(state.step, result.loss):
            self._warn(state, told)
        args, now = self.args, time.perf_counter()
        epoch = 1 + max(state.step * args.global_batch_size - 1, 0) // self.epoch_windows
        seconds, self.line_time = now - self.line_time, now
        left = self.clock.seconds_left(state.step)
        self.output.line(
            evaluation_line(
                args,
                state,
                result,
                self.last_update,
                epoch,
                seconds,
                left,
                self.world,
                self.device.amp,
            ),
            short_evaluation_line(args, state, result, self.last_update, left),
        )
        self.clock.restart()

    def sample(self, state: RunState, text: str | None) -> None:
        """Logs and records a text that the model wrote; None = none, for lack of a tokenizer."""
        if text is not None:
            self.output.line("sample: " + text.replace("\n", "\n    "))
            self._write({"event": "sample", "step": state.step, "text": text})
            self.clock.restart()

    def saved(self, seconds: float) -> None:
        """Called after a save: leaves the seconds that it took out of the timings, and fsyncs the
        metrics, so that they are as safe as the checkpoint.
        """
        self.clock.leave_out(seconds)
        self.output.safely("the metrics file", self.metrics.sync)

    def finish(self, state: RunState) -> None:
        """Draws the picture, writes the report, logs the commands to go on with, and closes all."""
        output, path = self.output, self.metrics.path
        output.bar.close()
        self._say_pending(state)
        stopped = state.stopped_by(self.args)
        if stopped:
            output.line(f"{signal.Signals(stopped).name}: stopped at step {state.step}")
        picture, page = path.with_suffix(".png"), path.with_suffix(".html")
        runs: list[RunCurves] = []  # this one, unless its metrics cannot be read
        output.safely("the report", lambda: runs.append(read_run(path)))
        output.safely("the loss picture", lambda: draw_losses([runs[0]], picture))
        output.safely("the report", lambda: write_report(runs, page))
        output.line(f"wrote {path.with_suffix('.log')}, {path}, {picture} and {page}")
        if self.args.check_reference:
            nothing = (False, "not compared with the reference curve, for lack of metrics")
            fine, verdict = self.reference.verdict(runs[0]) if runs else nothing
            state.left_reference = not fine
            output.line(verdict)
        commands = next_commands(self.script, self.args, state, self.world, self.prompt)
        for line in [*time_kept(self.args, state, seconds_since_start()), *commands]:
            output.line(line)
        for tracker in self.trackers:
            if "the loss picture" not in output.broken:
                tracker.picture("losses", picture, state.step)
            tracker.finish()
        if self.profile:
            self.profile.stop()
        output.safely("a log file", self.metrics.close)
        output.close()


class SilentLog(RunLog):
    """The log of all ranks but rank 0: it writes nothing, and drops messages for the log."""

    def __init__(self) -> None:
        pass

    def changed(self, args: Settings, state: RunState) -> None:
        pass

    def after_step(self, state: RunState) -> None:
        state.pending_messages.clear()
        state.pending_warnings.clear()

    def train(self, state: RunState, stats: StepStats, waited: float) -> None:
        pass

    def eval(self, state: RunState, result: EvalResult) -> None:
        pass

    def sample(self, state: RunState, text: str | None) -> None:
        pass

    def saved(self, seconds: float) -> None:
        pass

    def finish(self, state: RunState) -> None:
        pass


def open_log(
    ranks: Ranks,
    script: str,
    args: Settings,
    state: RunState,
    device: Device,
    model: GPTModel,
    train: TokenDataset,
    val: TokenDataset,
) -> RunLog:
    """The log of a run of many processes: a RunLog on rank 0, a SilentLog on the other ranks.
    Arguments and errors are those of `RunLog`.
    """
    if ranks.rank:
        return SilentLog()
    return RunLog(script, args, state, device, model, train, val, ranks.world)
