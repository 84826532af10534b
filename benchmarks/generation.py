"""Speed of generation, with and without the key/value cache and beside Hugging Face's."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import BenchSettings, Side, side_by_side
from benchmarks.speed import SMALL, gpt2_small, hugging_face_model
from model import GPTModel
from runtime.device import pick_device, tune
from settings.command_line import parse_settings
from training.sampling import Sampling, generate, lay_out_for_generation


def build_generation(args: BenchSettings, side: str) -> Callable[[], float]:
    """New tokens per second of greedy continuations of a batch of prompts: ours with or without the
    key/value cache, or Hugging Face's `generate` with a model of the same shape.
    """
    flags = gpt2_small(1, *(SMALL if args.small else []), *args.trainer)
    settings = parse_settings("train_minimal", flags)
    device = pick_device(args.device, settings.precision)
    prompts, new = [[1, 2, 3, 4]] * args.batch_size, args.new_tokens
    if side == "hugging face":
        theirs = hugging_face_model(settings.model).to(device.torch_device).eval()
        ids = torch.tensor(prompts, device=device.torch_device)

        def work() -> None:
            options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
            with torch.no_grad(), device.autocast():
                theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)

    else:
        tune(device)
        ours = GPTModel(settings.model, seed=0).to(device.torch_device)
        if side == "cached":
            lay_out_for_generation(ours, device)  # as generate.py does
        greedy, seeds, cached = Sampling(temperature=0), range(args.batch_size), side == "cached"

        def work() -> None:
            generate(ours, prompts, new, device, greedy, seeds, use_cache=cached)

    def run() -> float:
        start = time.perf_counter()
        work()
        return new * args.batch_size / (time.perf_counter() - start)

    return run


def bench_generate(args: BenchSettings) -> list[dict[str, Any]]:
    """GPT-2 small continues batch_size prompts of four tokens. On a GPU a first time is not
    counted: kernels are loaded then, and cuDNN's attention is prepared for each length.
    """
    names = ["cached", "uncached", "hugging face"]
    if importlib.util.find_spec("transformers") is None:
        names.remove("hugging face")
    sides = {name: Side(build_generation, args, name) for name in names}
    on_gpu = pick_device(args.device, "auto").torch_device.type != "cpu"
    runs = side_by_side(sides, args.repeats, warm_up=int(on_gpu))
    found = {name: statistics.median(rates) for name, rates in runs.items()}
    return [
        {"side": name, "tokens_per_s": rate, "of_uncached": rate / found["uncached"]}
        for name, rate in found.items()
    ]
