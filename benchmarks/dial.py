"""What `--minutes` gets out of the time, beside the quickstart and the plain recipe with as many
steps as fit into the same time. A study of hours: what was measured stays in a file, and the same
command goes on where it was stopped.
"""

from __future__ import annotations

import json
import lzma
import time
from pathlib import Path
from typing import Any

from benchmarks.common import BenchSettings
from benchmarks.recipe import PLAIN, records_of_run
from dataset import open_data
from settings.command_line import parse_settings
from training.time_budget import SHAPES

VAL_TOKENS = "111540"  # held out at most: a tenth of tinyshakespeare
PLAIN_SIZES = ((2, 64), (4, 128), (6, 256))  # blocks, width


def bench_dial(args: BenchSettings) -> list[dict[str, Any]]:
    """Bits per byte on held-out text by minutes, and how far from them each run ended. The last row
    is `xz -9` on the held-out text alone, and behind the training text. With --shapes the sides are
    the shapes that --minutes chooses from.
    """
    folder = Path(args.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "dial.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    known = {row["command"]: row for row in map(json.loads, lines)}
    rows = []
    for minutes in args.minutes:
        for seed in range(args.seeds):
            for side, flags in _sides(args).items():
                if args.sides and not side.startswith(args.sides):
                    continue
                flags = [*_data(args), *flags, "--minutes", minutes, "--seed", str(seed)]
                command = " ".join([*flags, *args.trainer])
                if command not in known:
                    known[command] = {"command": command, **_run([*flags, *args.trainer])}
                    with file.open("a") as out:
                        out.write(json.dumps(known[command]) + "\n")
                    print(f"{minutes} minutes, seed {seed}, {side}: {known[command]}", flush=True)
                found = known[command]
                row = {"minutes": float(minutes), "seed": seed, "side": side}
                rows.append({**row, **{k: found[k] for k in _SHOWN}})
    return [*rows, *_xz(args)]


_SHOWN = ("val_bpb", "best_bpb", "off", "parameters", "tokens", "n_layers", "d_model", "num_steps")


def _sides(args: BenchSettings) -> dict[str, list[str]]:
    """The flags of each side; --minutes with --preset chooses the number of steps alone."""
    if args.shapes:
        return {
            f"{n} x {width}": ["--n-layers", str(n), "--d-model", str(width)]
            for n, width, _ in SHAPES[:7]
        }
    steps_alone = ["--preset", "quickstart"]
    sides = {"dial": [], "quickstart": steps_alone}
    for n, width in PLAIN_SIZES:
        shape = ["--n-layers", str(n), "--d-model", str(width), "--seq-len", "64"]
        sides[f"plain {n} x {width}"] = [*steps_alone, *_without_steps(PLAIN), *shape]
    return sides


def _without_steps(flags: list[str]) -> list[str]:
    """PLAIN without its number of steps and its shape, which the sides choose."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    out = {"--num-steps", "--n-layers", "--d-model"}
    return [word for name, value in pairs if name not in out for word in (name, value)]


def _data(args: BenchSettings) -> list[str]:
    flags = ["--tokenizer-name", "bytes", "--val-max-tokens", VAL_TOKENS]
    return [*flags, "--train-data", *args.train_data] if args.train_data else flags


def _run(flags: list[str]) -> dict[str, Any]:
    """One run of train_minimal.py: its last and best bits per byte, and `off`, how far from its
    minutes it ended, as a part of them.
    """
    start = time.monotonic()
    records = records_of_run(flags)
    seconds = time.monotonic() - start
    settings = records[0]["settings"]
    evals = [r["val_bpb"] for r in records if r["event"] == "eval"]
    last = [r for r in records if r["event"] == "train"][-1]
    found = {"val_bpb": evals[-1], "best_bpb": min(evals), "seconds": seconds}
    found |= {"off": seconds / (60 * settings["minutes"]) - 1, "tokens": last["tokens"]}
    found |= {"parameters": records[0]["parameters"], "chosen": settings["chosen"]}
    return {**found, **{k: settings[k] for k in ("n_layers", "d_model", "num_steps")}}


def _xz(args: BenchSettings) -> list[dict[str, Any]]:
    """Bits per byte of `xz -9` on the held-out text."""
    settings = parse_settings("train_minimal", _data(args))
    train, val, _ = open_data(settings)
    tokens = (d.source.read(d.start, d.num_tokens) for d in (train, val))
    before, text = (bytes(t[t < 256].tolist()) for t in tokens)  # 256 parts documents

    def size(data: bytes) -> int:
        return len(lzma.compress(data, preset=9))

    both = size(before + text) - size(before)
    bits = {"xz -9": size(text), "xz -9, behind the training text": both}
    empty: dict[str, Any] = dict.fromkeys(_SHOWN, "")
    return [
        {"minutes": "", "seed": "", "side": side, **empty, "val_bpb": 8 * n / len(text)}
        for side, n in bits.items()
    ]
