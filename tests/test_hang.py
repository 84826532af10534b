import threading
import time

import pytest

import hang
from hang import HangGuard, Report, judge, own_report


def report(waiting=False, idle=50.0, patient=False, where="model.py:1 in forward"):
    return Report(number=1, idle=idle, waiting=waiting, patient=patient, stack=[where])


def test_the_rank_that_the_others_wait_for_is_named_with_its_stack():
    ranks = {0: report(waiting=True), 1: report(where="text.py:9 in read"), 2: report(waiting=True)}
    said = judge(ranks, [], timeout=60)
    assert said.startswith("error: rank 1 is stuck: the others have waited 50 s for it")
    assert "text.py:9 in read" in said and "rank 0" not in said and "--resume" in said


def test_a_rank_that_says_nothing_is_named_with_what_it_did_last():
    said = judge({0: report(waiting=True), 1: report(where="step.py:3 in go")}, [1], timeout=60)
    assert "rank 1 does not answer" in said and "step.py:3 in go" in said


@pytest.mark.parametrize(
    "ranks",
    [
        {0: report(), 1: report()},  # all compute: a slow step
        {0: report(waiting=True), 1: report(waiting=True)},  # in a collective that takes its time
        {0: report(patient=True), 1: report(waiting=True)},  # rank 0 saves
        {0: report(waiting=True), 1: report(idle=10.0)},  # has just come from a step
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


def waits_in_a_collective(monkeypatch):
    mine = report(waiting=True)
    monkeypatch.setattr(hang, "own_report", lambda n: Report(n, 0.0, True, False, mine.stack))


def test_a_guard_ends_a_run_that_waits_for_a_silent_rank(ended, monkeypatch):
    said, over = ended
    waits_in_a_collective(monkeypatch)
    store = Store(rank1=hang.to_json(report(where="data.py:5 in read"), 0.0).encode())
    guard = HangGuard(store, rank=0, world=2, timeout_seconds=1.0)
    assert not over.wait(1.5)  # nothing is judged before the first step
    guard.beat()
    start = time.monotonic()
    assert over.wait(5)
    assert time.monotonic() - start < 1.5 and "rank 1 does not answer" in said[0]


def test_steps_that_get_on_are_left_alone(ended, monkeypatch):
    _, over = ended
    waits_in_a_collective(monkeypatch)
    guard = HangGuard(Store(rank1=hang.to_json(report(), 0.0).encode()), 0, 2, timeout_seconds=0.5)
    for _ in range(12):
        guard.beat()
        assert not over.wait(0.1)
    guard.end()
    assert not over.wait(1.0)


def test_a_lost_store_ends_only_those_that_wait(ended, monkeypatch):
    said, over = ended

    class Lost(Store):
        def set(self, key, value):
            raise ConnectionError

    guard = HangGuard(Lost(), 1, 2, timeout_seconds=0.3)
    guard.beat()
    assert not over.wait(1.0)  # computes
    waits_in_a_collective(monkeypatch)
    assert over.wait(2) and "the launcher is gone" in said[0]
    guard.end()


def test_a_report_shows_the_threads_that_work_for_the_main_one():
    go_on = threading.Event()

    def reading_slowly():
        go_on.wait(10)

    thread = threading.Thread(target=reading_slowly, name="prefetch_0")
    thread.start()
    try:
        found = own_report(3)
    finally:
        go_on.set()
    assert found.number == 3 and not found.waiting and not found.patient
    stack = "\n".join(found.stack)
    assert (
        "test_hang.py" in stack and "thread prefetch_0:" in stack and "in reading_slowly" in stack
    )
