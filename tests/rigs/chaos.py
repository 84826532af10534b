"""Kills a run at each file event of a save, resumes it, and judges: `python -m tests.rigs.chaos`.

The killing and judging is ckpt-chaos's (pip install ckpt-chaos; not among the requirements). The
command is the same each time, with --resume auto, and must end with the checkpoints of the run that
nothing happened to: weights, optimizer state, counts and names of files, to the bit. A resume from
an older step than that of the newest whole checkpoint counts as LOST_WORK. Logs are killed too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import read_checkpoint  # noqa: E402

RUN = """
    --use-toy-data --vocab-size 97 --seq-len 16 --n-layers 1 --n-heads 2 --d-model 16 --dropout 0.1
    --arch gpt2 --global-batch-size 4 --batch-size 2 --num-steps 6 --save-steps 2 --keep-every 2
    --eval-steps 3 --log-steps 1 --val-max-tokens 200 --sample-tokens 1 --device cpu --lr 1e-2
    --checkpoint-async off --checkpoint-path {out}/c.pt --log-dir {out}/logs --resume auto
""".split()
MODES = ("before", "torn", "term")


def fingerprint(folder: Path) -> str:
    """The names of the checkpoints, and what the latest holds that a resume goes on with."""
    found = sorted(p.name for p in folder.glob("*.pt"))
    content = read_checkpoint(folder / "c.pt")
    state = {k: content[k] for k in ("model", "optimizer", "step", "tokens", "best_step")}
    digest = hashlib.sha256(repr(content["best_val_loss"]).encode())
    _add(state, digest)
    return f"{' '.join(found)}: step {content['step']}, {digest.hexdigest()}"


def _add(value: Any, digest: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value):
            digest.update(key.encode())
            _add(value[key], digest)
    else:
        whole = value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode()
        digest.update(whole)


def crash(ranks: int, points: int, jobs: int, modes: str, work: Path) -> tuple[int, str]:
    """(exit code, report) of ckpt-chaos on so many processes; at most so many points."""
    script = ROOT / ("train_ddp.py" if ranks > 1 else "train_minimal.py")
    mine = f"{sys.executable} {Path(__file__).resolve()}"
    command = [
        *(sys.executable, "-m", "ckpt_chaos", "run", "--ranks", str(ranks)),
        *("--step-regex", r"resumed \S+ at step (\d+)", "--result-cmd", mine + " --result {out}"),
        *("--checkpoint-glob", "{out}/c.step*.pt", "--ckpt-ignore-size"),  # paths are stored inside
        *("--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL"),
        *("--max-points", str(points), "--jobs", str(jobs), "--modes", modes, "--timeout", "120"),
        *("--work", str(work), "--", sys.executable, str(script), *RUN),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def main() -> int:
    """Prints the report for one process and for two; 0 if all resumes are right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--max-points", type=int, default=1000, help="kills of each, evenly spread")
    parser.add_argument("--modes", default=",".join(MODES), help="kinds of kills, of ckpt-chaos")
    parser.add_argument("--jobs", type=int, default=1, help="kills at a time")
    parser.add_argument("--result", type=Path, help="only print what a folder of checkpoints holds")
    asked = parser.parse_args()
    if asked.result:
        print(fingerprint(asked.result))
        return 0
    if importlib.util.find_spec("ckpt_chaos") is None:
        print("error: this takes ckpt-chaos; try: pip install ckpt-chaos", file=sys.stderr)
        return 2
    worst = 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        for ranks in asked.ranks:
            work = Path(folder) / f"{ranks}"
            code, report = crash(ranks, asked.max_points, asked.jobs, asked.modes, work)
            print(f"{ranks} processes:\n{report}", flush=True)
            worst = max(worst, code)
    return worst


if __name__ == "__main__":
    sys.exit(main())
