"""Two hosts with two processes each, as network namespaces of this machine: `python -m tests.rigs.hosts`.

What a user sees and how long it takes when a worker is killed, when a host is cut off for a while or
for good, when the second host never starts, and when only one host has the data. Needs root, and the
commands `ip` and `unshare`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import saved_settings  # noqa: E402
from checkpointing.commands import differences  # noqa: E402
from reporting.metrics_file import first_difference, read_records  # noqa: E402

TINY = """
    --use-toy-data --vocab-size 97 --seq-len 16 --n-layers 2 --n-heads 2 --d-model 16 --dropout 0.1
    --global-batch-size 12 --batch-size 3 --num-steps 400 --save-steps 20 --eval-steps 100
    --log-steps 1 --val-max-tokens 500 --device cpu --timeout-seconds 15 --lr 1e-2
""".split()
LIMIT = 240.0  # seconds after which a run counts as hung


def why_not() -> str:
    """Why hosts can't be made here; empty if they can."""
    missing = [name for name in ("ip", "unshare") if not shutil.which(name)]
    if os.geteuid() or missing:
        return "needs root" if os.geteuid() else f"needs the command {missing[0]}"
    tried = subprocess.run(["ip", "netns", "add", "rosetest"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "rosetest"], capture_output=True)
    return tried.stderr.strip()


def call(command: str) -> None:
    """Runs it; raises if it fails."""
    subprocess.run(command.split(), check=True, capture_output=True)


class Hosts:
    """Hosts rose0 and rose1, one cable between them, one folder that both see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = [folder / f"host{i}.txt" for i in (0, 1)]

    def __enter__(self) -> Hosts:
        self.remove()
        table = "127.0.0.1 localhost\n10.77.0.1 rose0\n10.77.0.2 rose1\n"
        for i in (0, 1):
            call(f"ip netns add rose{i}")
            Path(f"/etc/netns/rose{i}").mkdir(parents=True, exist_ok=True)
            Path(f"/etc/netns/rose{i}/hosts").write_text(table)
        call("ip link add cable0 netns rose0 type veth peer name cable1 netns rose1")
        for i in (0, 1):
            call(f"ip -n rose{i} addr add 10.77.0.{i + 1}/24 dev cable{i}")
            call(f"ip -n rose{i} link set lo up")
            call(f"ip -n rose{i} link set cable{i} up")
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """All that these hosts left, processes too."""
        for i in (0, 1):
            pids = subprocess.run(
                ["ip", "netns", "pids", f"rose{i}"], capture_output=True, text=True
            )
            for pid in pids.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", f"rose{i}"], capture_output=True)
            shutil.rmtree(f"/etc/netns/rose{i}", ignore_errors=True)

    def start(self, i: int, nodes: str, *flags: str, cwd: Path | None = None) -> subprocess.Popen:
        """torchrun on host i, with the command of the README."""
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"),
            *("--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=rose0:29400"),
            *("--rdzv-id=7", "--max-restarts=3", str(ROOT / "train_ddp.py"), *TINY, *flags),
        ]
        name = f"hostname rose{i} && exec ip netns exec rose{i} "
        quoted = " ".join(f"'{x}'" for x in torchrun)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(self.folder / "home")}
        with open(self.logs[i], "a") as log:
            return subprocess.Popen(
                ["unshare", "--uts", "sh", "-c", name + quoted],
                cwd=cwd or self.folder, env=env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def cut(self) -> None:
        """No packet passes."""
        call("ip -n rose1 link set cable1 down")

    def mend(self) -> None:
        """They pass again."""
        call("ip -n rose1 link set cable1 up")

    def workers(self, i: int) -> list[int]:
        """Processes that train on host i."""
        found = subprocess.run(
            ["ip", "netns", "pids", f"rose{i}"], capture_output=True, text=True
        ).stdout.split()
        return [p for p in map(int, found) if _is_worker(p)]

    def said(self, i: int) -> str:
        """What host i has printed."""
        return self.logs[i].read_text() if self.logs[i].exists() else ""


def _is_worker(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return len(words) > 2 and words[1] == b"-u" and words[2].endswith(b"train_ddp.py")


@contextmanager
def hosts() -> Iterator[Hosts]:
    """Fresh ones, in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder, Hosts(Path(folder)) as found:
        yield found


def ended(processes: list[subprocess.Popen], seconds: float = LIMIT) -> list[int | None]:
    """Their exit codes; None for one that does not end."""
    end, codes = time.monotonic() + seconds, list[int | None]()
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    return codes


def until_step(place: Hosts, step: int) -> None:
    """Waits until a step has been logged."""
    path, end = place.folder / "logs/train_ddp.jsonl", time.monotonic() + 90
    while time.monotonic() < end:
        if path.exists() and any(r.get("step", 0) >= step for r in read_records(path)):
            return
        time.sleep(0.1)
    raise RuntimeError(f"step {step} was not reached: {place.said(0)[-3000:]}")


def unequal(place: Hosts, reference: Path) -> str:
    """How the run differs from the one that nothing happened to; empty if it does not."""
    files = "logs/train_ddp.jsonl", "checkpoints/minigpt_ddp.pt"
    metrics, weights = (place.folder / f for f in files)
    return first_difference(reference / files[0], metrics) or "; ".join(
        differences(reference / files[1], weights)[1]
    )


