"""Injects faults into real runs and counts how they end: `python -m tests.rigs.faults [--short] [GROUP...]`.

A fault must end in one of four ways: the run finishes as if nothing had been, it resumes exactly, it
stops with one line and a good checkpoint, or it refuses to start with one line. Counted are

    survived   the metrics (timings aside), weights and optimizer state are bit for bit those of a run
               without the fault, in the end, or the run stopped as it should
    refused    one line said why, exit code 2, nothing was lost
    hung       it did not end in time
    silent     it went on with other numbers, or without a word
    lost       a checkpoint that had been announced could not be read
    orphans    processes that were left
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import read_checkpoint, save_checkpoint, saved_settings  # noqa: E402
from checkpointing.commands import differences  # noqa: E402
from checkpointing.reading import latest_valid  # noqa: E402
from reporting.metrics_file import comparable, first_difference, read_records  # noqa: E402
from runtime.setting_fields import UserError  # noqa: E402

OUTCOMES = ("survived", "refused", "hung", "silent", "lost", "orphans")
TOY = """
    --use-toy-data --vocab-size 97 --seq-len 16 --n-layers 2 --n-heads 2 --d-model 16 --dropout
    0.1 --global-batch-size 12 --batch-size 3 --num-steps 300 --save-steps 20 --eval-steps 50
    --log-steps 1 --keep-every 100 --val-max-tokens 500 --device cpu --timeout-seconds 20 --lr 1e-2
""".split()
SLOW = 90.0  # seconds after which a run counts as hung


class Place:
    """A folder in which runs happen, and the processes that were started for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, f"place-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        self.env = {**os.environ, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        self.env |= {"FAULT_MARK": self.mark, "PYTHONUNBUFFERED": "1"}
        self.out = folder / "out.txt"

    def start(
        self, *flags: str, ranks: int = 0, script: str = "", restarts: int = 0, **env: str
    ) -> subprocess.Popen:
        """Starts a trainer; what it prints is added to out.txt."""
        name = script or str(ROOT / ("train_ddp.py" if ranks else "train_minimal.py"))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        launch.append(f"--max-restarts={restarts}")
        command = [sys.executable, *(launch if ranks else []), name, *flags]
        with open(self.out, "a") as out:
            return subprocess.Popen(
                command, cwd=self.folder, env={**self.env, **env}, stdout=out, stderr=out
            )

    def run(self, *flags: str, ranks: int = 0, script: str = "", **env: str) -> int:
        """The exit code of a trainer that is left alone; -99 if it does not end."""
        process = self.start(*flags, ranks=ranks, script=script, **env)
        return self.end_of(process)

    def end_of(self, process: subprocess.Popen, seconds: float = SLOW) -> int:
        """Its exit code, or -99 if it does not end in time."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            process.wait()
            return -99

    def processes(self) -> list[int]:
        """All processes of this place that live, workers and their children among them."""
        found = []
        for proc in Path("/proc").iterdir():
            if proc.name.isdigit():
                try:
                    mine = f"FAULT_MARK={self.mark}".encode() in (proc / "environ").read_bytes()
                    state = (proc / "stat").read_text().rsplit(")", 1)[1].split()[0]
                except OSError:
                    continue
                if mine and state != "Z":
                    found.append(int(proc.name))
        return found

    def workers(self) -> list[int]:
        """Those of them that train."""
        return [
            pid
            for pid in self.processes()
            if b"torch.distributed.run" not in (cmd := _command_line(pid)) and b"train" in cmd
        ]

    def kill(self) -> None:
        """All at once, as when the machine is switched off."""
        for pid in self.processes():
            with _gone_is_fine():
                os.kill(pid, signal.SIGKILL)

    def empty(self, seconds: float = 30.0) -> bool:
        """Whether all processes are gone, at the latest after so many seconds."""
        end = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def printed(self) -> str:
        """All that was printed here."""
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def checkpoints(self) -> list[Path]:
        """Latest and previous, where they exist."""
        names = ("minigpt_single", "minigpt_single.previous", "minigpt_ddp", "minigpt_ddp.previous")
        paths = [self.folder / f"checkpoints/{name}.pt" for name in names]
        return [path for path in paths if path.exists()]

    @property
    def jsonl(self) -> Path:
        """Its metrics."""
        paths = [self.folder / f"logs/{s}.jsonl" for s in ("train_minimal", "train_ddp", "c")]
        return next(path for path in paths if path.exists())

    def metrics(self) -> list[dict[str, Any]]:
        """The records, without what may differ between two equal runs."""
        return comparable(self.jsonl)

    def reached(self, step: int) -> bool:
        """Whether its metrics have a record of this step or a later one."""
        try:
            records = read_records(self.jsonl)
        except (OSError, StopIteration):  # there is no file yet
            return False
        return any(r.get("step", 0) >= step for r in records)

    def clear(self) -> None:
        """Frees the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _command_line(pid: int) -> bytes:
    with _gone_is_fine():
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        yield


