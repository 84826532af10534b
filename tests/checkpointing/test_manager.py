import copy
import dataclasses
import math
import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU
from helpers import Run, equal

from checkpoint import read_checkpoint
from checkpointing import manager as saver_module
from checkpointing.manager import CheckpointManager
from checkpointing.memory_copy import copied, copy_bytes
from checkpointing.writing import lock_path
from parallel import hang_guard as hang
from parallel.process_group import Ranks
from runtime.setting_fields import UserError
from settings.paths import archive_existing, free_number, run_files

DATA = {"train": {"fingerprint": "a"}, "val": {"fingerprint": "b"}, "tokenizer": ""}


@pytest.fixture(scope="module")
def trained():
    run = Run()
    run.steps(1)
    return run


@pytest.fixture
def run(trained):
    return copy.deepcopy(trained)


@pytest.fixture
def saver(tmp_path, run):
    """Makes savers; another one on the same path is that of the next process."""
    made = []

    def make(run=run, path=tmp_path / "c.pt", rank=0, data=DATA, **changes):
        changes = {"checkpoint_async": "off", **changes}
        args = dataclasses.replace(run.args, checkpoint_path=str(path), **changes)
        run.state.pending_messages.clear()
        stop()
        made.append(
            s := CheckpointManager(
                args, run.model, run.optimizer, run.state, data, CPU, Ranks(rank)
            )
        )
        if not args.resume:
            s.begin()
        return s

    def stop():
        while made:
            if made[-1].rank == 0:
                made[-1].finish()
                made[-1].lock.close()
            made.pop()

    yield make
    for s in made:
        s.finish()
        if s.rank == 0:
            s.lock.close()


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def step_of(path):
    return read_checkpoint(path)["step"]


