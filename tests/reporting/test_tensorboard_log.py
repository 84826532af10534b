import builtins
import importlib.util
import json
import time

import pytest
from conftest import CPU, toy_settings
from helpers import logged_run, update

from reporting.metrics_file import read_records
from reporting.records import tracked_values
from reporting.tensorboard_log import TensorBoard
from runtime.setting_fields import UserError
from training.evaluation import EvalResult
from training.step import RunState

pytest.importorskip("tensorboard")
RESULT = EvalResult(loss=2.5, loss_se=0.1, ppl=12.2, bpb=None, tokens=99)
FLAGS = ("--use-tensorboard", "--log-steps", "1")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def events_of(log, state):
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base = log.metrics.path.with_suffix("")
    found = EventAccumulator(f"{base}_tensorboard/{state.run_id}", {"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def shown_texts(log, state, name):
    """The texts that TensorBoard shows. (Its older reader, of events_of, never leaves any out.)"""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    base = log.metrics.path.with_suffix("")
    found = EventAccumulator(f"{base}_tensorboard/{state.run_id}", {"tensors": 0})
    found.Reload()
    events = found.Tensors(f"{name}/text_summary")
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events]


def scalars(found):
    return {
        name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]
    }


def expected_of(log):
    """The values of the metrics file, by name, in float32 as TensorBoard has them."""
    values = {}
    for record in read_records(log.metrics.path):
        for name, value in tracked_values(record, CPU, 1).items():
            values.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    return values


def test_the_event_file_holds_the_metrics_file(folder):
    log, state = logged_run(*FLAGS)
    writer = log.trackers[0].writer.file_writer.event_writer._async_writer._writer
    write = writer.write
    writer.write = lambda data: time.sleep(0.01) or write(data)  # nothing may wait in a queue
    log.eval(state, RESULT)
    for _ in range(5):
        update(log, state, loss=3.0 / (1 + state.step))
    log.eval(state, RESULT)
    log.sample(state, "def x():\n  pass")
    before_the_end = scalars(events_of(log, state))
    log.finish(state)
    found = events_of(log, state)
    assert scalars(found) == before_the_end == expected_of(log)
    assert [step for step, _ in scalars(found)["val/loss"]] == [0, 5]
    assert shown_texts(log, state, "sample") == [(5, "    def x():\n      pass\n")]
    ((step, run),) = shown_texts(log, state, "run")
    assert step == 0 and json.loads(run)["settings"]["lr"] == 3e-3
    (picture,) = found.Images("losses")
    assert (picture.step, picture.width, picture.height) == (5, 960, 600)  # 8 x 5 inches, 120 dpi


def test_what_lies_beyond_the_checkpoint_is_not_shown_after_a_resume(folder):
    log, state = logged_run(*FLAGS)
    for _ in range(7):
        update(log, state, loss=2.0)
    log.sample(state, "old")
    log.finish(state)
    resumed = RunState(step=5, tokens=300, run_id=state.run_id)
    log, _ = logged_run(*FLAGS, state=resumed)
    for _ in range(4):
        update(log, resumed, loss=9.0)
    log.sample(resumed, "new")
    log.finish(resumed)
    found = events_of(log, state)
    assert scalars(found) == expected_of(log)
    assert scalars(found)["train/loss"] == [(s, 2.0) for s in range(1, 6)] + [
        (s, 9.0) for s in range(6, 10)
    ]
    assert shown_texts(log, state, "sample") == [(9, "    new\n")]


def test_points_of_a_resumed_run_stay_where_its_metrics_are_gone(folder):
    log, state = logged_run(*FLAGS)
    for _ in range(3):
        update(log, state)
    log.finish(state)
    log.metrics.path.unlink()
    log, _ = logged_run(*FLAGS, state=state)
    update(log, state)
    log.finish(state)
    assert [step for step, _ in scalars(events_of(log, state))["lr"]] == [1, 2, 3, 4]


def test_a_resumed_run_that_had_no_tensorboard_shows_its_metrics_from_the_start(folder):
    log, state = logged_run("--log-steps", "1")
    for _ in range(5):
        update(log, state)
    log.finish(state)
    log, _ = logged_run(*FLAGS, state=state)
    update(log, state)
    log.finish(state)
    assert [step for step, _ in scalars(events_of(log, state))["lr"]] == [1, 2, 3, 4, 5, 6]


def test_two_runs_at_one_path_do_not_mix(folder):
    for steps in (3, 2):
        log, state = logged_run(*FLAGS)
        for _ in range(steps):
            update(log, state)
        log.finish(state)
        assert len(scalars(events_of(log, state))["lr"]) == steps


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_the_events_and_not_the_run(folder, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    log, state = logged_run(*FLAGS)
    (tracker,) = log.trackers
    update(log, state)
    tracker.writer.file_writer.event_writer._async_writer._writer.write = full
    for _ in range(30):  # more than its queue holds
        update(log, state)
    log.sample(state, "x")
    log.finish(state)
    assert capsys.readouterr().out.count("tensorboard stopped: [Errno 28] No space left") == 1
    trained = [r["step"] for r in read_records(log.metrics.path) if r["event"] == "train"]
    assert trained == list(range(1, 32))


def test_a_folder_that_cannot_be_made_is_said(folder):
    said, state = [], RunState()
    (folder / "base_tensorboard").write_text("")
    log = TensorBoard(folder / "base", state, {}, said.append)
    log.log({"lr": 1.0}, 1)
    log.finish()
    assert len(said) == 1 and said[0].startswith("tensorboard stopped: ")


def test_a_missing_package_is_refused_at_the_start(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "settings.command_line.find_spec",
        lambda name: None if name == "tensorboard" else find(name),
    )
    with pytest.raises(UserError, match="tensorboard: pip install tensorboard, or leave it out"):
        toy_settings("--use-tensorboard")
    toy_settings()


def test_without_the_flag_the_package_is_not_loaded(folder, monkeypatch):
    def load(name, *rest):
        assert not name.startswith(("tensorboard", "torch.utils.tensorboard"))
        return original(name, *rest)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", load)
    log, state = logged_run()
    update(log, state)
    log.finish(state)
