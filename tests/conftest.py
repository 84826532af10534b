"""What the tests share: small settings, small models, a way to run a script as a user would."""

from __future__ import annotations

import dataclasses
import gc
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

from config import GPTConfig, Settings  # noqa: E402
from runtime.device import Device  # noqa: E402
from settings.command_line import parse_settings  # noqa: E402
from training.activation_recompute import storage_of  # noqa: E402

torch.set_num_threads(1)  # tiny models: threads only wait for each other
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell script
    signal.signal(signal.SIGINT, signal.default_int_handler)

CPU = Device(torch.device("cpu"), "fp32", "test")


def record_kept(monkeypatch: pytest.MonkeyPatch, found: dict[int, torch.Tensor]) -> Any:
    """The context in which all tensors kept for a backward pass are recorded in `found`, by
    storage. Torch calls only the innermost hooks, so those of the model are wrapped too.
    """
    original = torch.autograd.graph.saved_tensors_hooks

    def keep(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            found[storage_of(x)] = x
        return x

    def both(pack: Any, unpack: Any) -> Any:
        return original(lambda x: keep(pack(x)), unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", both)
    return both(lambda x: x, lambda x: x)


def tiny(arch: str = "gpt2", **changes: Any) -> GPTConfig:
    """A model that computes in milliseconds."""
    shape = {
        "vocab_size": 97,
        "max_position_embeddings": 16,
        "n_layers": 2,
        "n_heads": 2,
        "d_model": 16,
    }
    return GPTConfig(**{"arch": arch, **shape, **changes})


def toy_settings(*flags: str, world: int = 1, **changes: Any) -> Settings:
    """Settings on random tokens, parsed from flags as a script does."""
    base = [
        "--use-toy-data",
        "--arch",
        "gpt2",
        "--vocab-size",
        "97",
        "--seq-len",
        "16",
        "--n-layers",
        "2",
        "--n-heads",
        "2",
    ]
    base += "--optimizer adamw --lr 3e-3 --lr-scheduler cosine --min-lr -1 --warmup-steps 2".split()
    base += ["--d-model", "16", "--global-batch-size", "4", "--num-steps", "20", "--device", "cpu"]
    return dataclasses.replace(
        parse_settings("train_minimal", base + list(flags), world), **changes
    )


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield
    dist.destroy_process_group()


@pytest.fixture
def shared_text() -> Path:
    path = SHARED / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture
def gpt2_files(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = SHARED / "tiktoken_cache"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder


class Program:
    """Runs the project's scripts in a folder of their own, with no home cache and one thread a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        self.env.pop("CUDA_VISIBLE_DEVICES", None)

    def __call__(
        self, script: str, *flags: str, ranks: int = 0, ok: bool = True, **env: str
    ) -> str:
        """What the script printed (both streams). ranks: start so many with torchrun. ok: it must succeed."""
        start = [sys.executable]
        if ranks:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*start, str(ROOT / script), *flags],
            cwd=self.folder,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
        )
        if ok:
            assert done.returncode == 0, done.stdout
        else:
            assert done.returncode != 0, done.stdout
        return done.stdout


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


@pytest.fixture
def script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs a script in this process: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(name: str, *flags: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        code: Any = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            code = end.code
        gc.collect()  # its locks end with it
        return (code, *capsys.readouterr())

    return run
