"""Benchmarks, each side by side with what it is compared to: `python bench.py VERB`.

Prints a table and writes it as JSON into the log folder, with the machine.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import BenchSettings
from benchmarks.dial import bench_dial
from benchmarks.files import bench_data, bench_prepare
from benchmarks.generation import bench_generate
from benchmarks.growth import bench_growth
from benchmarks.layouts import bench_layouts, bench_processes, bench_tensor_parallel
from benchmarks.parts import bench_eval, bench_loss, bench_optim
from benchmarks.rates import bench_rates
from benchmarks.recipe import bench_recipe
from benchmarks.runs import bench_resume, bench_save
from benchmarks.speed import bench_profile, bench_train
from benchmarks.threads import bench_threads
from runtime.console import aligned
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import UserError, choose

Rows = list[dict[str, Any]]

VERBS: dict[str, Callable[[BenchSettings], Rows | tuple[Rows, str]]] = {
    "train": bench_train,
    "loss": bench_loss,
    "optim": bench_optim,
    "eval": bench_eval,
    "generate": bench_generate,
    "growth": bench_growth,
    "profile": bench_profile,
    "rates": bench_rates,
    "dial": bench_dial,
    "recipe": bench_recipe,
    "data": bench_data,
    "prepare": bench_prepare,
    "resume": bench_resume,
    "save": bench_save,
    "layouts": bench_layouts,
    "processes": bench_processes,
    "tp": bench_tensor_parallel,
    "threads": bench_threads,
}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a table."""
    cells = [
        {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows
    ]
    names = list(cells[0])
    print("\n".join(aligned([names, *([row[k] for k in names] for row in cells)])))


def main(args: BenchSettings) -> None:
    """Runs one benchmark, prints its rows as a table, and writes them as JSON."""
    if len(args.verb) != 1:
        raise UserError(f"say what to measure: bench.py {'|'.join(VERBS)}")
    found = choose("benchmark", args.verb[0], VERBS)(args)
    rows, last_line = found if isinstance(found, tuple) else (found, "")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{args.verb[0]} on {machine}; medians of {args.repeats} where times are given")
    show(rows)
    folder = Path(args.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "command": sys.argv[1:], "rows": rows}
    (folder / f"bench_{args.verb[0]}.json").write_text(json.dumps(result, indent=1))
    if last_line:
        print(last_line)


def launch(argv: list[str]) -> None:
    """Runs the benchmark that the command line names; after -- come the flags of a trainer."""
    own, trainer = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    main(BenchSettings(**parse_flags(BenchSettings, "bench.py", own), trainer=tuple(trainer)))


if __name__ == "__main__":
    run_script(launch)
