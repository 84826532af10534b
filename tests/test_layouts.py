"""Every layout is the same training: see layouts.py, whose main program prints these as tables."""

from collections import Counter

import pytest
import torch
from layouts import (
    ADAMW,
    BREAKAGES,
    LAYOUTS,
    MUON,
    SGD,
    all_layouts,
    by_world,
    compare,
    count_collectives,
    read_all,
    train_all,
    write_all,
)

from benchmarks.common import on_ranks

SOME = ["one process", "ddp 2", "fsdp 2", "tp 2", "fsdp 2 x tp 2", "ddp 2 x tp 2"]


@pytest.fixture(scope="module")
def with_sgd():
    return {row["layout"]: row for row in compare(all_layouts(SGD, steps=30))}


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


@pytest.mark.parametrize("kind", [ADAMW, MUON], ids=["adamw", "muon"])
def test_other_optimizers_have_the_same_losses_in_every_layout(kind):
    for row in compare(by_world(train_all, SOME, kind, 20)):
        assert row["losses"] < 1e-4, row


@pytest.mark.parametrize("precision", ["--bf16", "--precision fp16"])
def test_half_precision_is_that_of_one_process(precision):
    # Products in 16 bits have 3 digits, and sums of their parts over ranks are rounded again.
    for row in compare(by_world(train_all, SOME, f"{ADAMW} {precision}", 10)):
        assert row["losses"] < 2e-3 and row["norms"] < 5e-2, row
        if row["layout"] in ("ddp 2", "fsdp 2"):  # the same products
            assert row["losses"] < 2e-4 and row["norms"] < 1e-2, row


@pytest.mark.parametrize(
    "broken, layout",
    [
        ("gradients of shared inputs", "tp 2"),
        ("outputs of second parts", "tp 2"),
        ("gradient of the loss's input", "tp 2"),
        ("gradients of data-parallel ranks", "ddp 2"),
        ("gradients of data-parallel ranks", "fsdp 2"),
        ("norm over parts", "fsdp 2"),
    ],
)
def test_a_sum_over_ranks_that_is_left_out_shows(broken, layout):
    assert broken in BREAKAGES
    found = on_ranks(1, train_all, ["one process"], SGD, 5)
    found |= on_ranks(2, train_all, [layout], SGD, 5, broken)
    row = compare(found)[1]
    assert max(row["losses"], row["weights"], row["norms"]) > 1e-4, row


def test_gradients_are_exchanged_once_per_update():
    names = [n for n in LAYOUTS if LAYOUTS[n][0] == 2]
    found = by_world(count_collectives, names)
    # One bucket of gradients, whatever the accumulation.
    assert found["ddp 2"] == found["ddp 2, accumulation 2"] == Counter(all_reduce=1)
    scatters = [n for n in found["fsdp 2"] if "reduce_scatter" in n]
    assert scatters and all(
        found["fsdp 2"][n] == found["fsdp 2, accumulation 2"][n] for n in scatters
    )


@pytest.mark.parametrize("kind", [ADAMW, MUON], ids=["adamw", "muon"])
def test_each_layout_reads_what_each_other_wrote(tmp_path, kind):
    by_world(write_all, SOME, kind, str(tmp_path))
    found = by_world(read_all, SOME, kind, str(tmp_path))
    assert found == {name: sorted(SOME) for name in SOME}
    assert torch.load(tmp_path / "tp 2.pt", weights_only=True)["model"]["wte.weight"].shape == (
        97,
        32,
    )
