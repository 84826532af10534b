from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from test_report import write_metrics

from reporting.plots import _limits, draw_losses
from reporting.run_curves import RunCurves, read_run


@pytest.mark.parametrize(
    "train, val, shown",
    [
        ([9.0, 4.0, 3.0, 2.9, 2.8, 2.8, 2.7, 2.7, 2.6, 2.6, 2.5, 2.5], [(0, 9.5)], True),
        ([3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3, 2.2, 2.1, 2.0, 1.9], [(0, 3.1)], False),
        ([9.0, 1.0], [], False),
        ([2.0] * 12, [(0, None), (12, 2.0)], False),
    ],
)
def test_first_losses_that_hide_the_others_are_left_out_of_the_picture(train, val, shown):
    run = RunCurves("a", Path())
    run.train = {"step": list(range(1, len(train) + 1)), "train_loss": train}
    run.evals = {"step": [step for step, _ in val], "val_loss": [x for _, x in val]}
    found = _limits([run])
    assert bool(found) is shown
    if found:
        assert found == pytest.approx((2.5 - 0.075, 4.0 + 0.075))


@pytest.mark.parametrize("count", [1, 2])
def test_the_picture_shows_both_losses_of_each_run(tmp_path, count):
    runs = [read_run(write_metrics(tmp_path / f"{i}.jsonl", lr=i)) for i in range(count)]
    draw_losses(runs, tmp_path / "m.png")
    pixels = matplotlib.image.imread(tmp_path / "m.png")[..., :3]
    # Colors 0, 1 and 2 of matplotlib's cycle. One run: train and validation; two: one each.
    found = [
        bool((np.abs(pixels * 255 - color).max(-1) < 2).any())
        for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (0x2C, 0xA0, 0x2C))
    ]
    assert found == [True, count == 1, count == 2]


def test_a_run_without_records_has_a_picture(tmp_path):
    draw_losses([read_run(write_metrics(tmp_path / "a.jsonl", steps=0))], tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 1000
