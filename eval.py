"""Evaluates checkpoints, alone or under torchrun: `python eval.py --checkpoint-path FILE...`"""

from __future__ import annotations

import settings.before_torch  # noqa: F401  # before torch loads

import dataclasses
import hashlib
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint import TrainedModel, model_in
from checkpointing.file_format import Unreadable
from checkpointing.find import (
    CheckpointFile,
    Stamp,
    Watch,
    choose_checkpoints,
    left_out,
    stamp_of,
)
from checkpointing.reading import open_checkpoint
from checkpointing.validation import validation_of
from config import Settings
from corpus.token_dataset import TokenDataset
from parallel.process_group import DataParallel, Ranks, process_group
from parallel.rendezvous import is_first_reporter
from reporting.evaluation_table import Evaluation
from reporting.evaluations import EvalReport
from reporting.wandb_log import log_evaluations
from runtime.console import duration, say
from runtime.device import Device, pick_device, tune
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import UserError
from runtime.signals import StopSignals
from settings.eval_and_generate import EvalSettings
from training.evaluation import evaluate
from training.tasks import TaskModel, score_tasks

_LOOK_SECONDS = 2.0  # between two looks for new checkpoints


@dataclass(frozen=True)
class _Opened:
    """A model out of a checkpoint file. state: the same for the same weights of a run at a step,
    whatever the file is called.
    """

    run: TrainedModel
    run_id: str
    wandb_run_id: str
    step: int
    stamp: Stamp
    state: str


def _open(path: str, tokenizer_name: str) -> _Opened:
    """Reads one file, which stays the same one if another takes its name meanwhile."""
    with open_checkpoint(path) as contents:
        run = model_in(contents, tokenizer_name)
        ids, step = (contents.tree["run_id"], contents.tree["wandb_run_id"]), contents.tree["step"]
        stamp = stamp_of(os.fstat(contents.file.fileno()))
    weights = hashlib.sha256()
    for tensor in run.model.state_dict().values():
        weights.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return _Opened(run, *ids, step, stamp, f"{ids[0]} {step} {weights.hexdigest()[:16]}")


class Evaluator:
    """Evaluates checkpoints on all ranks together, each state once, and keeps the results."""

    def __init__(self, args: EvalSettings, ranks: Ranks) -> None:
        self.args, self.ranks, self.parallel = args, ranks, DataParallel(ranks)
        self.found: dict[str, Evaluation] = {}  # by state
        self.wandb: dict[str, tuple[Settings, str]] = {}  # settings and WandB run of each run id
        self.opened: tuple[Settings, dict[str, Any], TokenDataset] | None = None

    @property
    def evaluations(self) -> list[Evaluation]:
        """The results so far, in the order in which they were found."""
        return list(self.found.values())

    def open(self, path: str) -> _Opened:
        """Reads a checkpoint on each rank. Raises UserError on all of them."""
        file = self.ranks.each(_open, path, self.args.tokenizer_name)
        self.ranks.must_agree({f"the state in {path}": file.state})
        return file

    def evaluate(self, file: _Opened, listed: CheckpointFile) -> Evaluation | None:
        """Evaluates what is in a file that was opened as `listed`. None if that was done before:
        then its names are only added to the result. Raises UserError.
        """
        args, settings = self.args, file.run.settings
        same = file.stamp == listed.stamp  # else another one has taken its name since
        names = listed.names if same else (listed.path,)
        if known := self.found.get(file.state):
            also = dict.fromkeys((*known.also, *names))
            also.pop(known.checkpoint, None)
            self.found[file.state] = dataclasses.replace(known, also=tuple(also))
            return None
        precision = "fp32" if args.no_amp else settings.precision
        device = pick_device(args.device, precision, self.ranks.local_rank)
        tune(device)
        file.run.model.to(device.torch_device)
        size = args.batch_size or settings.batch_size
        found = Evaluation(names[0], file.run_id, file.step, None, also=names[1:])
        if not args.tasks_only:
            found = self._with_loss(found, file.run, device, size)
        if args.tasks:
            found = self._with_tasks(found, file.run, device, size)
        self.wandb[file.run_id] = settings, file.wandb_run_id
        self.found[file.state] = found
        return found

    def _with_loss(
        self, found: Evaluation, run: TrainedModel, device: Device, batch_size: int
    ) -> Evaluation:
        """Adds the loss on validation data. Raises UserError."""
        val, start = self._validation(run, found.checkpoint), time.perf_counter()
        result = evaluate(run.model, val, batch_size, device, self.parallel)
        seconds = time.perf_counter() - start
        parts = [p for p in val.parts if self.args.by_source and p.num_tokens > 1]
        sources = {
            p.source.name: evaluate(run.model, p, batch_size, device, self.parallel) for p in parts
        }
        return dataclasses.replace(
            found, result=result, seconds=seconds, data=val.describe(), sources=sources
        )

    def _with_tasks(
        self, found: Evaluation, run: TrainedModel, device: Device, batch_size: int
    ) -> Evaluation:
        """Adds the scores of the tasks that the flags name. Raises UserError."""
        args = self.args
        if run.tokenizer is None:
            raise UserError(
                f"{found.checkpoint} names no tokenizer for --tasks; say which: --tokenizer-name"
            )
        scored = TaskModel(run.model, run.tokenizer, device, batch_size)
        options = (args.task_path, args.task_limit, args.num_fewshot)
        return dataclasses.replace(found, tasks=score_tasks(args.tasks, scored, *options))

    def _validation(self, run: TrainedModel, where: str) -> TokenDataset:
        """The data for a checkpoint, which stay open for the next one of its run."""
        if self.opened is None or self.opened[:2] != (run.settings, run.data):
            val = self.ranks.each(validation_of, self.args, run.settings, run, where)
            for note in val.notes if self.ranks.rank == 0 else ():
                say(note)
            self.opened = run.settings, run.data, val
        return self.opened[2]


