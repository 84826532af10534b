"""The device of a run, the precision of its matrix products, its CPU threads and memory."""

from __future__ import annotations

import runtime.threads as threads

import ctypes
import functools
import os
import platform
import resource
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.setting_fields import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of mallopt(3)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """A torch device and the precision of its matrix products. description: both, and why they were
    chosen, for the log.
    """

    torch_device: torch.device
    precision: str  # fp32, bf16 or fp16
    description: str

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context manager for a forward pass: parameters stay float32, matrix products
        run in `precision`.
        """
        return torch.autocast(self.torch_device.type, self.dtype, enabled=self.amp)

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype in which matrix products run."""
        return _DTYPES[self.precision]

    @property
    def amp(self) -> bool:
        """Whether matrix products run in a lower precision than float32 (mixed precision)."""
        return self.precision != "fp32"


def peak_memory(device: Device) -> int:
    """The most bytes of memory that this process has taken so far: of the GPU's, or else of the
    machine's.
    """
    if device.torch_device.type == "cuda":
        return torch.cuda.max_memory_allocated(device.torch_device)
    unit = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def pick_device(name: str = "auto", precision: str = "auto", local_rank: int = 0) -> Device:
    """Returns the device called `name` with its precision. name "auto" is CUDA, else MPS, else the
    CPU; precision "auto" is bf16 or fp16 on CUDA, else fp32. A CUDA device becomes torch's current
    one. Raises UserError for an unknown device and one that this machine does not have.

    local_rank: the index of the GPU that this process takes where `name` has no index.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = next(k for k in found if found[k]) if name == "auto" else name.split(":")[0]
    if kind not in found:
        raise UserError(f"device={name!r:.40} is not one of auto, cpu, cuda, cuda:N, mps")
    if not found[kind]:
        raise UserError(
            f"device={name}, but torch {torch.__version__} finds none here; try --device cpu"
        )
    if kind == "cuda":
        index = int(name[5:]) if name[5:].isdigit() else local_rank
        if torch.cuda.device_count() == 1 and name[5:] == "":
            index = 0  # some launchers show each process its own GPU alone
        if index >= torch.cuda.device_count():
            raise UserError(
                f"GPU {index} wanted, but this machine has {torch.cuda.device_count()}; "
                "start at most that many processes on it"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        label = torch.cuda.get_device_name(device)
    else:
        device = torch.device(kind)
        label = f"{torch.get_num_threads()} threads" if kind == "cpu" else "Apple GPU"
        for variable, value in threads.WAITING_SET_BY_USER.items():
            label += f"; {variable}={value} of the environment decides how they wait"
    chosen = (
        "as asked"
        if name != "auto"
        else "no CUDA or MPS device found"
        if kind == "cpu"
        else "found"
    )
    settled, reason = _resolve_precision(precision, kind)
    return Device(device, settled, f"{device} ({label}; {chosen}), {settled} ({reason})")


def _resolve_precision(precision: str, kind: str) -> tuple[str, str]:
    if precision != "auto":
        return precision, "as asked"
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU computes it natively"
        return "fp16", "the GPU has no bf16 units"
    return "fp32", "the default on this kind of device"


@functools.cache
def has_bf16_units(device: torch.device) -> bool:
    """Whether the hardware of this device computes matrix products in bfloat16, and thus faster
    than in float32. On CPUs, torch before 2.12 doesn't tell, and the answer is no.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    find = getattr(torch.cpu, "get_capabilities", dict)  # since torch 2.12
    found: Mapping[str, Any] = find() if device.type == "cpu" else {}
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


def tune(device: Device, sparing: bool = False, deterministic: bool = False) -> None:
    """Sets the options of torch and the C library for computing on this device.

    sparing: save memory rather than time where the two conflict. deterministic: use only kernels
    that give the same bits each time; torch raises RuntimeError for an operation that has none. All
    CPU kernels are deterministic.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    if device.torch_device.type == "cuda":  # what stays in float32 under autocast may use TF32
        torch.set_float32_matmul_precision("high" if device.amp else "highest")
    elif device.torch_device.type == "cpu":
        _tune_malloc(sparing)


def _tune_malloc(sparing: bool) -> None:
    """Makes the C library reuse freed memory instead of returning it to the system. The system
    fills each new page with zeros, which takes longer than most operations on it: at GPT-2 small's
    size, squared ReLU with its gradient took 91 ms with new pages and 23 ms without. Reused blocks
    leave gaps, though, so with sparing each large block is returned at once. Does nothing without
    glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and sparing:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)  # bytes from which a block is a mapping of its own
    elif mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # no such mappings
        mallopt(_M_TRIM_THRESHOLD, -1)  # nor any return of what is free at the end


def use_threads(threads: int, local_world: int) -> None:
    """Sets the number of CPU threads that torch uses in this process. With threads = 0 it is an
    equal share of the cores that the process may use, or torch's own choice if the process is
    alone. local_world: the number of processes on this machine.
    """
    if threads or local_world > 1:
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores // local_world))


def seed_dropout(device: Device, seed: int) -> None:
    """Seeds the random numbers of dropout on this device. Takes 2 us where torch.manual_seed, which
    seeds every device, takes 200.
    """
    generator_of(device.torch_device).manual_seed(seed)


def generator_of(device: torch.device) -> torch.Generator:
    """The random generator of a device, from which dropout draws."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return (
        torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator
    )


def environment(device: Device, world: int) -> dict[str, Any]:
    """A record of where a run runs: versions, hardware and the number of processes (world). It
    holds no environment variables, which may be secrets, but for those in `device.description` that
    set how OpenMP's threads wait.
    """
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device.description,
        "processes": world,
    }


def free_memory() -> float:
    """The number of bytes of main memory, without swap, that this process can still allocate,
    within the limit of its container (cgroup v2); infinity where the system doesn't say.
    """
    free = float("inf")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
        group = Path("/sys/fs/cgroup")  # the limit of a container
        limit, used = (group / name for name in ("memory.max", "memory.current"))
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    except (OSError, ValueError, StopIteration):  # no such file, or "max"
        pass
    return free


def free_memory_of(device: Device) -> float:
    """The bytes that this process can still allocate on a device, with what torch's allocator holds
    in reserve; infinity where the system does not say.
    """
    if device.torch_device.type != "cuda":
        return free_memory()
    on = device.torch_device
    reserve = torch.cuda.memory_reserved(on) - torch.cuda.memory_allocated(on)
    return float(torch.cuda.mem_get_info(on)[0] + reserve)