def refused(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and all(part in said for part in parts), said


def damage(path):
    os.truncate(path, path.stat().st_size - 1)


# Who may use a path


def test_a_second_run_on_a_path_is_refused_with_the_name_of_the_first(tmp_path):
    first = lock_path(tmp_path / "c.pt")
    said = ("in use by another run", f"process {os.getpid()} on {os.uname().nodename}")
    for _ in range(2):
        refused(lambda: lock_path(tmp_path / "c.pt"), *said)
    lock_path(tmp_path / "other.pt").close()
    (tmp_path / "link.pt").symlink_to("c.pt")
    refused(lambda: lock_path(tmp_path / "link.pt"), *said)
    first.close()
    lock_path(tmp_path / "c.pt").close()


@pytest.mark.parametrize("resume", [False, True])
def test_a_refused_run_changes_nothing(tmp_path, run, saver, resume):
    saver().save()
    (tmp_path / "c.pt.1.tmp").touch()  # of the first run, which lives
    before = names(tmp_path)
    args = dataclasses.replace(run.args, checkpoint_path=str(tmp_path / "c.pt"), resume=resume)
    refused(
        lambda: CheckpointManager(args, run.model, run.optimizer, run.state, DATA, CPU), "in use"
    )
    assert names(tmp_path) == before


def test_a_path_that_is_no_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo("fifo")
    for path in ("folder", ".", "fifo"):
        refused(lambda path=path: lock_path(tmp_path / path), "not a plain file")
    (tmp_path / "file").touch()
    refused(lambda: lock_path(tmp_path / "file" / "c.pt"), "change --checkpoint-path")
    assert names(tmp_path) == ["fifo", "file", "folder"]


def test_a_disk_without_room_is_named_before_training(tmp_path, run, saver, monkeypatch):
    needed = 3 * 4 * run.model.num_parameters() + 1_000_000
    for free in (needed - 1, needed):
        monkeypatch.setattr("shutil.disk_usage", lambda p, free=free: SimpleNamespace(free=free))
        if free < needed:
            refused(lambda: saver(path=tmp_path / "x.pt"), "cannot save to", "free space")
        else:
            saver(path=tmp_path / "y.pt")


# What an earlier run left


def test_files_of_an_earlier_run_get_the_same_number(tmp_path, run, saver):
    for name in ("c.pt", "c.best.pt", "c.previous.pt", "c.step000003.pt"):
        (tmp_path / name).write_text(name)
    saver()
    assert names(tmp_path) == ["c.1.best.pt", "c.1.previous.pt", "c.1.pt", "c.1.step000003.pt"]
    for name in names(tmp_path):
        assert (tmp_path / name).read_text() == name.replace(".1", "")
    (note,) = run.state.pending_messages
    assert "c.best.pt -> c.1.best.pt" in note and "c.pt -> c.1.pt" in note


def test_files_of_others_and_older_ones_are_left_alone(tmp_path, saver):
    others = [
        *("d.pt", "cc.pt", "c.ckpt", "c.x.pt", "c.step.pt", "c.stepx.pt", "Xc.pt", "c.best.pt.bak"),
        *("c_pt", "c.pt.txt", "c.7.pt", "c.7.best.pt"),
    ]
    for name in [*others, "c.pt"]:
        (tmp_path / name).write_text(name)
    saver()
    assert names(tmp_path) == sorted([*others, "c.1.pt"])
    assert all((tmp_path / name).read_text() == name for name in others)


def test_nothing_is_ever_overwritten(tmp_path, saver):
    (tmp_path / "c.2.best.pt").write_text("old")  # its number is taken too
    for i in range(3):
        for name in ("c.pt", "c.best.pt"):
            (tmp_path / name).write_text(str(i))
        saver()
    numbers = [1, 3, 4]
    for i, n in enumerate(numbers):
        assert (tmp_path / f"c.{n}.pt").read_text() == str(i)
        assert (tmp_path / f"c.{n}.best.pt").read_text() == str(i)
    assert (tmp_path / "c.2.best.pt").read_text() == "old" and len(names(tmp_path)) == 7


def test_with_resume_nothing_is_renamed(tmp_path, run, saver):
    saver(keep_every=1).save()
    before = names(tmp_path)
    saver(resume=True)
    assert (
        names(tmp_path) == before == ["c.pt", "c.step000001.pt"] and not run.state.pending_messages
    )


@pytest.mark.parametrize(
    "name, files, wanted",
    [
        ("c.pt", ["c.best.pt"], ["c.1.best.pt"]),
        ("c", ["c", "c.best"], ["c.1", "c.1.best"]),
        ("a.b.pt", ["a.b.pt", "a.b.step000002.pt"], ["a.b.1.pt", "a.b.1.step000002.pt"]),
        ("c+(x).pt", ["c+(x).pt"], ["c+(x).1.pt"]),
        ("ü n.pt", ["ü n.previous.pt"], ["ü n.1.previous.pt"]),
        (".c", [".c"], [".c.1"]),
    ],
)
def test_numbers_stand_before_the_label(tmp_path, name, files, wanted):
    for file in files:
        (tmp_path / file).touch()
    assert [p.name for p in run_files(tmp_path / name)] == sorted(files)
    archive_existing(run_files(tmp_path / name), 1)
    assert names(tmp_path) == sorted(wanted)


def test_a_run_and_its_metrics_are_set_aside_with_the_same_number(tmp_path, saver):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "c.3.jsonl").touch()  # of a run that never saved
    (logs / "other.1.jsonl").touch()
    (tmp_path / "c.1.pt").touch()  # of one whose metrics are gone
    assert free_number(tmp_path / "c.pt", logs / "c") == 2
    (tmp_path / "c.2.step000005.pt").touch()
    assert free_number(tmp_path / "c.pt", logs / "c") == 4
    (tmp_path / "c.pt").touch()
    saver(log_dir=str(logs))
    assert (tmp_path / "c.4.pt").exists() and not (tmp_path / "c.pt").exists()
    assert free_number(tmp_path / "no/such/folder/c.pt", tmp_path / "none/c") == 1


