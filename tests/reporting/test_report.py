"""The report: what is read, the page (in test_report_browser.py as a browser shows it), the table."""

import json
import math
import os
import re
import time

import pytest
from conftest import ROOT, Program

import report
from reporting.metrics_file import to_json
from reporting.report_page import report_page
from reporting.report_text import report_text, sparkline
from reporting.run_curves import differences, read_run, runs_in, smoothed, thinned
from runtime.setting_fields import UserError


def train_record(step, loss):
    timing = {"tokens_per_sec": 1000.0 + step, "elapsed": 0.5 * step, "mfu": 0.4, "memory_gb": 1.5}
    return {
        "event": "train", "step": step, "tokens": 60 * step, "train_loss": loss, "lr": 1e-3 / step,
        "grad_norm": 1 + 1 / step, "time": timing,
    }  # fmt: skip


def eval_record(step, loss):
    return {
        "event": "eval", "step": step, "tokens": 60 * step, "val_loss": loss, "val_loss_se": 0.01,
        "val_ppl": math.exp(loss), "val_bpb": None, "val_tokens": 99, "time": {"elapsed": step / 2},
    }  # fmt: skip


def write_metrics(path, steps=50, lr=0.01, more=(), **settings):
    """The metrics file of a run whose loss falls from 9 to about 2."""
    settings = {"lr": lr, "num_steps": steps, "checkpoint_path": "runs/x.pt", **settings}
    records = [
        {
            "event": "run",
            "run_id": "abc",
            "settings": settings,
            "parameters": 7,
            "environment": {"torch": "2"},
        }
    ]
    for step in range(1, steps + 1):
        records.append(train_record(step, 2 + 7 / step + 0.1 * math.sin(step)))
        if step % max(1, steps // 10) == 0:
            records.append(eval_record(step, 2.1 + 6 / step))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(to_json(r) + "\n" for r in [*records, *more]))
    return path


def test_a_run_is_read_as_it_was_last_resumed(tmp_path):
    more = [
        {"event": "resume", "step": 50, "settings": {"lr": 0.5}, "environment": {}},
        {"event": "warning", "step": 50, "text": "step 50: loss spike"},
        {"event": "sample", "step": 50, "text": "once"},
    ]
    run = read_run(write_metrics(tmp_path / "a.jsonl", more=more))
    assert (run.name, run.settings["lr"], run.resumed) == ("a", 0.5, [50])
    assert [w["text"] for w in run.warnings] == ["step 50: loss spike"]
    assert [s["text"] for s in run.samples] == ["once"]
    assert run.train["step"] == list(range(1, 51)) and run.train["elapsed"][-1] == 25
    assert run.best() == 9 and run.best_checkpoint() == "runs/x.best.pt"
    assert run.last("val_bpb") is None and run.last("val_loss") == 2.1 + 6 / 50


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path):
    more = [train_record(51, math.nan), eval_record(51, math.nan)]
    run = read_run(write_metrics(tmp_path / "a.jsonl", more=more))
    assert run.train["train_loss"][-1] is None and run.evals["val_loss"][-1] is None
    assert run.train["smoothed"][-1] == run.train["smoothed"][-2]
    assert run.best() == 9
    assert "validation loss  none" not in report_text([run]) and "none" in report_text([run])


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "is not the metrics file of a run"),
        ('{"event": "eval", "loss": 2}\n', "is not the metrics file of a run"),
        (None, "cannot read .*No such file"),
    ],
)
def test_what_is_no_metrics_file_is_said(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        read_run(tmp_path / "a.jsonl")


def test_a_folder_gives_its_runs_and_not_their_other_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "a.1.jsonl"):
        write_metrics(tmp_path / name)
    (tmp_path / "a.cut.jsonl").write_text('{"event": "run"}\n')
    (tmp_path / "eval.jsonl").write_text('{"event": "eval"}\n')
    assert sorted(p.name for p in runs_in(tmp_path)) == ["a.1.jsonl", "a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match="has no metrics file of a run"):
        runs_in(tmp_path / "none")


def test_the_mean_of_a_constant_is_that_constant_from_its_first_record_on():
    assert smoothed([3.0] * 500) == pytest.approx([3.0] * 500)
    assert smoothed([None, 2.0, None]) == [None, 2.0, 2.0]
    assert smoothed([1.0, 5.0]) == pytest.approx([1.0, (0.75 * 1 + 5) / 1.75])  # looks back over 4
    # 100 values: each mean has 4/5 of the one before. From 0 to 1: 1 - (4/5)^k, after k of them.
    step = smoothed([0.0] * 60 + [1.0] * 40)
    assert step[69] == pytest.approx(1 - 0.8**10, abs=1e-4)


def test_thinning_keeps_the_ends_and_the_extremes_and_changes_nothing():
    values = [math.sin(i) for i in range(10_000)]
    values[4321], values[7654], values[5] = 9.0, -9.0, None
    columns = {"y": values, "x": list(range(10_000))}
    thin = thinned(columns, "y", 1000)
    assert 900 <= len(thin["x"]) <= 1002 and thin["x"][0] == 0 and thin["x"][-1] == 9999
    assert all(y == values[x] for x, y in zip(thin["x"], thin["y"], strict=True))
    assert {4321, 7654} <= set(thin["x"]) and thin["x"] == sorted(thin["x"])
    assert thinned(columns, "y", 10_000) is columns


def test_the_settings_that_differ_are_named(tmp_path):
    runs = [
        read_run(write_metrics(tmp_path / f"{lr}.jsonl", lr=lr, seed=1, more_of=lr > 1))
        for lr in (0.1, 0.2)
    ]
    assert differences(runs) == ["lr"]
    text = report_text(runs)
    assert re.search(r"run\s+lr\n0\.1\s+0\.1\n0\.2\s+0\.2", text)


def test_the_page_escapes_all_that_others_wrote(tmp_path):
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&'
    more = [
        {"event": "warning", "step": 50, "text": evil},
        {"event": "sample", "step": 50, "text": evil},
    ]
    path = write_metrics(tmp_path / "a.jsonl", more=more, sample_prompt=evil)
    page = report_page([read_run(path, evil)])
    assert "<script>alert" not in page and "<img" not in page
    assert page.count("</script>") == 2  # of the data and of the program
    data = re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    assert json.loads(data)["runs"][0]["name"] == evil


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    page = report_page([read_run(write_metrics(tmp_path / "a.jsonl"))])
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=[\"'](?!data:)", page)


def test_a_sparkline_has_the_lowest_bar_at_the_lowest_value():
    assert sparkline([3, 2, 1]) == "█▅▁" and sparkline([1, 1]) == "▁▁" and sparkline([]) == ""
    line = sparkline([1e9, *(100 - i for i in range(99))], width=20)
    assert len(line) == 20 and line[0] == "█" and line[2] == "█" and line[-1] == "▁"


def run_report(capsys, *flags):
    from runtime.flags import parse_flags

    given = parse_flags(report.ReportSettings, "report.py", report.short_flags(list(flags)))
    report.main(report.ReportSettings(**given))
    return capsys.readouterr().out


def test_without_arguments_all_runs_in_logs_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_metrics(tmp_path / "logs/a.jsonl")
    write_metrics(tmp_path / "logs/b.jsonl", lr=0.5)
    assert "wrote report.html" in run_report(capsys)
    page = (tmp_path / "report.html").read_text()
    assert "<title>2 runs</title>" in page and 'reload_seconds":0' in page
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ""] == ["report.html"]


