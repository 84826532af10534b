"""Everything that a GPU must show, in one command: `make gpu`, or `python scripts/gpu.py`.

Runs with the torch that is there, without network, in the order of what matters most. Each stage is
a few commands with a time limit of its own, and what they print is kept at once, so a run that is
cut off still tells: figures in gpu.json and gpu.md, whole outputs in gpu.log, in the folder $OUT or
logs/gpu. `--device cpu` runs the same stages at toy size, to try out the script itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.speed import SMALL, gpt2_small  # noqa: E402
from reporting.metrics_file import first_difference, read_records  # noqa: E402

LESS = [
    "--val-max-tokens",
    "2000",
    "--batch-size",
    "4",
    "--global-batch-size",
    "4",
    "--sample-tokens",
    "8",
]


@dataclass(frozen=True)
class Command:
    """A command of a stage, and the folder that it runs in. Commands of one folder run one after
    the other, those of different folders at the same time.
    """

    folder: str
    words: list[str]


class Check:
    """The stages, and what they found."""

    def __init__(self, device: str, folder: Path, only: list[str]) -> None:
        self.device, self.folder, self.only = device, folder, only
        self.small = device == "cpu"
        # Processes that run at the same time must not wait for each other's threads.
        threads = "1" if self.small else "4"
        self.env = {**os.environ, "OMP_NUM_THREADS": threads}
        self.env |= {"TORCHINDUCTOR_COMPILE_THREADS": threads}
        self.work = folder / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
        self.found: dict[str, Any] = {
            "device": name,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "command": "make gpu" + (" DEVICE=cpu" if self.small else ""),
            "stages": {},
        }
        self.log = open(folder / "gpu.log", "w", encoding="utf-8")  # noqa: SIM115
        self.writing = threading.Lock()

    def stage(self, name: str, limit: float, commands: list[Command]) -> bool:
        """Runs the commands for at most `limit` seconds; whether all of them succeeded."""
        if self.only and name not in self.only:
            return False
        start, limit = time.monotonic(), limit * (4 if self.small else 1)
        folders = dict.fromkeys(c.folder for c in commands)
        with ThreadPoolExecutor(2 if self.small else len(folders)) as pool:
            end = start + limit
            done = [
                pool.submit(self._in_turn, [c for c in commands if c.folder == folder], end)
                for folder in folders
            ]
            results = [line for each in done for line in each.result()]
        failed = [line for line in results if not line.endswith("ok")]
        self.record(
            name, {"seconds": round(time.monotonic() - start, 1), "failed": failed, "runs": results}
        )
        return not failed

    def _in_turn(self, commands: list[Command], end: float) -> list[str]:
        results = []
        for command in commands:
            folder = self.work / command.folder
            folder.mkdir(exist_ok=True)
            line = " ".join(command.words)
            started = time.monotonic()
            try:
                ran = subprocess.run(
                    [sys.executable, *command.words],
                    cwd=folder,
                    env=self.env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    timeout=max(1.0, end - started),
                )
                output, code = ran.stdout, str(ran.returncode)
            except subprocess.TimeoutExpired as reason:
                kept = reason.stdout or b""
                output = kept if isinstance(kept, str) else kept.decode(errors="replace")
                code = "out of time"
            fine = code == "0"
            seconds = time.monotonic() - started
            with self.writing:
                self.log.write(f"$ {line}   [{seconds:.1f} s, exit {code}]\n{output}\n")
                self.log.flush()
            results.append(f"{line}: {seconds:.0f} s, {'ok' if fine else f'exit {code}'}")
            if not fine:
                print(f"FAILED {line}\n{output[-3000:]}", flush=True)
        return results

    def record(self, name: str, what: dict[str, Any]) -> None:
        """Keeps what is known of a stage, and writes everything anew."""
        with self.writing:
            self.found["stages"].setdefault(name, {}).update(what)
            self.found["seconds"] = round(time.monotonic() - self.started, 1)
            (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1))
            (self.folder / "gpu.md").write_text(as_markdown(self.found))
        print(f"[{self.found['seconds']:.0f} s] {name}: {what.get('failed') or 'ok'}", flush=True)

    def benchmark(self, verb: str, limit: float, *flags: str) -> None:
        """A stage that is one benchmark; keeps its table."""
        flags = (verb, *flags, "--device", self.device, "--log-dir", "logs")
        flags += ("--small", "--repeats", "1") if self.small else ()
        if self.stage(verb, limit, [Command(verb, [str(ROOT / "bench.py"), *flags])]):
            table = json.loads((self.work / verb / "logs" / f"bench_{verb}.json").read_text())
            self.record(verb, {"table": table["rows"]})

    def smoke(self) -> None:
        """Each script once, as a user starts it."""
        train, deterministic = str(ROOT / "train_minimal.py"), "--deterministic"
        device = ["--device", self.device]
        steps, less = ("4", LESS) if self.small else ("100", [])
        saved = ["--checkpoint-path", "checkpoints/minigpt_single.pt"]
        gpt2 = [train, *device, *gpt2_small(8, *(SMALL if self.small else []))]
        gpt2 += ["--val-max-tokens", "20000", "--num-steps", "20"]
        toy = ["--preset", "toy", "--use-toy-data", deterministic, *device]
        self.stage(
            "smoke",
            120,
            [
                Command("quickstart", [train, *device, *less, "--num-steps", steps]),
                Command("quickstart", [str(ROOT / "eval.py"), *saved, *device]),
                Command("quickstart", [str(ROOT / "generate.py"), *saved, *device]),
                Command("compiled", [*gpt2, "--compile", "on"]),
                Command("eager", [*gpt2, "--compile", "off"]),
                Command("resume", [str(ROOT / "bench.py"), "resume", "--steps", "5", "--", *toy]),
            ],
        )

    def minutes(self) -> None:
        """A run that chooses its model. Its last lines in gpu.log say how it kept its time."""
        time = "0.2" if self.small else "1"
        run = [str(ROOT / "train_minimal.py"), "--device", self.device, "--minutes", time]
        self.stage("minutes", 100, [Command("minutes", [*run, *(LESS if self.small else [])])])

    def tests(self) -> None:
        """The tests of devices. The others compute on a CPU, wherever they run."""
        files = [str(ROOT / "tests" / name) for name in ("test_cuda.py", "runtime/test_device.py")]
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not self.small else []
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "--durations=5"]
        self.stage("tests", 300, [Command("tests", [*words, *workers, *files])])

    def curves(self) -> None:
        """The quickstart in each precision with the same seed, and once more in float32 with
        another, which says how far apart two runs may be; a deterministic run and its repetition.
        """
        steps = "3" if self.small else "300"
        base = [str(ROOT / "train_minimal.py"), "--device", self.device, "--num-steps", steps]
        base += ["--log-steps", "1", "--eval-steps", steps, "--compile", "off"]
        base += LESS if self.small else []
        runs = {
            "fp32": ["--precision", "fp32"],
            "fp32, another seed": ["--precision", "fp32", "--seed", "2", "--data-seed", "1337"],
            "bf16": ["--precision", "bf16"],
            "fp16": ["--precision", "fp16"],
            "deterministic": ["--deterministic", "--dropout", "0.1"],
            "deterministic, again": ["--deterministic", "--dropout", "0.1"],
        }
        commands = [Command(name, [*base, *flags]) for name, flags in runs.items()]
        if not self.stage("curves", 120, commands):
            return
        files = {name: self.work / name / "logs/train_minimal.jsonl" for name in runs}
        curve = {
            name: [r["train_loss"] for r in read_records(file) if r["event"] == "train"]
            for name, file in files.items()
        }
        rows = []
        for name in list(runs)[1:4]:
            apart = [abs(a - b) for a, b in zip(curve["fp32"], curve[name], strict=True)]
            rows.append(
                {
                    "run": name,
                    "mean difference to fp32, nats": sum(apart) / len(apart),
                    "largest": max(apart),
                    "last loss": curve[name][-1],
                    "last loss of fp32": curve["fp32"][-1],
                }
            )
        differs = first_difference(files["deterministic"], files["deterministic, again"])
        rows.append({"run": "deterministic, twice", "largest": differs or "same bits"})
        names = list(rows[0])
        self.record("curves", {"table": [{k: row.get(k, "") for k in names} for row in rows]})


def as_markdown(found: dict[str, Any]) -> str:
    """Everything found, as one page."""
    about = ", ".join(f"{k} {found[k]}" for k in ("device", "torch", "python", "date"))
    lines = ["# GPU check", "", f"`{found['command']}`: {about}; {found.get('seconds')} s", ""]
    for name, stage in found["stages"].items():
        lines += [f"## {name}", "", f"{stage.get('seconds')} s", ""]
        lines += [f"- {run}" for run in stage.get("runs", []) if "table" not in stage]
        if "table" in stage:
            rows = stage["table"]
            lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
            lines += ["| " + " | ".join(map(shown, row.values())) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def shown(value: object) -> str:
    """A cell of a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Runs all stages, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("stages", nargs="*", help="run these alone")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device here; try --device cpu (make gpu DEVICE=cpu)")
    folder = Path(os.environ.get("OUT") or ROOT / "logs" / "gpu").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    check = Check(args.device, folder, args.stages)
    batch = ("2", "4") if check.small else ("32", "480")
    right = (check.smoke, check.tests, check.curves)  # these time nothing
    with ThreadPoolExecutor(1 if check.small else len(right)) as pool:
        for done in [pool.submit(stage) for stage in right]:
            done.result()
    check.minutes()
    check.benchmark(
        "train", 240, "--batch-size", batch[0], "--global-batch-size", batch[1], "--repeats", "2"
    )
    check.benchmark("profile", 60, "--batch-size", batch[0])
    check.benchmark("loss", 120, "--repeats", "5")
    check.benchmark("optim", 60, "--repeats", "5")
    new = "20" if check.small else "256"
    check.benchmark("generate", 120, "--batch-size", "1", "--new-tokens", new, "--repeats", "2")
    print((folder / "gpu.md").read_text())
    failed = [line for stage in check.found["stages"].values() for line in stage.get("failed", [])]
    sys.exit(f"error: {len(failed)} commands failed: see {folder}/gpu.log" if failed else 0)


if __name__ == "__main__":
    main()