def difference(place: Place, reference: Place) -> str:
    """Where two runs differ first; "" if nowhere. Looks at metrics, weights, optimizer states, and
    at which checkpoints there are.
    """
    if found := first_difference(place.jsonl, reference.jsonl):
        return f"metrics: {found}"
    for name, (a, b) in _by_name(place, reference).items():
        if not (a and b):
            return f"{name} is not in both"
        if (found := _unequal(a, b)) and "previous" not in name:
            return f"{name}: {found}"
    return ""


def _by_name(*places: Place) -> dict[str, list[Path | None]]:
    folders = [place.folder / "checkpoints" for place in places]
    names = {p.name for folder in folders for p in folder.glob("*.pt")}
    return {n: [(f / n) if (f / n).exists() else None for f in folders] for n in sorted(names)}


def _unequal(a: Path, b: Path) -> str:
    return "; ".join(differences(a, b)[1][:3])


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}/")
        else:
            yield path + key, value


class Rig:
    """Counts outcomes, and has reference runs at hand."""

    def __init__(self, folder: Path, short: bool, at_once: int) -> None:
        self.folder, self.short, self.at_once = folder, short, at_once
        self.rows: dict[str, dict[str, int]] = {}
        self.notes: list[str] = []
        self.references: dict[tuple[str, ...], Place] = {}
        self.made = 0

    def place(self) -> Place:
        """A new one."""
        self.made += 1
        return Place(self.folder / f"{self.made:04d}")

    def reference(self, *flags: str, ranks: int = 0) -> Place:
        """The run that nothing happens to."""
        key = (*flags, str(ranks))
        if key not in self.references:
            place = self.references[key] = self.place()
            code = place.run(*flags, ranks=ranks)
            assert code == 0, place.printed()
        return self.references[key]

    def count(self, fault: str, outcome: str, place: Place | None = None, note: str = "") -> None:
        """One fault and how it ended; processes that are left are counted too."""
        row = self.rows.setdefault(fault, dict.fromkeys(("tried", *OUTCOMES), 0))
        row["tried"] += 1
        row[outcome] += 1
        if place and not place.empty():
            row["orphans"] += len(place.processes())
            place.kill()
        bad = outcome not in ("survived", "refused")
        if bad or row["orphans"]:
            self.notes.append(f"{fault}: {outcome} {note}")
            if place:
                self.notes.append(place.printed()[-1500:])
        if place and not bad:
            place.clear()
        print(f"{fault}: {outcome} {note}"[:240], flush=True)

    def table(self) -> str:
        """All counts."""
        width = max(map(len, self.rows))
        lines = ["fault".ljust(width) + "  tried  " + "  ".join(OUTCOMES)]
        total = dict.fromkeys(("tried", *OUTCOMES), 0)
        for fault, row in self.rows.items():
            total = {k: total[k] + row[k] for k in total}
            cells = "  ".join(f"{row[o]:{len(o)}d}" for o in OUTCOMES)
            lines.append(f"{fault.ljust(width)}  {row['tried']:5d}  {cells}")
        cells = "  ".join(f"{total[o]:{len(o)}d}" for o in OUTCOMES)
        return "\n".join([*lines, f"{'all'.ljust(width)}  {total['tried']:5d}  {cells}"])

    def bad(self) -> int:
        """Outcomes that must not be."""
        return sum(row[o] for row in self.rows.values() for o in OUTCOMES[2:])


# ---------------------------------------------------------------- SIGKILL at random moments


