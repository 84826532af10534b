"""Reading token shards and tokenizing text."""

from __future__ import annotations

import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import BenchSettings, in_new_process, memory
from corpus.find_text import find_sources, stdlib_files
from corpus.read_text import read_texts
from corpus.tokenizer import build_tokenizer
from corpus.tokenizing import prepare
from settings.command_line import parse_settings


def open_and_read(path: str) -> dict[str, float]:
    """Seconds from opening a shard to its first batch, for near and far steps, and MB it took."""
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
