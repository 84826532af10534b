import dataclasses
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest
from conftest import ROOT, toy_settings

from parallel import hang_guard as hang
from parallel import process_group as ranks
from parallel.hang_guard import (
    HangGuard,
    Report,
    exchange_finished,
    judge,
    may_take_long,
    report_of,
    stacks_of_threads,
)
from parallel.rendezvous import Rendezvous


def report(waiting=False, still=50.0, patient=False, where="model.py:1 in forward"):
    return Report(number=1, still=still, waiting=waiting, patient=patient, stack=[where])


def test_the_rank_that_the_others_wait_for_is_named_with_its_stack():
    ranks = {0: report(waiting=True), 1: report(where="text.py:9 in read"), 2: report(waiting=True)}
    said = judge(ranks, [], timeout=60)
    assert said.startswith("error: rank 1 is stuck: others have waited 50 s for it")
    assert "text.py:9 in read" in said and "rank 0" not in said and "--resume" in said


def test_a_rank_that_says_nothing_is_named_with_where_it_stood_if_it_did():
    said = judge({0: report(waiting=True), 1: report(where="step.py:3 in go")}, [1], timeout=60)
    assert "rank 1 does not answer" in said and "step.py:3 in go" in said
    got_on = dataclasses.replace(report(), stack=[])
    said = judge({0: report(waiting=True), 1: got_on}, [1], timeout=60)
    assert "rank 1 does not answer" in said and "stack" not in said


def test_patience_ends():
    for still, blamed in ((5000.0, False), (6000.0, True)):  # of the 7200 s that others wait
        ranks = {0: report(waiting=True), 1: report(patient=True, still=still)}
        assert bool(judge(ranks, [], timeout=60)) == blamed


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


class Ended:
    """Takes the place of the end of the process, and is what the main thread waits for."""

    def __init__(self):
        self.said, self.lock = [], threading.Lock()
        self.lock.acquire()

    def exit(self, code):
        self.lock.release()
        time.sleep(60)

    def while_at(self, file, function, seconds):
        """Whether a guard ends the process while the main thread stands in that function, for so
        many seconds at most; innermost is a call of C, so no other line is.
        """
        scope = {"wait": self.lock.acquire}
        code = f"def {function}(seconds):\n    return wait(timeout=seconds)"
        exec(compile(code, file, "exec"), scope)
        return scope[function](seconds)


@pytest.fixture
def ended(monkeypatch):
    over = Ended()
    monkeypatch.setattr(hang, "print_stderr", over.said.append)
    monkeypatch.setattr(hang.os, "_exit", over.exit)
    return over


@pytest.fixture
def guarded():
    """Makes guards, which end with the test, however that ends."""
    made = []

    def make(*arguments, **more):
        made.append(HangGuard(*arguments, **more))
        return made[-1]

    yield make
    for guard in made:
        guard.ended.set()


ELSEWHERE = ("/x/data.py", "read")
EXCHANGE = ("/x/torch/distributed/c10d.py", "all_reduce")


def silent_rank(where="data.py:5 in read"):
    return Store(rank1=json.dumps(asdict(report(where=where, still=0.0))).encode())


def test_a_guard_ends_a_run_that_waits_for_a_silent_rank(ended, guarded):
    start = time.monotonic()
    guarded(silent_rank(), rank=0, world=2, timeout_seconds=2.0)
    assert ended.while_at(*EXCHANGE, 8)
    assert "rank 1 does not answer" in ended.said[0] and "data.py:5" in ended.said[0]
    assert time.monotonic() - start > 1.5  # not before the time is up


def test_a_rank_that_ended_before_its_first_word_is_named(ended, guarded):
    guarded(Store(), rank=0, world=2, timeout_seconds=0.4)
    assert ended.while_at(*EXCHANGE, 8)
    assert "error: rank 1 does not answer" in ended.said[0] and "rank 0" not in ended.said[0]


def test_ranks_that_ended_are_told_from_those_that_answer(guarded):
    store = silent_rank()
    guard = guarded(store, rank=0, world=4, timeout_seconds=0.4)
    guarded(store, rank=2, world=4, timeout_seconds=0.4)
    time.sleep(0.2)
    assert guard.gone() == [1, 3]  # one that was there, one that never was

    class Lost(Store):
        def check(self, keys):
            raise ConnectionError

    assert guarded(Lost(), 1, 2, 0.4).gone() == [0]  # which had the store


def test_a_rank_that_waits_for_its_gpu_waits_for_the_others(ended, guarded):
    # The line it stands at says nothing: .item(), a backward pass, an optimizer step.
    guard = guarded(silent_rank(), 0, 2, 0.4, gpu_is_busy=lambda: True)
    assert ended.while_at("/x/run_log.py", "train", 8)
    assert "rank 1 does not answer" in ended.said[0] and "rank 0" not in ended.said[0]
    assert json.loads(guard.store["rank0"])["waiting"]


def test_ranks_that_get_on_are_left_alone(ended, guarded):
    guarded(silent_rank(), 0, 2, timeout_seconds=0.4)
    assert not ended.while_at(*ELSEWHERE, 1.0)  # at one line, but its own
    for line in range(25):  # at other lines of an exchange
        code = "\n" * line + "wait(timeout=0.04)"
        exec(compile(code, EXCHANGE[0], "exec"), {"wait": ended.lock.acquire})
    for _ in range(25):  # at one, but exchanges are finished
        exchange_finished()
        assert not ended.while_at(*EXCHANGE, 0.04)
    assert not ended.said


