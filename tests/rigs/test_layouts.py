"""Every layout is the same training: see layouts.py, whose main program prints these as tables."""

import copy
import math
from collections import Counter

import pytest
import torch

from checkpoint import build_checkpoint
from tests.rigs.layouts import (
    ADAMW,
    BREAKAGES,
    LAYOUTS,
    MUON,
    SGD,
    Run,
    break_all,
    by_world,
    compare,
    count_collectives,
    read_all,
    train_all,
    write_all,
)

# The first test waits for the runs of all layouts: two minutes alone, more beside other work.
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

SOME = ["one process", "ddp 2", "ddp 3", "fsdp 2", "tp 2", "fsdp 2 x tp 2"]
# With 3 ranks and 2 matrices of each shape, one has no matrix for Muon to orthogonalize.
KINDS = {"adamw": ADAMW, "muon": MUON}
HALF = {"bf16": f"{ADAMW} --bf16", "fp16": f"{ADAMW} --precision fp16"}


def everything(ranks, names, folder):
    """All that is asked of the layouts of one size, in one start of that many processes."""
    some = [name for name in names if name in SOME]
    found = {"sgd": train_all(ranks, names, SGD, 30)}
    for label, kind in {**KINDS, **HALF}.items():
        found[label] = train_all(ranks, some, kind, 12)
    for label, kind in KINDS.items():
        write_all(ranks, some, kind, f"{folder}/{label}")
    found["uneven"] = {name: uneven(ranks, LAYOUTS[name][1]) for name in names}
    if ranks.world == 2:
        found["collectives"] = count_collectives(ranks, names)
        found["broken"] = break_all(ranks)
        found["poisoned"] = {
            f"{name} {label}": poisoned(ranks, f"{kind} {LAYOUTS[name][1]}")
            for name in ("fsdp 2", "tp 2")
            for label, kind in KINDS.items()
        }
    return {(ranks.world, key): value for key, value in found.items()}


def read_both(ranks, names, folder):
    """By layout: the files of each kind of optimizer that it has bit for bit."""
    both = {
        label: read_all(ranks, names, kind, f"{folder}/{label}") for label, kind in KINDS.items()
    }
    return {name: {label: both[label][name] for label in both} for name in names}


def uneven(ranks, flags):
    """Validation of 5 windows, one batch: the other ranks have none left."""
    return Run(ranks, f"{SGD} {flags} --val-max-tokens {15 * 5 + 1}").evaluate()


def poisoned(ranks, flags):
    """What a NaN in one gradient of the last rank changes in an update; how many were skipped."""
    run = Run(ranks, flags)
    run.step()

    def state():
        kept = build_checkpoint(
            run.model, run.optimizer, run.state, run.args, gather=run.parallel.gather
        )
        return copy.deepcopy({k: kept[k] for k in ("model", "optimizer")})

    before, clip = state(), run.parallel.clip

    def with_nan(parameters, limit):
        if ranks.rank == ranks.world - 1:
            grad = next(p.grad for p in run.model.parameters() if p.grad is not None)
            (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[0] = math.nan
        return clip(parameters, limit)

    run.parallel.clip = with_nan
    run.step()
    after = state()
    changed = [k for k, v in before["model"].items() if not torch.equal(v, after["model"][k])]
    changed += [
        f"{name} {k}"
        for name, kept in before["optimizer"].items()
        for k, v in kept.items()
        if not torch.equal(v, after["optimizer"][name][k])
    ]
    return changed, [float(run.state.bad_in_row), run.state.step]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("layouts")
    for label in KINDS:
        (made / label).mkdir()
    return made


@pytest.fixture(scope="module")
def found(folder):
    """What everything() found, over all sizes, by what was asked."""
    merged = {}
    for (_, key), value in by_world(everything, list(LAYOUTS), str(folder)).items():
        merged.setdefault(key, {}).update(value)
    return merged


@pytest.fixture(scope="module")
def with_sgd(found):
    return {row["layout"]: row for row in compare(found["sgd"])}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_norms_and_weights_are_those_of_one_process(with_sgd, layout):
    row = with_sgd[layout]
    assert row["losses"] < 1e-6 and row["norms"] < 1e-5 and row["weights"] < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_is_that_of_one_process(with_sgd, layout):
    # Without split layers each window's loss is the same bits; with them, float32 rounding inside
    # the layers is left, which averages to nothing over many tokens: here there are 2999.
    row = with_sgd[layout]
    assert row["val_tokens"] == 2999
    assert row["val_loss"] < (1e-8 if "tp" in layout else 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_a_window_left_waits_for_nobody(found, layout):
    loss, tokens = found["uneven"][layout]
    assert tokens == 75 and loss == pytest.approx(found["uneven"]["one process"][0], rel=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_other_optimizers_have_the_same_losses_in_every_layout(found, kind):
    assert len(found[kind]) == len(SOME)
    for row in compare(found[kind]):
        assert row["losses"] < 1e-4, row


@pytest.mark.parametrize("precision", HALF)
def test_half_precision_is_that_of_one_process(found, precision):
    # Products in 16 bits have 3 digits, and sums of their parts over ranks are rounded again.
    for row in compare(found[precision]):
        same_products = row["layout"] in ("ddp 2", "ddp 3", "fsdp 2")
        assert row["losses"] < (2e-4 if same_products else 2e-3), row
        assert row["norms"] < (1e-2 if same_products else 5e-2), row


@pytest.mark.parametrize("what", BREAKAGES)
def test_a_sum_over_ranks_that_is_left_out_shows(found, what):
    one = {k: v[:5] for k, v in found["sgd"]["one process"].items() if k in ("losses", "norms")}
    broken = found["broken"][what]
    apart = [
        abs(a - b) / a for k in one for a, b in zip(one[k], broken[k], strict=True)
    ]  # 1e-6 where nothing is left out: see above
    assert max(apart) > 1e-3


def test_gradients_are_exchanged_once_per_update(found):
    counts = found["collectives"]
    # One bucket of gradients, whatever the accumulation.
    assert counts["ddp 2"] == counts["ddp 2, accumulation 2"] == Counter(all_reduce=1)
    # The sums of two blocks and of the rest, and one for the norm.
    for layout in ("fsdp 2", "fsdp 2, accumulation 2"):
        assert (counts[layout]["reduce_scatter"], counts[layout]["all_reduce"]) == (3, 1)
    # The embedding; in each of two blocks, forward and backward, one for each pair of matrices;
    # the loss's gradient; the norm.
    assert counts["tp 2"]["all_reduce"] == 1 + 2 * 2 * 2 + 1 + 1


@pytest.mark.parametrize("case", [f"{n} {k}" for n in ("fsdp 2", "tp 2") for k in KINDS])
def test_a_nan_on_one_rank_is_skipped_by_all(found, case):
    assert found["poisoned"][case] == ([], [1.0, 2])


def test_each_layout_reads_what_each_other_wrote(found, folder):
    read = by_world(read_both, SOME, str(folder))
    assert len(read) == len(SOME)
    for reader, kinds in read.items():
        for label, files in kinds.items():
            assert set(files) == set(SOME), (reader, label)
    tree = torch.load(folder / "adamw/tp 2.pt", weights_only=True)
    assert tree["model"]["wte.weight"].shape == (97, 32)
