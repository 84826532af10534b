"""How much a model computes, and how much a device can: together the MFU of a run."""

from __future__ import annotations

import time

import torch

from config import GPTConfig
from runtime.device import Device

# Dense FLOP/s in bfloat16 (of a V100 in float16), as their maker's data sheets say. The first name
# that is part of the device's decides.
_SHEETS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "V100": 125e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}  # fmt: skip
_PRODUCTS = 12  # timed to measure a CPU: 0.25 s at 100 GFLOP/s


def flops_per_token(config: GPTConfig, seq_len: int) -> float:
    """FLOPs of one training step per token, forward and backward, counted as in Chowdhery et al.
    2022, appendix B: 6 for each number of a matrix (the embedding counts as head only), and 12 L C
    T for attention, as if it were not causal.
    """
    attention = 12.0 * config.n_layers * config.d_model * seq_len
    return 6.0 * numbers_in_matrices(config) + attention


def numbers_in_matrices(config: GPTConfig) -> int:
    """The number of elements of the matrices that each token is multiplied with: those of the
    blocks and the head.
    """
    c, ff = config.d_model, config.d_ff
    return config.n_layers * (4 * c * c + 2 * c * ff) + config.vocab_size * c


def peak_flops(device: Device) -> float | None:
    """The most FLOP/s that a device can compute in its precision: of a known GPU in 16 bits by its
    data sheet, of a CPU the fastest product of two 1024 x 1024 matrices with this process's threads
    (measured now); None of other devices.
    """
    if device.torch_device.type == "cuda" and device.amp:
        return sheet_flops(torch.cuda.get_device_name(device.torch_device))
    return _measured(device.dtype) if device.torch_device.type == "cpu" else None


def sheet_flops(name: str) -> float | None:
    """The dense FLOP/s in 16 bits of the GPU with this name; None if it is not known."""
    return next((flops for known, flops in _SHEETS.items() if known in name), None)


def _measured(dtype: torch.dtype) -> float:
    a = torch.ones(1024, 1024, dtype=dtype)
    out, seconds = torch.mm(a, a), []
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        seconds.append(time.perf_counter() - start)
    return 2.0 * 1024**3 / min(seconds)
