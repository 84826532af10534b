import json
import threading
import time
from dataclasses import asdict

import pytest

import hang
from hang import HangGuard, Report, judge, report_of


def report(waiting=False, still=50.0, patient=False, where="model.py:1 in forward"):
    return Report(number=1, still=still, waiting=waiting, patient=patient, stack=[where])


def test_the_rank_that_the_others_wait_for_is_named_with_its_stack():
    ranks = {0: report(waiting=True), 1: report(where="text.py:9 in read"), 2: report(waiting=True)}
    said = judge(ranks, [], timeout=60)
    assert said.startswith("error: rank 1 is stuck: others have waited 50 s for it")
    assert "text.py:9 in read" in said and "rank 0" not in said and "--resume" in said


def test_a_rank_that_says_nothing_is_named_with_what_it_did_last():
    said = judge({0: report(waiting=True), 1: report(where="step.py:3 in go")}, [1], timeout=60)
    assert "rank 1 does not answer" in said and "step.py:3 in go" in said


@pytest.mark.parametrize(
    "ranks",
    [
        {0: report(), 1: report()},  # all compute
        {0: report(waiting=True), 1: report(waiting=True)},  # in a collective that takes its time
        {0: report(patient=True), 1: report(waiting=True)},  # rank 0 saves
        {0: report(waiting=True), 1: report(still=10.0)},  # gets from line to line: a slow step
        {0: report(waiting=True, still=40.0), 1: report()},  # nobody has waited for long
    ],
)
def test_what_is_only_slow_is_left_alone(ranks):
    assert judge(ranks, [], timeout=60) is None


class Store(dict):
    def set(self, key, value):
        self[key] = value.encode()

    def check(self, keys):
        return all(k in self for k in keys)

    def get(self, key):
        return self[key]


@pytest.fixture
def ended(monkeypatch):
    """What a guard printed before it ended the process, which it does not here."""
    said, over = [], threading.Event()
    monkeypatch.setattr(hang, "tell", said.append)
    monkeypatch.setattr(hang.os, "_exit", lambda code: (over.set(), time.sleep(60)))
    return said, over


WAITING = [("train_ddp.py", 40, "main"), ("torch/distributed/c10d.py", 7, "all_reduce")]


def silent_rank(where="data.py:5 in read"):
    return Store(rank1=json.dumps(asdict(report(where=where))).encode())


def test_a_guard_ends_a_run_that_waits_for_a_silent_rank(ended, monkeypatch):
    said, over = ended
    monkeypatch.setattr(hang, "calls_of", lambda frame: WAITING)
    start = time.monotonic()
    HangGuard(silent_rank(), rank=0, world=2, timeout_seconds=2.0)
    assert over.wait(8) and "rank 1 does not answer" in said[0] and "data.py:5" in said[0]
    assert 1.5 < time.monotonic() - start < 4


def test_ranks_that_get_on_are_left_alone(ended, monkeypatch):
    _, over = ended
    line = iter(range(10**6))
    monkeypatch.setattr(hang, "calls_of", lambda frame: [*WAITING[:1], ("d.py", next(line), "f")])
    guard = HangGuard(silent_rank(), 0, 2, timeout_seconds=0.4)
    assert not over.wait(1.5)
    monkeypatch.setattr(hang, "calls_of", lambda frame: [*WAITING, *WAITING[:1]])
    assert not over.wait(1.5)  # at one line, but its own
    guard.end()


def test_a_lost_store_ends_only_those_that_wait(ended, monkeypatch):
    said, over = ended

    class Lost(Store):
        def set(self, key, value):
            raise ConnectionError

    guard = HangGuard(Lost(), 1, 2, timeout_seconds=0.3)
    assert not over.wait(1.0)  # computes
    monkeypatch.setattr(hang, "calls_of", lambda frame: WAITING)
    assert over.wait(2) and "the launcher is gone" in said[0]
    guard.end()


def test_a_report_shows_the_threads_that_work_for_the_main_one():
    go_on = threading.Event()

    def reading_slowly():
        go_on.wait(10)

    thread = threading.Thread(target=reading_slowly, name="prefetch_0")
    thread.start()
    try:
        found = report_of([("train_ddp.py", 40, "main")], number=3, still=1.0)
    finally:
        go_on.set()
    assert found.number == 3 and not found.waiting and not found.patient
    assert found.stack[0].endswith("train_ddp.py:40 in main")
    stack = "\n".join(found.stack)
    assert "thread prefetch_0:" in stack and "in reading_slowly" in stack
    assert report_of(WAITING, 1, 0.0).waiting
    assert report_of([("/x/saver.py", 1, "save"), ("io.py", 2, "write")], 1, 0.0).patient
