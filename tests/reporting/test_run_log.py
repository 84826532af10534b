import dataclasses
import json
import math
import os
import re
import signal
import types

import pytest
import torch
from conftest import CPU, ROOT, toy_settings

from dataset import open_data
from model import GPTModel
from reporting.metrics_file import comparable, first_difference, read_records, run_as_known, to_json
from reporting.run_log import RunLog, SilentLog
from runtime.setting_fields import UserError
from training.evaluation import EvalResult
from training.flops import flops_per_token
from training.step import RunState, StepStats

RESULT = EvalResult(loss=10.9447, loss_se=0.01, ppl=56653.46, bpb=3.1234, tokens=99)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(state=None, rank=0, world=1, **changes):
    train, val, args = open_data(toy_settings(**changes))
    model = GPTModel(args.model, seed=0)
    if rank:
        return SilentLog()
    return RunLog("train_minimal", args, state or RunState(), CPU, model, train, val, world)


def update(log, state, loss=2.0, norm=0.5):
    state.step += 1
    state.tokens += 60
    log.train(state, StepStats(torch.tensor(loss * 60), 60, torch.tensor(norm), 3.3e-5), waited=0.0)


def test_the_evaluation_line_has_the_fields_of_the_design_in_order(folder, capsys):
    state = RunState()
    log = start(state)
    for _ in range(10):
        update(log, state, loss=10.9411, norm=0.8123)
    log.eval(state, RESULT)
    line = capsys.readouterr().out.splitlines()[-1]
    order = [
        "epoch 1 step 10 / 20 | lr: 0.000033 | step time: ",
        "| toks/s (per rank): ",
        "| grad norm: 0.8123",
    ]
    order += [
        "| train loss: 10.9411 | val loss: 10.9447 | val ppl: 56653.46",
        "| dt: ",
        "s | eta: ",
        "h | amp: False",
    ]
    places = [line.index(part) for part in order]
    assert places == sorted(places) and "val bpb: 3.1234" in line
    assert (folder / "logs/train_minimal.log").read_text().splitlines()[-1] == line


def test_records_hold_the_numbers_and_timings_apart(folder):
    state = RunState()
    log = start(state)
    log.eval(state, RESULT)
    update(log, state)
    log.finish(state)
    run, first, train = read_records(folder / "logs/train_minimal.jsonl")
    assert run["event"] == "run" and run["settings"]["n_layers"] == 2
    assert run["train"]["fingerprint"] and run["environment"]["torch"] == torch.__version__
    assert (
        first["val_loss"] == 10.9447 and first["val_tokens"] == 99 and first["val_loss_se"] == 0.01
    )
    assert {k: v for k, v in train.items() if k != "time"} == {
        "event": "train", "step": 1, "tokens": 60, "train_loss": 2.0, "lr": 3.3e-5, "grad_norm": 0.5
    }  # fmt: skip
    assert set(train["time"]) == {
        "step_seconds", "tokens_per_sec", "mfu", "data_wait_seconds", "memory_gb", "elapsed"
    }  # fmt: skip
    assert 0 < train["time"]["memory_gb"] < 100


def test_what_went_wrong_and_what_was_written_is_recorded(folder, capsys):
    state = RunState()
    log = start(state)
    for _ in range(30):
        update(log, state)
    update(log, state, loss=9.0)
    state.pending_warnings.append("step 31 was not saved: disk full")
    log.after_step(state)
    log.sample(state, "one\x1b[2J")
    log.sample(state, None)
    log.finish(state)
    records = read_records(log.metrics.path)
    warnings = [r for r in records if r["event"] == "warning"]
    assert [(r["step"], r["text"].split(",")[0]) for r in warnings] == [
        (31, "step 31: loss spike"),
        (31, "step 31 was not saved: disk full"),
    ]
    assert [r for r in records if r["event"] == "sample"] == [
        {"event": "sample", "step": 31, "text": "one\x1b[2J"}
    ]
    assert all(r["text"] in text_log(folder) for r in warnings)
    assert not state.pending_warnings and "warning" not in str(comparable(log.metrics.path))


def text_log(folder):
    return (folder / "logs/train_minimal.log").read_text()


