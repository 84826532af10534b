"""The global batch of an optimizer step, and the micro-batches into which it is divided."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from config import Settings
from runtime.setting_fields import UserError


def data_parallel_size(script: str, args: Settings, typed: Mapping[str, Any], world: int) -> int:
    """The number of data-parallel ranks: the `world` processes divided by tensor_parallel_size.
    Raises UserError if that is no whole number, or if a script for one process is to run in
    parallel.

    script: "train_minimal" or "train_ddp". typed: the flags that the user typed.
    """
    parts = args.tensor_parallel_size
    if args.use_tensor_parallel and typed.get("tensor_parallel_size", world) != world:
        raise UserError(
            f"--use-tensor-parallel means all {world} processes, not "
            f"{typed['tensor_parallel_size']}; give one of the two"
        )
    if script != "train_ddp" and (args.parallel != "ddp" or parts > 1):
        raise UserError(
            "--parallel fsdp and tensor parallelism are for several processes: "
            "torchrun --nproc-per-node=N train_ddp.py"
        )
    if world % parts:
        raise UserError(
            f"tensor_parallel_size={parts} does not divide {world} processes; start a multiple of "
            f"{parts}, or give another --tensor-parallel-size"
        )
    return world // parts


def resolve_batch(args: Settings, typed: Mapping[str, Any], world: int, known: int) -> Settings:
    """Returns the settings with global_batch_size, batch_size (the micro-batch) and
    grad_accum_steps that fit each other.

    typed: the flags that the user typed. world: the number of data-parallel ranks. known: the
    global batch of the preset or of the run to resume, 0 if there is none. Raises UserError if the
    sizes don't divide each other, or if a resumed run would get another global batch.
    """
    total = _global_batch(args, typed, world, known)
    if args.resume and known and total != known and "global_batch_size" not in args.allow_change:
        raise UserError(
            f"the run to resume has global_batch_size={known}, not {total}; another "
            "one would repeat or leave out data; leave it, and give --batch-size to save memory "
            "(or --allow-change global_batch_size)"
        )
    micro = _micro_batch(args, typed, world, total)
    accum = total // world // micro
    return dataclasses.replace(
        args, global_batch_size=total, batch_size=micro, grad_accum_steps=accum
    )


def _global_batch(args: Settings, typed: Mapping[str, Any], world: int, known: int) -> int:
    """The number of sequences per optimizer step: global_batch_size if that was typed; batch_size x
    grad_accum_steps x ranks if both of these were typed or no size is known; else the known size. A
    new run rounds a preset's size to a multiple of the ranks, whose number the preset did not
    foresee.
    """
    micro, accum = typed.get("batch_size"), typed.get("grad_accum_steps")
    if typed.get("global_batch_size"):
        return args.global_batch_size
    if (micro and accum) or not known:
        return args.batch_size * (args.grad_accum_steps or 1) * world
    return known if args.resume else world * max(1, round(known / world))


def _micro_batch(args: Settings, typed: Mapping[str, Any], world: int, total: int) -> int:
    """The number of sequences per rank and micro-step: the batch_size that was typed, or the rank's
    part of the global batch divided by the grad_accum_steps that were typed, or else the largest
    divisor of that part up to args.batch_size. Raises UserError if the micro-batch does not divide
    it.

    total: the global batch in sequences.
    """
    micro, accum = typed.get("batch_size"), typed.get("grad_accum_steps")
    rows = total // world
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    size = micro or rows // (accum or 1)
    if not (micro or accum):
        size = max((n for n in sizes if n <= args.batch_size), default=0)
    if total == rows * world and size in sizes and (not accum or size * accum == rows):
        return size
    unit = world * (micro or 1) * (accum or 1)
    near = [n for n in (total // unit * unit, (total // unit + 1) * unit) if n]
    close = sorted(sorted(sizes, key=lambda n: (abs(n - (micro or n)), n))[:2])
    tries = []
    if micro and total == rows * world and not accum:
        tries.append(f"--batch-size {_either(close)}")
    tries.append(
        "other --nproc-per-node" if args.resume else f"--global-batch-size {_either(near)}"
    )
    raise UserError(
        f"global_batch_size={total} is not {world} ranks x batch_size {micro or 'N'} x "
        f"grad_accum_steps {accum or 'N'} with whole numbers N; try {', or '.join(tries)}"
    )


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
