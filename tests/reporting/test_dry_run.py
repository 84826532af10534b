import re

import pytest
from helpers import TINY

from config import to_dict
from reporting.report_text import sketch
from settings.command_line import parse_settings
from settings.presets import PRESETS, origins_of_settings


def figures(out):
    """The numbers of a dry run by name."""
    size = re.search(r"checkpoints of ([\d.]+) MB", out)[1]
    rows = dict(re.findall(r"^  (\S.*?)  +([\d,]+)(?:  +[\d.]+%)?$", out, re.M))
    return float(size) * 1e6, {k: int(v.replace(",", "")) for k, v in rows.items()}


@pytest.mark.parametrize(
    "flags",
    ["--optimizer muon", pytest.param("--arch gpt2 --optimizer adamw", marks=pytest.mark.long)],
)
def test_a_dry_run_tells_the_sizes_of_the_run_and_leaves_no_file(program, flags):
    words = f"{TINY} {flags} --d-model 128 --vocab-size 5000 --num-steps 5 --val-max-tokens 2000".split()
    out = program("train_minimal.py", "--dry-run", *words)
    size, parts = figures(out)
    assert {p.name for p in program.folder.iterdir()} <= {"home"}
    out = program("train_minimal.py", *words)
    real = (program.folder / "checkpoints/minigpt_single.pt").stat().st_size
    assert size == pytest.approx(real, rel=0.05)
    assert parts.pop("all") == sum(parts.values())
    assert f"{sum(parts.values()):,} parameters" in out
    assert ("n-gram embedding" in parts) == ("muon" in flags)


@pytest.mark.long
def test_a_dry_run_of_two_processes_tells_once(program):
    out = program("train_ddp.py", "--dry-run", *TINY.split(), "--num-steps", "7", ranks=2)
    assert out.count("a dry run: no log") == 1 and "2 processes" in out
    tokens = 7 * parse_settings("train_ddp", TINY.split(), world=2).global_batch_size * 15
    assert f"  {tokens:,} tokens are trained on" in out and not (program.folder / "logs").exists()
    assert re.search(r"  [\d.]+ s: 7 steps of \S+ s, .*; 2 evaluations of ", out)


def test_a_dry_run_refuses_what_the_run_would_refuse(program):
    out = program("train_minimal.py", "--dry-run", "--resume", ok=False)
    assert "--dry-run is about a new run" in out
    words = [*TINY.split(), "--num-steps", "3", "--check-reference", "none.json"]
    assert "cannot read none.json" in program("train_minimal.py", "--dry-run", *words, ok=False)


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "finetune"])
def test_the_table_of_settings_says_where_each_comes_from(preset):
    args = parse_settings("train_minimal", ["--preset", preset, "--lr", "0.5"])
    rows = {name: (value, origin) for name, value, origin in origins_of_settings(args)}
    assert rows["lr"] == ("0.5", "given, or follows from what is given")
    assert rows["n_layers"] == (str(to_dict(args)["n_layers"]), f"preset {preset}")
    assert rows["weight_decay"] == ("0.1", "default: Brown et al. 2020, appendix B")
    assert ("muon_momentum" in rows) == (args.optimizer == "muon")
    assert len(rows[f"preset {preset}"][1]) > 10


def test_a_sketch_fills_its_rows_in_proportion():
    assert sketch([0, 1, 2, 4], rows=1, low=0.0) == ["▁▃▅█"]
    # 16 levels: 0, 7.5 -> 8 (the lowest of the upper row), 15
    assert sketch([0, 5, 10], rows=2) == [" ▁█", "▁██"]
    assert sketch([3, 3], rows=2, low=3.0) == ["", "▁▁"]