def test_a_symbolic_link_stays_one_when_its_target_is_renamed(tmp_path, saver):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "c.pt").write_text("old")
    (tmp_path / "link.pt").symlink_to("real/c.pt")
    saver(path=tmp_path / "link.pt").save()
    assert names(tmp_path / "real") == ["c.1.pt", "c.pt"]
    assert (tmp_path / "link.pt").is_symlink() and step_of(tmp_path / "link.pt") == 1


def test_nothing_to_rename_is_nothing_to_say(tmp_path, run, saver):
    saver()
    assert archive_existing([tmp_path / "none.pt"], 1) == [] == run.state.pending_messages


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_run_left_half_written_is_removed(tmp_path, saver, resume):
    gone = [f"c{label}.pt.{n}.tmp" for n in (1, 99999) for label in ("", ".best", ".previous")]
    kept = ["c.pt.tmp", "c.pt.x.tmp", "d.pt.1.tmp", "cc.pt.1.tmp", "c.1.tmp", "c.pt.1.tmp.pt"]
    for name in [*gone, "c.step000007.pt.5.tmp", *kept]:
        (tmp_path / name).touch()
    saver(resume=resume)
    assert names(tmp_path) == sorted(kept)


def test_what_another_run_is_writing_is_left_alone(tmp_path, saver):
    other = lock_path(tmp_path / "c.large.pt")
    (tmp_path / "c.large.pt.7.tmp").touch()
    saver()
    other.close()
    assert names(tmp_path) == ["c.large.pt.7.tmp"]


# Saving


def gated(monkeypatch):
    """Lets write_checkpoint wait for the event."""
    go, original = threading.Event(), saver_module.write_checkpoint

    def write(*args, **more):
        assert go.wait(20)
        original(*args, **more)

    monkeypatch.setattr(saver_module, "write_checkpoint", write)
    return go


def test_a_background_save_holds_the_state_of_its_moment(tmp_path, run, saver, monkeypatch):
    go = gated(monkeypatch)
    s = saver(checkpoint_async="on")
    for step in (1, 2):
        go.clear()
        weights = run.weights()
        moments = {k: v.clone() for k, v in run.optimizer.state[run.model.wte.weight].items()}
        s.save()
        assert s.writing.is_alive() and run.state.step == step
        run.step()
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(1)
        go.set()
        s.finish()
        content = read_checkpoint(tmp_path / "c.pt")
        assert content["step"] == step and equal(content["model"], weights)
        assert equal(content["optimizer"]["wte.weight"], moments)
    assert step_of(tmp_path / "c.previous.pt") == 1


def test_a_rank_that_saves_or_loads_may_take_long(tmp_path, run, saver, monkeypatch):
    seen, writing, go = [], threading.Event(), threading.Event()

    def noted(function):
        def call(*args, **more):
            seen.append((function.__name__, hang._progress.long_work))
            writing.set()
            assert go.wait(20)
            return function(*args, **more)

        return call

    monkeypatch.setattr(saver_module, "write_checkpoint", noted(saver_module.write_checkpoint))
    monkeypatch.setattr(saver_module, "load_checkpoint", noted(saver_module.load_checkpoint))
    go.set()
    saver().save()
    saver(run=Run(), resume=True).load()
    assert seen == [("write_checkpoint", 1), ("load_checkpoint", 1)]
    go.clear(), writing.clear()
    s = saver(checkpoint_async="on")
    s.save()  # in another thread: this one goes on, and nothing excuses it
    assert writing.wait(20) and hang._progress.long_work == 0
    threading.Timer(0.2, lambda: (seen.append(hang._progress.long_work), go.set())).start()
    s.finish()
    assert seen[-1] == 1 and hang._progress.long_work == 0


def test_a_save_waits_for_the_one_before(tmp_path, run, saver, monkeypatch):
    active, most, original = [], [], saver_module.write_checkpoint

    def write(*args, **more):
        active.append(1)
        most.append(len(active))
        original(*args, **more)
        active.pop()

    monkeypatch.setattr(saver_module, "write_checkpoint", write)
    s = saver(checkpoint_async="on")
    for _ in range(4):
        s.save()
        run.step()
    s.finish()
    assert most == [1] * 4 and step_of(tmp_path / "c.pt") == 4
    assert s.writing is None


