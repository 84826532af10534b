import dataclasses
import math
from contextlib import contextmanager

import pytest
import torch
from conftest import CPU, toy_settings
from helpers import FP16, Run

from parallel.context import ParallelContext
from runtime.device import Device
from runtime.setting_fields import UserError
from training import step as step_module
from training.step import RunState, check_finite, due, train_step


def test_logged_loss_is_that_of_the_whole_global_batch():
    run = Run("--global-batch-size", "12", "--grad-accum-steps", "3")
    batch = run.train.global_batch(0, run.args)
    reference = run.model(batch, labels=batch)[1].item()
    assert batch.shape == (12, 16)
    assert run.steps(1)[0] == pytest.approx(reference, rel=1e-6)
    assert run.state.tokens == 12 * 15


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_accumulation_gives_the_update_of_one_large_batch(arch):
    runs = [
        Run("--arch", arch, "--global-batch-size", "12", "--batch-size", str(b)) for b in (12, 4, 1)
    ]
    losses = [run.steps(5) for run in runs]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradient_is_that_of_the_mean_loss(accumulation):
    # AdamW and clipping hide a wrong scale of the gradients, so look at their norm itself.
    run = Run("--global-batch-size", "12", "--batch-size", str(12 // accumulation))
    batch = run.train.global_batch(0, run.args)
    run.model(batch, labels=batch)[1].backward()
    wanted = torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item()
    run.model.zero_grad()
    assert run.step().grad_norm.item() == pytest.approx(wanted, rel=1e-5)


def test_clipping_bounds_the_norm_and_logs_the_one_before():
    loose, tight = Run("--grad-clip-norm", "0"), Run("--grad-clip-norm", "0.01")
    seen = {}
    for name, run in (("loose", loose), ("tight", tight)):
        original = run.optimizer.step

        def step(run=run, name=name, original=original):
            grads = torch.cat([p.grad.flatten() for p in run.model.parameters()])
            seen[name] = grads.norm().item()
            return original()

        run.optimizer.step = step
        seen[name + " logged"] = run.step().grad_norm.item()
    assert seen["loose"] == pytest.approx(seen["loose logged"], rel=1e-5)
    assert seen["tight logged"] == pytest.approx(seen["loose logged"], rel=1e-5)
    assert seen["tight"] == pytest.approx(0.01, rel=1e-3)


def test_dropout_depends_on_step_and_slot_and_not_on_global_random_state():
    def run(before):
        r = Run("--dropout", "0.3", "--global-batch-size", "8", "--grad-accum-steps", "2")
        out = []
        for _ in range(3):
            before()
            out += r.steps(1)
        return out, r.weights()

    losses, weights = run(lambda: None)
    again, weights_again = run(lambda: torch.rand(7))
    assert losses == again
    assert all(torch.equal(weights[k], weights_again[k]) for k in weights)
    other, _ = (
        Run(
            "--dropout", "0.3", "--global-batch-size", "8", "--grad-accum-steps", "2", "--seed", "9"
        ),
        None,
    )
    assert other.steps(1) != losses[:1]


def test_micro_batches_of_a_step_get_different_masks():
    seeds = []
    run = Run("--dropout", "0.5", "--global-batch-size", "12", "--grad-accum-steps", "3")
    forward = run.model.forward
    run.model.forward = lambda *a, **k: (seeds.append(torch.initial_seed()), forward(*a, **k))[1]
    run.steps(2)
    assert len(set(seeds)) == 6


def test_gradients_are_shared_only_at_the_last_micro_step():
    events = []

    class Quiet(ParallelContext):
        @contextmanager
        def no_sync(self):
            events.append("quiet")
            yield

    run = Run("--global-batch-size", "12", "--grad-accum-steps", "3")
    batch = run.train.global_batch(0, run.args)
    original = run.model.forward
    run.model.forward = lambda *a, **k: (events.append("forward"), original(*a, **k))[1]
    train_step(run.model, run.optimizer, batch, run.args, run.state, CPU, Quiet())
    assert events == ["quiet", "forward", "quiet", "forward", "forward"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_update_with_a_non_finite_gradient_is_skipped_entirely(value):
    run, clean = Run(), Run()
    run.steps(2)
    before, moments = (
        run.weights(),
        {k: v.clone() for k, v in run.optimizer.state[run.model.wte.weight].items()},
    )
    handle = run.model.norm_f.weight.register_hook(
        lambda g: g.index_fill(0, torch.tensor([3]), value)
    )
    run.step()
    handle.remove()
    assert run.state.step == 3 and run.state.bad_in_row.item() == 1 == run.state.skipped.item()
    assert all(torch.equal(before[k], v) for k, v in run.weights().items())
    assert all(
        torch.equal(moments[k], v) for k, v in run.optimizer.state[run.model.wte.weight].items()
    )
    run.step()
    assert run.state.bad_in_row.item() == 0
    assert any(not torch.equal(before[k], v) for k, v in run.weights().items())
    clean.steps(2)
    assert all(torch.equal(before[k], v) for k, v in clean.weights().items())


def test_several_skipped_updates_in_a_row_stop_the_run():
    run = Run()
    run.model.norm_f.weight.register_hook(lambda g: g * math.nan)
    for _ in range(4):
        run.step()
        check_finite(run.state, run.args, str)
    run.step()
    with pytest.raises(UserError, match="gradients of the last 5 updates were not finite"):
        check_finite(run.state, run.args, str)


def test_fp16_overflow_is_tried_again_and_moves_neither_data_nor_schedule():
    run = Run("--lr", "0.01", device=FP16)
    scale = run.state.scaler.scale
    tries = []
    original = run.model.forward

    def forward(*a, **k):
        tries.append(torch.is_autocast_enabled("cpu"))
        return original(*a, **k)

    run.model.forward = forward
    handle = run.model.norm_f.weight.register_hook(lambda g: g * math.inf if len(tries) < 3 else g)
    stats = run.step()
    handle.remove()
    assert tries == [True] * 3
    assert run.state.scaler.scale == scale / 4
    assert run.state.step == 1 and run.state.bad_in_row.item() == 0
    assert stats.lr == pytest.approx(0.01 / run.args.warmup_steps)  # that of the first update
    assert run.optimizer.state[run.model.wte.weight]["step"].item() == 1


def test_fp16_that_never_works_ends_with_one_line():
    run = Run(device=FP16)
    run.model.norm_f.weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(UserError, match="overflow at any loss scale"):
        run.step()


@pytest.mark.parametrize("precision, bound", [("bf16", 0.02), ("fp16", 0.005)])
def test_low_precision_trains_like_float32(precision, bound):
    device = Device(torch.device("cpu"), precision, "test")
    exact, low = Run().steps(8), Run(device=device).steps(8)
    assert low == pytest.approx(exact, rel=bound) and low != exact


def test_due_names_everything_at_the_end_and_logs_whatever_is_due():
    args = toy_settings(
        "--num-steps", "50", "--eval-steps", "20", "--save-steps", "15", "--log-steps", "7"
    )
    last = due(RunState(50), args)
    assert last.log and last.eval and last.save and last.sample
    for step in range(1, 51):
        now = due(RunState(step), args)
        assert now.log or not (now.eval or now.save or now.sample)
        assert now.sample == (step == 50)
    prompted = dataclasses.replace(args, sample_prompt="x", keep_every=4)
    assert due(RunState(20), prompted).sample and due(RunState(4), prompted).save
    assert not due(RunState(5), prompted).log


def test_an_unplanned_save_adds_nothing_to_the_metrics():
    args = toy_settings("--num-steps", "50", "--log-steps", "7")
    for now in (due(RunState(5), args, overdue=1), due(RunState(5, stop=15), args)):
        assert now.save and not (now.log or now.eval or now.sample)


def test_random_data_cannot_be_learned():
    losses = Run("--num-steps", "40").steps(40)
    assert all(abs(loss - math.log(97)) < 0.1 for loss in losses)


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradients_are(monkeypatch):
    run = Run("--global-batch-size", "8", "--grad-accum-steps", "2")
    run.steps(2)
    before, moments = run.weights(), run.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    forward = type(run.model).forward

    def with_infinite_loss(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        return logits, loss + math.inf  # adds nothing to the gradients

    with monkeypatch.context() as patch:
        patch.setattr(type(run.model), "forward", with_infinite_loss)
        run.step()
    assert run.state.bad_in_row == 1 and run.state.step == 3
    assert all(torch.equal(before[k], v) for k, v in run.weights().items())
    assert torch.equal(moments, run.optimizer.state_dict()["state"][0]["exp_avg"])
    run.step()
    assert run.state.bad_in_row == 0


def test_the_end_after_bad_updates_names_steps_and_samples():
    args = toy_settings("--global-batch-size", "12")
    way_back = "go back from {}".format
    check_finite(RunState(step=35, bad_in_row=torch.tensor(4.0)), args, way_back)
    said = "steps 31 to 35, samples 360 to 419.* those of step 30; go back from 30$"
    with pytest.raises(UserError, match=said):
        check_finite(RunState(step=35, bad_in_row=torch.tensor(5.0)), args, way_back)


def test_the_lowest_loss_is_the_best_and_a_nan_never():
    state = RunState(step=1)
    state.update_best(math.nan)
    assert state.best_val_loss == math.inf and not state.is_best
    state.update_best(2.0)
    assert state.is_best
    for step, loss in ((2, 2.0), (3, math.nan), (4, 2.5)):
        state.step = step
        state.update_best(loss)
        assert (state.best_val_loss, state.best_step) == (2.0, 1) and not state.is_best


def test_a_long_first_step_says_how_far_it_is(monkeypatch):
    told = []

    def progress(items, what, total, quiet):
        told.append((what, total, quiet))
        return items

    monkeypatch.setattr(step_module, "progress", progress)
    run = Run("--global-batch-size", "12", "--grad-accum-steps", "3")
    run.steps(2)
    assert told == [("step 1", 3, False), ("step 2", 3, True)]