def killed_run(rig: Rig, flags: list[str], ranks: int, kills: int, seed: int) -> int:
    """Kills one run again and again, each time resuming it, and compares its end with that of the
    run that was left alone. Returns the number of kills, which is smaller where it ended before.
    """
    draw, place, done = random.Random(seed), rig.place(), 0
    reference = rig.references[(*flags, str(ranks))]
    name = "train_ddp" if ranks else "train_minimal"
    label = f"SIGKILL, {ranks} ranks" if ranks else "SIGKILL, 1 process"
    announced = 0
    while True:
        resume = ["--resume"] if place.checkpoints() else []
        before = _stamp(place.folder / f"logs/{name}.jsonl")
        process = place.start(*([] if resume else flags), *resume, ranks=ranks)
        if done < kills and _wait_for_moment(place, process, draw, name, before):
            moment = _kill(place, process, draw, ranks)
            done += 1
            process.wait(60)
            if not place.empty(60):
                rig.count(label, "hung", place, f"{moment}: processes are left")
                return done
            said = re.findall(r"saved \S+ at step (\d+)", place.printed())
            announced = int(said[-1]) if said else 0
            if announced and not _whole(place):
                rig.count(label, "lost", place, f"step {announced} was announced")
                return done
            continue
        code = place.end_of(process)
        break
    if code:
        outcome, note = ("hung" if code == -99 else "silent"), f"exit code {code}"
    else:
        note = difference(place, reference)
        outcome = "silent" if note else "survived"
    for _ in range(max(done - 1, 0)):  # each kill was survived, if the end is the same
        row = rig.rows.setdefault(label, dict.fromkeys(("tried", *OUTCOMES), 0))
        row["tried"] += 1
        row[outcome] += 1
    rig.count(label, outcome, place, f"({done} kills) {note}")
    return done


def _whole(place: Place) -> bool:
    try:
        latest_valid(place.checkpoints()[0], saved_settings)
        return True
    except (UserError, IndexError):
        return False


def _stamp(path: Path) -> tuple[int, int] | None:
    with _gone_is_fine():
        return path.stat().st_ino, path.stat().st_size
    return None


def _wait_for_moment(
    place: Place, process: subprocess.Popen, draw: random.Random, name: str, before: Any
) -> bool:
    """A random moment of start, training or saving; False if the run ended before it."""
    kind = draw.choice(("start", "steps", "steps", "save", "save"))
    end = time.monotonic() + (draw.uniform(0, 6) if kind == "start" else 60)
    began = None
    while time.monotonic() < end and process.poll() is None:
        if (
            kind == "steps"
            and began is None
            and _stamp(place.folder / f"logs/{name}.jsonl") != before
        ):
            began = end = time.monotonic() + draw.uniform(0, 4)
        if kind == "save" and list(place.folder.glob("checkpoints/*.tmp")):
            time.sleep(draw.choice((0, draw.uniform(0, 0.02))))
            break
        time.sleep(0.0005 if kind == "save" else 0.01)
    return process.poll() is None


def _kill(place: Place, process: subprocess.Popen, draw: random.Random, ranks: int) -> str:
    moment = draw.choice(("all", "torchrun", "worker")) if ranks else "all"
    workers = place.workers()
    with _gone_is_fine():
        if moment == "all":
            place.kill()
        elif moment == "torchrun" or not workers:
            process.kill()
        else:
            os.kill(draw.choice(workers), signal.SIGKILL)
    return moment


def kills(rig: Rig) -> None:
    """200 kills of runs of one process."""
    for arch in ("gpt2",) if rig.short else ("gpt2", "modern"):
        flags = [*TOY, "--arch", arch, *(["--num-steps", "120"] if rig.short else [])]
        rig.reference(*flags)

        def work(i: int, flags: list[str] = flags) -> None:
            left, seed = (4 if rig.short else 100) // rig.at_once, 1000 * (i + 1)
            while left > 0:
                left -= killed_run(rig, flags, 0, min(left, 5), seed)
                seed += 1

        with ThreadPoolExecutor(rig.at_once) as pool:
            list(pool.map(work, range(rig.at_once)))


def rank_kills(rig: Rig) -> None:
    """40 kills of runs of 2, 3 and 4 ranks: of torchrun, of a rank, or of all at once."""
    plan = ((3, 1),) if rig.short else ((2, 13), (3, 14), (4, 13))
    for ranks, left in plan:
        flags = _for_ranks([*TOY, "--arch", "modern" if ranks == 3 else "gpt2"], ranks)
        rig.reference(*flags, ranks=ranks)
        seed = 100_000 * ranks
        while left > 0:
            left -= killed_run(rig, flags, ranks, min(left, 5), seed)
            seed += 1


def _for_ranks(flags: list[str], ranks: int) -> list[str]:
    flags = [*flags, "--batch-size", str({2: 3, 3: 2, 4: 1}[ranks])]
    return [*flags, "--num-steps", "150"]


# ---------------------------------------------------------------- other numbers of processes