def test_the_memory_of_the_copies_is_used_again(tmp_path, run, saver):
    def places(tree):
        if isinstance(tree, dict):
            return [place for v in tree.values() for place in places(v)]
        return [tree.data_ptr()]

    s = saver(checkpoint_async="on")
    s.save()
    s.finish()
    first = places(s.copies)
    own = [p.data_ptr() for p in run.model.parameters()]
    assert len(first) == 4 * len(own) and not set(first) & set(own)
    run.step()
    s.save()
    s.finish()
    assert places(s.copies) == first and step_of(tmp_path / "c.pt") == 2


def test_moments_that_come_later_are_copied_too():
    into = {}
    weight, moment = torch.ones(2), torch.full((3,), 2.0)
    assert equal(copied({"w": weight, "o": {}}, into), {"w": weight, "o": {}})
    both = {"w": weight + 1, "o": {"m": moment}, "step": 7}
    copy_of = copied(both, into)
    moment += 1
    assert copy_of["w"].tolist() == [2, 2] and copy_of["o"]["m"].tolist() == [2, 2, 2]
    assert copy_of["step"] == 7 and into.keys() == {"w", "o"}


def test_a_plain_save_is_on_disk_when_it_returns(tmp_path, run, saver):
    s = saver()
    seconds = s.save()
    assert step_of(tmp_path / "c.pt") == 1 and s.writing is None and s.copies == {}
    assert 0 < seconds < 20
    assert run.state.pending_messages == [f"saved {tmp_path}/c.pt at step 1"]


def test_auto_saves_in_the_background_where_a_copy_fits(tmp_path, run, saver, monkeypatch):
    content = 3 * 4 * run.model.num_parameters() + 4 * len(list(run.model.parameters()))
    s = saver(checkpoint_async="auto")
    monkeypatch.setattr(saver_module, "free_memory", lambda: 2.0 * content)
    s.save()
    assert s.copies == {} and s.writing is None and step_of(tmp_path / "c.pt") == 1
    monkeypatch.setattr(saver_module, "free_memory", lambda: 2.0 * content + 1)
    s.save()
    assert s.copies and s.writing is not None
    monkeypatch.setattr(saver_module, "free_memory", lambda: 0.0)
    s.save()
    assert s.writing is not None, "the copy has its memory already"
    s.finish()


def test_other_ranks_write_and_claim_nothing(tmp_path, saver):
    s = saver(rank=1, checkpoint_async="on")
    assert s.save() < 0.1
    s.finish()
    assert not list(tmp_path.iterdir())


def test_milestones_and_the_best_are_kept(tmp_path, run, saver):
    s = saver(keep_every=2)
    for step in range(2, 6):
        run.step()
        if step == 3:
            run.state.best_step = 3
        run.state.pending_messages.clear()
        s.save()
        also = {2: "c.step000002.pt", 3: "c.best.pt", 4: "c.step000004.pt"}.get(step)
        more = f" and {also}" if also else ""
        assert run.state.pending_messages == [f"saved {tmp_path}/c.pt{more} at step {step}"]
    held = {name: step_of(tmp_path / name) for name in names(tmp_path)}
    assert held == {
        "c.pt": 5,
        "c.previous.pt": 4,
        "c.best.pt": 3,
        "c.step000002.pt": 2,
        "c.step000004.pt": 4,
    }
    assert os.path.samefile(tmp_path / "c.previous.pt", tmp_path / "c.step000004.pt")


def best_at(run, step):
    run.step()
    assert run.state.step == step
    run.state.best_step = step


