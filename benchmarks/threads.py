"""How the threads of a matrix product should wait for each other, beside processes that compute."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import BenchSettings
from reporting.metrics_file import read_records
from runtime.setting_fields import UserError

# The environment of each side. An empty OMP_WAIT_POLICY counts as set by the user, see
# runtime/threads.py; OpenMP then spins, as it does without the variable.
WAYS = {
    "sleeping": {},
    "spinning": {"OMP_WAIT_POLICY": ""},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
STEPS = {
    "quickstart": ["--num-steps", "30", "--log-steps", "5"],
    "larger": [
        *["--num-steps", "5", "--log-steps", "1", "--n-layers", "4", "--d-model", "256"],
        *["--global-batch-size", "8", "--seq-len", "256"],
    ],
}
WITHOUT_EVALUATION = ["--eval-at-start", "off", "--val-max-tokens", "1000"]


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute with one thread until the block ends."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def step_milliseconds(flags: list[str], environment: dict[str, str]) -> float:
    """The median step of a run of train_minimal.py, without its first ones."""
    script = Path(__file__).resolve().parent.parent / "train_minimal.py"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        files = ["--checkpoint-path", f"{folder}/c.pt", "--log-dir", folder]
        run = subprocess.run(
            [sys.executable, str(script), *flags, *files, *WITHOUT_EVALUATION],
            env=inherited | environment,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise UserError(f"train_minimal.py failed: {run.stderr.strip()[-300:]}")
        records = [r for r in read_records(Path(folder) / "c.jsonl") if r["event"] == "train"]
    return 1000 * statistics.median(r["time"]["step_seconds"] for r in records[1:])


def bench_threads(args: BenchSettings) -> list[dict[str, Any]]:
    """Milliseconds a step for each way to wait, with 0, 1 and 2 busy processes beside; the ways
    take turns within each number of neighbours.
    """
    found: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(args.repeats):
        for count in (0, 1, 2):
            with neighbours(count):
                for way, environment in WAYS.items():
                    for name, flags in STEPS.items():
                        figure = step_milliseconds(flags, environment)
                        found.setdefault((way, name, count), []).append(figure)
    return [
        {"threads wait": way}
        | {
            f"{name}, {count} busy": statistics.median(found[way, name, count])
            for name in STEPS
            for count in (0, 1, 2)
        }
        for way in WAYS
    ]
