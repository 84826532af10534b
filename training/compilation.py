"""torch.compile of a model: its blocks, one by one, and the elementwise part of its loss."""

from __future__ import annotations

import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import nn

from config import Settings
from loss import next_token_loss, token_losses
from model import Block, GPTModel, rotary_table
from runtime.console import one_line
from runtime.device import Device
from runtime.setting_fields import UserError

_LINKING = 5.0  # a linker writes to its file more often than after so many seconds


def why_not_compiled(args: Settings, device: Device) -> str:
    """The reason why the model is not compiled with these settings; "" if it is compiled. Raises
    UserError if --compile on cannot be done.
    """
    if args.compile == "off" or (args.compile == "auto" and device.torch_device.type != "cuda"):
        return "--compile on compiles on this device too" if args.compile == "auto" else "as asked"
    reason = ""
    if not any(shutil.which(c) for c in ("c++", "g++", "clang++", "cl")):
        reason = "no C++ compiler (g++ or clang++) is found"
    elif args.tensor_parallel_size > 1:
        reason = "layers that several processes compute together can't be compiled"
    if reason and args.compile == "on":
        raise UserError(f"--compile on: {reason}; try --compile auto")
    return reason


def compile_model(
    model: GPTModel,
    args: Settings,
    device: Device,
    agree: Callable[..., list[int]] = lambda *wishes: list(wishes),
) -> list[str]:
    """Compiles the blocks of a model and its loss in place, if args.compile says so, and returns
    the lines to log. Call it before DDP or FSDP wrap the model.

    All blocks run the same code, so one compilation serves them all. Shapes are static:
    (batch_size, seq_len), in training and in evaluation. Both are compiled here, without other
    processes. If that fails, --compile on raises UserError, and auto goes on uncompiled. agree:
    returns the maximum of a number over the ranks, which must all do the same (see `Ranks.agree`).
    """
    reason = why_not_compiled(args, device)
    if reason:
        silent = args.compile == "off" or device.torch_device.type != "cuda"
        return [] if silent else [f"not compiled: {reason}"]
    start, failure = time.perf_counter(), None
    blocks = cast(list[Block], list(model.blocks))
    units = [unit for block in blocks for unit in _units(block, args)]
    for unit in units:
        _compile(unit)
    model.compiled = True
    try:
        _delete_parts_of_libraries()
        warm_up(args, device)
    except Exception as found:  # a compiler is a large program: anything can come
        failure = found
    if not agree(failure is not None)[0]:
        return [f"compiled in {time.perf_counter() - start:.0f} s"]
    cause = one_line(failure or "it failed on another rank", 200)
    if args.compile == "on":
        raise UserError(f"--compile on: {cause}; try --compile off") from failure
    for unit in units:
        del unit.forward  # the forward method of its class is left
    model.compiled = False
    return [f"not compiled: {cause}"]


def _units(block: Block, args: Settings) -> tuple[nn.Module, ...]:
    """The modules that are compiled, each as one unit: the block, or its two halves under FSDP,
    which has hooks on those.
    """
    return (block.attn, block.mlp) if args.parallel == "fsdp" else (block,)


def _compile(unit: nn.Module) -> None:
    # Compiles the method, not the module: hooks of FSDP stay outside, and names as they are.
    unit.forward = torch.compile(unit.forward, dynamic=False, fullgraph=True)


def _delete_parts_of_libraries() -> None:
    """Deletes the libraries in torch's cache of which only the beginning is there. A linker writes
    in place, so a program that is killed while it compiles can leave one, and torch, which takes
    each file for whole, would fail with it in all later runs.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for library in Path(cache_dir()).rglob("*.so"):
        try:
            while library.stat().st_size < _size_of_library(library):
                if time.time() - library.stat().st_mtime > _LINKING:
                    library.unlink()
                time.sleep(0.1)  # perhaps another process is linking it
        except FileNotFoundError:  # deleted: here, or by another process
            continue


def _size_of_library(path: Path) -> int:
    """The bytes of a library of 64-bit Linux by its header, which says where its last part is, the
    table of sections; 1 if it has another format, so that only an empty one is too short.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head[:5] != b"\x7fELF\x02":
        return 1
    if len(head) < 64:
        return 64
    (start,), (size, count) = struct.unpack_from("Q", head, 40), struct.unpack_from("HH", head, 58)
    return start + size * count


def warm_up(args: Settings, device: Device) -> None:
    """Runs a training step and an evaluation of one block and of the loss on zeros, which makes
    torch.compile compile them. It makes a block of its own on the device, where that of the model
    may not be yet.
    """
    config, on = args.model, device.torch_device
    rotary = None
    if config.arch == "modern":
        cos, sin = rotary_table(args.seq_len, config.d_model // config.n_heads)
        rotary = (cos.to(on), sin.to(on))
    block = Block(config).to(on)
    for unit in _units(block, args):
        _compile(unit)
        if args.parallel == "fsdp":  # FSDP gathers matrices in the dtype of the products
            unit.to(device.dtype)
    x = torch.zeros(args.batch_size, args.seq_len, config.d_model, device=on, requires_grad=True)
    labels = torch.zeros(args.batch_size, args.seq_len, dtype=torch.int64, device=on)
    weight = torch.zeros(config.vocab_size, config.d_model, device=on, requires_grad=True)
    with device.autocast():
        out = block(x, None, rotary)
        next_token_loss(out, weight, labels, fused=True)[0].backward()
    block.eval()
    with device.autocast(), torch.no_grad():
        token_losses(block(x.detach(), None, rotary), weight, labels, fused=True)
