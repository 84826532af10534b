"""Ends a run with --minutes in its time. Nobody can say beforehand how fast the steps of half an
hour will be, so the last step is fixed late: when the learning rate is about to fall.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from config import Settings
from corpus.token_dataset import TokenDataset
from parallel.process_group import Ranks
from runtime.start_time import seconds_since_start
from training.memory import num_numbers
from training.step import RunState

_ENDING = 2.0  # seconds from the last evaluation to the end, besides those of the checkpoint
_BYTES_PER_SECOND = 2e8  # of a checkpoint that is written
_REMEMBERED = 0.15  # part of the whole time after which a step counts e times less for the speed


def seconds_to_end(args: Settings) -> float:
    """Seconds from the last evaluation to the end of the process: saving, pictures and reports."""
    return _ENDING + 4.0 * num_numbers(args.model)[0] / _BYTES_PER_SECOND


def evaluation_in_steps(args: Settings, val_tokens: int) -> float:
    """The time of an evaluation in steps: a step computes about three times as much per token."""
    return (val_tokens - 1) / (args.global_batch_size * (args.seq_len - 1)) / 3


class Deadline:
    """Sets num_steps to what the rest of the time is enough for, again and again until the learning
    rate falls.

    Until then, no step depends on num_steps (`lr_at` with wsd). So the run is in the end what
    it would have been with these settings from its start. A run without --minutes, one whose
    settings leave num_steps as it is (`open_end`) and a resumed one never come near a deadline.
    """

    def __init__(
        self,
        args: Settings,
        state: RunState,
        val: TokenDataset,
        ranks: Ranks | None = None,
        clock: Callable[[], float] = seconds_since_start,
    ) -> None:
        """ranks: all ranks of the run; clock: seconds since the process began."""
        self.args, self.state, self.ranks, self.clock = args, state, ranks or Ranks(), clock
        self.open = args.open_end and not args.resume
        self.step, self.last = 0, 0.0  # the step and the time when the clock was last read
        self.end = 60 * args.minutes - seconds_to_end(args)
        self.steps = self.seconds = 0.0  # of the steps, the latest ones in full
        self.evaluation = evaluation_in_steps(args, val.num_tokens)  # in steps
        self.evaluations = 0  # so many were measured
        self.alone = False  # whether steps were measured without an evaluation or a save

    def near(self) -> bool:
        """Whether the rate falls in the step after the next, by num_steps as it is or as this rank
        would set it now. Call it after every step.
        """
        if not self.open:
            return False
        args, before = self.args, self.state.step - 1
        # Where the step before was reported, a GPU was waited for: elsewhere, it may be behind.
        if any(before % n == 0 for n in (args.log_steps, args.eval_steps, args.save_steps)):
            self._read_clock(before)
        # An evaluation that comes before the rate falls is waited for: it tells how long they take.
        comes = self.step <= args.eval_steps < _last_constant(args, args.num_steps) - 1
        last = min(args.num_steps, self._last_step(0.0 if comes else self.evaluation))
        return self.state.step + 1 > _last_constant(args, last)

    def _read_clock(self, before: int) -> None:
        """Learns from the time since the last reading how long a step takes, or an evaluation after
        the step `before`.
        """
        args, now = self.args, self.clock()
        steps, spent = self.state.step - self.step, now - self.last
        self.step, self.last = self.state.step, now
        if not before:  # the first step takes memory, and what was before it
            return
        evaluated = before % args.eval_steps == 0
        alone = not evaluated and before % args.save_steps != 0
        self.alone = self.alone or alone
        if alone or not self.alone:
            kept = math.exp(-spent / (_REMEMBERED * 60 * args.minutes))
            self.steps = kept * self.steps + steps + evaluated * self.evaluation
            self.seconds = kept * self.seconds + spent
        elif evaluated:
            self.evaluations += 1
            found = max(0.0, spent / (self.seconds / self.steps) - steps)
            self.evaluation += (found - self.evaluation) / self.evaluations  # the mean

    def settled(self, *told: Callable[[Settings, RunState], None]) -> Settings:
        """The settings with num_steps as it has to be, which it also gives to each of `told`. All
        ranks call it together.
        """
        (negative,) = self.ranks.agree(-self._last_step(self.evaluation))
        args, state = dataclasses.replace(self.args, num_steps=-negative), self.state
        self.open = state.step + 1 <= _last_constant(args, -negative)
        if not self.open:
            args = dataclasses.replace(args, open_end=False)
            state.pending_messages.append(
                f"step {state.step}: the run has {args.num_steps:,} steps in all; from now on the "
                "learning rate falls"
            )
        self.args = args
        for tell in told:
            tell(args, state)
        return args

    def _last_step(self, evaluation: float) -> int:
        """The last step for which there is time, at the speed of the latest steps, if an evaluation
        takes as long as so many of them, or most_steps where that is before it. It is not before
        this one, and so late that the steps until now were before the decay.
        """
        args, step = self.args, self.state.step
        first = math.ceil(max(step, (step - 1) / (1 - _decay(args))))
        if not self.steps:
            return max(first, args.num_steps)
        most = self.step + (self.end - self.last) / (self.seconds / self.steps)
        each, done = args.eval_steps, self.step // args.eval_steps
        # With n more evaluations, time allows most - n * evaluation steps, and each * (done + n) is
        # the last. The first falls with n and the second rises: the best n is where they meet.
        n = max(1, int((most - each * done) / (each + evaluation)))
        last = max(int(min(most - k * evaluation, each * (done + k))) for k in (n, n + 1))
        return max(first, min(last, args.most_steps or last))


def _decay(args: Settings) -> float:
    """The part of the steps in which the learning rate falls."""
    return min(0.99, args.decay_ratio) if args.lr_scheduler == "wsd" else 0.0


def _last_constant(args: Settings, num_steps: int) -> float:
    """The last step before the learning rate falls in a run of num_steps steps."""
    return num_steps * (1 - _decay(args))