def worlds(rig: Rig) -> None:
    """The same run continued on another number of processes: its losses over the next 50 steps."""
    flags = [*TOY, "--arch", "gpt2", "--batch-size", "1", "--num-steps", "80", "--keep-every", "30"]
    moves = ((1, 2),) if rig.short else ((1, 2), (2, 1), (2, 4), (4, 3))
    for old, new in moves:
        straight, place = rig.reference(*flags, ranks=old), rig.place()
        (kept,) = straight.folder.glob("checkpoints/*.step000030.pt")
        (place.folder / "checkpoints").mkdir()
        shutil.copy(kept, place.folder / "checkpoints/c.pt")
        code = place.run("--resume", "--checkpoint-path", "checkpoints/c.pt", ranks=new)
        losses = [
            {r["step"]: r["train_loss"] for r in p.metrics() if r["event"] == "train" and r["step"] > 30}
            for p in (straight, place)
        ] if code == 0 else [{}, {}]  # fmt: skip
        apart = max((abs(losses[1][s] / x - 1) for s, x in losses[0].items()), default=1.0)
        good = losses[0].keys() == losses[1].keys() == set(range(31, 81)) and apart < 1e-5
        note = f"largest relative difference of 50 losses {apart:.2e}"
        rig.count(f"{old} -> {new} processes", "survived" if good else "silent", place, note)


# ---------------------------------------------------------------- signals


def signals(rig: Rig) -> None:
    """A signal must end the run after its step, with a checkpoint that continues exactly."""
    few = [(signal.SIGTERM, 2, "everyone")]
    many = [
        (s, 0, "process") for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    ]
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        many += [(s, 2, who) for who in ("one rank", "all ranks", "torchrun", "everyone")]
    many.append((signal.SIGKILL, 2, "torchrun"))
    for number, ranks, who in few if rig.short else many:
        flags = _for_ranks([*TOY, "--arch", "gpt2"], 2) if ranks else [*TOY, "--arch", "gpt2"]
        flags += ["--num-steps", "60"] if rig.short else []
        reference, place = rig.reference(*flags, ranks=ranks), rig.place()
        process = place.start(*flags, ranks=ranks)
        outcome, note = "survived", ""
        if not _until(lambda p=place: p.reached(25)):
            outcome, note = "hung", "it never came to step 25"
        workers = place.workers()
        targets = {"process": workers, "one rank": workers[-1:], "all ranks": workers}
        targets["everyone"] = place.processes()
        for pid in targets.get(who, [process.pid]):
            os.kill(pid, number)
        code, left = place.end_of(process, 30), place.empty()
        # Those that torchrun dies of reach the workers as their parent's end.
        passed_on = who != "torchrun" or number not in (signal.SIGUSR1, signal.SIGKILL)
        name = (number if passed_on else signal.SIGTERM).name
        stopped = re.findall(rf"{name}: stopped at step (\d+)", place.printed())
        if code == -99 or not left:
            outcome, note = "hung", "it did not end"
        elif not stopped or f"at step {stopped[-1]}" not in place.printed().split("stopped")[0]:
            outcome, note = "silent", "it did not say that it saved and stopped"
        elif not ranks and code != 128 + number:
            outcome, note = "silent", f"exit code {code}"
        elif (code := place.run("--resume", ranks=ranks)) or (note := difference(place, reference)):
            outcome, note = "silent", f"resumed with exit code {code}; {note}"
        rig.count(f"{number.name} to {who}", outcome, place, note or f"stopped at {stopped[-1]}")


def second_signal(rig: Rig) -> None:
    """The second Ctrl-C ends the process at once, even in the middle of a long step."""
    place = rig.place()
    slow = [*TOY, "--arch", "gpt2", "--global-batch-size", "12000", "--num-steps", "9"]
    process = place.start(*slow)
    _until(lambda: "step 0 /" in place.printed())
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    alive = process.poll() is None
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    code = place.end_of(process, 20)
    good = alive and code == 130 and time.monotonic() - start < 2
    rig.count("second Ctrl-C", "survived" if good else "hung", place, f"exit code {code}")


