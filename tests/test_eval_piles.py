"""eval.py on many checkpoints: which it evaluates, each once, and what it writes about them."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from helpers import TINY, Run, content

from checkpoint import read_checkpoint
from checkpointing.find import Watch, choose_checkpoints, files_of, is_foreign
from checkpointing.writing import write_checkpoint
from reporting.evaluation_table import Evaluation, in_order
from reporting.evaluations import EvalReport
from reporting.metrics_file import read_records
from runtime.files import write_atomically
from runtime.setting_fields import UserError
from training.evaluation import EvalResult
from training.tasks import TaskScores

FLAGS = f"{TINY} --global-batch-size 4 --warmup-steps 1 --sample-tokens 1 --val-max-tokens 300"


def trained(program, path, *flags, steps=6):
    """Trains, and saves at steps 2, 4 and so on."""
    more = ["--num-steps", str(steps), "--save-steps", "2", "--eval-steps", "3"]
    program("train_minimal.py", *FLAGS.split(), *more, "--checkpoint-path", path, *flags)


def evaluated(program, *flags, code=0, **options):
    """(standard output, standard error) of eval.py, which must end with the exit code."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), "--checkpoint-path", *flags],
        cwd=program.folder, env=program.env, capture_output=True, text=True, timeout=90, **options,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def records(program):
    return [json.loads(x) for x in (program.folder / "logs/eval.jsonl").read_text().splitlines()]


def steps_of(program):
    return [r["step"] for r in records(program)]


@pytest.fixture
def saved():
    """Writes the state of a run at some step, and returns that path."""
    run = Run("--num-steps", "9")

    def save(path, step, run_id="one"):
        run.state.step, run.state.run_id = step, run_id
        with torch.no_grad():
            run.model.wte.weight.fill_(step / 10)
        path.parent.mkdir(exist_ok=True)
        write_checkpoint(path, content(run))
        return str(path)

    return save


@pytest.mark.long
def test_folders_and_patterns_give_one_sorted_table_and_the_files_agree(program):
    trained(program, "runs/b.pt", "--keep-every", "2")
    trained(program, "runs/a.pt", "--seed", "5")
    evaluated(program, "runs/b.pt", "--csv", "one.csv")  # a single one, for comparison
    (alone,) = records(program)
    tables = ("--csv", "t/t.csv", "--json", "t/t.json")
    out, err = evaluated(program, "runs/b*.pt", "runs", *tables)
    assert err == ""
    rows = [line.split() for line in out.splitlines() if re.match(r"\S+\.pt  ", line)]
    # run b: kept 2, 4 and 6, best 3, latest 6, previous 4; run a: best 3 or 6, latest 6, previous 4
    assert [row[1] for row in rows if "/b." in row[0]] == ["2", "3", "4", "6"]
    assert [row[1] for row in rows if "/a." in row[0]] in (["3", "4", "6"], ["4", "6"])
    assert all("/b." in row[0] for row in rows[:4])
    assert "runs/b.step000006.pt: the same state as runs/b.pt" in out
    written = records(program)[1:]
    assert {k: written[0][k] for k in alone if k not in ("time", "also")} == {
        k: v for k, v in alone.items() if k not in ("time", "also")
    }
    of_file = {r["checkpoint"]: r for r in written}
    with open(program.folder / "t/t.csv", newline="") as file:
        as_csv = list(csv.DictReader(file))
    as_json = json.loads((program.folder / "t/t.json").read_text())
    assert [r["checkpoint"] for r in as_csv] == [r["checkpoint"] for r in as_json]
    assert [r["checkpoint"] for r in as_json] == [row[0] for row in rows]
    for a, b, row in zip(as_csv, as_json, rows, strict=True):
        r = of_file[b["checkpoint"]]
        for column, name in (("avg_loss", "loss"), ("loss_se",) * 2, ("ppl",) * 2, ("tokens",) * 2):
            assert float(a[column]) == b[column] == r[name]
        assert (int(a["step"]), a["run_id"]) == (b["step"], b["run_id"]) == (r["step"], r["run_id"])
        assert float(a["seconds"]) == b["seconds"] == r["time"]["seconds"] > 0
        assert a["bpb"] == "" and b["bpb"] is r["bpb"] is None
        assert (a["also"], b["also"]) == ("; ".join(r["also"]), r["also"])
        assert row[2:7] == [
            f"{r['loss']:.6f}",
            f"{r['loss_se']:.6f}",
            f"{r['ppl']:.4f}",
            "n/a",
            "299",
        ]
    assert "wrote logs/eval.log, logs/eval.jsonl, t/t.csv, t/t.json, logs/eval.png" in out
    assert (program.folder / "logs/eval.png").read_bytes().startswith(b"\x89PNG")
    assert not list(program.folder.glob("**/*.tmp"))