@pytest.mark.parametrize("memory", ["on", "auto"])
def test_the_best_so_far_waits_in_memory_for_the_next_save(
    tmp_path, run, saver, monkeypatch, memory
):
    written, original = [], saver_module.write_checkpoint

    def write(path, content, *labels, **more):
        written.append((content["step"], *labels))
        original(path, content, *labels, **more)

    monkeypatch.setattr(saver_module, "write_checkpoint", write)
    s = saver(checkpoint_async=memory)
    for step in (2, 3):
        best_at(run, step)
        assert 0 < s.keep_best() < 20
    weights = run.weights()
    moments = {k: v.clone() for k, v in run.optimizer.state[run.model.wte.weight].items()}
    assert written == [] and names(tmp_path) == []
    run.steps(2)
    s.save()
    s.finish()
    assert written == [(3, "best"), (5,)]
    assert [step_of(tmp_path / f"c{x}.pt") for x in ("", ".best", ".previous")] == [5, 3, 3]
    best = read_checkpoint(tmp_path / "c.best.pt")
    assert equal(best["model"], weights) and equal(best["optimizer"]["wte.weight"], moments)
    run.step()
    s.save()
    best_at(run, 7)
    s.keep_best()
    best_at(run, 8)
    s.save()  # better than the one that waits, which nobody will ask for
    s.finish()
    assert written[2:] == [(6,), (8, "best")] and step_of(tmp_path / "c.best.pt") == 8
    assert run.state.pending_messages[-1] == f"saved {tmp_path}/c.pt and c.best.pt at step 8"


def test_the_best_so_far_is_written_at_once_where_memory_has_no_room(
    tmp_path, run, saver, monkeypatch
):
    monkeypatch.setattr(saver_module, "free_memory", lambda: 0.0)
    for step, mode in ((2, "off"), (3, "auto")):
        s = saver(checkpoint_async=mode)
        best_at(run, step)
        s.keep_best()
        s.finish()
        assert step_of(tmp_path / "c.best.pt") == step_of(tmp_path / "c.pt") == step
    s = saver(checkpoint_async="on")
    monkeypatch.setattr(saver_module, "copied", refuse_memory)
    best_at(run, 4)
    s.keep_best()
    assert step_of(tmp_path / "c.best.pt") == 4
    assert "no memory to save in the background (none left)" in run.state.pending_messages


def refuse_memory(*_, **__):
    raise MemoryError("none left")


def test_a_way_back_has_the_best_that_was_not_written_yet(tmp_path, run, saver):
    s = saver(checkpoint_async="on")
    s.save()
    best_at(run, 2)
    s.keep_best()
    run.steps(2)
    assert "continues step 2" in s.way_back(4)
    assert [step_of(tmp_path / f"c{x}.pt") for x in ("", ".best", ".previous")] == [2, 2, 1]


def test_pinned_copies_count_as_the_blocks_that_torch_gives_them():
    tree = {"model": {"a": torch.empty(5), "b": torch.empty(4)}, "step": 3, "c": torch.empty(0)}
    assert copy_bytes(tree) == 36 and copy_bytes(tree, pinned=True) == 32 + 16


def test_names_that_a_kill_left_out_are_made_up_for(tmp_path, run, saver):
    run.state.best_step = 1
    s = saver(keep_every=1)
    s.save()
    run.step()
    run.state.best_step = 2
    s.save()
    os.remove(tmp_path / "c.step000002.pt")  # as if killed before the second names of step 2
    os.replace(tmp_path / "c.previous.pt", tmp_path / "c.best.pt")
    fresh = Run()
    s = saver(run=fresh, resume=True, keep_every=1)
    s.load()
    s.begin()
    assert {step_of(tmp_path / f"c.{name}.pt") for name in ("best", "step000002")} == {2}
    assert names(tmp_path) == ["c.best.pt", "c.pt", "c.step000001.pt", "c.step000002.pt"]


