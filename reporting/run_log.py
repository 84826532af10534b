"""What a run tells: terminal, text log, metrics (JSONL), loss picture and Weights & Biases.

The only place that formats a metric. The JSONL is the truth: all else shows numbers of its records.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from config import Settings, to_dict
from corpus.windows import TokenDataset
from model import GPTModel
from reporting.metrics_file import to_json
from reporting.plots import draw_losses, read_records, run_of
from reporting.wandb_log import WandB
from runtime.console import command, visible
from runtime.device import Device, environment
from runtime.fields import UserError
from runtime.locks import hold
from settings.paths import archive_existing, default_checkpoint, free_number, log_base
from settings.presets import notes_on_preset
from training.evaluation import EvalResult, starts_with_evaluation
from training.memory import estimate, free_memory_of
from training.optimizers import lr_at
from training.sampling import fitting_prompt
from training.step import RunState, StepStats

_PROFILED = 8  # steps until the profile is complete
_SPIKE_RECORDS, _SPIKE_SIGMAS = 20, 5.0


class RunLog:
    """Tells what happens, on global rank 0; on the other ranks every method does nothing.

    Timings cover fetching and computing of steps, never evaluation, sampling or saving: the clock
    runs from the end of one report to the next train(), and anything else is reported right after a
    train() (see `step.due`).
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
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.script, self.args, self.device, self.world = script, args, device, world
        self.prompt = ""  # where only the user knows the tokenizer
        if rank == 0 and val.tokenizer:
            self.prompt = shlex.quote(fitting_prompt(val))
        self.on, self.epoch_windows = rank == 0, len(train)
        if not self.on:
            return
        base = log_base(args)
        if base.name == "eval":
            raise UserError(
                f"{args.checkpoint_path}: the logs of this run would be those of eval.py; give "
                "another --checkpoint-path"
            )
        self.text_path, self.jsonl_path = Path(f"{base}.log"), Path(f"{base}.jsonl")
        self.record: dict[str, Any] = {}  # of the last update reported
        self.steps_reported, self.skips_reported = state.step, 0
        self.line_time, self.broken = time.perf_counter(), set[str]()
        self.losses = deque[float](maxlen=_SPIKE_RECORDS)
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            self.lock = hold(Path(f"{self.jsonl_path}.lock"), str(self.jsonl_path), "--log-dir")
            self.number = free_number(
                Path(args.checkpoint_path), base
            )  # that of its CheckpointManager
            continued = args.resume and self._continue(state)
            if not continued:
                state.pending_messages += archive_existing([self.jsonl_path], self.number)
            if args.resume and not continued:
                state.pending_messages.append(
                    f"{base.parent} has no metrics of this run before step {state.step}: they stay "
                    "where it was started, and go on here"
                )
            self.text = open(self.text_path, "a", encoding="utf-8")  # noqa: SIM115
            self.jsonl = open(self.jsonl_path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as reason:
            raise UserError(
                f"cannot write {reason.filename}: {reason.strerror}; try --log-dir"
            ) from reason
        self.bar = tqdm(
            total=args.num_steps,
            initial=state.step,
            unit="step",
            disable=None,
            dynamic_ncols=True,
        )
        self._say_notes(state)
        self._header(model, train, val)
        run = {
            "run_id": state.run_id,
            "settings": to_dict(args),
            "parameters": model.num_parameters(),
            "train": train.describe(),
            "val": val.describe(),
            "environment": environment(device, world),
        }
        if not continued:
            self._write({"event": "run", **run})
        for note in [] if args.resume else notes_on_preset(args):
            self.line(note)
        if not state.step and not starts_with_evaluation(0, model, val, args, device):
            self.line("no evaluation before the first step (--eval-at-start on does one)")
        if args.resume and state.step == args.num_steps:
            self.line(
                f"nothing left to do: all {args.num_steps} steps are done; --num-steps with more "
                "of them goes on"
            )
        self.wandb = WandB(args, state, run, self.line) if args.use_wandb else None
        self.profiler = _start_profiler(base, device) if args.use_profiler else None
        self.restart_clock()

    def _continue(self, state: RunState) -> bool:
        """Finds the metrics of a resumed run, drops the records beyond its step, which it will make
        again, and keeps them in a file of their own. False if there are none.
        """
        path = self.jsonl_path
        names = (path, *sorted(path.parent.glob("*.jsonl")))
        file = next((f for f in names if f.is_file() and run_of(f) == state.run_id), None)
        if file is None:
            return False
        records = read_records(file)
        if file != path:  # it had another name, or another run was here meanwhile
            state.pending_messages += archive_existing([path], self.number)
        kept = [r for r in records if r.get("step", 0) <= state.step]
        lines = {to_json(r) for r in kept}
        dropped = [
            x for x in file.read_bytes().splitlines() if x.decode(errors="replace") not in lines
        ]
        aside, temporary = path.with_suffix(".cut.jsonl"), path.with_suffix(f".{os.getpid()}.tmp")
        if dropped:
            with open(aside, "ab") as cut:
                cut.write(b"".join(line + b"\n" for line in dropped))
            state.pending_messages.append(
                f"{len(dropped)} records beyond step {state.step} are now in {aside}"
            )
        temporary.write_text("".join(to_json(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(temporary, path)
        if file != path:
            file.unlink()
        losses = [r["train_loss"] for r in kept if r["event"] == "train"]
        self.losses.extend(x for x in losses if x is not None)
        return True

    def _header(self, model: GPTModel, train: TokenDataset, val: TokenDataset) -> None:
        args, config = self.args, self.args.model
        ranks = f", {self.world} processes" if self.world > 1 else ""
        epochs = args.num_steps * args.global_batch_size / len(train)
        tokenizer = train.tokenizer.name if train.tokenizer else "none"
        self.line(f"device: {self.device.why}{ranks}")
        self.line(
            f"data: {train.source.name}; tokenizer: {tokenizer}; {train.num_tokens:,} tokens to "
            "train on, "
            f"{val.num_tokens:,} held out for validation"
        )
        for note in train.notes:
            self.line(f"data: {note}")
        self.line(
            f"model: {config.arch}, {config.n_layers} layers, {config.n_heads} heads, "
            f"{config.d_model} channels, "
            f"vocabulary {config.vocab_size:,}: {model.num_parameters():,} parameters"
        )
        free = free_memory_of(self.device)
        there = "" if free == math.inf else f"; {free / 1e9:.2f} GB are still free"
        need = estimate(args, self.device)
        if need.total > free:
            there += ": too few, it seems; a lower --batch-size needs less"
        self.line(f"memory: training takes about {need}{there}")
        self.line(
            f"run: preset {args.preset}, {args.num_steps} steps of {args.global_batch_size} x "
            f"{args.seq_len} tokens (global batch {args.global_batch_size}, micro-batch "
            f"{args.batch_size}; {epochs:.2g} epochs), {args.optimizer}, lr {args.lr:g}, seed "
            f"{args.seed}"
        )

    def restart_clock(self) -> None:
        """Leaves out of the timings what was done since the last report."""
        self.mark = time.perf_counter()

    def line(self, text: str) -> None:
        """One line for people, on the terminal and in the text log."""
        if not self.on:
            return
        stamped = time.strftime("[%Y-%m-%d %H:%M:%S] ") + visible(text)
        self._safely("the terminal", lambda: tqdm.write(stamped) or sys.stdout.flush())
        self._safely("the text log", lambda: print(stamped, file=self.text, flush=True))

    def _safely(self, what: str, write: Callable[[], object]) -> None:
        """A full disk or a closed terminal ends what is written there, not the run."""
        if what in self.broken:
            return
        try:
            write()
        except (OSError, ValueError) as reason:
            self.broken.add(what)
            if what == "the terminal":  # or the interpreter would try again at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.line(f"{what} can't be written any more ({reason}); the run goes on without it")

    def after_step(self, state: RunState) -> None:
        """After each update: says what others have left in state.pending_messages, such as a
        background save that is done.
        """
        if not self.on:
            return
        self._say_notes(state)
        if self.profiler:  # wants to know where an update ends
            self.profiler.step()

    def _say_notes(self, state: RunState) -> None:
        while state.pending_messages:
            self.line(state.pending_messages.pop(0))

    def train(self, state: RunState, stats: StepStats) -> None:
        """Records the update just finished, of which stats holds the sums over ranks. Waits for
        the device.
        """
        if not self.on:
            return
        loss, norm = float(stats.nll_sum) / stats.n_tokens, float(stats.grad_norm)  # waits here
        seconds, steps = time.perf_counter() - self.mark, state.step - self.steps_reported
        rate = steps * stats.n_tokens / seconds
        timing = {"step_seconds": seconds / steps, "tokens_per_sec": rate}
        values = {"train_loss": loss, "lr": stats.lr, "grad_norm": norm}
        self.steps_reported, self.record = state.step, {**values, **timing}
        self._write(
            {"event": "train", "step": state.step, "tokens": state.tokens, **values, "time": timing}
        )
        if self.wandb:
            rates = {"tokens_per_sec_per_rank": rate / self.world, "global_tokens_per_sec": rate}
            amp = {"amp": int(self.device.amp), "bf16": int(self.device.precision == "bf16")}
            self.wandb.log(
                {
                    "train/loss": loss,
                    "grad_norm": norm,
                    "lr": stats.lr,
                    "tokens": state.tokens,
                    **rates,
                    **amp,
                },
                state,
            )
        self._tell_spike(state, loss, norm)
        skipped = 0 if state.skipped is None else int(state.skipped)
        if skipped > self.skips_reported:
            new, self.skips_reported = skipped - self.skips_reported, skipped
            self.line(f"step {state.step}: {new} updates skipped: loss or gradients not finite")
        self.bar.update(state.step - self.bar.n)
        self.bar.set_postfix_str(f"train loss {loss:.4f}")
        if (
            self.bar.disable
            and state.step % self.args.eval_steps
            and state.step < self.args.num_steps
        ):
            short = f"step {state.step} / {self.args.num_steps} | train loss: {loss:.4f}"
            self._safely("the terminal", lambda: print(short, flush=True))
        self.restart_clock()

    def _tell_spike(self, state: RunState, loss: float, norm: float) -> None:
        """A line where the loss is far above those of the records before."""
        if len(self.losses) == _SPIKE_RECORDS:
            usual = statistics.fmean(self.losses)
            spread = max(statistics.pstdev(self.losses), usual / 100)
            if not loss <= usual + _SPIKE_SIGMAS * spread:
                guess = math.log(self.args.model.vocab_size)
                self.line(
                    f"step {state.step}: loss spike, {loss:.4f} where the last {_SPIKE_RECORDS} "
                    f"records had {usual:.4f} +- {spread:.4f} and guessing has {guess:.4f}; grad "
                    f"norm {norm:.4f}"
                )
        if math.isfinite(loss):
            self.losses.append(loss)

    def eval(self, state: RunState, result: EvalResult) -> None:
        """Records an evaluation and prints the one line that says how the run stands."""
        if not self.on:
            return
        values = {
            "loss": result.loss,
            "loss_se": result.loss_se,
            "ppl": result.ppl,
            "bpb": result.bpb,
        }
        record = {f"val_{k}": v for k, v in {**values, "tokens": result.tokens}.items()}
        self._write({"event": "eval", "step": state.step, "tokens": state.tokens, **record})
        if self.wandb:
            self.wandb.log({f"val/{k}": values[k] for k in ("loss", "ppl", "bpb")}, state)
        self.line(self._eval_line(state, result))
        self.line_time = time.perf_counter()
        self.restart_clock()

    def _eval_line(self, state: RunState, result: EvalResult) -> str:
        def last(name: str, digits: int, scale: float = 1.0, unit: str = "") -> str:
            known = name in self.record
            return f"{self.record[name] * scale:.{digits}f}{unit}" if known else "n/a"

        args, dt = self.args, time.perf_counter() - self.line_time
        epoch = 1 + max(state.step * args.global_batch_size - 1, 0) // self.epoch_windows
        fields = {
            "lr": last("lr", 6),
            "step time": last("step_seconds", 2),
            "toks/s (per rank)": last("tokens_per_sec", 2, 1 / self.world),
            "grad norm": last("grad_norm", 4),
            "train loss": last("train_loss", 4),
            "val loss": f"{result.loss:.4f}",
            "val ppl": f"{result.ppl:.2f}",
            "val bpb": "n/a" if result.bpb is None else f"{result.bpb:.4f}",
            "tokens": f"{state.tokens}",
            "dt": f"{dt:.2f}s",
            "eta": last("step_seconds", 2, (args.num_steps - state.step) / 3600, "h"),
            "amp": self.device.amp,
        }
        text = " | ".join(f"{name}: {value}" for name, value in fields.items())
        return f"epoch {epoch} step {state.step} / {args.num_steps} | {text}"

    def sample(self, text: str | None) -> None:
        """Shows what the model writes; None = nothing can be shown."""
        if self.on and text is not None:
            self.line("sample: " + text.replace("\n", "\n    "))
            self.restart_clock()

    def saved(self, seconds: float) -> None:
        """Leaves the time that a save took out of the timings, and makes the metrics up to it as
        safe as the checkpoint.
        """
        if self.on:
            self.mark += seconds
            self._safely("the metrics file", lambda: os.fsync(self.jsonl.fileno()))

    def finish(self, state: RunState) -> None:
        """Draws the loss picture, says what can be done next, and closes everything."""
        if not self.on:
            return
        self.bar.close()
        self._say_notes(state)
        stopped = state.stopped_by(self.args)
        if stopped:
            self.line(f"{signal.Signals(stopped).name}: stopped at step {state.step}")
        picture = self.jsonl_path.with_suffix(".png")
        self._safely("the loss picture", lambda: draw_losses(self.jsonl_path, picture))
        self.line(f"wrote {self.text_path}, {self.jsonl_path} and {picture}")
        self._say_next(state)
        if self.wandb:
            self.wandb.finish()
        if self.profiler:
            self.profiler.stop()
            if not Path(f"{self.jsonl_path.with_suffix('')}_trace.json").exists():
                self.line(f"no profile: it takes {_PROFILED} steps")
        for file in (self.text, self.jsonl, self.lock):
            self._safely("a log file", file.close)

    def _say_next(self, state: RunState) -> None:
        """The commands that evaluate, continue and sample."""
        args = self.args
        path = shlex.quote(args.checkpoint_path)
        usual = args.checkpoint_path == default_checkpoint(self.script)
        where = "" if usual else f" --checkpoint-path {path}"
        start = command(f"{self.script}.py", self.world if self.script == "train_ddp" else 0)
        guessing = math.log(args.model.vocab_size)
        failed = math.inf > state.best_val_loss > 1.02 * guessing
        if failed:
            self.line(
                f"the best validation loss, {state.best_val_loss:.4f}, is above that of guessing, "
                f"ln {args.model.vocab_size} = {guessing:.4f}: this model has learned nothing; try "
                f"a lower --lr than {args.lr:g}"
            )
        more = "" if state.stopped_by(args) else self._more_steps(state)
        self.line(f"evaluate: {command('eval.py')} --checkpoint-path {path}")
        if not failed:
            self.line(f"continue: {start} --resume{more}{where}")
        sample = f"{command('generate.py')} --checkpoint-path {path}"
        if self.prompt:
            self.line(f"sample:   {sample} --prompt {self.prompt}")
        elif args.data_mode != "toy":
            self.line(
                "sample:   these token ids name no tokenizer; if they are GPT-2's, "
                f"{sample} --tokenizer-name gpt2"
            )

    def _more_steps(self, state: RunState) -> str:
        """Flags that continue a run that is done. Where its learning rate has decayed they have it
        decay anew, from about a tenth of the peak.
        """
        args, last = self.args, lr_at(self.args.num_steps - 1, self.args)
        more = f" --num-steps {2 * state.step}"
        if last > args.lr / 2:
            return more
        share = 0.1 if args.lr_scheduler == "wsd" else 0.2  # the others are half way down by then
        lr = max(share * args.lr, args.min_lr)
        self.line(
            f"the learning rate has decayed to {last:.3g}; the command below that continues this "
            f"run has --lr {lr:.3g}, since with {args.lr:g} it would jump up to "
            f"{args.lr if args.lr_scheduler == 'wsd' else args.lr / 2:.3g}"
        )
        return f"{more} --lr {lr:.3g}"

    def _write(self, record: dict[str, Any]) -> None:
        self._safely(
            "the metrics file", lambda: print(to_json(record), file=self.jsonl, flush=True)
        )


def _start_profiler(base: Path, device: Device) -> Any:
    """Records updates 6 to 8 into a trace for chrome://tracing or Perfetto."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.torch.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(
        activities=kinds,
        schedule=torch.profiler.schedule(wait=4, warmup=1, active=_PROFILED - 5, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(f"{base}_trace.json"),
    )
    profiler.start()
    return profiler
