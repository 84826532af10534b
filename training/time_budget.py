"""Chooses a model and its training for the time that there is: `--minutes`.

The numbers below come from the runs in docs/experiments.md; where they are a guess, it says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from config import GPTConfig, Settings, from_dict, to_dict
from dataset import open_data
from parallel.process_group import Ranks
from runtime.device import free_memory_of, has_bf16_units, pick_device, tune
from runtime.setting_fields import UserError
from runtime.start_time import seconds_since_start
from settings.command_line import trainer_flags
from training.compilation import why_not_compiled
from training.deadline import evaluation_in_steps, seconds_to_end
from training.evaluation import starts_with_evaluation
from training.flops import flops_per_token, numbers_in_matrices
from training.memory import num_numbers
from training.step_speed import seconds_of_step

# Shapes to choose from: blocks, width, context.
SHAPES = (
    (2, 64, 128), (3, 96, 256), (4, 128, 256), (5, 192, 256), (6, 256, 256), (8, 384, 512),
    (10, 512, 512), (12, 768, 1024), (16, 1024, 1024), (24, 1536, 1024), (32, 2048, 2048),
)  # fmt: skip
TOKENS_PER_NUMBER = 12.0  # tokens of a run for each number in the matrices of its model
# At width 64, a run of so many tokens has batches and rates of these sizes. In longer runs, batches
# grow with the root of the tokens, and rates fall with the fourth root, at most to a third.
RUN_TOKENS = 2.4e6
RUN_RATE = 4e4  # tokens/s of the smallest shape on two cores, until that is measured
BATCH_TOKENS = 3072
RATES, RATE_WIDTH = {"muon": 0.03, "adamw": 0.01}, 64
ROWS_PER_TOKEN, MOST_ROWS = 0.1, 1_000_000  # of the n-gram embedding
LONGEST, LONGEST_OF_REPEATED = 8, 5  # n-grams, and those of a text that is seen more than once
DECAY = 0.5  # part of the steps in which the learning rate falls
MOST_EPOCHS = 5.0  # of the training data; more time than for that goes into a larger model
MOST_NUMBERS = 15.0  # in the matrices of a model, for each token of the training data
COMPILES_FROM = 5.0  # minutes: compiling takes 10 to 15 s
# Time of a compiled step, as a part of one that is not; in bf16 on a CPU it converts less.
COMPILED, COMPILED_BF16 = 0.7, 0.5
MEASURING = 0.02  # part of the time for measuring, after the first and until the last has begun
EVALUATING = 0.04  # part of the time for evaluations, where three take less than that


def fit_to_time(
    script: str,
    argv: list[str],
    args: Settings,
    ranks: Ranks | None = None,
    spread: Callable[..., Any] | None = None,
) -> Settings:
    """With --minutes, returns the settings of the run that is expected to reach the lowest
    validation loss in that time, on this device and with these data. Flags typed in argv stay; with
    --preset or --init-from, only the number of steps is chosen. Without --minutes, and for a
    resumed run, returns the settings as they are. All ranks call it together. spread: ParallelModel
    where there are ranks (it loads too slowly for a run that does not need it). Raises UserError.

    The model is the one that gets about TOKENS_PER_NUMBER tokens for each number of its matrices,
    or a larger one where that would be more than MOST_EPOCHS of the data; how many tokens a model
    gets in the time is measured here. The number of steps is a plan: see
    training/deadline.py.
    """
    if not args.minutes or args.resume:
        return args
    return _Choice(trainer_flags(script, argv), args, ranks or Ranks(), spread).made()


class _Choice:
    """The choice of settings for one run. typed: the flags that the user typed."""

    def __init__(
        self,
        typed: Mapping[str, Any],
        args: Settings,
        ranks: Ranks,
        spread: Callable[..., Any] | None,
    ) -> None:
        self.typed, self.ranks, self.spread = typed, ranks, spread
        self.device = pick_device(args.device, args.precision, ranks.local_rank)
        tune(self.device, args.model.use_activation_checkpoint, args.deterministic)
        self.train, self.val, self.args = ranks.each(open_data, args)
        self.data_tokens = self.train.num_tokens
        self.seconds = 60.0 * args.minutes
        self.fixed = "preset" in typed or bool(args.init_from)
        (short,) = ranks.agree(-int(min(free_memory_of(self.device), 1e18)))
        self.memory = -short  # bytes that are free on every rank
        self.compiles = self._compiles()

    def made(self) -> Settings:
        """Measures the shape that is the likeliest, and then the one that this makes the likeliest,
        until that is one that was measured; returns it with the number of its steps.
        """
        shapes = self._shapes()
        until, late = math.inf, False
        guess, tokens = 0, min(RUN_RATE * self.seconds, MOST_EPOCHS * self.data_tokens)
        known: dict[int, tuple[Settings, float]] = {}
        while guess not in known:
            args = self._settings(shapes[guess], tokens)
            known[guess] = args, self._speed(args)
            if late:
                break
            elapsed = self._elapsed()
            late = elapsed > until
            until = min(until, elapsed + MEASURING * self.seconds)  # the first starts the GPU too
            guess, tokens = self._best(shapes, known)
        args, step = known[guess]
        if self.compiles and not self.fixed:
            args = dataclasses.replace(args, compile="on")
        return self._with_steps(args, step)

    def _speed(self, args: Settings) -> float:
        """The measured seconds of a step, those of the slowest rank, and of a compiled model if the
        run is compiled.
        """
        limit = MEASURING * self.seconds / (1 if self.fixed else 3)  # three shapes, as a rule
        step = seconds_of_step(args, self.train, self.device, self.ranks, self.spread, limit)
        (us,) = self.ranks.agree(int(1e6 * step))
        return max(1, us) / 1e6 * (compiled_part(args) if self.compiles else 1.0)

    def _elapsed(self) -> float:
        """Seconds since the start, the same on all ranks: of the first to start."""
        return self.ranks.agree(int(1000 * seconds_since_start()))[0] / 1000

    def _shapes(self) -> list[dict[str, Any]]:
        """The shapes to choose from, without what the user typed. Where that is both blocks and
        width, there is one: its context is that of the nearest width.
        """
        if self.fixed:
            return [{}]
        found: list[dict[str, Any]] = []
        shapes = list(SHAPES)
        if {"n_layers", "d_model"} <= self.typed.keys():
            typed = self.typed["d_model"]
            shapes = [min(SHAPES, key=lambda shape: abs(math.log(shape[1] / typed)))]
        for n_layers, width, context in shapes:
            wide = self.typed.get("d_model", width)
            most = max(2, wide // 64)  # heads of even size (for the rotations), some 64
            heads = next((n for n in range(most, 1, -1) if wide % (2 * n) == 0), 1)
            shape = {"n_layers": n_layers, "d_model": width, "n_heads": heads, "d_ff": 0}
            longest = self.typed.get("max_position_embeddings") or context
            shape |= {"seq_len": min(context, longest), "max_position_embeddings": 0}
            shape = {k: v for k, v in shape.items() if k not in self.typed}
            if wide % self.typed.get("n_heads", heads) == 0 and shape not in found:
                found.append(shape)
        return found or [{}]

    def _settings(self, shape: Mapping[str, Any], tokens: float) -> Settings:
        """The settings of a run of about so many tokens with a model of this shape."""
        values, typed = {**to_dict(self.args), **shape}, self.typed
        if self.fixed:
            return self.args
        scale = math.sqrt(max(1.0, tokens / RUN_TOKENS))
        chosen: dict[str, Any] = {"lr_width": RATE_WIDTH, "warmup_steps": 0, "compile": "off"}
        chosen["lr"] = RATES[values["optimizer"]] * max(1 / 3, scale**-0.5)
        if values["arch"] == "modern":
            epochs = tokens / self.data_tokens
            chosen["ngram_longest"] = LONGEST if epochs <= 1 else LONGEST_OF_REPEATED
            chosen["ngram_rows"] = self._rows(tokens, values["d_model"])
            chosen["ngram_optimizer"] = "rmsprop"
        on_cpu = self.device.torch_device.type == "cpu"
        if not typed.keys() & {"batch_size", "grad_accum_steps", "global_batch_size"}:
            ranks = self.ranks.world // values["tensor_parallel_size"]
            rows = max(1, round(BATCH_TOKENS * scale / values["seq_len"] / ranks))
            chosen |= {"global_batch_size": rows * ranks, "grad_accum_steps": 1}
            chosen |= {"batch_size": rows, "micro_batch": "given" if on_cpu else "auto"}
        if on_cpu:
            fast = values["d_model"] >= 128 and has_bf16_units(self.device.torch_device)
            if not typed.keys() & {"bf16", "no_amp"}:
                chosen["precision"] = "bf16" if fast else "fp32"
        values |= {k: v for k, v in chosen.items() if k not in typed}
        values["max_position_embeddings"] = values["max_position_embeddings"] or values["seq_len"]
        return from_dict(values)

    def _rows(self, tokens: float, width: int) -> int:
        """Rows of the n-gram embedding: a part of the tokens that a run sees, and at most a
        twentieth of the memory that is free.
        """
        memory = 0.05 * self.memory / (4 * width)
        seen = ROWS_PER_TOKEN * min(tokens, self.data_tokens)
        return max(1, round(min(MOST_ROWS, memory, max(10_000, seen)) / 10_000)) * 10_000

    def _compiles(self) -> bool:
        """Whether the run is to be compiled. The search for its shape is not."""
        args = self.args
        if args.compile == "auto" and not self.fixed:
            args = dataclasses.replace(args, compile="on")
            if args.minutes < COMPILES_FROM:
                return False
        try:
            return not why_not_compiled(args, self.device)
        except UserError:
            return False

    def _best(
        self, shapes: list[dict[str, Any]], known: Mapping[int, tuple[Settings, float]]
    ) -> tuple[int, float]:
        """The index of the best shape, and how many tokens it sees: the shape for which there is
        time for TOKENS_PER_NUMBER, or where the data is the limit for MOST_EPOCHS. The speed of
        shapes that were not measured follows from the nearest that was, and from how much they
        compute.
        """
        left, most = max(1.0, self.seconds - self._elapsed()), MOST_EPOCHS * self.data_tokens

        def tokens(i: int) -> float:
            args, step = known[min(known, key=lambda k: abs(k - i))]
            other = self._settings(shapes[i], RUN_TOKENS)
            rate = args.global_batch_size * args.seq_len / step * _flops(args) / _flops(other)
            return rate * left

        def off(i: int) -> float:
            args = self._settings(shapes[i], RUN_TOKENS)
            numbers, parts = numbers_in_matrices(args.model), args.tensor_parallel_size
            if args.parallel == "fsdp":
                parts = self.ranks.world
            if 16.0 * num_numbers(args.model)[0] / parts > 0.8 * self.memory:
                return math.inf  # weights, gradients and moments do not fit
            if i and numbers > MOST_NUMBERS * self.data_tokens:
                return math.inf
            return abs(math.log(tokens(i) / min(TOKENS_PER_NUMBER * numbers, most)))

        best = min(range(len(shapes)), key=off)
        return best, min(tokens(best), most)

    def _with_steps(self, args: Settings, step: float) -> Settings:
        """The settings with as many steps, evaluations and saves as there is time for."""
        typed, batch = self.typed, args.global_batch_size * (args.seq_len - 1)
        evaluation = evaluation_in_steps(args, self.val.num_tokens) * step
        left = self.seconds - self._elapsed() - seconds_to_end(args)
        most = int(EVALUATING * self.seconds / evaluation)
        # With three, the first is before the rate falls: it tells how long the others will take.
        evaluations = min(20, max(1 if self.seconds < 60 else 3, most))
        first = self.fixed and starts_with_evaluation(0, self.val, args, self.device)
        steps = max(2, int((left - (evaluations + first) * evaluation) / step))
        most_steps = 0 if self.fixed else max(2, int(MOST_EPOCHS * self.data_tokens / batch))
        early = 0 < most_steps < steps and "num_steps" not in typed
        steps = most_steps if early else steps
        each = -(-steps // evaluations)
        saves = max(1, int(evaluations * 120.0 / self.seconds))  # evaluations between saves
        chosen: dict[str, Any] = {"num_steps": steps, "eval_steps": each}
        chosen["save_steps"] = each * saves
        if not self.fixed:
            chosen |= {"eval_at_start": "off", "lr_scheduler": "wsd", "decay_ratio": DECAY}
            chosen["log_steps"] = max(1, min(args.log_steps, steps // 50))  # it reads the clock
            chosen |= regularization_for(steps * batch / self.data_tokens, args.model)
        values = {**to_dict(args), **{k: v for k, v in chosen.items() if k not in typed}}
        values["warmup_steps"] = min(values["warmup_steps"], values["num_steps"] // 10)
        open_end = "num_steps" not in typed and values["lr_scheduler"] in ("wsd", "none")
        run = dataclasses.replace(from_dict(values), open_end=open_end, most_steps=most_steps)
        return dataclasses.replace(run, chosen=self._sentence(run, step, early))

    def _sentence(self, args: Settings, step: float, early: bool) -> str:
        """What was chosen, and why, in two lines. early: whether the data is gone through so often
        that the run ends before its time.
        """
        c, tokens = args.model, args.num_steps * args.global_batch_size * (args.seq_len - 1)
        rate = args.global_batch_size * (args.seq_len - 1) / step
        rows = f", {c.ngram_rows:,} rows for n-grams" if c.ngram_rows else ""
        about = "some " if args.open_end else ""
        what = (
            f"chosen for {args.minutes:g} minutes: {c.n_layers} blocks of width {c.d_model}{rows}; "
            f"{about}{args.num_steps:,} steps of {args.global_batch_size} x {args.seq_len} tokens"
        )
        why = (
            f"because {rate:,.0f} tokens/s were measured: {tokens / 1e6:.3g}M tokens, "
            f"{tokens / self.data_tokens:.2g} epochs, {tokens / numbers_in_matrices(c):.3g} for "
            f"each number in the matrices (best are some {TOKENS_PER_NUMBER:g}, or fewer where "
            "the data is the limit)"
        )
        if early:
            why += f"; it ends before its time: over {MOST_EPOCHS:g} epochs may not help"
        return f"{what}\n{why}"


def compiled_part(args: Settings) -> float:
    """The time of a compiled step, as a part of one that is not."""
    return COMPILED_BF16 if args.precision == "bf16" else COMPILED


def regularization_for(epochs: float, model: GPTConfig) -> dict[str, float]:
    """Settings against learning a text by heart that is seen more than once. Its long n-grams are
    known first, so half of them are left out; and from two to three epochs, weight decay grows ten
    times, and rows of n-grams begin to have one (tinyshakespeare).
    """
    often = round(min(1.0, max(0.0, epochs - 2)), 1)
    chosen = {"weight_decay": round(0.1 * 10**often, 2)}
    if model.ngram_rows:
        dropout = min(0.5, round(0.25 * epochs, 1)) if epochs >= 0.5 else 0.0
        chosen |= {"ngram_dropout": dropout, "ngram_weight_decay": often}
    return chosen


def _flops(args: Settings) -> float:
    return flops_per_token(args.model, args.seq_len)
