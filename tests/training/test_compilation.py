import dataclasses
import os
import struct
import subprocess
import sys

import pytest
import torch
from conftest import CPU, ROOT, toy_settings

from model import GPTModel
from runtime.device import Device
from runtime.setting_fields import UserError
from training import compilation as compiling
from training.compilation import compile_model, why_not_compiled

GPU = Device(torch.device("cuda", 0), "bf16", "test")


def settings(compile, **changes):
    return dataclasses.replace(toy_settings("--compile", compile), **changes)


def test_what_is_not_compiled_has_a_reason(monkeypatch):
    assert why_not_compiled(settings("auto"), GPU) == why_not_compiled(settings("on"), CPU) == ""
    assert why_not_compiled(settings("off"), GPU) == "as asked"
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    args, model = settings("auto"), GPTModel(toy_settings().model)
    assert "no C++ compiler" in why_not_compiled(args, GPU)
    (line,) = compile_model(model, args, GPU)
    assert line.startswith("not compiled: no C++ compiler") and not model.compiled
    assert compile_model(model, args, CPU) == []  # nobody expects it there
    with pytest.raises(UserError, match="--compile on: no C"):
        why_not_compiled(settings("on"), CPU)


def test_layers_that_ranks_share_are_not_compiled():
    args = settings("auto", tensor_parallel_size=2)
    assert "several processes compute together" in why_not_compiled(args, GPU)


def test_libraries_that_a_killed_compiler_left_unfinished_are_deleted(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "warm_up", lambda args, device: None)
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)  # to import it takes 8 s
    head = b"\x7fELF\x02".ljust(40, b"\0") + struct.pack("Q10xHH2x", 100, 64, 2)  # its last part is
    whole = head.ljust(100 + 64 * 2, b"\0")  # a table of 2 sections of 64 bytes that begins at 100
    parts = {"empty": 0, "in_header": 40, "in_sections": len(whole) - 1, "whole": len(whole)}
    contents = {name: whole[:size] for name, size in parts.items()} | {"other_format": b"short"}
    for name, content in contents.items():
        (tmp_path / f"{name}.so").write_bytes(content)
        os.utime(tmp_path / f"{name}.so", (0, 0))
    assert compile_model(GPTModel(toy_settings().model), settings("on"), CPU)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["other_format", "whole"]


def failing(args, device):
    raise RuntimeError("no\n  such kernel")


@pytest.mark.parametrize("fails_here", [True, False])
def test_a_compiler_that_fails_on_any_rank_leaves_the_model_as_it_was(monkeypatch, fails_here):
    monkeypatch.setattr(compiling, "warm_up", failing if fails_here else lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)  # to import it takes 8 s
    model, agree = GPTModel(toy_settings().model), lambda wish: [1]
    monkeypatch.setattr(compiling, "why_not_compiled", lambda args, device: "")
    cause = "no such kernel" if fails_here else "it failed on another rank"
    assert compile_model(model, settings("auto"), CPU, agree) == [f"not compiled: {cause}"]
    assert not model.compiled and all("forward" not in vars(b) for b in model.blocks)
    with pytest.raises(UserError, match=f"--compile on: {cause}; try --compile off"):
        compile_model(model, settings("on"), CPU, agree)


COUNT = """
import sys, torch
from torch._dynamo.utils import counters
from settings.command_line import parse_settings
from training.compilation import compile_model
from dataset import open_data
from runtime.device import pick_device
from training.evaluation import evaluate
from training.activation_recompute import recompute_activations
from training.sampling import generate
from model import GPTModel
from training.optimizers import make_optimizer
from training.step import RunState, train_step

flags = "--preset toy --use-toy-data --vocab-size 97 --n-heads 2 --d-model 16 --seq-len 16"
flags += " --batch-size 4 --global-batch-size 8 --compile on --device cpu --val-max-tokens 1000"
args = parse_settings("train_minimal", flags.split() + sys.argv[1:])
train, val, args = open_data(args)
device, state = pick_device("cpu", args.precision), RunState()
model = GPTModel(args.model, seed=0)
assert compile_model(model, args, device)[0].startswith("compiled in")
recompute_activations(model)
compiled = counters["stats"]["unique_graphs"], counters["inductor"]["async_compile_cache_miss"]
torch._dynamo.config.error_on_recompile = True
optimizer = make_optimizer(model, args)
for _ in range(3):
    batch = train.global_batch(state.step, args)
    train_step(model, optimizer, batch, args, state, device)
    assert evaluate(model, val, 4, device).tokens == 999  # 67 windows: the last batch is not full
    generate(model, [[0, 0, 0]], 5, device)
now = counters["stats"]["unique_graphs"], counters["inductor"]["async_compile_cache_miss"]
print(now == compiled, compiled[0], dict(counters["graph_break"]))
"""


def compiled_graphs(*flags):
    """Graphs that a run compiled; none of them after its warm-up, none broken."""
    ran = subprocess.run(
        [sys.executable, "-c", COUNT, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    same, graphs, breaks = ran.stdout.split(maxsplit=2)
    assert (same, breaks.strip()) == ("True", "{}")
    return int(graphs)


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", ["", "--bf16 --arch modern --dropout 0.1"], ids=["gpt2", "modern"]
)
def test_nothing_is_compiled_after_the_warm_up_and_no_more_for_more_layers(flags):
    # A block and the sums of the loss in training, the same in evaluation, and gradients.
    assert compiled_graphs(*flags.split(), "--n-layers", "2") == 4
    assert compiled_graphs(*flags.split(), "--n-layers", "6") == 4


@pytest.mark.long
def test_recomputed_blocks_are_not_compiled_again():
    assert compiled_graphs("--use-activation-checkpoint", "--n-layers", "2") == 4
