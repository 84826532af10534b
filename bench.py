"""Benchmarks, each side by side with what it is compared to: `python bench.py data|prepare|save`,
and the self-check `python bench.py resume -- FLAGS OF A TRAINER`.

Prints a table and writes it as JSON into the log folder, with the machine.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint import differences, read_checkpoint
from cli import parse_flags, parse_settings, run_script
from config import UserError, check_fields, choose, flag
from report import first_difference, read_records
from saver import Saver, claim
from text import find_sources, read_texts, stdlib_files
from token_files import prepare
from tokenizer import build_tokenizer


@dataclass(frozen=True)
class BenchSettings:
    """Settings of bench.py."""

    verb: tuple[str, ...] = flag((), "data, prepare, resume or save", positional=True)
    train_data: tuple[str, ...] = flag((), "prepare: texts; none = source of Python's library")
    synthetic_bytes: int = flag(0, "prepare: so much text made from these lines; 0 = as it is")
    tokenizer_name: str = flag("gpt2", "prepare: tokenizer")
    steps: int = flag(20, "resume: steps before the kill, and after it", at_least=2)
    ranks: int = flag(0, "resume: processes under torchrun; 0 = train_minimal.py", at_least=0)
    batch_size: int = flag(4, "save: sequences of 1024 tokens in a step", at_least=1)
    repeats: int = flag(5, "runs of each side; the median counts", at_least=1)
    log_dir: str = flag("logs", "folder of the JSON")
    trainer: tuple[str, ...] = ()  # what stands behind --

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


def bench_resume(args: BenchSettings) -> list[dict[str, Any]]:
    """Trains twice as many steps straight, and again with a SIGKILL in the second half and a
    --resume; says whether the two runs are the same run.
    """
    root, script = Path(__file__).resolve().parent, "train_ddp" if args.ranks else "train_minimal"
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
        metrics = killed / f"{script}.jsonl"
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
            claim(path).close()
            return
        except UserError:
            time.sleep(0.1)
    raise UserError(f"{path} is still in use a minute after the kill")


def bench_save(args: BenchSettings) -> list[dict[str, Any]]:
    """What a save of GPT-2 small with AdamW costs the training, written at once and in the
    background, and what it costs to check every byte of it.
    """
    from dataset import open_data, record_of
    from device import pick_device
    from model import GPTModel
    from optim import make_optimizer
    from step import RunState, train_step

    size = str(args.batch_size)
    flags = ["--preset", "gpt2-small", "--use-toy-data", "--tokenizer-name", "", "--device", "cpu"]
    flags += ["--batch-size", size, "--global-batch-size", size, "--vocab-size", "50257"]
    rows: list[dict[str, Any]] = []
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
        rows.append({"what": f"step of {size} x 1024 tokens", "seconds": plain, "of_a_step": 1.0})
        for way in ("off", "on"):
            saver = Saver(
                dataclasses.replace(settings, checkpoint_async=way), model, optimizer, state,
                record_of(train, val), device,
            )  # fmt: skip
            stalls, wholes = [], []
            for _ in range(args.repeats + 1):
                start = time.perf_counter()
                stalls.append(saver.save())
                saver.finish()
                wholes.append(time.perf_counter() - start)
            names = {"off": "at once", "on": "in the background"}
            times = {"first save": stalls[0], "each later save": statistics.median(stalls[1:])}
            times["each later save, until it is safe"] = statistics.median(wholes[1:])
            rows += [
                {"what": f"{names[way]}, {what}", "seconds": s, "of_a_step": s / plain}
                for what, s in times.items()
            ]
            if way == "on":
                saver.save()
                while_saving = step()
                saver.finish()
                rows.append(
                    {
                        "what": "step during a background save",
                        "seconds": while_saving,
                        "of_a_step": while_saving / plain,
                    }
                )
            saver.lock.close()
        readers: dict[str, Callable[[], Any]] = {
            "read, every byte checked": lambda: read_checkpoint(path),
            "torch.load, nothing checked": lambda: torch.load(path, weights_only=True),
        }
        for name, read in readers.items():
            times_read = [timeit.timeit(read, number=1) for _ in range(args.repeats)]
            s = statistics.median(times_read)
            rows.append({"what": name, "seconds": s, "of_a_step": s / plain})
        rows.append(
            {"what": f"file of {path.stat().st_size / 1e6:.0f} MB", "seconds": "", "of_a_step": ""}
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    cells = [
        {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows
    ]
    widths = {k: max(len(k), *(len(row[k]) for row in cells)) for k in cells[0]}
    for row in ({k: k for k in widths}, *cells):
        print("  ".join(row[k].ljust(widths[k]) for k in widths).rstrip())


VERBS = {
    "data": bench_data,
    "prepare": bench_prepare,
    "resume": bench_resume,
    "save": bench_save,
}


def main(args: BenchSettings) -> None:
    """Runs one benchmark."""
    if len(args.verb) != 1:
        raise UserError(f"say what to measure: bench.py {'|'.join(VERBS)}")
    rows = choose("benchmark", args.verb[0], VERBS)(args)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{args.verb[0]} on {machine}; medians of {args.repeats} where times are given")
    show(rows)
    folder = Path(args.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "command": sys.argv[1:], "rows": rows}
    (folder / f"bench_{args.verb[0]}.json").write_text(json.dumps(result, indent=1))


def launch(argv: list[str]) -> None:
    own, trainer = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    main(BenchSettings(**parse_flags(BenchSettings, "bench.py", own), trainer=tuple(trainer)))


if __name__ == "__main__":
    run_script(launch)