def _until(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# ---------------------------------------------------------------- ranks that hang or fail

PATCH = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
sys.argv[0] = {root!r} + "/{trainer}.py"
import torch, dataset
from training import step
rank = int(os.environ.get("RANK", 0))
{body}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def patched(place: Place, body: str, trainer: str = "train_ddp") -> str:
    """A trainer into which a fault is edited."""
    path = place.folder / "train_patched.py"
    path.write_text(PATCH.format(root=str(ROOT), body=body, trainer=trainer))
    return str(path)


READS = """
read = dataset.TokenDataset.global_batch
def global_batch(self, k, *args):
    if rank == 1 and k == 7:
        {what}
    return read(self, k, *args)
dataset.TokenDataset.global_batch = global_batch
"""


def hangs(rig: Rig) -> None:
    """A rank that is stopped, stuck or fails: the job ends in time, with the rank named."""
    flags = [*_for_ranks([*TOY, "--arch", "gpt2"], 2), "--timeout-seconds", "10"]
    cases: list[tuple[str, str, str, str]] = [
        ("a rank is stopped (SIGSTOP)", "", "rank 1 does not answer", ""),
        (
            "a rank is stuck reading",
            READS.format(what="time.sleep(1000)"),
            "rank 1 is stuck",
            "global_batch",
        ),
        (
            "a rank raises",
            READS.format(what="raise OSError('broken disk')"),
            "broken disk",
            "global_batch",
        ),
        ("a rank is slow", READS.format(what="time.sleep(6)"), "", ""),
    ]
    if not rig.short:
        _steps_longer_than_the_timeout(rig)
    for name, body, said, frame in cases[1:2] if rig.short else cases:
        reference, place = rig.reference(*flags, ranks=2), rig.place()
        process = place.start(*flags, ranks=2, script=patched(place, body))
        if not body:
            _until(lambda p=place: p.reached(25))
            os.kill(place.workers()[-1], signal.SIGSTOP)
        start = time.monotonic()
        code, left = place.end_of(process, 75), place.empty()
        seconds = time.monotonic() - start
        out = place.printed()
        outcome = "survived"
        if code == -99 or not left:
            outcome = "hung"
        elif said and (code == 0 or said not in out or frame not in out):
            outcome = "silent"
        elif not said:
            outcome = "silent" if code or difference(place, reference) else outcome
        elif place.checkpoints():
            code = place.run("--resume", ranks=2)
            outcome = "silent" if code or difference(place, reference) else outcome
        rig.count(name, outcome, place, f"ended after {seconds:.0f} s")


def _steps_longer_than_the_timeout(rig: Rig) -> None:
    flags = [*_for_ranks([*TOY, "--arch", "gpt2"], 2), "--global-batch-size", "9000"]
    flags += ["--num-steps", "3", "--warmup-steps", "1"]
    reference, place = rig.reference(*flags, ranks=2), rig.place()
    code = place.run(*flags, "--timeout-seconds", "3", ranks=2)
    seconds = max(r["time"]["step_seconds"] for r in read_records(place.jsonl) if "time" in r)
    note = difference(place, reference) if code == 0 else f"exit code {code}"
    note = note or ("" if seconds > 3 else f"a step took only {seconds:.1f} s")
    rig.count("steps longer than the timeout", "silent" if note else "survived", place, note)


def restarts(rig: Rig) -> None:
    """A rank dies and torchrun starts all of them again; ranks that find different files."""
    flags = _for_ranks([*TOY, "--arch", "gpt2"], 2)
    reference, place = rig.reference(*flags, ranks=2), rig.place()
    process = place.start(*flags, ranks=2, restarts=1)
    _until(lambda: place.reached(45))
    os.kill(place.workers()[-1], signal.SIGKILL)
    code = place.end_of(process)
    note = difference(place, reference) if code == 0 else f"exit code {code}"
    rig.count("a rank killed under --max-restarts", "silent" if note else "survived", place, note)
    body = """
from checkpointing import manager as saver
load = saver.CheckpointManager._load
def load_other(self, file):
    load(self, file)
    self.state.step -= 20 * rank
saver.CheckpointManager._load = load_other
"""
    place = rig.place()
    shutil.copytree(reference.folder / "checkpoints", place.folder / "checkpoints")
    code = place.run("--resume", ranks=2, script=patched(place, body))
    good = code not in (0, -99) and "the ranks differ in step to resume" in place.printed()
    rig.count("ranks find different checkpoints", "refused" if good else "silent", place)


# ---------------------------------------------------------------- storage


def storage(rig: Rig) -> None:
    """Damage to the newest checkpoint, full and read-only disks, two runs on one path."""
    flags = [*TOY, "--arch", "gpt2", "--num-steps", "60"]
    reference = rig.reference(*flags)

    def stopped() -> tuple[Place, Path]:
        place = rig.place()
        shutil.copytree(reference.folder / "checkpoints", place.folder / "checkpoints")
        shutil.copytree(reference.folder / "logs", place.folder / "logs")
        return place, place.folder / "checkpoints/minigpt_single.pt"

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1000])

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def zero(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))

    def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
        return lambda path: (path.unlink(), make(path))[0]

    damages: dict[str, Callable[[Path], object]] = {
        "truncated": cut,
        "a byte flipped": flip,
        "tail zeroed": zero,
        "deleted": Path.unlink,
        "replaced by a directory": instead(Path.mkdir),
        "replaced by a FIFO": instead(os.mkfifo),
        "replaced by HTML": instead(lambda p: p.write_text("<html>404</html>")),
    }
    for name, damage in list(damages.items())[: 1 if rig.short else None]:
        place, path = stopped()
        previous = read_checkpoint(path.with_name("minigpt_single.previous.pt"))["step"]
        damage(path)
        code, out = place.run("--resume"), place.printed()
        if name in (
            "replaced by a directory",
            "replaced by a FIFO",
        ):  # nothing is moved out of the way
            good = code == 2 and "not a plain file" in out
            rig.count(f"newest checkpoint {name}", "refused" if good else "silent", place)
            continue
        good = code == 0 and f"minigpt_single.previous.pt at step {previous}" in out
        why = "" if good and "not the latest, since" in out else f"exit code {code}"
        note = why or difference_of_weights(place, reference)
        rig.count(f"newest checkpoint {name}", "silent" if note else "survived", place, note)
    place, path = stopped()
    cut(path), flip(path.with_name("minigpt_single.previous.pt"))
    good = place.run("--resume") == 2 and "no whole checkpoint" in place.printed()
    rig.count("both checkpoints damaged", "refused" if good else "silent", place)

    place = rig.place()
    first = place.start(*TOY, "--arch", "gpt2", "--num-steps", "2000")
    _until(lambda: place.reached(25))
    refused = all(
        place.run(*more) == 2 and f"in use by another run (process {first.pid}" in place.printed()
        for more in (flags, ["--resume"])
    )
    first.send_signal(signal.SIGTERM)
    good = refused and place.end_of(first) == 143 and _whole(place)
    rig.count("a second run on the same path", "refused" if good else "silent", place)
    if not rig.short:
        _odd_paths(rig, flags)
        _reading_while_saving(rig)
    _full_disks(rig)


