"""What needs a GPU: skipped where there is none."""

import threading

import pytest
import torch
from test_distributed import TINY

from ranks import queue_of
from report import first_difference, read_records

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ON_GPU = TINY.replace("--device cpu", "--device cuda") + " --num-steps 20 --batch-size 4"


def losses(program, script):
    records = read_records(program.folder / f"logs/{script}.jsonl")
    return [r["train_loss"] for r in records if r["event"] == "train"]


@pytest.mark.parametrize(
    "flags, close",
    [
        ("--no-amp --compile off", 1e-4),
        ("--bf16 --compile off", 2e-2),
        ("--precision fp16 --compile off", 1e-2),
        ("--bf16 --compile on", 2e-2),
        ("--bf16 --arch modern --optimizer muon --ngram-rows 300", 3e-2),
    ],
)
def test_a_gpu_trains_as_the_cpu_does(program, flags, close):
    cpu = flags.replace("--bf16", "").replace("--precision fp16", "").replace("--compile on", "")
    program("train_minimal.py", *f"{TINY} --num-steps 20 --batch-size 4 {cpu}".split())
    wanted = losses(program, "train_minimal")
    program("train_minimal.py", *f"{ON_GPU} {flags}".split())
    assert losses(program, "train_minimal") == pytest.approx(wanted, rel=close)


@pytest.mark.parametrize("flags", ["", "--parallel fsdp", "--parallel fsdp --bf16"])
def test_nccl_with_one_process(program, flags):
    program("train_minimal.py", *f"{ON_GPU} {flags.replace('--parallel fsdp', '')}".split())
    program("train_ddp.py", *f"{ON_GPU} {flags}".split(), ranks=1)
    assert losses(program, "train_ddp") == pytest.approx(losses(program, "train_minimal"), rel=1e-3)


def test_a_deterministic_run_is_its_repetition(program):
    flags = f"{ON_GPU} --deterministic --dropout 0.1".split()
    program("train_minimal.py", *flags)
    first = program.folder / "first.jsonl"
    (program.folder / "logs/train_minimal.jsonl").rename(first)
    program("train_minimal.py", *flags)
    assert first_difference(first, program.folder / "logs/train_minimal.jsonl") == ""


def test_the_guard_sees_from_its_thread_that_the_gpu_has_work():
    # What tells a rank that waits in .item() for a collective from one that is stuck.
    busy = queue_of(torch.device("cuda"))
    torch.cuda.synchronize()
    seen = []
    look = threading.Thread(target=lambda: seen.append(busy()))
    torch.cuda._sleep(2 * 10**9)  # cycles: about a second
    look.start(), look.join()
    torch.cuda.synchronize()
    assert seen == [True] and not busy()
