"""How fast the default recipe learns, against the plain one, and what each of its parts gains."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import BenchSettings
from reporting.metrics_file import read_records
from runtime.setting_fields import UserError

# The settings that nanoGPT's README gives for a CPU; the model has 0.83M parameters.
PLAIN = [
    *("--arch", "gpt2", "--n-layers", "4", "--n-heads", "4", "--d-model", "128"),
    *("--ngram-rows", "0", "--batch-size", "12", "--global-batch-size", "12"),
    *("--num-steps", "2000", "--optimizer", "adamw", "--lr", "1e-3", "--min-lr", "1e-4"),
    *("--warmup-steps", "100", "--lr-scheduler", "cosine", "--beta1", "0.9", "--beta2", "0.99"),
]

# Each part of the recipe, and the flags that put the plain thing in its place.
PARTS = {
    "the n-gram embedding": ["--ngram-rows", "0"],
    "Muon": ["--optimizer", "adamw"],
    "the modern blocks": ["--arch", "gpt2", "--ngram-rows", "0"],
    "the linear schedule to 0": ["--lr-scheduler", "cosine", "--min-lr", "1e-3"],
}


def bench_recipe(args: BenchSettings) -> tuple[list[dict[str, Any]], str]:
    """Training seconds of the plain recipe to its end, and of the default one to the same loss on
    the whole validation part (111,540 tokens of Python's library), and a last line that says how
    many times faster the default is. With --ablate the other sides are the default recipe without
    each of its parts.
    """
    length = ["--num-steps", str(args.recipe_steps)]
    sides = {"plain": PLAIN, "default": length}
    if args.ablate:
        parts = {f"without {part}": [*length, *flags] for part, flags in PARTS.items()}
        sides = {"default": length, **parts}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for seed in range(args.seeds):
        for name, flags in sides.items():
            found = train(args, [*flags, "--seed", str(seed)])
            runs[name].append(found)
            print(f"seed {seed}, {name}: {found}", flush=True)
    rows: list[dict[str, Any]] = []
    for name, some in runs.items():
        row: dict[str, Any] = {"side": name, "steps": int(some[0]["steps"])}
        row |= {"parameters": int(some[0]["parameters"])}
        for key in ("seconds", "val_loss", "val_bpb"):
            row[key] = statistics.median(run[key] for run in some)
        rows.append({**row, "worst_val_loss": max(run["val_loss"] for run in some)})
    if args.ablate:
        return rows, ""
    reached = max(run["val_loss"] for run in runs["plain"])
    target = min(args.target_loss or reached, reached)
    worst = max(run["val_loss"] for run in runs["default"])
    ratio = rows[0]["seconds"] / rows[1]["seconds"]
    print(f"target: {target:.4f}; the default recipe's worst seed ends at {worst:.4f}")
    if worst > target:
        return rows, "the default recipe did not get there; give more --recipe-steps"
    return rows, f"{ratio:.1f} times faster"


def train(args: BenchSettings, flags: list[str]) -> dict[str, float]:
    """Runs train_minimal.py; its training seconds (without evaluation and saving) and its last
    validation losses.
    """
    data = ["--tokenizer-name", "bytes", "--val-max-tokens", "0", "--seq-len", "64"]
    data += ["--train-data", *args.train_data] if args.train_data else []
    data += ["--val-max-tokens", "111540"] if not args.train_data else []
    rare = ["--eval-steps", "1000000", "--save-steps", "1000000", "--sample-tokens", "1"]
    records = records_of_run([*data, *rare, *flags, *args.trainer])
    seconds, last = 0.0, 0
    for r in records:
        if r["event"] == "train":
            seconds += r["time"]["step_seconds"] * (r["step"] - last)
            last = r["step"]
    end = [r for r in records if r["event"] == "eval"][-1]
    found = {"steps": last, "parameters": records[0]["parameters"], "seconds": seconds}
    return {**found, "val_loss": end["val_loss"], "val_bpb": end["val_bpb"]}


def records_of_run(flags: list[str]) -> list[dict[str, Any]]:
    """Runs train_minimal.py in a folder that is thrown away; its metrics. Raises UserError if it
    fails.
    """
    script = Path(__file__).resolve().parent.parent / "train_minimal.py"
    with tempfile.TemporaryDirectory() as folder:
        files = ["--checkpoint-path", f"{folder}/c.pt", "--log-dir", folder]
        command = [sys.executable, str(script), *files, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"train_minimal.py failed: {done.stderr.strip()[-300:]}")
        return read_records(Path(folder) / "c.jsonl")
