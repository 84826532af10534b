"""When a run with --minutes ends: on a clock that the tests make up."""

import dataclasses
import math

import pytest

from config import Settings
from corpus.data_kinds import ToyRandomDataset
from parallel.process_group import Ranks
from reporting.log_lines import time_kept
from training.deadline import Deadline, seconds_to_end
from training.optimizers import lr_at
from training.step import RunState, due

PLAN = Settings(
    minutes=2.0, open_end=True, num_steps=400, eval_steps=100, lr_scheduler="wsd", decay_ratio=0.5,
    lr=1.0, min_lr=0.0, warmup_steps=0, global_batch_size=8, seq_len=64,
)  # fmt: skip
VAL = ToyRandomDataset(100, 64, num_tokens=5_000)


def simulate(seconds_of, args=PLAN, evaluation=2.0, start=10.0, gpu=False, val=VAL):
    """Runs the loop of the trainers with steps of seconds_of(step) seconds; with `gpu`, all but the
    first, which compiles, have only begun when train_step returns, and reports and evaluations wait
    for them. Returns the settings at the end, the rates that the steps had, the seconds that the
    run took, and the messages.
    """
    now, state, rates, behind = [start], RunState(), [], 0.0
    deadline = Deadline(args, state, val, clock=lambda: now[0])
    told = []
    while state.step < args.num_steps:
        rates.append(lr_at(state.step, args))
        behind += seconds_of(state.step)
        if not gpu or state.step == 0:
            now[0], behind = now[0] + behind, 0.0
        state.step += 1
        if deadline.near():
            args = deadline.settled(lambda args, state: told.append(args))
            assert told[-1] == args
        now_due = due(state, args)
        if now_due.log:
            now[0], behind = now[0] + behind, 0.0
        now[0] += evaluation * now_due.eval
    return args, rates, now[0] + seconds_to_end(args), state.pending_messages


SPEEDS = {
    "as planned": lambda step: 0.25,
    "half as fast": lambda step: 0.5,
    "three times as fast": lambda step: 0.083,
    "slower from the first quarter on": lambda step: 0.2 if step < 100 else 0.3,
    "every other step twice as long": lambda step: 0.2 + 0.2 * (step % 2),
    "a first step that compiles": lambda step: 0.2 if step else 20.0,
    "steps of ten, as a GPU's seem": lambda step: 2.0 if step % 10 == 9 else 1e-4,
}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("intervals", [
    {"eval_steps": 10}, {"save_steps": 5}, {"log_steps": 1000, "eval_steps": 20},
])  # fmt: skip
def test_the_speed_is_learned_where_each_report_is_of_an_evaluation_or_a_save(gpu, intervals):
    args = dataclasses.replace(PLAN, **intervals)
    _, _, seconds, _ = simulate(SPEEDS["half as fast"], args, evaluation=0.5, gpu=gpu)
    assert 0.96 * 120 <= seconds <= 1.04 * 120


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("speed", SPEEDS)
def test_a_run_ends_in_its_time_whatever_its_speed(speed, gpu):
    args, rates, seconds, messages = simulate(SPEEDS[speed], gpu=gpu)
    assert 0.98 * 120 <= seconds <= 1.025 * 120
    assert not args.open_end and len(rates) == args.num_steps
    assert len(messages) == 1 and f"{args.num_steps:,} steps in all" in messages[0]


@pytest.mark.parametrize("speed", SPEEDS)
def test_the_rates_are_those_of_a_run_that_had_the_last_settings_from_its_start(speed):
    args, rates, _, _ = simulate(SPEEDS[speed])
    assert rates == [lr_at(step, args) for step in range(args.num_steps)]
    assert rates[0] == 1.0 and rates[-1] < 0.05


def test_what_comes_after_the_last_step_is_fixed_shifts_the_end_by_half():
    _, _, seconds, _ = simulate(lambda step: 0.25 if step < 230 else 0.275)
    assert seconds == pytest.approx(120 * 1.04, rel=0.02)


def test_a_third_evaluation_tells_how_long_the_others_take():
    val = ToyRandomDataset(100, 64, num_tokens=150_000)  # guessed at 100 steps, which are 25 s
    few, more = (dataclasses.replace(PLAN, eval_steps=n) for n in (200, 134))
    _, _, early, _ = simulate(SPEEDS["as planned"], few, evaluation=8.0, val=val)
    _, _, seconds, _ = simulate(SPEEDS["as planned"], more, evaluation=8.0, val=val)
    assert early < 0.85 * 120 and 0.97 * 120 <= seconds <= 1.03 * 120


def test_no_run_has_more_than_its_most_steps():
    args = dataclasses.replace(PLAN, most_steps=430)
    found, rates, seconds, _ = simulate(SPEEDS["three times as fast"], args)
    assert found.num_steps == len(rates) == 430 and seconds < 0.8 * 120
    assert rates == [lr_at(step, found) for step in range(430)]


def test_without_open_end_or_resumed_nothing_changes():
    for fixed in ({"open_end": False}, {"resume": True}):
        args = dataclasses.replace(PLAN, **fixed)
        found, rates, _, messages = simulate(SPEEDS["half as fast"], args)
        assert found == args and len(rates) == 400 and not messages


def test_a_run_that_is_late_already_ends_and_its_rates_fall_to_the_end():
    args, rates, _, _ = simulate(lambda step: 200.0 if step == 20 else 0.2)
    assert args.num_steps == math.ceil(20 / 0.5) and rates[-1] < 0.06


def test_a_run_says_at_its_end_why_it_did_not_take_its_time():
    def line(seconds, **changes):
        args = dataclasses.replace(PLAN, **changes)
        return time_kept(args, RunState(step=args.num_steps), seconds)

    assert line(121.2) == ["took 2.02 of its 2 minutes"]
    expected = "took 2.20 of its 2 minutes: since its last step was fixed, it has been slower than"
    assert line(132) == [f"{expected} expected"]
    assert line(108)[0].endswith("it has been faster than expected")
    assert line(108, most_steps=400)[0].endswith("more epochs of these data may not help")
    assert line(108, minutes=0.0) == line(108, resume=True) == []


def test_a_constant_rate_ends_in_its_time_too():
    args = dataclasses.replace(PLAN, lr_scheduler="none")
    _, rates, seconds, _ = simulate(SPEEDS["half as fast"], args)
    assert 0.97 * 120 <= seconds <= 1.02 * 120 and set(rates) == {1.0}


def test_all_ranks_take_the_number_of_steps_of_the_slowest():
    class Slowest(Ranks):
        def agree(self, *wishes):
            return [max(wish, -200) for wish in wishes]

    deadline = Deadline(PLAN, RunState(step=150), VAL, Slowest(), clock=lambda: 50.0)
    assert deadline.settled().num_steps == 200