@pytest.mark.long
def test_a_damaged_one_does_not_cost_the_others_but_the_exit_code(program):
    trained(program, "runs/a.pt")
    whole = (program.folder / "runs/a.pt").read_bytes()
    (program.folder / "runs/cut.pt").write_bytes(whole[: len(whole) // 2])
    (program.folder / "runs/notes.txt").write_text("try a higher rate")
    out, _ = evaluated(program, "runs", code=2)
    assert set(steps_of(program)) == {3, 4, 6} or set(steps_of(program)) == {4, 6}
    assert "not evaluated: runs/cut.pt: no checksum at its end" in out
    assert "no run of this program has saved them (1): runs/notes.txt" in out
    for alone in ("runs/cut.pt", "runs/notes.txt"):
        out, err = evaluated(program, alone, code=2)
        assert out == "" and err.startswith(f"error: {alone}: no checksum") and err.count("\n") == 1
    out, err = evaluated(program, "no*.pt", code=2)
    assert err == "error: no*.pt: no checkpoint there\n"


@pytest.mark.long
def test_ranks_evaluate_the_same_pile(program):
    trained(program, "runs/a.pt")
    evaluated(program, "runs")
    alone = records(program)
    program("eval.py", "--checkpoint-path", "runs", ranks=2)
    both = records(program)[len(alone) :]
    assert [(r["checkpoint"], r["step"]) for r in both] == [
        (r["checkpoint"], r["step"]) for r in alone
    ]
    for a, b in zip(alone, both, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    (program.folder / "runs/cut.pt").write_bytes(b"PK\3\4 and no more")
    out = program("eval.py", "--checkpoint-path", "runs", ranks=2, ok=False)
    assert "not evaluated: runs/cut.pt" in out
    assert len(records(program)) == 3 * len(alone)
    out = program("eval.py", "--checkpoint-path", "runs", "--watch", ranks=2, ok=False)
    assert out.count("error: --watch works in one process; start eval.py without torchrun") == 1


def test_each_file_is_found_once_and_what_holds_no_state_is_not(tmp_path, saved):
    one = saved(tmp_path / "a.pt", 1)
    os.link(one, tmp_path / "a.best.pt")
    other = saved(tmp_path / "deeper/b.pt", 2)
    shutil.copy(one, tmp_path / "a.pt.123.tmp")  # a save under way
    (tmp_path / "a.pt.lock").write_text("process 1 on host")
    (tmp_path / ".hidden").touch()
    (tmp_path / "gone.pt").symlink_to("nowhere")
    best = str(tmp_path / "a.best.pt")
    assert [f.names for f in files_of([str(tmp_path)])] == [(one, best)]
    assert [f.names for f in files_of([f"{tmp_path}/*"])] == [(one, best), (other,)]
    found = files_of([best, one, str(tmp_path / "deeper"), f"{tmp_path}/**/*.pt"])
    assert [(f.names, f.named) for f in found] == [((best, one), True), ((other,), False)]
    strange = tmp_path / "[x].pt"
    shutil.copy(one, strange)
    assert [f.names for f in files_of([str(strange)])] == [(str(strange),)]  # no pattern


def test_what_is_damaged_is_told_from_what_is_foreign(tmp_path, saved):
    whole = open(saved(tmp_path / "a.pt", 1), "rb").read()
    torch.save({"model": torch.zeros(3)}, tmp_path / "other.pt")
    cases = {
        "other.pt": True,  # a whole archive without a checksum
        "text.txt": b"a text",
        "empty": b"",
        "whole.pt": whole,
        "flipped.pt": b"X" + whole[1:],
        "middle.pt": whole[:3000] + b"X" + whole[3001:],
        "cut.pt": whole[:-1],
        "unsealed.pt": whole[:-71],
        "short.pt": whole[:3],
        "empty.pt": b"",
    }
    for name, data in cases.items():
        if data is not True:
            (tmp_path / name).write_bytes(data)
    foreign = [name for name in cases if is_foreign(str(tmp_path / name))]
    assert foreign == ["other.pt", "text.txt", "empty"]
    assert not is_foreign(str(tmp_path / "none"))
    (tmp_path / "only").mkdir()
    (tmp_path / "only/text.txt").touch()
    with pytest.raises(UserError, match=r"only: no checkpoint there; files left out.*text\.txt"):
        choose_checkpoints([str(tmp_path / "only")])
    with pytest.raises(UserError, match=r"none\.pt: no such checkpoint"):
        choose_checkpoints([str(tmp_path / "a.pt"), str(tmp_path / "none.pt")])


@pytest.mark.long
def test_a_copy_is_evaluated_once_and_other_weights_of_the_same_step_are_not(program):
    trained(program, "runs/a.pt")
    folder = program.folder / "runs"
    shutil.copy(folder / "a.pt", folder / "copy.pt")
    changed = read_checkpoint(folder / "a.pt")
    changed["model"]["wte.weight"] += 0.5
    write_checkpoint(folder / "other.pt", changed)
    out, _ = evaluated(program, "runs/a.pt", "runs/copy.pt", "runs/other.pt")
    assert [r["checkpoint"] for r in records(program)] == ["runs/a.pt", "runs/other.pt"]
    assert steps_of(program) == [6, 6]
    assert "runs/copy.pt: the same state as runs/a.pt" in out


def result(loss):
    return EvalResult(loss, 0.1, 1.0, None, 9)


def test_the_fields_of_the_records_are_those_of_the_document():
    page = (ROOT / "docs/metrics.md").read_text().split("\n# eval.jsonl\n")[1]
    more = {"sources": {"b.npy": result(2.0)}, "tasks": {"mine": TaskScores({"acc": 0.5})}}
    record = Evaluation("a.pt", "a", 1, result(1.0), **more).record
    assert record.keys() - {"event"} == set(re.findall(r"^\| `(\w+)` \|", page, re.M))


def test_runs_stay_together_in_the_order_in_which_they_came():
    found = [
        Evaluation(f"{run}{step}", run, step, result(1.0))
        for run, step in (("z", 20), ("a", 4), ("z", 3), ("a", 100))
    ]
    assert [e.checkpoint for e in in_order(found)] == ["z3", "z20", "a4", "a100"]


@pytest.mark.parametrize("steps, drawn", [((1, 2), False), ((1, 2, 3), True)])
def test_a_run_with_more_than_two_checkpoints_has_a_curve(tmp_path, steps, drawn):
    found = [Evaluation("a.pt", "a", s, result(3.0 - s)) for s in steps]
    found += [Evaluation("b.pt", "b", s, result(3.5 - s)) for s in (1, 2)]  # too few
    EvalReport(str(tmp_path)).finish(found)
    assert (tmp_path / "eval.png").exists() is drawn


@pytest.mark.long
def test_tables_that_cannot_be_written_are_said_before_anything_is_evaluated(program):
    trained(program, "a.pt")
    (program.folder / "file").touch()
    out, err = evaluated(program, "a.pt", "--csv", "file/t.csv", code=2)
    assert out == "" and "cannot write" in err and err.count("\n") == 1
    out, err = evaluated(program, "a.pt", "--csv", "t", "--json", "t", code=2)
    assert err == "error: --csv and --json are both t; give two files\n"
    assert not (program.folder / "logs/eval.jsonl").exists()


def test_a_table_is_the_old_one_or_the_new_one_and_a_link_stays(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("t.csv")

    def fails(*paths):
        assert (tmp_path / "t.csv").read_text() == "old"  # until the rename
        raise OSError(5, "no rename", "t.csv")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no rename"):
            write_atomically(tmp_path / "link.csv", b"new")
    assert sorted(os.listdir(tmp_path)) == ["link.csv", "t.csv"]
    write_atomically(tmp_path / "link.csv", b"new")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "t.csv").read_text() == "new"


def looks(watch):
    """The paths that a look finds, each noted as read from its own header."""
    found = []
    while file := watch.next():
        tree = read_checkpoint(file.path)
        watch.note(file.stamp, tree["run_id"], tree["step"], tree["settings"]["num_steps"])
        found.append(os.path.basename(file.path))
    return found


def test_a_watch_reads_each_file_once_whatever_it_is_called(tmp_path, saved):
    watch = Watch((f"{tmp_path}/*.pt",))
    assert looks(watch) == [] and not watch.finished()
    saved(tmp_path / "a.pt", 1)
    assert looks(watch) == ["a.pt"]
    os.link(tmp_path / "a.pt", tmp_path / "a.step000001.pt")
    assert looks(watch) == []
    saved(tmp_path / "a.pt", 2)  # the first one is a.previous.pt now
    saved(tmp_path / "a.pt", 3)
    assert looks(watch) == ["a.previous.pt", "a.pt"]  # oldest first
    assert looks(watch) == [] and not watch.finished()
    saved(tmp_path / "a.pt", 9)  # of 9
    assert looks(watch) == ["a.pt"] and watch.finished()


def test_a_watch_ends_with_the_runs_that_go_on_and_not_with_those_given_up(tmp_path, saved):
    saved(tmp_path / "old.pt", 4, "given-up")
    watch = Watch((str(tmp_path),))
    assert looks(watch) == ["old.pt"] and not watch.finished()
    saved(tmp_path / "a.pt", 9, "a")
    assert looks(watch) == ["a.pt"] and watch.finished()
    saved(tmp_path / "b.pt", 1, "b")
    assert looks(watch) == ["b.pt"] and not watch.finished()
    saved(tmp_path / "a.pt", 9, "c")  # finished, and newer; b goes on
    assert looks(watch) == ["a.pt"] and not watch.finished()
    saved(tmp_path / "b.pt", 9, "b")
    assert looks(watch) == ["b.pt"] and watch.finished()


def test_a_file_that_is_still_being_copied_is_read_again_and_a_damaged_one_is_said(tmp_path, saved):
    whole = open(saved(tmp_path / "elsewhere/a.pt", 9), "rb").read()
    there = tmp_path / "there"
    there.mkdir()
    (there / "copied.pt").write_bytes(whole[:2000])
    (there / "cut.pt").write_bytes(whole[:1000])
    (there / "gone.pt").write_bytes(whole[:900])
    watch = Watch((str(there),))
    while file := watch.next():
        with pytest.raises(UserError) as raised:
            read_checkpoint(file.path)
        watch.suspect(file, str(raised.value))
    assert watch.failed_reads == 3
    (there / "copied.pt").write_bytes(whole)
    (there / "gone.pt").unlink()
    (there / "text.txt").write_text("a text")
    assert watch.next().path == str(there / "copied.pt")  # a new stamp, so it is looked at
    assert [f.path for f in watch.foreign()] == [str(there / "text.txt")]
    (reason,) = watch.damaged()
    assert "cut.pt: no checksum" in reason
    assert looks(watch) == ["copied.pt"] and watch.damaged() == [] and watch.finished()


def test_a_file_that_is_replaced_while_it_is_read_stays_the_one_that_was_opened(
    tmp_path, saved, monkeypatch
):
    import eval as script

    def meanwhile(contents, name, read=script.model_in):
        saved(tmp_path / "a.pt", 2)
        return read(contents, name)

    path = saved(tmp_path / "a.pt", 1)
    (listed,) = files_of([path])
    monkeypatch.setattr(script, "model_in", meanwhile)
    opened = script._open(path, "")
    assert (opened.step, opened.stamp) == (1, listed.stamp)
    assert opened.run.model.wte.weight.unique().tolist() == pytest.approx([0.1])
    assert [f.stamp == listed.stamp for f in files_of([path])] == [False]


def started(program, *flags):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "eval.py"), "--watch", "--checkpoint-path", *flags],
        cwd=program.folder, env=program.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.long
def test_a_training_that_saves_every_step_is_watched_without_a_torn_read(program):
    watch = started(program, "runs", "--json", "t.json")
    try:
        assert watch.stdout.readline().startswith("watching runs until")
        flags = "--num-steps 150 --save-steps 1 --eval-steps 1 --keep-every 50".split()
        program("train_minimal.py", *FLAGS.split(), *flags, "--checkpoint-path", "runs/a.pt")
        out, _ = watch.communicate(timeout=60)
    finally:
        watch.kill()
    assert watch.returncode == 0, out
    done, stay = steps_of(program), {50, 100, 149, 150}
    assert len(done) == len(set(done)) > len(stay) and stay <= set(done) <= set(range(1, 151))
    assert "all steps are done" in out
    assert re.search(rf"^evaluated {len(done)} states in .*; 0 reads failed$", out, re.M)
    table = json.loads((program.folder / "t.json").read_text())
    assert [r["step"] for r in table] == sorted(done)
    own = {r["step"]: r for r in read_records(program.folder / "logs/a.jsonl") if "val_loss" in r}
    assert [r["avg_loss"] for r in table] == [own[r["step"]]["val_loss"] for r in table]
    lines = [x for x in out.splitlines() if re.match(r"runs/\S+\.pt  ", x)]
    assert len(lines) == 2 * len(done)  # as they came, and in the table at the end


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_signal_ends_the_watch_with_a_table(program, number):
    trained(program, "runs/a.pt", "--num-steps", "8", steps=6)
    (program.folder / "runs/a.pt").unlink()  # so that the run is not finished
    watch = started(program, "runs")
    try:
        end = time.monotonic() + 60
        while not (program.folder / "logs/eval.jsonl").exists() or len(records(program)) < 2:
            assert time.monotonic() < end and watch.poll() is None
            time.sleep(0.1)
        watch.send_signal(number)
        out, _ = watch.communicate(timeout=60)
    finally:
        watch.kill()
    assert watch.returncode == 0, out
    assert f"{number.name}: stopping after this evaluation; again = at once" in out
    assert "evaluated 2 states" in out and "all steps" not in out
