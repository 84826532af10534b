import dataclasses

import pytest
import torch
from conftest import CPU, toy_settings

import compiling
from compiling import compile_model, why_not_compiled
from config import UserError
from device import Device
from model import GPTModel

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
    assert line.startswith("not compiled: no C++ compiler") and not model.fused_loss
    assert compile_model(model, args, CPU) == []  # nobody expects it there
    with pytest.raises(UserError, match="--compile on: no C"):
        why_not_compiled(settings("on"), CPU)


def test_layers_that_ranks_share_are_not_compiled():
    args = settings("auto", tensor_parallel_size=2)
    assert "several processes compute together" in why_not_compiled(args, GPU)


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
    assert not model.fused_loss and all("forward" not in vars(b) for b in model.blocks)
    with pytest.raises(UserError, match=f"--compile on: {cause}; try --compile off"):
        compile_model(model, settings("on"), CPU, agree)
