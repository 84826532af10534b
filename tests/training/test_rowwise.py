"""Row-wise RMSprop of the n-gram embedding, and the rates of models of other widths."""

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from conftest import CPU, tiny, toy_settings

from benchmarks.common import on_ranks
from model import GPTModel
from parallel.context import SINGLE_PROCESS
from parallel.parallel_model import ParallelModel
from training.optimizers import (
    RowwiseRMSprop,
    Together,
    make_optimizer,
    part_of_rate,
    state_shapes,
)
from training.step import RunState, train_step

FLAGS = ["--arch", "modern", "--optimizer", "muon", "--ngram-rows", "60", "--lr", "0.02"]
FLAGS += "--ngram-optimizer rmsprop --ngram-weight-decay 0.5 --ngram-longest 5".split()
FLAGS += ["--vocab-size", "97"]


def table_with(rows=6, width=4, beta2=0.9, lr=0.1, decay=0.5):
    args = toy_settings("--beta2", str(beta2), "--lr", str(lr))
    args = dataclasses.replace(args, ngram_weight_decay=decay)
    table = torch.nn.Parameter(torch.randn(rows, width, generator=torch.Generator().manual_seed(1)))
    return table, RowwiseRMSprop([table], args)


def gradient(seed, rows, width=4):
    """A dense gradient of 6 rows, of which only `rows` are not 0."""
    dense = torch.zeros(6, width)
    draw = torch.Generator().manual_seed(seed)
    dense[rows] = torch.randn(len(rows), width, generator=draw)
    return dense


@pytest.mark.parametrize("sparse", [False, True])
def test_steps_are_those_worked_out_one_row_at_a_time(sparse):
    table, optimizer = table_with()
    expected, mean_square = table.detach().clone().double(), {}
    for step, rows in enumerate(([0, 2], [2, 5], [2], [0, 2, 5])):
        dense = gradient(step, rows)
        table.grad = dense.to_sparse(1) if sparse else dense.clone()
        optimizer.step()
        for row in rows:
            g = dense[row].double()
            new = float((g * g).mean())
            old = mean_square.get(row)
            mean_square[row] = new if old is None else 0.9 * old + 0.1 * new
            expected[row] -= 0.1 * (g / math.sqrt(mean_square[row]) + 0.5 * expected[row])
        torch.testing.assert_close(table.detach().double(), expected, rtol=1e-5, atol=1e-6)
    kept = optimizer.state[table]["mean_square"].flatten()
    assert kept[[1, 3, 4]].tolist() == [0, 0, 0]  # never seen


@pytest.mark.parametrize("sparse", [False, True])
def test_a_bad_update_moves_no_row(sparse):
    table, optimizer = table_with()
    table.grad = gradient(0, [1, 2])
    optimizer.step()
    before, kept = table.detach().clone(), optimizer.state[table]["mean_square"].clone()
    bad = gradient(1, [1, 3]) * math.nan
    bad[[0, 2, 4, 5]] = 0
    table.grad = bad.to_sparse(1) if sparse else bad
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(table, before)
    assert torch.equal(optimizer.state[table]["mean_square"], kept)


def one_step(sparse):
    args = toy_settings(*FLAGS)
    model = GPTModel(args.model, seed=0)
    optimizer = make_optimizer(model, args)
    assert model.ngrams.sparse
    model.ngrams.sparse = sparse
    state = RunState.fresh(CPU)
    draw = torch.Generator().manual_seed(3)
    norms = []
    for _ in range(3):
        batch = torch.randint(0, 97, (args.global_batch_size, args.seq_len), generator=draw)
        norms.append(float(train_step(model, optimizer, batch, args, state, CPU).grad_norm))
    return model, optimizer, norms


def test_a_sparse_gradient_gives_the_steps_of_a_dense_one():
    (a, optimizer, norms), (b, _, dense_norms) = one_step(True), one_step(False)
    assert norms == pytest.approx(dense_norms, rel=1e-5)  # each row counts once in the norm
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    assert isinstance(optimizer, Together)
    for p in a.parameters():
        kept = {k: tuple(v.shape) for k, v in optimizer.state[p].items()}
        assert kept == state_shapes(optimizer, p, tuple(p.shape))


