"""What needs a GPU: skipped where there is none."""

import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, tiny
from helpers import TINY

import loss
from model import GPTModel
from parallel.process_group import queue_of
from reporting.metrics_file import first_difference, read_records
from runtime.device import Device
from training.sampling import Sampling, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ON_GPU = TINY.replace("--device cpu", "--device cuda") + " --num-steps 20 --global-batch-size 4"


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
    program("train_minimal.py", *f"{TINY} --num-steps 20 --global-batch-size 4 {cpu}".split())
    wanted = losses(program, "train_minimal")
    program("train_minimal.py", *f"{ON_GPU} {flags}".split())
    assert losses(program, "train_minimal") == pytest.approx(wanted, rel=close)


@pytest.mark.parametrize("flags", ["", "--parallel fsdp", "--parallel fsdp --bf16"])
def test_nccl_with_one_process(program, flags):
    program("train_minimal.py", *f"{ON_GPU} {flags.replace('--parallel fsdp', '')}".split())
    program("train_ddp.py", *f"{ON_GPU} {flags}".split(), ranks=1)
    assert losses(program, "train_ddp") == pytest.approx(losses(program, "train_minimal"), rel=1e-3)


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]
)
def test_the_loss_in_chunks_is_the_plain_one(monkeypatch, dtype, bound, fused):
    monkeypatch.setattr(loss, "_GPU_LOGITS", 128 * 1001)  # 8 chunks, of 1001 columns and 23 unused
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 256, 64, generator=draw).cuda().requires_grad_()
    weight = torch.randn(1001, 64, generator=draw).cuda().requires_grad_()
    labels = torch.randint(1001, (4, 256), generator=draw).cuda()
    labels[0, 5:12] = -100
    logits = F.linear(hidden.double(), weight.double())[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found, count = loss.next_token_loss(hidden, weight, labels, fused=fused)
    assert count == 4 * 255 - 7 and found.item() == pytest.approx(wanted.item(), rel=bound)
    for mine, theirs in zip(
        torch.autograd.grad(found, (hidden, weight)),
        torch.autograd.grad(wanted, (hidden, weight)),
        strict=True,
    ):
        assert (mine - theirs).norm() < bound * theirs.norm()


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


@pytest.mark.parametrize("arch, rows", [("gpt2", 0), ("modern", 0), ("modern", 500)])
def test_a_gpu_generates_what_the_cpu_does(arch, rows):
    model = GPTModel(tiny(arch, ngram_rows=rows), seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.3, generator=draw)
    prompts, greedy = [[1, 2, 3], [4] * 9], Sampling(temperature=0)  # beyond the 16 positions too
    wanted = generate(model, prompts, 20, CPU, greedy, [0, 0])
    on = Device(torch.device("cuda", 0), "fp32", "test")
    model = model.cuda()
    assert generate(model, prompts, 20, on, greedy, [0, 0]) == wanted
    assert generate(model, prompts, 20, on, greedy, [0, 0], use_cache=False) == wanted
