"""Muon: what it computes, what it leaves to AdamW, and that a bad update moves nothing."""

import math

import pytest
import torch
from conftest import tiny, toy_settings

from model import GPTModel
from training import optimizers as optim
from training.optimizers import Muon, Together, make_optimizer, orthogonalize, state_shapes


def model_with(*flags, arch="modern", seed=0):
    args = toy_settings("--arch", arch, "--optimizer", "muon", *flags)
    model = GPTModel(tiny(arch), seed=seed)
    return model, make_optimizer(model, args)


def give_gradients(model, seed):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("shape", [(3, 16, 16), (4, 24, 8), (2, 8, 40)])
def test_orthogonalize_keeps_singular_vectors_and_makes_the_values_about_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    found = orthogonalize(x).double()
    # In the basis of the singular vectors it is diagonal. The coefficients send every value of
    # 0.05 to 1 (relative to the norm) into 0.68 .. 1.13; smaller ones stay smaller.
    turned = u.mT @ found @ v.mT
    values = turned.diagonal(dim1=1, dim2=2)
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-4
    sizes = torch.linalg.svdvals(x.double())
    relative = sizes / sizes.norm(dim=1, keepdim=True)
    assert values.max() < 1.25 and values[relative > 0.05].min() > 0.65


@pytest.mark.parametrize(
    "precision, units, wanted",
    [
        ("fp32", True, torch.float32),
        ("auto", True, torch.float32),  # on a CPU
        ("bf16", True, torch.bfloat16),
        ("bf16", False, torch.float32),
    ],
)
def test_bfloat16_is_used_where_it_is_asked_for_and_fast(monkeypatch, precision, units, wanted):
    monkeypatch.setattr(optim, "has_bf16_units", lambda device: units)
    _, optimizer = model_with("--precision", precision)
    x = torch.randn(2, 16, 32)
    found = optimizer.parts[0].orthogonalize(x)
    assert found.dtype == wanted
    assert (found.float() - orthogonalize(x)).norm() < 0.05 * orthogonalize(x).norm()


def test_zero_gradients_give_zero():
    assert orthogonalize(torch.zeros(2, 8, 16)).abs().max() == 0


def test_steps_are_those_worked_out_one_matrix_at_a_time():
    model, optimizer = model_with("--weight-decay", "0.1", "--muon-lr-ratio", "0.5", "--lr", "0.02")
    matrices = {k: p for k, p in model.named_parameters() if k.startswith("blocks.")}
    assert len(matrices) == 8  # qkv, proj, fc, proj of two blocks
    expected = {k: p.detach().clone() for k, p in matrices.items()}
    moments = {k: torch.zeros_like(p) for k, p in matrices.items()}
    for step in range(3):
        give_gradients(model, step)
        for k, p in matrices.items():
            moments[k] = 0.95 * moments[k] + 0.05 * p.grad
            ahead = 0.95 * moments[k] + 0.05 * p.grad
            x = ahead / ahead.norm()
            x = x.T if x.shape[0] > x.shape[1] else x
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.T if p.shape[0] > p.shape[1] else x
            lr = 0.02 * 0.5
            expected[k] *= 1 - lr * 0.1
            expected[k] -= lr * 0.2 * math.sqrt(max(p.shape)) * x
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * group.get("lr_ratio", 1.0)
        optimizer.step()
    for k, p in matrices.items():
        torch.testing.assert_close(p.detach(), expected[k], rtol=1e-4, atol=1e-5)


def test_everything_else_is_updated_as_by_adamw():
    muon_model, muon = model_with(arch="gpt2")
    plain_model = GPTModel(tiny("gpt2"), seed=0)
    plain = make_optimizer(plain_model, toy_settings("--arch", "gpt2", "--optimizer", "adamw"))
    for step in range(3):
        for model, optimizer in ((muon_model, muon), (plain_model, plain)):
            give_gradients(model, step)
            optimizer.step()
    same = {
        k: torch.equal(a, b)
        for (k, a), b in zip(muon_model.named_parameters(), plain_model.parameters(), strict=True)
    }
    for k, p in muon_model.named_parameters():
        assert same[k] == (not (k.startswith("blocks.") and p.ndim == 2)), k


def test_a_bad_update_moves_neither_weights_nor_moments_nor_counts():
    model, optimizer = model_with()
    give_gradients(model, 0)
    optimizer.step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for p, s in optimizer.state.items():
        assert all(torch.equal(v, moments[p][k]) for k, v in s.items())
    give_gradients(model, 1)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.wte.weight, before["wte.weight"])


def test_the_stack_is_cut_where_it_would_take_too_much_memory(monkeypatch):
    found = []
    for most, alike in ((1 << 25, 2), (1, 1)):  # all of a shape at once; one at a time
        monkeypatch.setattr(optim, "_STACK_NUMBERS", most)
        model, optimizer = model_with()
        sizes = [len(stack) for stack in optimizer.parts[0].stacks]
        assert max(sizes) == alike and sum(sizes) == 8
        give_gradients(model, 0)
        optimizer.step()
        found.append(model.state_dict())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_state_shapes_are_those_of_the_state():
    model, optimizer = model_with(arch="gpt2")
    assert isinstance(optimizer, Together) and isinstance(optimizer.parts[0], Muon)
    give_gradients(model, 0)
    optimizer.step()
    for p in model.parameters():
        kept = {k: tuple(v.shape) for k, v in optimizer.state[p].items()}
        assert kept == state_shapes(optimizer, p, tuple(p.shape))
    sgd = torch.optim.SGD(model.parameters(), lr=1)
    assert state_shapes(sgd, model.wte.weight, (97, 16)) == {}


def test_no_rank_is_idle_while_wide_matrices_are_orthogonalized():
    # GPT-2 XL's QKV, 4800 x 1600: 4 of them are as many numbers as one rank takes at once.
    assert optim.most_alike((4800, 1600), 1) == 4
    assert optim.most_alike((4800, 1600), 8) == 8 * 4  # 4 for each of 8 ranks
    assert optim.most_alike((50_000, 10_000), 8) == 8  # never fewer than ranks