def test_runs_of_one_name_are_told_apart_by_their_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_metrics(tmp_path / "x/a.jsonl"), write_metrics(tmp_path / "y/a.jsonl")
    out = run_report(capsys, "x", "y/a.jsonl", "--text")
    assert re.search(r"^x/a .*\ny/a ", out, re.M) and not (tmp_path / "report.html").exists()


def test_the_picture_alone(tmp_path, capsys):
    path = write_metrics(tmp_path / "a.jsonl")
    run_report(capsys, str(path), "--png", str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="cannot write "):
        run_report(capsys, str(path), "--png", str(tmp_path / "none/p.png"))


@pytest.mark.long
def test_a_finished_run_leaves_its_report(program: Program):
    toy = "--preset toy --use-toy-data --num-steps 6 --device cpu".split()
    out = program("train_minimal.py", *toy)
    page = (program.folder / "logs/train_minimal.html").read_text()
    assert "logs/train_minimal.html" in out and "6 of 6" in page
    said = program("report.py", "--text")
    assert re.search(r"^train_minimal +6 of 6 ", said, re.M)


def test_watching_writes_the_page_anew_until_it_is_stopped(tmp_path, monkeypatch, capsys):
    path, seen = write_metrics(tmp_path / "a.jsonl", steps=10), []

    def sleep(seconds):
        seen.append((tmp_path / "report.html").read_text())
        write_metrics(path, steps=10 * (len(seen) + 1))
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("report.time.sleep", sleep)
    run_report(capsys, str(path), "-o", str(tmp_path / "report.html"), "--watch")
    assert ["10 of 10" in seen[0], "20 of 20" in seen[1], "30 of 30" in seen[2]] == [True] * 3
    assert all('"reload_seconds":5.0' in page for page in seen)
    last = (tmp_path / "report.html").read_text()
    assert "40 of 40" in last and '"reload_seconds":0' in last
    assert capsys.readouterr().out == ""  # once at the start is enough
    assert not list(tmp_path.glob("*.tmp")) and (ROOT / "reporting/report_page.js").exists()


def test_watching_waits_for_runs_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seconds = []

    def sleep(_):
        seconds.append(len(seconds))
        if len(seconds) == 2:
            write_metrics(tmp_path / "logs/a.jsonl")
        if len(seconds) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("report.time.sleep", sleep)
    out = run_report(capsys, "--watch")
    assert out.count("waiting, since cannot read logs") == 1 and out.count("every 5 s") == 1
    assert "50 of 50" in (tmp_path / "report.html").read_text()


def test_the_page_says_how_far_each_run_is(tmp_path):
    done = read_run(write_metrics(tmp_path / "a.jsonl"))
    path = write_metrics(tmp_path / "b.jsonl", steps=50, num_steps=80)
    os.utime(path, (time.time() - 300, time.time() - 300))
    page = report_page([done, read_run(path)])
    assert "a: finished; b: at step 50; its last record is of 5 min ago." in page
