"""Benchmarks, each side by side with what it is compared to: `python bench.py data|prepare`.

Prints a table and writes it as JSON into the log folder, with the machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cli import parse_flags, parse_settings, run_script
from config import UserError, check_fields, choose, flag
from text import find_sources, read_texts, stdlib_files
from token_files import prepare
from tokenizer import build_tokenizer


@dataclass(frozen=True)
class BenchSettings:
    """Settings of bench.py."""

    verb: tuple[str, ...] = flag((), "data or prepare", positional=True)
    train_data: tuple[str, ...] = flag((), "prepare: texts; none = source of Python's library")
    synthetic_bytes: int = flag(0, "prepare: so much text made from these lines; 0 = as it is")
    tokenizer_name: str = flag("gpt2", "prepare: tokenizer")
    repeats: int = flag(5, "runs of each side; the median counts", at_least=1)
    log_dir: str = flag("logs", "folder of the JSON")

    def __post_init__(self) -> None:
        check_fields(self)


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What work returns in a process of its own, so that memory and caches of others don't
    count.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory(kind: str) -> float:
    """MB of this process: "VmRSS" now, "VmHWM" at its highest. 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1000
    except OSError:
        return 0.0


def open_and_read(path: str) -> dict[str, float]:
    """Seconds from opening a shard to its first batch, for near and far steps, and MB it took."""
    import torch

    from dataset import FineWebNPYDataset

    torch.set_num_threads(1)
    args = parse_settings("train_minimal", ["--preset", "gpt2-small", "--global-batch-size", "8"])
    before, start = memory("VmRSS"), time.perf_counter()
    data = FineWebNPYDataset([path], args.seq_len)
    data.global_batch(0, args)
    found = {
        "open_to_first_batch_s": time.perf_counter() - start,
        "step_0_s": 0.0,
        "step_1e6_s": 0.0,
    }
    for name, step in (("step_0_s", 1), ("step_1e6_s", 1_000_000)):
        start = time.perf_counter()
        for k in range(20):
            data.global_batch(step + k, args)
        found[name] = (time.perf_counter() - start) / 20
    start = time.perf_counter()
    for k in range(100):
        data.sample_windows(8 * (1_000_000 + k), 8, 0)
    found["which_windows_us"] = (time.perf_counter() - start) * 1e4
    found["more_memory_mb"] = memory("VmRSS") - before
    return found


def bench_data(args: BenchSettings) -> list[dict[str, Any]]:
    """A shard of 100M tokens, and a sparse one that stands for 10 billion."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in (10_000, 100_000_000, 10_000_000_000):
            path = Path(folder) / f"{tokens}.npy"
            with open(path, "wb") as file:
                about = {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
                np.lib.format.write_array_header_1_0(file, about)
                if tokens <= 10**8:
                    file.write(np.random.default_rng(0).integers(0, 50257, tokens, np.uint16).data)
                else:
                    file.truncate(file.tell() + 2 * tokens)
            runs = [in_new_process(open_and_read, str(path)) for _ in range(args.repeats)]
            medians = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
            rows.append({"tokens": f"{tokens:,}", **medians})
            path.unlink()
    return rows


def plain_encode(paths: list[str], tokenizer_name: str) -> dict[str, float]:
    """One process, tiktoken's encode_ordinary, ids thrown away: seconds and tokens."""
    import tiktoken

    known = tiktoken.get_encoding(tokenizer_name)
    known.encode_ordinary("warm up")
    start, tokens = time.perf_counter(), 0
    for path in paths:
        for piece in read_texts(Path(path)):
            tokens += len(known.encode_ordinary(piece.text)) + piece.ends_document
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "mb": memory("VmHWM")}


def our_prepare(paths: list[str], tokenizer_name: str, workers: int) -> dict[str, float]:
    """`prepare` with so many workers, shards written and synced: seconds and tokens."""
    tokenizer = build_tokenizer(tokenizer_name)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        made = prepare([Path(p) for p in paths], tokenizer, Path(folder) / "out", workers=workers)
        seconds = time.perf_counter() - start
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    mb = memory("VmHWM") + workers * largest  # at most: forked processes share pages
    return {"seconds": seconds, "tokens": made["tokens"], "mb": mb}


def bench_prepare(args: BenchSettings) -> list[dict[str, Any]]:
    """tokens/s of data/prepare.py against one process of tiktoken on the same text."""
    sources = find_sources(args.train_data) if args.train_data else stdlib_files()
    with tempfile.TemporaryDirectory() as folder:
        if args.synthetic_bytes:
            sources = [synthetic_text(sources, args.synthetic_bytes, Path(folder) / "text.txt")]
        paths = [str(p) for p in sources]
        sides: dict[str, Callable[[], Any]] = {
            "tiktoken encode_ordinary, 1 process": lambda: in_new_process(
                plain_encode, paths, args.tokenizer_name
            ),
            "prepare, 1 worker": lambda: in_new_process(our_prepare, paths, args.tokenizer_name, 1),
            f"prepare, {os.cpu_count()} workers": lambda: in_new_process(
                our_prepare, paths, args.tokenizer_name, os.cpu_count()
            ),
        }
        runs: dict[str, list[Any]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, side in sides.items():
                runs[name].append(side())
    rows: list[dict[str, Any]] = []
    for name, some in runs.items():
        seconds = statistics.median(run["seconds"] for run in some)
        rate = some[0]["tokens"] / seconds
        base = rows[0]["tokens_per_s"] if rows else rate
        peak = max(run["mb"] for run in some)
        row = {"side": name, "seconds": seconds, "tokens": some[0]["tokens"], "tokens_per_s": rate}
        rows.append({**row, "times_plain": rate / base, "peak_memory_mb": peak})
    return rows


def synthetic_text(sources: list[Path], n_bytes: int, path: Path) -> Path:
    """A file of about n_bytes: the lines of the sources, drawn again and again in random order."""
    lines = [line for p in sources for line in p.read_text(encoding="utf-8").splitlines(True)]
    draw, written = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while written < n_bytes:
            draw.shuffle(lines)
            written += sum(file.write(line) for line in lines)
    return path


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    cells = [
        {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows
    ]
    widths = {k: max(len(k), *(len(row[k]) for row in cells)) for k in cells[0]}
    for row in ({k: k for k in widths}, *cells):
        print("  ".join(row[k].ljust(widths[k]) for k in widths).rstrip())


VERBS = {"data": bench_data, "prepare": bench_prepare}


def main(args: BenchSettings) -> None:
    """Runs one benchmark."""
    if len(args.verb) != 1:
        raise UserError(f"say what to measure: bench.py {'|'.join(VERBS)}")
    rows = choose("benchmark", args.verb[0], VERBS)(args)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{args.verb[0]} on {machine}; medians of {args.repeats}")
    show(rows)
    folder = Path(args.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "command": sys.argv[1:], "rows": rows}
    (folder / f"bench_{args.verb[0]}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_script(lambda argv: main(BenchSettings(**parse_flags(BenchSettings, "bench.py", argv))))
