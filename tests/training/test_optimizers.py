import math

import pytest
import torch
from conftest import tiny, toy_settings

from model import GPTModel
from training.optimizers import lr_at, make_optimizer


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_only_matrices_decay(arch):
    model = GPTModel(tiny(arch), seed=0)
    optimizer = make_optimizer(model, toy_settings("--weight-decay", "0.3"))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for _, p in model.named_parameters():
        assert decay[id(p)] == (0.3 if p.ndim >= 2 else 0.0)


def test_adamw_is_that_of_the_paper():
    # Loshchilov and Hutter 2019, algorithm 2, by hand for two steps of one number.
    args = toy_settings("--weight-decay", "0.1", "--beta1", "0.8", "--beta2", "0.9", "--lr", "0.01")
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 2.0)
    optimizer = make_optimizer(layer, args)
    w, m, v = 2.0, 0.0, 0.0
    for t, g in ((1, 0.5), (2, -0.25)):
        layer.weight.grad = torch.full((1, 1), g)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w -= 0.01 * 0.1 * w
        w -= 0.01 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-8)
        assert layer.weight.item() == pytest.approx(w, rel=1e-6)


def schedule(name, *flags):
    args = toy_settings(
        "--num-steps", "100", "--warmup-steps", "10", "--lr", "1", "--min-lr", "0.1", *flags
    )
    return [lr_at(step, toy(args, name)) for step in range(101)]


def toy(args, name):
    import dataclasses

    return dataclasses.replace(args, lr_scheduler=name)


@pytest.mark.parametrize("name", ["none", "cosine", "linear", "wsd"])
def test_warm_up_is_linear_and_never_zero(name):
    assert schedule(name)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_courses_after_warm_up():
    none, cosine, linear, wsd = (schedule(n) for n in ("none", "cosine", "linear", "wsd"))
    assert set(none[10:]) == {1.0}
    # Half-way (step 55 of 10..100) cosine and linear are at the middle of 0.1 and 1.
    assert cosine[55] == pytest.approx(0.55) and linear[55] == pytest.approx(0.55)
    assert cosine[10] == linear[10] == 1.0
    # A quarter in (step 32.5), cosine is at 0.1 + 0.9 (1 + cos(pi/4))/2 = 0.868.
    assert (cosine[32] + cosine[33]) / 2 == pytest.approx(0.868, abs=1e-3)
    # wsd holds until the last fifth, then falls in a straight line.
    assert set(wsd[10:81]) == {1.0} and wsd[90] == pytest.approx(0.55)
    for course in (cosine, linear, wsd):
        assert course[100] == pytest.approx(0.1) and course[99] > 0.1


def test_the_floor_can_be_zero_and_is_a_tenth_by_default():
    args = toy_settings("--lr", "1")
    assert args.final_lr == 0.1
    assert lr_at(20, toy_settings("--lr", "1", "--min-lr", "0")) == 0.0


def test_the_rate_stays_at_the_floor_beyond_the_end():
    assert lr_at(1000, toy_settings("--lr", "1", "--min-lr", "0.2")) == pytest.approx(0.2)