def difference_of_weights(place: Place, reference: Place) -> str:
    """Of the latest checkpoint alone: which others there are depends on what was damaged."""
    (a, b) = _by_name(place, reference)["minigpt_single.pt"]
    metrics = "" if place.metrics() == reference.metrics() else "metrics"
    return metrics or (_unequal(a, b) if a and b else "missing")


def _odd_paths(rig: Rig, flags: list[str]) -> None:
    for path in ("bare.pt", "new/folder/c.pt", "with space and ünïcode.pt", "link.pt"):
        place = rig.place()
        (place.folder / "link.pt").symlink_to("real.pt")
        code = place.run(*flags, "--checkpoint-path", path)
        again = place.run("--resume", "--num-steps", "80", "--checkpoint-path", path)
        good = (code, again) == (0, 0) and (place.folder / path).is_file()
        rig.count(f"checkpoint at {path}", "survived" if good else "silent", place)


def _reading_while_saving(rig: Rig) -> None:
    place = rig.place()
    process = place.start(*TOY, "--arch", "gpt2", "--save-steps", "1", "--num-steps", "400")
    path = place.folder / "checkpoints/minigpt_single.pt"
    _until(path.exists)
    reads, steps = 0, []
    while process.poll() is None:
        content = read_checkpoint(path)
        kept = content["optimizer"].values()  # Muon's matrices have no count of steps
        moments = {float(s["step"]) for s in kept if "step" in s}
        steps.append(content["step"])
        reads += moments == {float(content["step"])}
    good = reads == len(steps) > 20 and len(set(steps)) > 10 and steps == sorted(steps)
    note = f"{len(steps)} reads of {len(set(steps))} files"
    rig.count("reading while training saves", "survived" if good else "silent", place, note)


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A file system of that size; False where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = (
        subprocess.run(mount, capture_output=True).returncode == 0
        if shutil.which("mount")
        else False
    )
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _full_disks(rig: Rig) -> None:
    """A checkpoint is about 150 kB. The disk fills at each point of a save, from before the first
    byte to after the last.
    """
    flags = [*TOY, "--arch", "gpt2", "--num-steps", "60"]
    size = next((rig.reference(*flags).folder / "checkpoints").glob("*.pt")).stat().st_size
    points = (0.5,) if rig.short else (0.02, 0.3, 0.5, 0.8, 0.98)
    for point in points:
        place = rig.place()
        # The check of free space would refuse at once; this is the case that it does not see.
        body = (
            "from checkpointing import manager, writing\n"
            "writing.check_space = manager.check_space = lambda *a: None"
        )
        with _small_disk(
            place.folder / "checkpoints", str(int(size * (1 + point)) + 8192)
        ) as there:
            if not there:
                print("skipped: no disk of a small size can be mounted here")
                return
            code = place.run(*flags, script=patched(place, body, "train_minimal"))
            out, left = place.printed(), sorted(os.listdir(place.folder / "checkpoints"))
            steps = {r["step"] for r in place.metrics() if r["event"] == "train"}
            good = code == 2 and "was not saved" in out
            good = good and steps == set(range(1, 61)) and not [n for n in left if "tmp" in n]
            kept = _whole(place)
        note = f"at {point:.0%} of a save"
        outcome = "lost" if not kept else "survived" if good else "silent"
        rig.count("disk full in a save", outcome, place, note)
    if rig.short:
        return
    place = rig.place()
    with _small_disk(place.folder / "logs", "16k"):
        code = place.run(*flags)
        good = code == 0 and "can't be written any more" in place.printed()
    rig.count("disk full for the logs", "survived" if good else "silent", place)
    place = rig.place()
    with _small_disk(place.folder / "checkpoints", "40k"):
        good = place.run(*flags) == 2 and "MB are free" in place.printed()
    rig.count("disk too small at the start", "refused" if good else "silent", place)
    place = rig.place()
    with _small_disk(place.folder / "checkpoints", "1m"):
        subprocess.run(["mount", "-o", "remount,ro", str(place.folder / "checkpoints")], check=True)
        good = place.run(*flags) == 2 and "Read-only file system" in place.printed()
    rig.count("read-only folder", "refused" if good else "silent", place)