def test_the_elapsed_time_goes_on_where_a_run_is_resumed(folder, monkeypatch):
    clock, state = [100.0], RunState()
    monkeypatch.setattr("reporting.step_clock.peak_flops", lambda device: None)
    monkeypatch.setattr("reporting.step_clock.time.perf_counter", lambda: clock[0])
    log = start(state)
    clock[0] += 7.0
    update(log, state)
    log.finish(state)
    clock[0] = 5000.0
    log = start(state, resume=True)
    clock[0] += 3.0
    log.eval(state, RESULT)
    log.finish(state)
    assert read_records(log.metrics.path)[-1]["time"] == {"elapsed": 10.0}


def test_the_mfu_is_the_part_of_the_measured_peak_that_the_model_computes(folder, monkeypatch):
    clock, state, measured = [100.0], RunState(), []

    def peak_flops(device):
        measured.append(device)
        return [1e9, 4e9, 2e9][len(measured) - 1]

    monkeypatch.setattr("reporting.step_clock.peak_flops", peak_flops)
    monkeypatch.setattr("reporting.step_clock.time.perf_counter", lambda: clock[0])
    log = start(state, world=2)
    found = []
    for seconds in (4.0, 2.0, 0.5, 6.0, 20.0):
        clock[0] += seconds
        update(log, state)
        found.append(read_records(log.metrics.path)[-1]["time"]["mfu"])
    assert found[0] is None and len(measured) == 3  # after 6, 12.5 and 32.5 s; the highest counts
    per_token = flops_per_token(log.args.model, 16)  # 60 tokens a step, 2 processes
    assert found[1:] == pytest.approx(
        [30 * per_token / 2e9, 120 * per_token / 2e9, 10 * per_token / 8e9, 3 * per_token / 8e9]
    )


@pytest.mark.parametrize("steps, bpb", [(20, 1.5), (10**8, None)])
def test_a_terminal_gets_a_short_line_and_the_log_the_whole_one(
    folder, monkeypatch, capsys, steps, bpb
):
    state = RunState(step=steps - 1)
    log = start(state, num_steps=steps)
    update(log, state, loss=1.25)
    capsys.readouterr()
    log.output.bar = types.SimpleNamespace(disable=False)
    log.eval(state, dataclasses.replace(RESULT, loss=1.3, ppl=3.67e9, bpb=bpb))
    shown = capsys.readouterr().out.splitlines()[-1]
    assert f"step {steps}/{steps} | train 1.2500 | val 1.3000 +-0.0100" in shown
    assert len(shown) <= 120 and ("bpb 1.5000" in shown) == (bpb is not None)
    whole = (folder / "logs/train_minimal.log").read_text().splitlines()[-1]
    assert f"epoch {1 + 4 * steps // log.epoch_windows} step {steps} / {steps} | lr: " in whole
    assert "| mfu: " in whole and "| memory: " in whole and "| data wait: 0.0%" in whole


def test_infinite_perplexity_is_shown_and_the_record_stays_json(folder, capsys):
    state = RunState()
    log = start(state)
    log.eval(state, dataclasses.replace(RESULT, ppl=math.inf, bpb=None))
    assert "val ppl: inf | val bpb: n/a" in capsys.readouterr().out
    assert json.loads(to_json({"a": math.inf, "b": math.nan, "c": 1.5})) == {
        "a": None,
        "b": None,
        "c": 1.5,
    }


def test_skipped_updates_are_said_even_between_logged_steps(folder, capsys):
    state = RunState(skipped=torch.tensor(2.0))
    log = start(state)
    update(log, state)
    update(log, state)
    out = capsys.readouterr().out
    assert out.count("2 updates skipped: loss or gradients not finite") == 1


def test_a_full_disk_or_a_closed_terminal_does_not_stop_the_run(folder, capsys):
    state = RunState()
    log = start(state)

    class Full:
        def write(self, *_):
            raise OSError(28, "No space left on device")

        flush = close = write

    log.metrics.file.close()
    log.metrics.file = Full()
    for _ in range(3):
        update(log, state)
    log.eval(state, RESULT)
    log.finish(state)
    out = capsys.readouterr().out
    assert (
        out.count("the metrics file can't be written any more") == 1 and "val loss: 10.9447" in out
    )