def failing_once(monkeypatch, error, calls=1):
    original, left = saver_module.write_checkpoint, [calls]

    def write(*args, **more):
        left[0] -= 1
        if left[0] >= 0:
            raise error
        original(*args, **more)

    monkeypatch.setattr(saver_module, "write_checkpoint", write)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_save_that_fails_is_noted_and_the_next_one_makes_it_good(
    tmp_path, run, saver, monkeypatch, mode
):
    s = saver(checkpoint_async=mode)
    failing_once(monkeypatch, UserError("the disk is full"))
    s.save()
    said = "step 1 was not saved: the disk is full"
    s.finish()
    assert run.state.unsaved and run.state.exit_code(s.args) == 2
    assert run.state.pending_warnings == [f"{said}; the run goes on"]
    run.step()
    s.save()
    s.finish()
    assert not run.state.unsaved and run.state.exit_code(s.args) == 0
    assert run.state.pending_messages == [f"saved {tmp_path}/c.pt at step 2"]
    failing_once(monkeypatch, UserError("the disk is full"))
    run.step()
    s.save()
    s.finish()
    assert run.state.unsaved
    assert step_of(tmp_path / "c.pt") == 2


@pytest.mark.parametrize("error", [MemoryError("no memory"), TypeError("x"), AssertionError()])
def test_no_failure_in_the_background_is_lost(run, saver, monkeypatch, error):
    s = saver(checkpoint_async="on")
    failing_once(monkeypatch, error)
    s.save()
    s.finish()
    assert run.state.pending_warnings == [f"step 1 was not saved: {error}; the run goes on"]


def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path, run, saver):
    s = saver(checkpoint_async="on")
    s.save()
    run.step()
    run.model.wpe.weight.data[3, 3] = float("nan")
    s.save()
    s.finish()
    assert "step 2 was not saved: model wpe.weight is not finite" in run.state.pending_warnings[-1]
    assert step_of(tmp_path / "c.pt") == 1 and names(tmp_path) == ["c.pt"]


def test_a_save_is_overdue_by_the_minutes_since_the_last(tmp_path, saver, monkeypatch):
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: 0.0)
    monkeypatch.setattr(saver_module, "time", clock)
    s = saver(save_minutes=1.5)
    for later, overdue in ((0, False), (89.9, False), (90, True), (1000, True)):
        now[0] = 1000 + later
        assert s.overdue == overdue
    s.save()
    assert not s.overdue
    now[0] += 90
    assert s.overdue
    for quiet in ({"save_minutes": 0.0}, {"save_minutes": 1.0, "rank": 1}):
        s = saver(path=tmp_path / "d.pt", **quiet)
        now[0] += 1e9
        assert not s.overdue


def skipped(run):
    """As after an update that was skipped."""
    run.state.step += 1
    run.state.bad_in_row = 1 + (run.state.bad_in_row or torch.tensor(0.0))


@pytest.mark.parametrize("mode", ["on", "off"])
def test_saves_of_skipped_updates_leave_the_checkpoint_from_before_them(tmp_path, run, saver, mode):
    def held():
        s.finish()
        return [step_of(tmp_path / name) for name in ("c.previous.pt", "c.pt")]

    s = saver(checkpoint_async=mode)
    s.save()
    run.step()
    s.save()
    for step in (3, 4, 5):
        skipped(run)
        s.save()
        assert held() == [1, step]  # step 2 has the weights of 3, 4 and 5
    s = saver(checkpoint_async=mode, resume=True)  # the next process
    s.load()
    skipped(run)
    s.save()
    assert held() == [1, 6]
    run.step()
    s.save()
    assert run.state.bad_in_row == 0 and held() == [6, 7]


@pytest.mark.parametrize(
    "saved, bad_from, resumes",
    [
        ([1, 2, 3, 4], 2, 1),  # with --save-steps 1: 2 to 4 have the weights that fail
        ([1, 2], 3, 2),  # saved before
        ([1], 1, None),
        ([], 1, None),
    ],
)
def test_after_bad_updates_the_way_back_works(tmp_path, run, saver, saved, bad_from, resumes):
    s = saver()
    for step in range(1, 5):
        if step in saved:
            s.save()
        skipped(run) if step >= bad_from else run.step()
    said = s.way_back(bad_from)
    if resumes is None:
        assert said == "no checkpoint has earlier ones; start anew with a lower --lr"
        return
    path = tmp_path / "c.pt"
    assert said == f"--resume continues step {resumes} of {path}; give it a lower --lr"
    fresh = Run()
    s = saver(run=fresh, resume=True, lr=1e-4)
    s.load()
    assert fresh.state.step == resumes and math.isfinite(fresh.steps(2)[-1])
    s.save()
    assert step_of(path) == resumes + 2


