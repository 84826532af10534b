import json
import re

import pytest
from conftest import CPU
from helpers import Run, logged_run

from reporting.profiler import RANGES
from training.prefetch import Prefetch
from training.step import due, train_step

# A step of about 50 ms, in which what lies between the ranges is little.
MODEL = "--d-model 128 --n-layers 4 --seq-len 128 --global-batch-size 8 --batch-size 4".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def profiled(steps, *flags):
    """Trains with a profile, as a trainer does."""
    run = Run(*MODEL, *flags)
    log, _ = logged_run(*MODEL, *flags, "--use-profiler", model=run.model)
    batches = Prefetch(run.train, run.args, CPU)
    while run.state.step < steps:
        batch = batches(run.state.step)
        stats = train_step(run.model, run.optimizer, batch, run.args, run.state, CPU)
        log.after_step(run.state)
        if due(run.state, run.args).log:
            log.train(run.state, stats, batches.waited)
    log.finish(run.state)


def trace(path="logs/train_minimal_trace.json"):
    """The ranges in a trace: of each profiled step, its milliseconds, those of each range, and which
    part of the torch operations that its thread began lie in no range.
    """
    events = [e for e in json.loads(open(path).read())["traceEvents"] if e["ph"] == "X"]
    ranges = [e for e in events if e.get("cat") == "user_annotation"]
    found = {}
    for step in ranges:
        if not step["name"].startswith("ProfilerStep#"):
            continue
        inside = [e for e in ranges if e["name"] in RANGES and within(e["ts"], step)]
        parts = dict.fromkeys(RANGES, 0.0)
        for e in inside:
            parts[e["name"]] += e["dur"] / 1e3
        begun = [
            e["ts"]
            for e in events
            if e.get("cat") == "cpu_op" and e["tid"] == step["tid"] and within(e["ts"], step)
        ]
        outside = [ts for ts in begun if not any(within(ts, e) for e in inside)]
        found[step["name"]] = step["dur"] / 1e3, parts, len(outside) / len(begun)
    return found


def within(ts, event):
    return event["ts"] <= ts <= event["ts"] + event["dur"]


def assert_whole(found):
    """The ranges hold the work of a step: all but 2 % of its operations (the sum of gradients' norms
    and the like), and no time twice.
    """
    assert len(found) == 3
    for step, parts, outside in found.values():
        assert sum(parts.values()) <= step and outside <= 0.02


def assert_filled(found):
    """The ranges fill a step but for 5 %. On a busy machine one of three may have waited between two
    of them: for a core, or up to 5 ms for the thread that reads the next batch. (With two processes
    more of them wait: there, only the operations tell.)
    """
    shares = sorted(sum(parts.values()) / step for step, parts, _ in found.values())
    print("of each step in a range:", shares)
    assert len(shares) == 3 and shares[1] >= 0.95


def test_the_four_ranges_add_up_to_each_step(folder):
    profiled(9, "--log-steps", "100", "--eval-steps", "100")
    found = trace()
    assert list(found) == ["ProfilerStep#5", "ProfilerStep#6", "ProfilerStep#7"]
    for _, parts, _ in found.values():
        assert parts["log"] == 0 and all(parts[name] > 0 for name in RANGES[:4])
    assert_whole(found)
    assert_filled(found)


def test_with_a_record_of_each_step_the_log_is_a_range_too(folder):
    profiled(9, "--log-steps", "1", "--eval-steps", "100")
    found = trace()
    for _, parts, _ in found.values():
        assert parts["log"] > 0
    assert_whole(found)
    assert_filled(found)


def test_the_log_names_the_trace_and_what_took_most_of_the_time(folder, capsys):
    profiled(9, "--eval-steps", "100")
    out = capsys.readouterr().out
    (said,) = re.findall(r"profile of updates 6 to 8: ([\d.]+) ms a step \((.*)\); (\S+)", out)
    assert said[2] == "logs/train_minimal_trace.json"
    steps = [step for step, *_ in trace().values()]
    assert float(said[0]) == pytest.approx(sum(steps) / 3, rel=0.01)
    parts = {name: float(ms) for name, ms in (part.split() for part in said[1].split(", "))}
    assert list(parts) == [*RANGES, "rest"]
    assert sum(parts.values()) == pytest.approx(float(said[0]), abs=0.05)
    rows = re.findall(r"^ +([\d.]+) +([\d.]+)% +([\d.]+)  (.+)$", out, re.M)
    names, times = [row[3] for row in rows], [float(row[0]) for row in rows]
    assert names[0] == "all of them" and len(rows) == 21 and times[1:] == sorted(times[1:])[::-1]
    assert not {*RANGES, "ProfilerStep*"} & set(names) and times[0] <= float(said[0])
    calls = {row[3]: float(row[2]) for row in rows}
    # Each of 4 blocks has one attention, in each of 2 micro-batches.
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == 4 * 2


@pytest.mark.parametrize(
    "steps, said",
    [
        (4, "no profile: it takes 8 steps"),
        (5, "no profile: it takes 8 steps"),
        (7, "profile of updates 6 to 7: "),
    ],
)
def test_a_run_that_ends_early_has_the_profile_of_what_there_was(folder, capsys, steps, said):
    profiled(steps)
    out = capsys.readouterr().out
    assert out.count(said) == 1 and out.count("profile of") == said.count("profile of")
    assert (folder / "logs/train_minimal_trace.json").exists() == (steps == 7)


def test_a_trace_that_cannot_be_written_does_not_end_the_run(folder, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", full)
    profiled(9)
    assert "the profile can't be written ([Errno 28] No space" in capsys.readouterr().out


@pytest.mark.long
def test_the_ranges_of_one_of_two_processes_add_up_too(program, folder):
    flags = "--use-toy-data --preset toy --num-steps 9 --eval-steps 100 --use-profiler --device cpu"
    program("train_ddp.py", *flags.split(), ranks=2)
    found = trace("logs/train_ddp_trace.json")
    assert len(found) == 3
    for _, parts, _ in found.values():
        assert parts["agree"] > 0
    assert_whole(found)
