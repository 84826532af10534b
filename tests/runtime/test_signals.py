import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from conftest import ROOT

from runtime.signals import StopSignals


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@contextmanager
def not_ignored(number):
    """`nohup pytest` ignores SIGHUP, and so would the tests."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_noted_and_nothing_else_happens(number, capfd):
    with not_ignored(number), StopSignals() as watch:
        watch.install()
        assert watch.signal == 0
        os.kill(os.getpid(), number)
        assert until(lambda: watch.signal == number)
        assert number.name in capfd.readouterr().err


def test_handlers_are_as_before_afterwards():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with StopSignals() as watch:
        watch.install()
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {s: signal.getsignal(s) for s in before} == before
    assert signal.set_wakeup_fd(-1) == -1


def test_before_it_begins_signals_do_what_they_always_do():
    with StopSignals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_what_was_ignored_stays_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as watch:
            watch.install()
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.3)
            assert watch.signal == 0
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.long
def test_a_system_without_locks_is_refused_in_one_line(program):
    # Stands for Windows.
    without = (
        "import runpy, signal, sys; sys.modules['fcntl'] = None; del signal.SIGHUP, signal.SIGUSR1; "
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]; "
        f"runpy.run_path({str(ROOT)!r} + '/' + sys.argv[0], run_name='__main__')"
    )

    def run(script, *flags):
        done = subprocess.run(
            [sys.executable, "-c", without, script, *flags], cwd=program.folder, env=program.env,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("train_minimal.py", "--train-data", "none.txt")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: this Python has no file locks") and "WSL" in err
    toy = "--use-toy-data --preset toy --num-steps 1 --sample-tokens 1 --device cpu".split()
    program("train_minimal.py", *toy)
    code, out, err = run("eval.py", "--checkpoint-path", "checkpoints/minigpt_single.pt")
    assert code == 0 and "avg_loss" in out, err


def test_the_signals_that_there_are_stop_a_run(monkeypatch):
    import importlib

    from runtime import signals as watch

    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(signal, "SIGUSR1")
    try:
        assert importlib.reload(watch)._STOPPING == [signal.SIGTERM, signal.SIGINT]
    finally:
        monkeypatch.undo()
        importlib.reload(watch)


SCRIPT = f"""
import hashlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from runtime.signals import StopSignals, end_with_parent
"""
BUSY = """
with StopSignals() as watch:
    watch.install()
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # no handler of Python's runs in here
"""


def started(code, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **options,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_second_signal_ends_the_process_at_once():
    process = started(BUSY)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # of another kind: no answer to the message
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    assert "again = at once" in process.stderr.read()


def test_what_torchrun_repeats_is_not_a_second_signal():
    process = started(BUSY, env={**os.environ, "TORCHELASTIC_RUN_ID": "x"})
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143


def test_a_process_gets_a_sigterm_when_its_parent_is_gone():
    child = SCRIPT + "end_with_parent()\nprint('ready', flush=True)\ntime.sleep(60)"
    parent = started(
        f"import subprocess\nchild = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "sys.stderr.write(f'{child.pid}\\n'); sys.stderr.flush()\ntime.sleep(60)"
    )
    pid = int(parent.stderr.readline())
    parent.kill()
    parent.wait()

    def gone():
        try:
            with open(f"/proc/{pid}/stat") as stat:
                return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    assert until(gone, 5)