def test_the_way_back_names_another_precision_only_where_there_is_one(saver, run):
    s = saver()
    s.device = dataclasses.replace(CPU, precision="bf16")
    assert s.way_back(1).endswith("lower --lr, or with --precision fp32")


# Loading


@pytest.fixture
def saved(tmp_path, run, saver):
    """A run that was saved at steps 1 and 2 and ended."""
    s = saver()
    s.save()
    run.step()
    s.save()
    return run


@pytest.mark.parametrize(
    "latest, previous, step, renamed",
    [
        ("whole", "whole", 2, []),
        ("whole", "damaged", 2, []),
        ("whole", "missing", 2, []),
        ("damaged", "whole", 1, ["c.1.pt"]),
        ("missing", "whole", 1, []),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_newest_whole_checkpoint_is_continued(
    tmp_path, saved, saver, latest, previous, step, renamed, rank
):
    files = {"c.pt": latest, "c.previous.pt": previous}
    for name, state in files.items():
        if state == "damaged":
            damage(tmp_path / name)
        elif state == "missing":
            os.remove(tmp_path / name)
    wanted = {name: saved.weights() for name in files} if step == 2 else {}
    fresh = Run()
    s = saver(run=fresh, resume=True, rank=rank)
    s.load()
    s.begin()
    assert fresh.state.step == step and fresh.state.run_id == saved.state.run_id
    if wanted:
        assert equal(fresh.weights(), wanted["c.pt"])
    used = "c.pt" if step == 2 else "c.previous.pt"
    notes = fresh.state.pending_messages
    assert f"resumed {tmp_path}/{used} at step {step}" in notes
    said = "not the latest, since "
    assert any(note.startswith(said + f"{tmp_path}/c.pt: ") for note in notes) == (step == 1)
    now = {name for name, state in files.items() if state != "missing"}
    if renamed and rank == 0:
        now = now - {"c.pt"} | set(renamed)
        assert any("c.pt -> c.1.pt" in note for note in notes)
    assert names(tmp_path) == sorted(now)


def test_a_damaged_file_never_becomes_the_previous_one(tmp_path, saved, saver):
    damage(tmp_path / "c.pt")
    fresh = Run()
    s = saver(run=fresh, resume=True)
    s.load()
    s.begin()
    for step in (2, 3):
        fresh.step()
        s.save()
        assert step_of(tmp_path / "c.pt") == step
        assert step_of(tmp_path / "c.previous.pt") == step - 1
    assert names(tmp_path) == ["c.1.pt", "c.previous.pt", "c.pt"]


def test_the_next_saves_keep_the_one_that_was_resumed(tmp_path, saved, saver):
    fresh = Run()
    s = saver(run=fresh, resume=True)
    s.load()
    fresh.step()
    s.save()
    assert [step_of(tmp_path / n) for n in ("c.previous.pt", "c.pt")] == [2, 3]


def test_the_resumed_run_goes_on_like_the_uninterrupted_one(saved, saver):
    fresh = Run()
    saver(run=fresh, resume=True).load()
    assert fresh.steps(3) == saved.steps(3)
    assert equal(fresh.weights(), saved.weights())


def test_two_damaged_files_are_both_named_and_left(tmp_path, saved, saver):
    for name in ("c.pt", "c.previous.pt"):
        damage(tmp_path / name)
    s = saver(run=Run(), resume=True)
    refused(s.load, "no whole checkpoint", f"{tmp_path}/c.pt: ", f"{tmp_path}/c.previous.pt: ")
    assert names(tmp_path) == ["c.previous.pt", "c.pt"]


def test_nothing_to_resume_says_how_to_start(tmp_path, saver):
    refused(saver(resume=True).load, f"{tmp_path}/c.pt: no such", "start without --resume")


@pytest.mark.parametrize(
    "other, data, said",
    [
        (("--n-layers", "1"), DATA, "blocks.1.attn.qkv.weight is unknown"),
        ((), {**DATA, "val": {"fingerprint": "x"}}, "val data: fingerprint was 'b', is 'x'"),
    ],
)
def test_another_run_is_refused_and_not_mistaken_for_damage(
    tmp_path, saved, saver, other, data, said
):
    fresh = Run(*other)
    s = saver(run=fresh, resume=True, data=data)
    refused(s.load, "does not fit", said)
    assert fresh.state.step == 0 and names(tmp_path) == ["c.previous.pt", "c.pt"]


def test_settings_and_machine_that_changed_are_noted(tmp_path, saved, saver, monkeypatch):
    monkeypatch.setattr(saver_module, "environment", lambda device, world: {"processes": 4})
    fresh = Run()
    saver(run=fresh, resume=True, lr=0.5).load()
    (note,) = (note for note in fresh.state.pending_messages if note.startswith("changed"))
    assert f"lr was {saved.args.lr}, is 0.5" in note and "processes was 1, is 4" in note


def test_notes_name_files_that_exist(tmp_path, run, saver):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.pt").symlink_to("real/c.pt")
    run.state.best_step = 1
    saver(path=tmp_path / "link.pt").save()
    (note,) = run.state.pending_messages
    assert "c.best.pt" in note and (tmp_path / "real" / "c.best.pt").exists()


def test_a_run_that_does_not_come_to_begin_renames_nothing(tmp_path, saved, saver, monkeypatch):
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "begin", lambda self: None)
        saver()
    assert names(tmp_path) == before


def test_a_copy_becomes_a_run_of_its_own_and_a_moved_file_does_not(tmp_path, saved, saver):
    shutil.copy(tmp_path / "c.pt", tmp_path / "copy.pt")
    branch = Run()
    saver(run=branch, resume=True, path=tmp_path / "copy.pt").load()
    assert branch.state.run_id != saved.state.run_id and branch.state.wandb_run_id == ""
    assert f"a branch of run {saved.state.run_id}" in branch.state.pending_messages[-1]
    (tmp_path / "c.pt").rename(tmp_path / "moved.pt")
    moved = Run()
    saver(run=moved, resume=True, path=tmp_path / "moved.pt").load()
    assert moved.state.run_id == saved.state.run_id


def test_a_run_that_was_set_aside_is_itself_and_no_copy(tmp_path, saved, saver):
    saver(run=Run()).save()  # another run at the same path
    assert step_of(tmp_path / "c.1.pt") == 2
    old = Run()
    saver(run=old, resume=True, path=tmp_path / "c.1.pt").load()
    assert old.state.run_id == saved.state.run_id
    damage(tmp_path / "c.pt")  # whose file that was can't be told
    old = Run()
    saver(run=old, resume=True, path=tmp_path / "c.1.pt").load()
    assert old.state.run_id != saved.state.run_id


@pytest.mark.parametrize("name", ["c.best.pt", "c.previous.pt", "c.step000500.pt"])
def test_the_files_of_a_run_are_no_paths_for_another(tmp_path, name):
    refused(lambda: lock_path(tmp_path / name), "belongs to the run at c.pt", "copy it")


def test_a_run_beyond_its_end_is_refused(saved, saver):
    refused(
        saver(run=Run(), resume=True, num_steps=1, warmup_steps=0).load,
        "at step 2 already",
        "--num-steps 1",
    )


def test_without_memory_for_a_copy_it_saves_at_once(tmp_path, run, saver, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("can't allocate memory")

    s = saver(checkpoint_async="on")
    monkeypatch.setattr(saver_module, "copied", no_memory)
    s.save()
    assert step_of(tmp_path / "c.pt") == 1 and s.writing is None
    assert "no memory to save in the background" in run.state.pending_messages[0]