@pytest.mark.parametrize("name", ["read_run", "draw_losses", "write_report"])
def test_a_report_that_fails_does_not_end_the_run(folder, monkeypatch, capsys, name):
    def fail(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(f"reporting.run_log.{name}", fail)
    log = start()
    log.finish(RunState(step=20))
    out = capsys.readouterr().out
    assert "can't be written any more (a bug); the run goes on" in out and "evaluate: " in out


def test_metrics_of_another_run_are_set_aside_on_resume(folder):
    other, state = RunState(), RunState(step=4)
    for _ in range(2):
        log = start(other)
        update(log, other)
        log.finish(other)
    before = log.metrics.path.read_text()
    log = start(state, resume=True)
    log.finish(state)
    records = read_records(log.metrics.path)
    assert [r["event"] for r in records] == ["run"] and records[0]["run_id"] == state.run_id
    assert (folder / "logs/train_minimal.2.jsonl").read_text() == before


@pytest.mark.parametrize(
    "path, name",
    [
        ("checkpoints/minigpt_single.pt", "train_minimal"),
        ("checkpoints/minigpt_ddp.pt", "train_ddp"),
        ("./checkpoints//minigpt_single.pt", "train_minimal"),
        ("runs/minigpt_single.pt", "minigpt_single"),
        ("runs/lr 0.1.pt", "lr 0.1"),
        ("c", "c"),
    ],
)
def test_the_logs_of_a_run_have_the_name_of_its_checkpoint(folder, path, name):
    state = RunState()
    log = start(state, checkpoint_path=path)
    log.finish(state)
    made = {p.name for p in (folder / "logs").iterdir()}
    assert made == {name + end for end in (".log", ".jsonl", ".png", ".html", ".jsonl.lock")}


def test_two_runs_at_once_never_share_logs(folder):
    one, other = RunState(), RunState()
    first = start(one, checkpoint_path="a/c.pt")
    second = start(other, checkpoint_path="b.pt")
    for resume in (False, True):
        said = (
            f"logs/c.jsonl is in use by another run .process {os.getpid()} on .*another --log-dir"
        )
        with pytest.raises(UserError, match=said):
            start(RunState(), checkpoint_path="b/c.pt", resume=resume)
    for log, state in ((first, one), (second, other)):
        update(log, state)
        log.finish(state)
        records = read_records(log.metrics.path)
        assert [r["event"] for r in records] == ["run", "train"]
        assert records[0]["run_id"] == state.run_id
    start(RunState(), checkpoint_path="b/c.pt").finish(one)  # after it


def test_a_run_cannot_have_the_logs_of_eval(folder):
    with pytest.raises(UserError, match=r"x/eval\.pt: .* of eval\.py; give another"):
        start(checkpoint_path="x/eval.pt")


def test_the_time_left_counts_evaluations_but_not_the_first_step(folder, monkeypatch, capsys):
    clock, state = [100.0], RunState()
    monkeypatch.setattr("reporting.step_clock.peak_flops", lambda device: None)
    monkeypatch.setattr("reporting.step_clock.time.perf_counter", lambda: clock[0])
    log = start(state, num_steps=1000, eval_steps=100)
    log.eval(state, RESULT)
    assert "eta: n/a" in capsys.readouterr().out
    clock[0] += 5000.0  # the first step, in which a model is compiled
    update(log, state)
    for _ in range(4):
        clock[0] += 100.0
        update(log, state)
    clock[0] += 1000.0
    log.eval(state, RESULT)
    log.sample(state, "x")
    clock[0] += 100.0
    update(log, state)
    clock[0] += 300.0
    log.eval(state, RESULT)
    # 1400 s for 4 steps after the first one, then 1800 s for 5: 360 s each, and 994 are left.
    first, last = re.findall(r"eta: ([\d.]+)h", capsys.readouterr().out)
    assert float(first) == pytest.approx(995 * 350 / 3600, abs=0.01)
    assert float(last) == pytest.approx(994 * 360 / 3600, abs=0.01)


def test_timings_cover_training_and_nothing_else(folder, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("reporting.step_clock.peak_flops", lambda device: None)
    monkeypatch.setattr("reporting.step_clock.time.perf_counter", lambda: clock[0])
    state = RunState()
    log = start(state)
    for spent_on_step, spent_on_evaluation in ((2.0, 50.0), (2.0, 70.0)):
        clock[0] += spent_on_step
        update(log, state)
        clock[0] += spent_on_evaluation
        log.eval(state, RESULT)
        clock[0] += 30.0
        log.saved(30.0)
    log.finish(state)
    timings = [r["time"] for r in read_records(log.metrics.path) if r["event"] == "train"]
    assert [t["step_seconds"] for t in timings] == [2.0, 2.0]
    assert [t["tokens_per_sec"] for t in timings] == [30.0, 30.0]
    assert [t["elapsed"] for t in timings] == [2.0, 2.0 + 50 + 30 + 2]


def test_other_ranks_write_nothing(folder, capsys):
    state = RunState()
    log = start(state, rank=1, world=2)
    update(log, state)
    log.eval(state, RESULT)
    log.sample(state, "x")
    log.saved(3.0)
    log.after_step(state)
    log.finish(state)
    assert capsys.readouterr().out == "" and list(folder.iterdir()) == []


def test_a_new_run_sets_the_old_metrics_aside_and_says_so(folder, capsys):
    start().finish(RunState())
    first = (folder / "logs/train_minimal.jsonl").read_text()
    start().finish(RunState())
    assert (folder / "logs/train_minimal.1.jsonl").read_text() == first
    assert "train_minimal.jsonl -> train_minimal.1.jsonl" in capsys.readouterr().out


def test_notes_are_said_once(folder, capsys):
    state = RunState(pending_messages=["resumed c.pt at step 4"])
    log = start(state)
    state.pending_messages.append("saved c.pt at step 5")
    log.after_step(state)
    log.after_step(state)
    log.finish(state)
    out, text = capsys.readouterr().out, (folder / "logs/train_minimal.log").read_text()
    for said in ("resumed c.pt at step 4", "saved c.pt at step 5"):
        assert out.count(said) == text.count(said) == 1


def test_the_end_of_a_stopped_run_says_so_and_continues_with_the_same_steps(folder, capsys):
    state = RunState(step=3, stop=signal.SIGTERM)
    start(state).finish(state)
    out = capsys.readouterr().out
    assert "SIGTERM: stopped at step 3" in out and re.search(r"train_minimal.py --resume\n", out)


def test_a_loss_far_above_the_records_before_is_said_with_them(folder, capsys):
    state = RunState()
    log = start(state)
    for i in range(40):
        update(log, state, loss=2.0 + 0.01 * (i % 2))
    assert "spike" not in capsys.readouterr().out
    update(log, state, loss=2.5)
    said = "step 41: loss spike, 2.5000 where the last 20 records had 2.0050 +- 0.0"
    assert said in capsys.readouterr().out
    update(log, state, loss=math.nan)
    assert "step 42: loss spike, nan" in capsys.readouterr().out


def test_a_falling_loss_is_no_spike(folder, capsys):
    state = RunState()
    log = start(state)
    for i in range(60):
        update(log, state, loss=10.0 / (1 + i / 10))
    assert "spike" not in capsys.readouterr().out


def test_a_resumed_run_continues_its_files(folder):
    state = RunState()
    log = start(state)
    for _ in range(6):
        update(log, state)
    log.finish(state)
    before = read_records(log.metrics.path)
    resumed = RunState(step=4, tokens=240, run_id=state.run_id)
    log = start(resumed, resume=True)
    update(log, resumed, loss=9.0)
    log.finish(resumed)
    after = read_records(log.metrics.path)
    assert after[:5] == before[:5] and [r["step"] for r in after[1:]] == [1, 2, 3, 4, 4, 5]
    assert after[5] == {"event": "resume", "step": 4, "settings": {}, "environment": {}}
    assert after[6]["train_loss"] == 9.0
    assert read_records(folder / "logs/train_minimal.cut.jsonl") == before[5:]
    text = (folder / "logs/train_minimal.log").read_text()
    assert "2 records beyond step 4 are now in logs/train_minimal.cut.jsonl" in text


@pytest.mark.parametrize("path", ["c.pt", "c.1.pt"])  # in its place again, or where it was put
def test_metrics_that_another_run_set_aside_are_found_again(folder, path):
    first = RunState()
    log = start(first, checkpoint_path="c.pt")
    for _ in range(3):
        update(log, first)
    log.finish(first)
    before, other = read_records(log.metrics.path), RunState()
    log = start(other, checkpoint_path="c.pt")
    update(log, other)
    log.finish(other)
    resumed = RunState(step=2, run_id=first.run_id)
    log = start(resumed, resume=True, checkpoint_path=path)
    log.finish(resumed)
    found = {p.name: read_records(p) for p in (folder / "logs").glob("*.jsonl")}
    cut = found.pop(f"{path[:-3]}.cut.jsonl")
    mine, theirs = found.pop(f"{path[:-3]}.jsonl"), found.popitem()[1]
    assert mine[:3] == before[:3] and cut == before[3:] and not found
    assert [r["event"] for r in mine[3:]] == ["resume"]
    assert theirs[0]["run_id"] == other.run_id


def test_metrics_from_when_all_runs_shared_a_name_are_found(folder):
    state = RunState()
    log = start(state)
    update(log, state)
    log.finish(state)
    before = log.metrics.path.read_text()
    log = start(state, resume=True, checkpoint_path="runs/a.pt")
    log.finish(state)
    after = (folder / "logs/a.jsonl").read_text()
    assert after.startswith(before) and json.loads(after[len(before) :])["event"] == "resume"
    assert not (folder / "logs/train_minimal.jsonl").exists()


def test_lines_that_are_no_records_are_kept_aside(folder):
    state = RunState()
    log = start(state)
    for _ in range(3):
        update(log, state)
    log.finish(state)
    lines = log.metrics.path.read_bytes().splitlines(True)
    log.metrics.path.write_bytes(
        lines[0] + b"\xff{\n[1]\n" + b"".join(lines[1:]) + b'{"event": "tr'
    )
    resumed = RunState(step=2, run_id=state.run_id)
    log = start(resumed, resume=True)
    log.finish(resumed)
    assert log.metrics.path.read_bytes().splitlines(True)[:-1] == lines[:3]
    aside = (folder / "logs/train_minimal.cut.jsonl").read_bytes()
    assert aside == b"\xff{\n[1]\n" + lines[3] + b'{"event": "tr\n'


def test_a_signal_in_the_last_step_leaves_a_finished_run(folder, capsys):
    state = RunState(step=20, stop=signal.SIGTERM)
    log = start(state)
    log.finish(state)
    assert state.exit_code(log.args) == 0 and "stopped" not in capsys.readouterr().out
    assert RunState(step=19, stop=signal.SIGTERM).exit_code(log.args) == 143


def test_two_runs_are_compared_without_what_may_differ(folder):
    paths = []
    for name, loss in (("a", 2.0), ("b", 2.0), ("c", 2.5)):
        state = RunState()
        log = start(state, log_dir=name, checkpoint_path=f"{name}.pt")
        for step in range(3):
            update(log, state, loss=loss if step == 2 else 2.0)
        paths.append(log.metrics.path)
    assert first_difference(paths[0], paths[1]) == ""
    assert first_difference(paths[0], paths[2]) == "step 3: train_loss 2.0 | 2.5"
    update(log, state)
    assert "train_loss" in first_difference(paths[1], paths[2])
    paths[1].write_text("".join(paths[1].read_text().splitlines(True)[:-1]))
    assert first_difference(paths[0], paths[1]) == "4 | 3 records"


def test_a_record_cut_short_by_a_crash_is_dropped(folder):
    (folder / "m.jsonl").write_text('{"event": "train", "step": 1}\n{"event": "tr')
    assert read_records(folder / "m.jsonl") == [{"event": "train", "step": 1}]


def test_what_changed_when_a_run_was_resumed_is_in_its_metrics(folder):
    state = RunState()
    log = start(state)
    update(log, state)
    log.finish(state)
    for lr in (2e-4, 3e-4, 3e-4):
        log = start(state, resume=True, lr=lr)
        log.finish(state)
    records = read_records(log.metrics.path)
    changes = [r["settings"] for r in records if r["event"] == "resume"]
    assert changes == [{"lr": 2e-4}, {"lr": 3e-4}, {}]
    known = run_as_known(records)
    assert known["settings"] == {**records[0]["settings"], "lr": 3e-4}
    assert first_difference(log.metrics.path, log.metrics.path) == ""
    assert all(r["event"] != "resume" for r in comparable(log.metrics.path))


def test_without_a_terminal_the_progress_is_said_every_ten_seconds(folder, capsys, monkeypatch):
    clock, state = [100.0], RunState()
    monkeypatch.setattr("reporting.log_output.time.monotonic", lambda: clock[0])
    log = start(state, eval_steps=1000)
    for _ in range(15):  # 0.0, 2.5, ... 35 s
        update(log, state)
        clock[0] += 2.5
    steps = re.findall(r"^step (\d+) / 20 \| train loss: 2", capsys.readouterr().out, re.M)
    assert steps == ["1", "5", "9", "13"]


def test_the_fields_of_the_metrics_are_those_of_the_document(folder):
    state = RunState()
    log = start(state)
    update(log, state)
    log.eval(state, RESULT)
    log.sample(state, "x")
    state.pending_warnings.append("step 1 was not saved")
    log.changed(dataclasses.replace(log.args, num_steps=30), state)
    log.finish(state)
    start(state, resume=True).finish(state)
    documented = {}
    page = (ROOT / "docs/metrics.md").read_text().split("\n# ")[0]  # then comes eval.jsonl
    for line in page.splitlines():
        if m := re.match(r"## `(\w+)`", line):
            fields = documented.setdefault(m[1], set())
        elif m := re.match(r"\| `(\w+)` \|", line):
            fields.add(m[1])
    written = {r["event"]: r.keys() - {"event"} for r in read_records(log.metrics.path)}
    assert written == documented


def test_another_number_of_steps_is_known_from_then_on(folder, capsys):
    state = RunState()
    log = start(state)
    log.changed(dataclasses.replace(log.args, num_steps=30), state)
    update(log, state)
    assert log.clock.seconds_left(state.step) == pytest.approx(29 * log.clock.step_seconds)
    assert "step 1 / 30 |" in capsys.readouterr().out
    assert run_as_known(read_records(log.metrics.path))["settings"]["num_steps"] == 30
    assert all(r["event"] != "settings" for r in comparable(log.metrics.path))


def test_closing_commands_name_the_checkpoint(folder, capsys):
    log = start(checkpoint_path="my run.pt")
    log.finish(RunState(step=20))
    out = capsys.readouterr().out
    assert "eval.py --checkpoint-path 'my run.pt'" in out
    assert "train_minimal.py --resume --num-steps 40 --lr 0.0006 --checkpoint-path 'my run" in out
    assert "generate.py --checkpoint-path" not in out  # nothing to sample from random tokens


def test_more_steps_are_offered_with_a_rate_that_suits_them(folder, capsys):
    def end(**changes):
        start(**changes).finish(RunState(step=20, best_val_loss=2.0, best_step=20))
        return capsys.readouterr().out

    assert "--resume --num-steps 40\n" in end(lr_scheduler="none", lr=0.5)
    out = end(lr_scheduler="linear", lr=0.5, min_lr=0.0, warmup_steps=0)
    assert "has decayed to 0.025;" in out  # 0.5 x (1 - 19/20)
    assert (
        "has --lr 0.1, since with 0.5 it would jump up to 0.25" in out
        and "--resume --num-steps 40 --lr 0.1\n" in out
    )
    assert "--num-steps 40 --lr 0.05\n" in end(lr_scheduler="wsd", lr=0.5)
    assert "--num-steps 40 --lr 0.2\n" in end(lr_scheduler="linear", lr=0.5, min_lr=0.2)


def test_a_finished_run_that_is_resumed_has_nothing_left_to_do(folder, capsys):
    start(RunState(step=20), resume=True)
    assert "nothing left to do: all 20 steps are done; --num-steps" in capsys.readouterr().out
    start(RunState(step=19), resume=True, checkpoint_path="other.pt")
    assert "nothing left" not in capsys.readouterr().out


def test_a_best_loss_above_guessing_is_said_and_not_continued(folder, capsys):
    start(lr=100.0).finish(RunState(step=20, best_val_loss=5.5, best_step=20))  # ln 97 = 4.5747
    out = capsys.readouterr().out
    assert "5.5000, is above that of guessing, ln 97 = 4.5747" in out and "than 100\n" in out
    assert "evaluate: " in out and "continue: " not in out
    start().finish(RunState(step=20, best_val_loss=4.58, best_step=20))
    out = capsys.readouterr().out
    assert "guessing" not in out and "continue: " in out


def test_the_run_line_names_both_batches_and_what_the_preset_became(folder, capsys):
    start(global_batch_size=12, batch_size=3, grad_accum_steps=4)
    out = capsys.readouterr().out
    assert "steps of 12 x 16 tokens (global batch 12, micro-batch 3;" in out
    start(preset="quickstart", lr=3e-3, checkpoint_path="other.pt")
    assert "lr is 0.003, which preset quickstart has with adamw" in capsys.readouterr().out


def test_secrets_of_the_environment_are_in_no_file(folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t" * 6)
    log = start()
    log.finish(RunState())
    for path in folder.rglob("*"):
        assert path.is_dir() or b"s3cr3t" not in path.read_bytes()


def test_log_folder_that_cannot_be_made_is_named(folder):
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="--log-dir"):
        start(log_dir="file/logs")