def test_a_lost_store_ends_only_those_that_wait(ended, guarded):
    class Lost(Store):
        def set(self, key, value):
            raise ConnectionError

    guarded(Lost(), 1, 2, timeout_seconds=0.3)
    assert not ended.while_at(*ELSEWHERE, 1.0)  # computes
    assert ended.while_at(*EXCHANGE, 4) and "the launcher is gone" in ended.said[0]


def test_a_guard_ends_with_its_run(guarded):
    with guarded(Store(), 0, 2, timeout_seconds=0.4) as guard:
        assert guard.thread.is_alive()
    guard.thread.join(5)
    assert not guard.thread.is_alive()


def test_a_run_that_fails_takes_its_guard_along(monkeypatch, guarded):
    made = []
    monkeypatch.setattr(
        ranks, "_guard", lambda *_: made.append(guarded(Store(), 0, 2, 4)) or made[0]
    )
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(ranks.dist, name, lambda *_, **more: None)
    start = Rendezvous(None, "", rank=0, world=2, launched=True)
    args = toy_settings("--threads", "1")
    with pytest.raises(OSError, match="broken disk"), ranks.process_group(args, start):
        raise OSError("broken disk")
    made[0].thread.join(5)
    assert not made[0].thread.is_alive()


def test_a_rank_that_may_take_long_says_so(ended, guarded):
    guard = guarded(Store(), 0, 2, timeout_seconds=0.4)

    def patient():
        ended.while_at("/x/disk.py", "write", 0.1)
        return json.loads(guard.store["rank0"])["patient"]

    with may_take_long():
        with may_take_long():
            assert patient()
        assert patient()
    assert not patient()
    with pytest.raises(OSError), may_take_long():
        raise OSError
    assert not patient()


def test_a_report_shows_the_threads_that_work_for_the_main_one():
    go_on = threading.Event()

    def reading_slowly():
        go_on.wait(10)

    thread = threading.Thread(target=reading_slowly, name="prefetch_0")
    thread.start()
    try:
        found = report_of(stacks_of_threads(), 3, 1.0, lambda: False)
    finally:
        go_on.set()
    assert found.number == 3 and not found.waiting and not found.patient
    main, others = "\n".join(found.stack).split("thread prefetch_0:")
    here = test_a_report_shows_the_threads_that_work_for_the_main_one
    assert f"test_hang_guard.py:{here.__code__.co_firstlineno + 9} in {here.__name__}" in main
    assert "in reading_slowly" in others and "in reading_slowly" not in main


def test_a_stack_is_read_with_its_innermost_call_last(tmp_path):
    path = tmp_path / 'ü "x", line 3.py'
    scope = {"look": stacks_of_threads}
    exec(
        compile("def outer():\n    return inner()\ndef inner():\n    return look()", path, "exec"),
        scope,
    )
    calls = scope["outer"]()[threading.main_thread().ident]
    assert [(n, name) for _, n, name in calls[-3:-1]] == [(2, "outer"), (4, "inner")]
    assert calls[-2][0].endswith('"x", line 3.py') and calls[-1][2] == "stacks_of_threads"


@pytest.mark.parametrize("temporary", ["/nonexistent", "/proc"])
def test_without_a_place_for_stacks_nobody_is_blamed(ended, guarded, monkeypatch, temporary):
    monkeypatch.setattr(hang.tempfile, "tempdir", temporary)
    guard = guarded(silent_rank(), 0, 2, timeout_seconds=0.4)
    assert not ended.while_at(*EXCHANGE, 1.0)
    assert json.loads(guard.store["rank0"])["still"] == 0


CRASH = """
import faulthandler, gc, sys, threading, time
sys.path.insert(0, {root!r})
from parallel import hang_guard as hang

faulthandler.enable()
gc.disable()


class Cycle:
    def __init__(self):
        self.me = self

    def __del__(self):
        time.sleep(0.0003)  # lets the other thread run


class Store(dict):
    def set(self, key, value): pass
    def check(self, keys): return False


class Clock:  # a look begins with the time; the first object that it makes then collects garbage
    looks, sleep = 0, time.sleep

    @staticmethod
    def monotonic():
        global garbage
        gc.disable()
        garbage = False
        while not garbage:
            time.sleep(0.0002)
        gc.set_threshold(1, 10**6, 10**6)
        gc.enable()
        Clock.looks += 1
        return time.monotonic()


def calls(n):  # functions with many locals come and go, so that their frames are used again
    names = " = ".join(f"v{{i}}" for i in range(n))
    scope = {{}}
    exec(f"def f(d, g, h):\\n  {{names}} = 1\\n  return (h if d % 2 else g)(d - 1, h, g) if d else 0", scope)
    return scope["f"]


functions = [calls(n) for n in (3, 17, 60, 150, 300)]
hang.time, garbage = Clock, False
guard = hang.HangGuard(Store(), 0, 2, 0.001)
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    if not garbage:
        for _ in range(4):
            Cycle()
        garbage = True
    for a in functions:
        for b in functions:
            a(12, a, b)
print("survived" if Clock.looks > 10 else "did not look", flush=True)
hang.os._exit(0)
"""


def test_looking_on_while_garbage_is_collected_does_not_crash():
    code = CRASH.format(root=str(ROOT), seconds=5)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "survived\n", "")
