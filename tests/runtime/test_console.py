"""What is written to a terminal."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT

from runtime.console import command, duration, progress
from runtime.setting_fields import UserError
from settings.paths import checkpoint_in


@pytest.mark.parametrize(
    "seconds, said",
    [(0, "0 s"), (99.4, "99 s"), (101, "2 min"), (5999, "100 min"), (6000, "1.7 h")],
)
def test_a_duration_is_said_in_the_unit_that_suits_it(seconds, said):
    assert duration(seconds) == said


def test_a_command_works_in_the_folder_where_it_is_printed(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr("shutil.which", lambda name: found.get(name))
    monkeypatch.setattr(sys, "executable", "/my env/bin/python")
    monkeypatch.chdir(ROOT)
    assert command("eval.py") == "'/my env/bin/python' eval.py"
    assert command("a.py", 2) == (
        "'/my env/bin/python' -m torch.distributed.run --nproc-per-node=2 a.py"
    )
    found |= {name: f"/my env/bin/{name}" for name in ("python", "torchrun")}
    assert command("eval.py") == "python eval.py"
    assert command("train_ddp.py", 3) == "torchrun --nproc-per-node=3 train_ddp.py"
    found["python"] = "/usr/bin/python"  # another one, without these packages
    assert command("eval.py") == "'/my env/bin/python' eval.py"
    monkeypatch.chdir(tmp_path)
    assert command("eval.py").split("' ")[1] == str(Path(ROOT) / "eval.py")


def test_a_folder_of_checkpoints_stands_for_the_one_in_it(tmp_path):
    one, other = tmp_path / "minigpt_single.pt", tmp_path / "minigpt_ddp.pt"
    assert checkpoint_in(str(tmp_path)) == str(one)  # whose absence is then said
    other.touch()
    assert checkpoint_in(str(tmp_path)) == str(other)
    assert checkpoint_in(str(one)) == str(one)
    one.touch()
    with pytest.raises(UserError, match=r"minigpt_single\.pt and .*minigpt_ddp\.pt; say which"):
        checkpoint_in(str(tmp_path))


def test_long_work_says_how_far_it_is_in_few_lines(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("runtime.console.time.monotonic", lambda: clock[0])

    def items(n):
        for i in range(n):
            clock[0] = float(i)  # a second each
            yield i

    assert list(progress(items(10), "evaluating", 10)) == list(range(10))
    assert capsys.readouterr().err == ""  # 9 s
    clock[0] = 0.0
    list(progress(items(100), "evaluating", 100, quiet=True))
    assert capsys.readouterr().err == ""
    clock[0] = 0.0
    list(progress(items(100), "evaluating", 100))
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 10% in 10 s, about 90 s to go",
        "evaluating: 20% in 20 s, about 80 s to go",
        "evaluating: 40% in 40 s, about 60 s to go",
        "evaluating: 80% in 80 s, about 20 s to go",
    ]
