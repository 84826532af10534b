"""Checkpoints that the commit 0ea69bb wrote, before files and names were moved, go on.

They are of step 3 of 6, made on a CPU with torch 2.13 by

    python train_minimal.py --preset toy --use-toy-data --vocab-size 97 --n-layers 1 --n-heads 2
        --d-model 8 --d-ff 16 --seq-len 16 --val-max-tokens 1000 --num-steps 6 --save-steps 3
        --eval-steps 3 --warmup-steps 1 --device cpu --sample-tokens 1

with --arch gpt2, or with --arch modern --optimizer muon --ngram-rows 50 --dropout 0. The losses are
those that this commit went on to. Since then the loss adds the same numbers in another order.
"""

import re
import shutil
from pathlib import Path

import pytest

from checkpoint import load_model
from reporting.metrics_file import read_records

FOLDER = Path(__file__).parent / "written_by_0ea69bb"


@pytest.mark.parametrize("arch, loss", [("gpt2", 4.576195546933958), ("modern", 4.574800579636185)])
def test_a_run_of_before_the_move_goes_on_to_the_loss_that_it_had(program, arch, loss):
    (program.folder / "checkpoints").mkdir()
    shutil.copy(FOLDER / f"{arch}.pt", program.folder / "checkpoints/minigpt_single.pt")
    out = program("train_minimal.py", "--resume")
    out = re.sub(r"changed since it was saved: platform was \S+, is \S+\n", "", out)
    assert "at step 3" in out and "changed since" not in out
    record = read_records(program.folder / "logs/train_minimal.jsonl")[-1]
    assert (record["event"], record["step"]) == ("eval", 6)
    assert record["val_loss"] == pytest.approx(loss, rel=1e-8)
    trained = load_model(FOLDER / f"{arch}.pt")
    assert trained.settings.model.arch == arch and trained.tokenizer is None
