"""Checkpoints of earlier commits go on: a setting that was in one may not be gone.

Those of 0ea69bb are from before files and names were moved, that of ad223b8 has settings of --minutes.
They are of step 3 of 6, made on a CPU with torch 2.13 by

    python train_minimal.py --preset toy --use-toy-data --vocab-size 97 --n-layers 1 --n-heads 2
        --d-model 8 --d-ff 16 --seq-len 16 --val-max-tokens 1000 --num-steps 6 --save-steps 3
        --eval-steps 3 --warmup-steps 1 --device cpu --sample-tokens 1

with --arch gpt2, or with --arch modern --optimizer muon --ngram-rows 50 --dropout 0, for `rows` also
--ngram-optimizer rmsprop --ngram-longest 5 --lr-width 64 --keep-every 3. The losses are what they
went on to there. Since then the loss adds the same numbers in another order.
"""

import re
import shutil
from pathlib import Path

import pytest

from checkpoint import load_model
from reporting.metrics_file import read_records

FOLDER = Path(__file__).parent
OLD = {
    "written_by_0ea69bb/gpt2.pt": 4.576195546933958,
    "written_by_0ea69bb/modern.pt": 4.574800579636185,
    "written_by_ad223b8/rows.pt": 4.575343195501868,
}


@pytest.mark.parametrize("name", OLD)
def test_a_run_of_an_earlier_commit_goes_on_to_the_loss_that_it_had(program, name):
    (program.folder / "checkpoints").mkdir()
    shutil.copy(FOLDER / name, program.folder / "checkpoints/minigpt_single.pt")
    out = program("train_minimal.py", "--resume")
    here = r"(platform|python) was \S+, is [^\s;]+"  # where the test runs, which may be elsewhere
    out = re.sub(rf"changed since it was saved: {here}(; {here})?\n", "", out)
    assert "at step 3" in out and "changed since" not in out
    record = read_records(program.folder / "logs/train_minimal.jsonl")[-1]
    assert (record["event"], record["step"]) == ("eval", 6)
    assert record["val_loss"] == pytest.approx(OLD[name], rel=1e-8)
    trained = load_model(FOLDER / name)
    assert trained.tokenizer is None
    assert trained.settings.model.arch == ("gpt2" if "gpt2" in name else "modern")