# ---------------------------------------------------------------- numbers, and the outside world


def numbers(rig: Rig) -> None:
    """A NaN in one gradient element of one rank; then in five updates in a row."""
    body = """
wrap = step.nn.utils.clip_grad_norm_
backward = step._backward
def poisoned(model, batch, args, state, *rest):
    if rank == 1 and state.step in {steps}:
        handle = next(model.parameters()).register_hook(lambda g: g.index_fill(0, torch.tensor([3]), float("nan")))
        try:
            return backward(model, batch, args, state, *rest)
        finally:
            handle.remove()
    return backward(model, batch, args, state, *rest)
step._backward = poisoned
"""
    flags = _for_ranks([*TOY, "--arch", "gpt2"], 2)
    place = rig.place()
    code = place.run(*flags, ranks=2, script=patched(place, body.format(steps="{30}")))
    out = place.printed()
    good = code == 0 and "1 updates skipped" in out
    if good:
        norms = {r["step"]: r["grad_norm"] for r in place.metrics() if r["event"] == "train"}
        good = [s for s, norm in norms.items() if norm is None] == [31]
    rig.count("NaN in a gradient of one rank", "survived" if good else "silent", place)
    place = rig.place()
    code = place.run(*flags, ranks=2, script=patched(place, body.format(steps="range(30, 99)")))
    out = place.printed()
    good = code not in (0, -99) and "steps 31 to 35, samples 360 to 419" in out and _whole(place)
    rig.count("NaN in five updates in a row", "survived" if good else "silent", place)


def outside(rig: Rig) -> None:
    """What the environment does."""
    flags = [*TOY, "--arch", "gpt2", "--num-steps", "60"]
    reference = rig.reference(*flags)
    secret = "0123456789abcdef0123456789abcdef01234567"
    worlds: dict[str, tuple[list[str], dict[str, str], str]] = {
        "locale C, TERM=dumb": ([], {"LC_ALL": "C", "LANG": "C", "TERM": "dumb"}, ""),
        "clock set back by a day at step 30": (["--save-minutes", "0.02"], {}, """
clock, calls = time.time, []
time.time = lambda: clock() - 86400 * (calls.append(1) or len(calls) > 30)
"""),
        "WandB server dead, key in the environment": (
            ["--use-wandb"],
            {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": secret},
            "",
        ),
    }  # fmt: skip
    for name in ("locale C, TERM=dumb",) if rig.short else worlds:
        more, env, body = worlds[name]
        place = rig.place()
        script = patched(place, body, "train_minimal") if body else ""
        code = place.run(*flags, *more, script=script, **env)
        note = difference_of_weights(place, reference) if code == 0 else f"exit code {code}"
        leaks = [
            p for p in place.folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()
        ]
        note = note or (f"secret in {leaks[0]}" if leaks else "")
        rig.count(name, "silent" if note else "survived", place, note)
    if rig.short:  # tests/test_programs.py has the rest
        return
    place = rig.place()
    command = f"{sys.executable} {ROOT}/train_minimal.py {' '.join(flags)} | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=place.folder, env=place.env, capture_output=True, timeout=SLOW
    )
    note = done.stderr.decode()[-200:] or difference_of_weights(place, reference)
    rig.count("| head -1", "silent" if note else "survived", place, note)
    for name, env, said in (
        ("host name that does not resolve", {"MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29555"}, "no connection"),
        ("MASTER_PORT in use", {"MASTER_ADDR": "127.0.0.1"}, "no connection"),
    ):  # fmt: skip
        import socket

        place = rig.place()
        with socket.create_server(("127.0.0.1", 0)) as busy:
            here = {
                "RANK": "0",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "0",
                "MASTER_PORT": str(busy.getsockname()[1]),
            }
            script = str(ROOT / "train_ddp.py")
            code = place.run(*flags, "--timeout-seconds", "10", script=script, **{**here, **env})
        good = code == 2 and said in place.printed() and "Traceback" not in place.printed()
        outcome = "hung" if code == -99 else "refused" if good else "silent"
        rig.count(name, outcome, place, f"exit code {code}")


