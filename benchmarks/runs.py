"""Whether a killed and resumed run is the same run, and what saving costs."""

from __future__ import annotations

import dataclasses
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import BenchSettings
from checkpoint import read_checkpoint
from checkpointing.commands import differences
from checkpointing.manager import CheckpointManager
from checkpointing.writing import lock_path
from reporting.metrics_file import first_difference, read_records
from runtime.setting_fields import UserError
from settings.command_line import parse_settings


def bench_resume(args: BenchSettings) -> list[dict[str, Any]]:
    """Trains twice as many steps straight, and again with a SIGKILL in the second half and a
    --resume; says whether the two runs are the same run.
    """
    root, script = (
        Path(__file__).resolve().parent.parent,
        "train_ddp" if args.ranks else "train_minimal",
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    program = [sys.executable, *(torchrun if args.ranks else []), str(root / f"{script}.py")]
    length = [
        "--num-steps",
        str(2 * args.steps),
        "--save-steps",
        str(args.steps),
        "--log-steps",
        "1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"

        def start(where: Path, *flags: str) -> subprocess.Popen[bytes]:
            files = ["--checkpoint-path", str(where / "c.pt"), "--log-dir", str(where)]
            return subprocess.Popen([*program, *flags, *files])

        def wait(run: subprocess.Popen[bytes]) -> None:
            if code := run.wait():
                raise UserError(f"the trainer ended with code {code}; its message is above")

        wait(start(straight, *args.trainer, *length))
        run = start(killed, *args.trainer, *length)
        metrics = killed / "c.jsonl"
        enough = args.steps + max(1, args.steps // 3)
        while run.poll() is None and not (
            (killed / "c.pt").exists() and _last_step(metrics) >= enough
        ):
            time.sleep(0.01)
        run.kill()
        if run.wait() != -signal.SIGKILL:
            raise UserError("the run ended before it could be killed; give more --steps")
        reached = _last_step(metrics)
        _wait_for_lock(killed / "c.pt")
        wait(start(killed, "--resume"))
        apart = {
            "metrics": first_difference(straight / metrics.name, metrics),
            "weights, optimizer": "; ".join(differences(straight / "c.pt", killed / "c.pt")[1][:3]),
        }
    print(f"killed at step {reached} of {2 * args.steps}, resumed from step {args.steps} or later")
    return [{"compared": k, "straight and resumed": v or "bit-equal"} for k, v in apart.items()]


def _last_step(metrics: Path) -> int:
    records = read_records(metrics) if metrics.exists() else []
    return max((r.get("step", 0) for r in records), default=0)


def _wait_for_lock(path: Path) -> None:
    """Workers whose torchrun was killed save once more before they end."""
    for _ in range(600):
        try:
            lock_path(path).close()
            return
        except UserError:
            time.sleep(0.1)
    raise UserError(f"{path} is still in use a minute after the kill")


def bench_save(args: BenchSettings) -> list[dict[str, Any]]:
    """What a save of GPT-2 small with AdamW costs the training, written at once and in the
    background, and what it costs to check every byte of it.
    """
    from dataset import data_record, open_data
    from model import GPTModel
    from runtime.device import pick_device
    from training.optimizers import make_optimizer
    from training.step import RunState, train_step

    size = str(args.batch_size)
    flags = ["--preset", "gpt2-small", "--use-toy-data", "--tokenizer-name", "", "--device", "cpu"]
    flags += ["--batch-size", size, "--global-batch-size", size, "--vocab-size", "50257"]
    Path(args.log_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.log_dir) as folder:
        path = Path(folder) / "c.pt"
        settings = parse_settings("train_minimal", [*flags, "--checkpoint-path", str(path)])
        train, val, settings = open_data(settings)
        device = pick_device("cpu")
        model = GPTModel(settings.model, seed=0)
        optimizer, state = make_optimizer(model, settings), RunState.fresh(device)

        def step() -> float:
            batch, start = train.global_batch(state.step, settings), time.perf_counter()
            train_step(model, optimizer, batch, settings, state, device)
            return time.perf_counter() - start

        step()
        plain = statistics.median(step() for _ in range(3))
        seconds = {f"step of {size} x 1024 tokens": plain}
        for way in ("off", "on"):
            saver = CheckpointManager(
                dataclasses.replace(settings, checkpoint_async=way), model, optimizer, state,
                data_record(train, val), device,
            )  # fmt: skip
            seconds |= _seconds_of_saves(saver, way, args.repeats, step)
            saver.lock.close()
        readers: dict[str, Callable[[], Any]] = {
            "read, every byte checked": lambda: read_checkpoint(path),
            "torch.load, nothing checked": lambda: torch.load(path, weights_only=True),
        }
        for name, read in readers.items():
            found = [timeit.timeit(read, number=1) for _ in range(args.repeats)]
            seconds[name] = statistics.median(found)
        rows = [{"what": k, "seconds": s, "of_a_step": s / plain} for k, s in seconds.items()]
        megabytes = path.stat().st_size / 1e6
    return [*rows, {"what": f"file of {megabytes:.0f} MB", "seconds": "", "of_a_step": ""}]


def _seconds_of_saves(
    saver: CheckpointManager, way: str, repeats: int, step: Callable[[], float]
) -> dict[str, float]:
    """Seconds of the first and of later saves, written at once ("off") or in the background ("on"),
    and of a step during a background save.
    """
    stalls, wholes = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        stalls.append(saver.save())
        saver.finish()
        wholes.append(time.perf_counter() - start)
    name = {"off": "at once", "on": "in the background"}[way]
    seconds = {
        f"{name}, first save": stalls[0],
        f"{name}, each later save": statistics.median(stalls[1:]),
        f"{name}, each later save, until it is safe": statistics.median(wholes[1:]),
    }
    if way == "on":
        saver.save()
        seconds["step during a background save"] = step()
        saver.finish()
    return seconds