def evaluate_all(
    files: list[CheckpointFile], evaluator: Evaluator, report: EvalReport | None, note: str
) -> int:
    """Evaluates each file and reports the results with the note. Returns the exit code: 2 if one of
    several could not be evaluated. Raises UserError if a single one could not. report: None on the
    ranks but 0.
    """
    ranks, notes = evaluator.ranks, [note] if note else []
    failed = []
    for file in files:
        try:
            found = evaluator.evaluate(evaluator.open(file.path), file)
        except UserError as reason:
            alike = reason.of_all or ranks.world == 1  # else the other ranks would not go on
            if len(files) == 1 or not alike:
                raise
            if file.named or ranks.from_first(os.path.lexists, file.path):
                failed.append(f"not evaluated: {reason}")
            continue
        if report and found:
            report.record(found)
    if report:
        report.finish(evaluator.evaluations, [*notes, *failed])
        to_wandb(evaluator)
    return 2 if failed else 0


def watch(args: EvalSettings, evaluator: Evaluator, report: EvalReport) -> int:
    """Evaluates what is there and then what runs add, until they have finished or a signal comes.
    Returns the exit code: 2 if a checkpoint could not be evaluated.
    """
    waiting, start, failed = Watch(args.checkpoint_path), time.monotonic(), list[str]()
    say(f"watching {' '.join(args.checkpoint_path)} until its runs are finished, or Ctrl-C")
    with StopSignals("this evaluation") as signals:
        signals.install()
        while not signals.signal:
            if file := waiting.next():
                failed += _evaluate_next(args, evaluator, report, waiting, file)
            elif waiting.finished():
                say("all steps are done")
                break
            else:
                _pause(signals)
                failed += _said(waiting.damaged())
    failed += _said(waiting.damaged())
    seconds, reads = duration(time.monotonic() - start), waiting.failed_reads
    done = f"evaluated {len(evaluator.found)} states in {seconds}; {reads} reads failed"
    notes = [line for line in (left_out(waiting.foreign()), *failed, done) if line]
    report.finish(evaluator.evaluations, notes)
    to_wandb(evaluator)
    return 2 if failed else 0


def to_wandb(evaluator: Evaluator) -> None:
    """Adds the results to the runs of Weights & Biases, if that was asked for."""
    for run_id, (trained, wandb_run_id) in evaluator.wandb.items():
        if evaluator.args.use_wandb:
            found = sorted(evaluator.evaluations, key=lambda e: e.step)
            results = [(e.step, e.values) for e in found if e.run_id == run_id]
            log_evaluations(trained, wandb_run_id, results, say)


def _evaluate_next(
    args: EvalSettings,
    evaluator: Evaluator,
    report: EvalReport,
    waiting: Watch,
    file: CheckpointFile,
) -> list[str]:
    """Evaluates a file and shows its row. Returns the line that says why it can't, if it can't."""
    try:
        opened = _open(file.path, args.tokenizer_name)
        waiting.note(opened.stamp, opened.run_id, opened.step, opened.run.settings.num_steps)
        found = evaluator.evaluate(opened, file)
    except Unreadable as reason:
        waiting.suspect(file, str(reason))
        return []
    except UserError as reason:
        waiting.read.add(file.stamp)
        return _said([str(reason)])
    if found:
        report.say_row(found)
        report.record(found)
        report.write_tables(evaluator.evaluations, last=False)
    return []


def _said(problems: list[str]) -> list[str]:
    """Prints a line for each problem, and returns the lines for the end."""
    lines = [f"not evaluated: {problem}" for problem in problems]
    for line in lines:
        say(line)
    return lines


def _pause(signals: StopSignals) -> None:
    """Waits before the next look for checkpoints, or until a signal comes."""
    end = time.monotonic() + _LOOK_SECONDS
    while not signals.signal and time.monotonic() < end:
        time.sleep(0.1)


def main(args: EvalSettings) -> int:
    """Evaluates checkpoints, alone or under torchrun; rank 0 prints and logs the results."""
    with process_group(args) as ranks:
        for flag in ("watch", "tasks"):
            if getattr(args, flag) and ranks.world > 1:
                said = f"--{flag} works in one process; start eval.py without torchrun"
                raise UserError(said, of_all=True)
        pick_device(args.device, local_rank=ranks.local_rank)  # is there one?
        evaluator = Evaluator(args, ranks)
        tables = (args.log_dir, args.csv, args.json)
        if args.watch:
            return watch(args, evaluator, EvalReport(*tables))
        files, note = ranks.from_first(choose_checkpoints, args.checkpoint_path)
        report = ranks.each(lambda: None if ranks.rank else EvalReport(*tables))
        return evaluate_all(files, evaluator, report, note)


if __name__ == "__main__":
    run_script(
        lambda argv: main(EvalSettings(**parse_flags(EvalSettings, "eval.py", argv))),
        is_first_reporter,
    )