# ---------------------------------------------------------------- damage to every byte


def damage(rig: Rig) -> None:
    """Every byte of a small checkpoint flipped, every length that it can be cut to, zeroed tails;
    plain torch.load beside it.
    """
    import io

    import torch

    from model import GPTModel
    from tests.conftest import tiny, toy_settings
    from training.optimizers import make_optimizer
    from training.step import RunState

    shape = {"vocab_size": 8, "max_position_embeddings": 4, "d_model": 4, "n_layers": 1}
    model = GPTModel(tiny(**shape), seed=0)
    args = toy_settings("--vocab-size", "8", "--d-model", "4", "--n-layers", "1", "--seq-len", "4")
    path = rig.folder / "small.pt"
    optimizer = make_optimizer(model, args)
    model(torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4, dtype=torch.int64))[
        1
    ].backward()
    optimizer.step()
    save_checkpoint(path, model, optimizer, RunState(step=1), args)
    whole = path.read_bytes()
    wanted = dict(
        _leaves({k: v for k, v in read_checkpoint(path).items() if k in ("model", "optimizer")})
    )
    stride = 37 if rig.short else 1
    kinds: dict[str, Iterator[bytes]] = {
        "byte flipped": (
            whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :]
            for i in range(0, len(whole), stride)
        ),
        "one bit flipped": (
            whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :]
            for i in range(0, len(whole), stride)
        ),
        "truncated": (whole[:i] for i in range(0, len(whole), stride)),
        "tail zeroed": (whole[:i] + bytes(len(whole) - i) for i in range(0, len(whole), stride)),
    }
    for name, contents in kinds.items():
        tried = ours = plain = wrong = 0
        for content in contents:
            tried += 1
            path.write_bytes(content)
            try:
                read_checkpoint(path)
            except UserError:
                ours += 1
            try:
                loaded = torch.load(io.BytesIO(content), weights_only=True)
                found = dict(_leaves({k: loaded[k] for k in ("model", "optimizer")}))
                same = found.keys() == wanted.keys() and all(
                    torch.equal(found[k], v) for k, v in wanted.items()
                )
                wrong += not same
            except Exception:
                plain += 1
        label = f"{name}, each of {len(whole):,} bytes"
        row = rig.rows.setdefault(label, dict.fromkeys(("tried", *OUTCOMES), 0))
        row["tried"] += tried
        row["refused"] += ours
        row["silent"] += tried - ours
        print(
            f"{label}: detected {ours} of {tried}; torch.load: {plain} errors, {wrong} loaded with wrong tensors"
        )


GROUPS: dict[str, Callable[[Rig], None]] = {
    group.__name__: group
    for group in (
        damage,
        signals,
        second_signal,
        hangs,
        restarts,
        storage,
        numbers,
        outside,
        worlds,
        kills,
        rank_kills,
    )
}


def main() -> int:
    """Runs the groups that were named, or all; 1 if anything ended as it must not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], metavar="GROUP")
    parser.add_argument("--short", action="store_true", help="a few of each kind, for CI")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs at a time")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        rig, start = Rig(Path(folder), asked.short, asked.at_once), time.monotonic()
        for group in asked.groups or GROUPS:
            GROUPS[group](rig)
        print(f"\n{rig.table()}\n{time.monotonic() - start:.0f} s")
    for note in rig.notes:
        print(note)
    return 1 if rig.bad() else 0


if __name__ == "__main__":
    sys.exit(main())