def undisturbed(keep: Path) -> str:
    """The reference, kept in a folder."""
    with hosts() as place:
        codes = ended([place.start(i, "2") for i in (0, 1)])
        assert codes == [0, 0], place.said(0) + place.said(1)
        for name in ("logs", "checkpoints"):
            shutil.copytree(place.folder / name, keep / name)
        assert "4 processes" in place.said(0)
        assert not (place.folder / "logs/train_ddp.1.jsonl").exists()
        return "finished; rank 0 alone wrote"


def worker_killed(keep: Path) -> str:
    """One worker of the second host gets SIGKILL."""
    with hosts() as place:
        running = [place.start(i, "2") for i in (0, 1)]
        until_step(place, 60)
        os.kill(place.workers(1)[0], signal.SIGKILL)
        start = time.monotonic()
        while "resumed" not in place.said(0) and time.monotonic() - start < 120:
            time.sleep(0.1)
        seconds = time.monotonic() - start
        codes = ended(running)
        found = unequal(place, keep) if codes == [0, 0] else f"exit codes {codes}"
        return found or f"all 4 went on from the checkpoint after {seconds:.0f} s; equal in the end"


def cut_for_a_while(keep: Path) -> str:
    """The cable is cut for 40 s."""
    with hosts() as place:
        running = [place.start(i, "2") for i in (0, 1)]
        until_step(place, 60)
        place.cut()
        start = time.monotonic()
        while place.workers(0) and time.monotonic() - start < 120:
            time.sleep(0.2)
        seconds = time.monotonic() - start
        time.sleep(max(0.0, 40 - seconds))
        place.mend()
        codes = ended(running, 100)
        said = first_line(place.said(0))
        again = ""
        if codes != [0, 0]:  # torchrun itself gave up: the same command on both
            place.remove()
            place.__enter__()
            codes = ended([place.start(i, "2", "--resume") for i in (0, 1)])
            again = ", given the command again with --resume,"
        found = unequal(place, keep) if codes == [0, 0] else f"exit codes {codes}"
        return found or (
            f"rank 0's host: '{said}'; its workers ended after {seconds:.0f} s;{again} equal in "
            "the end"
        )


def cut_for_good(keep: Path) -> str:
    """With --nnodes=1:2 the second host is switched off."""
    with hosts() as place:
        running = [place.start(i, "1:2") for i in (0, 1)]
        until_step(place, 60)
        place.cut()
        start = time.monotonic()
        while "resumed" not in place.said(0) and time.monotonic() - start < 150:
            time.sleep(0.2)
        seconds = time.monotonic() - start
        codes = ended(running[:1])
        size = saved_settings(place.folder / "checkpoints/minigpt_ddp.pt")["global_batch_size"]
        return (
            f"the first host went on alone after {seconds:.0f} s, exit code {codes[0]}, global "
            f"batch {size}"
        )


def never_there(keep: Path) -> str:
    """Rank 1's host never starts; no torchrun, as under a batch system."""
    with hosts() as place:
        env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29400"}
        start = time.monotonic()
        done = subprocess.run(
            ["ip", "netns", "exec", "rose0", sys.executable, str(ROOT / "train_ddp.py"), *TINY],
            cwd=place.folder, env=env, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.monotonic() - start
        return f"after {seconds:.0f} s, exit code {done.returncode}: {first_line(done.stderr)}"


def data_on_one(keep: Path) -> str:
    """Only the first host has the text."""
    with hosts() as place:
        (place.folder / "text.txt").write_text("to be or not to be. " * 2000)
        (place.folder / "empty").mkdir()
        text = ["--no-use-toy-data", "--train-data", "text.txt", "--vocab-size", "300"]
        start = time.monotonic()
        running = [
            place.start(0, "2", *text),
            place.start(1, "2", *text, cwd=place.folder / "empty"),
        ]
        while "error:" not in place.said(0) + place.said(1) and time.monotonic() - start < 90:
            time.sleep(0.2)
        seconds = time.monotonic() - start
        for process in running:
            process.send_signal(signal.SIGTERM)
        ended(running, 30)
        return f"after {seconds:.0f} s: {first_line(place.said(0) + place.said(1))}"


def first_line(text: str) -> str:
    """The first line that says what is wrong."""
    return next((x for x in text.splitlines() if "error:" in x), "no line says what is wrong")


CASES: dict[str, Callable[[Path], str]] = {
    f.__name__: f
    for f in (
        undisturbed, worker_killed, cut_for_a_while, cut_for_good, never_there, data_on_one
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", help=f"of {', '.join(CASES)}; none = all")
    cases = parser.parse_args().case or list(CASES)
    if reason := why_not():
        sys.exit(f"no hosts can be made here: {reason}")
    with tempfile.TemporaryDirectory() as keep:
        for name in dict.fromkeys(["undisturbed", *cases]):
            start = time.monotonic()
            found = CASES[name](Path(keep))
            print(f"{name} ({time.monotonic() - start:.0f} s): {found}", flush=True)


if __name__ == "__main__":
    main()
