import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import loss
from loss import VocabShard, next_token_loss, token_losses


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    monkeypatch.setattr(loss, "_CPU_LOGITS", 97 * 16)  # 16 rows of logits at a time


def problem(seed=0, B=3, T=30, C=16, V=97):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, C, generator=g).requires_grad_()
    weight = torch.randn(V, C, generator=g).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, 5:12] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels, reduction="sum"):
    logits = F.linear(hidden, weight).float()[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


def gradients(value, *inputs):
    return torch.autograd.grad(value, inputs)


def test_value_and_gradients_are_those_of_the_plain_loss():
    hidden, weight, labels = problem()
    total, count = next_token_loss(hidden, weight, labels)
    reference = plain(hidden, weight, labels)
    assert count.item() == 3 * 29 - 7
    torch.testing.assert_close(total, reference, rtol=1e-6, atol=0)
    for mine, theirs in zip(
        gradients(total / count, hidden, weight),
        gradients(reference / count, hidden, weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_autocast_keeps_sums_in_float32(dtype, bound):
    hidden, weight, labels = problem()
    with torch.autocast("cpu", dtype):
        total, _ = next_token_loss(hidden, weight, labels)
    assert total.dtype == torch.float32
    reference = plain(hidden, weight, labels)
    assert abs(total.item() / reference.item() - 1) < 1e-3
    for mine, theirs in zip(
        gradients(total, hidden, weight), gradients(reference, hidden, weight), strict=True
    ):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < bound * theirs.norm()


def test_nothing_scored_gives_zero_and_no_nan():
    hidden, weight, labels = problem()
    total, count = next_token_loss(hidden, weight, torch.full_like(labels, -100))
    assert (total.item(), count.item()) == (0, 0)
    assert all(g.abs().max() == 0 for g in gradients(total, hidden, weight))


def test_logits_never_exist_at_once(monkeypatch):
    seen = []
    original = torch.Tensor.exp_
    monkeypatch.setattr(
        torch.Tensor,
        "exp_",
        lambda self, *a, **k: (seen.append(self.shape), original(self, *a, **k))[1],
    )
    next_token_loss(*problem())
    assert len(seen) == 6 and all(shape[0] <= 16 for shape in seen)  # 87 rows in chunks of 16


def test_a_second_backward_pass_is_refused_and_not_scaled_twice():
    total, _ = next_token_loss(*problem())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_large_logits_overflow_nothing():
    hidden, weight, labels = problem()
    total, _ = next_token_loss(hidden * 100, weight * 100, labels)
    torch.testing.assert_close(total, plain(hidden * 100, weight * 100, labels), rtol=1e-6, atol=0)
    assert all(g.isfinite().all() for g in gradients(total, hidden, weight))


def test_per_token_losses_add_up_to_the_sum():
    hidden, weight, labels = problem()
    losses = token_losses(hidden, weight, labels)
    assert losses.shape == (3, 29) and not losses.requires_grad
    assert losses[0, 4:11].abs().max() == 0
    torch.testing.assert_close(
        losses.sum(), plain(hidden, weight, labels).detach(), rtol=1e-6, atol=0
    )


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels = problem()
    total, _ = next_token_loss(hidden.detach(), weight, labels)
    total.backward()
    assert hidden.grad is None and weight.grad is not None


def test_shapes_must_match():
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match="share"):
        next_token_loss(hidden, weight, labels[:, :-1])


def test_unused_columns_change_nothing(monkeypatch):
    found = []
    for unused in (0, 31):
        monkeypatch.setattr(loss, "_unused_columns", lambda weight, dtype, n=unused: n)
        hidden, weight, labels = problem()
        total, _ = next_token_loss(hidden, weight, labels)
        found.append((total.detach(), *gradients(total, hidden, weight)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unused", [0, 7])
def test_parts_of_the_head_have_the_loss_of_the_whole(monkeypatch, unused):
    # 97 ids in 4 parts are 25, 25, 25 and 22: of unequal size, each with `unused` columns beyond,
    # and chunks that would be unequal too. The parts run in threads that exchange as ranks do.
    monkeypatch.setattr(loss, "_CPU_LOGITS", 1000)
    hidden = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(97, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(3))
    labels[0, 5:9] = -100
    given = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, _ = next_token_loss(*given, labels)
    wanted = torch.autograd.grad(total, given)
    slots, meet = [None] * 4, threading.Barrier(4, timeout=20)

    def work(i):
        def gather(x):
            slots[i] = x
            meet.wait()
            found = torch.stack(list(slots))
            meet.wait()
            return found

        start = 25 * i
        part = VocabShard(start, 25, gather, lambda x: gather(x).sum(0))
        mine = hidden.clone().requires_grad_(), weight[start : start + 25].clone().requires_grad_()
        total, _ = next_token_loss(*mine, labels, part)
        with torch.no_grad():
            each = token_losses(*mine, labels, part)
        return total.detach(), each, torch.autograd.grad(total, mine)

    monkeypatch.setattr(loss, "_unused_columns", lambda weight, dtype: unused)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for own_total, each, (d_hidden, _) in found:
        assert own_total == pytest.approx(total.item(), rel=1e-6)
        assert each.sum() == pytest.approx(total.item(), rel=1e-6)
        torch.testing.assert_close(d_hidden, wanted[0], rtol=1e-4, atol=1e-5)
    d_weight = torch.cat([grads[1] for _, _, grads in found])
    torch.testing.assert_close(d_weight, wanted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unused", [0, 5])
def test_the_gradient_of_the_head_is_no_view_which_autograd_would_copy_to_add_to_it(
    monkeypatch, unused
):
    monkeypatch.setattr("loss._unused_columns", lambda weight, dtype: unused)
    hidden, weight = torch.randn(2, 5, 8), torch.randn(13, 8, requires_grad=True)
    labels, seen = torch.randint(0, 13, (2, 5)), []
    weight.register_hook(lambda g: seen.append((g._is_view(), g.shape)))
    next_token_loss(hidden, weight, labels)[0].backward()
    assert seen == [(False, (13, 8))]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_what_is_compiled_for_a_chunk_is_loss_and_gradient_of_its_used_columns(dtype, bound):
    draw = torch.Generator().manual_seed(0)
    given = (3 * torch.randn(12, 128, generator=draw)).to(dtype)  # 97 columns and 31 unused
    labels = torch.randint(97, (12,), generator=draw)
    labels[4:7] = -100
    x = given[:, :97].double().requires_grad_()
    wanted = F.cross_entropy(x, labels, reduction="none")
    (gradient,) = torch.autograd.grad(wanted.sum(), x)
    torch.testing.assert_close(loss._losses(given.clone(), labels, 97), wanted.float())
    found, gradients = loss._losses_and_gradients(given.clone(), labels, 97)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)
    assert gradients.dtype == dtype and not gradients[:, 97:].any()
    torch.testing.assert_close(gradients[:, :97].double(), gradient, rtol=bound, atol=bound / 100)


def test_the_compiled_loss_is_the_other_one():
    hidden, weight, labels = problem()
    plainly, count = next_token_loss(hidden, weight, labels)
    compiled, same_count = next_token_loss(hidden, weight, labels, fused=True)
    torch.testing.assert_close(compiled, plainly, rtol=1e-6, atol=0)
    assert count == same_count
    for mine, theirs in zip(
        gradients(compiled, hidden, weight), gradients(plainly, hidden, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    one = token_losses(hidden, weight, labels, fused=True)
    torch.testing.assert_close(one, token_losses(hidden, weight, labels), rtol=1e-5, atol=1e-6)