def test_the_gradient_norm_is_clipped_to_its_limit_where_a_gradient_is_sparse():
    rows = torch.nn.Embedding(6, 4, sparse=True)
    other = torch.nn.Parameter(torch.zeros(3))
    table = rows.weight
    rows(torch.tensor([1, 1, 2])).sum().backward()  # row 1 twice
    other.grad = torch.full((3,), 2.0)
    norm = SINGLE_PROCESS.clip([table, other], 1.0)
    assert float(norm) == pytest.approx(math.sqrt(4 * 4 + 4 + 3 * 4))
    left = torch.cat((table.grad.to_dense().flatten(), other.grad))
    assert float(left.norm()) == pytest.approx(1, rel=1e-4)
    assert float(left[4]) == pytest.approx(2 * float(left[8]))


def test_rates_fall_with_the_width_where_lr_is_meant_for_another():
    def ratios(optimizer, width, lr_width):
        flags = ["--arch", "modern", "--optimizer", optimizer]
        flags += ["--muon-lr-ratio", "0.4"] if optimizer == "muon" else []
        args = toy_settings(*flags, "--d-model", str(width), "--lr-width", str(lr_width))
        model = GPTModel(tiny("modern", ngram_rows=50), seed=0)
        return {n: part_of_rate(n, p.ndim, args) for n, p in model.named_parameters()}

    for optimizer, matrices in (("adamw", 1.0), ("muon", 0.4)):
        assert {n: r for n, r in ratios(optimizer, 256, 0).items() if "blocks" not in n} == {
            "wte.weight": 1.0, "ngrams.weight": 1.0, "lm_head.weight": 1.0,
        }  # fmt: skip
        for name, ratio in ratios(optimizer, 256, 64).items():
            shrunk = matrices * (0.25 if optimizer == "adamw" else 0.5)
            wanted = {"wte.weight": 1.0, "ngrams.weight": 1.0, "lm_head.weight": 0.25}
            assert ratio == wanted.get(name, shrunk), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_group_of_the_optimizer_has_the_rate_of_its_parameters(optimizer):
    flags = ["--arch", "modern", "--optimizer", optimizer, "--d-model", "256", "--lr-width", "64"]
    args = toy_settings(*flags, "--ngram-rows", "50", "--ngram-optimizer", "rmsprop")
    model = GPTModel(args.model, seed=0)
    made = make_optimizer(model, args)
    found = {id(p): g["lr_ratio"] for g in made.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert found[id(p)] == part_of_rate(name, p.ndim, args), name


def gradient_over_ranks(ranks):
    """Of each rank: the gradient of the n-gram embedding under DDP, and that of its batch alone."""
    args = toy_settings(*FLAGS, "--ngram-rows", "2000")
    draw = torch.Generator().manual_seed(ranks.rank)
    batch = torch.randint(0, 97, (2, 2, 16), generator=draw)  # two micro-batches

    def gradient(model, net, no_sync=nullcontext):
        for ids, context in zip(batch, (no_sync, nullcontext), strict=True):
            with context():
                net(ids, labels=ids, reduction="sum", return_logits=False)[1].backward()
        grad = model.ngrams.weight.grad
        return grad.is_sparse, len(grad.coalesce().indices()[0]), grad.to_dense()

    together, alone = GPTModel(args.model, seed=0), GPTModel(args.model, seed=0)
    parallel = ParallelModel(together, args, CPU, ranks)
    make_optimizer(together, args, parallel)
    make_optimizer(alone, args)
    found = [None, None]
    dist.all_gather_object(
        found, (gradient(together, parallel.net, parallel.no_sync), gradient(alone, alone))
    )
    return found


def test_on_cpus_ddp_exchanges_the_rows_in_use_alone():
    (both, a), (same, b) = on_ranks(2, gradient_over_ranks)
    assert both[0] and torch.equal(both[2], same[2])
    assert max(a[1], b[1]) < both[1] <= a[1] + b[1]
    torch.testing.assert_close(both[2], (a[2] + b[2]) / 2)
