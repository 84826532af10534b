import json
import math
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import CPU
from helpers import TINY, Run
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from checkpointing.commands import differences
from model import GPTModel
from parallel.context import ParallelContext
from parallel.parallel_model import ParallelModel, replicate
from parallel.process_group import Ranks
from reporting.metrics_file import first_difference, read_records
from training.optimizers import make_optimizer
from training.sampling import generate
from training.step import train_step

TINY += " --eval-steps 10 --log-steps 1 --val-max-tokens 2000 --lr 0.01"


def count_syncs(ddp):
    calls = []

    def hook(_, bucket):
        calls.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    ddp.register_comm_hook(None, hook)
    return calls


class Wrapped(ParallelContext):
    """A context of which only no_sync is not that of one process."""

    def __init__(self, ddp):
        self.no_sync = ddp.no_sync


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_are_synchronised_once_per_optimizer_step(group, accumulation):
    run = Run("--global-batch-size", "12", "--grad-accum-steps", str(accumulation))
    ddp = replicate(run.model, dist.group.WORLD, run.args, CPU)
    calls = count_syncs(ddp)
    for step in range(4):
        batch = run.train.global_batch(step, run.args)
        train_step(ddp, run.optimizer, batch, run.args, run.state, CPU, Wrapped(ddp))
    assert (
        calls == [0] * 4
    )  # one bucket, once a step; on every micro-step it would be 4 x accumulation


MUON = "--arch modern --optimizer muon --ngram-rows 300 --ngram-optimizer rmsprop"
MUON += " --ngram-weight-decay 0.5"


@pytest.mark.long
def test_two_ranks_match_one_process_with_twice_the_accumulation(program):
    # Without dropout, and for the other layouts, see test_layouts.py.
    common = f"{TINY} --arch gpt2 --dropout 0.2 --num-steps 30 --batch-size 4".split()
    program("train_minimal.py", *common, "--grad-accum-steps", "2")
    program("train_ddp.py", *common, "--grad-accum-steps", "1", ranks=2)
    one, two = (
        read_records(program.folder / f"logs/{s}.jsonl") for s in ("train_minimal", "train_ddp")
    )
    assert len(one) == len(two) == 1 + 30 + 4
    for a, b in zip(one[1:], two[1:], strict=True):
        for name in ("train_loss", "grad_norm", "lr", "val_loss", "val_loss_se"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4), (a, b)
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        assert a.get("val_tokens", 1999) == b.get("val_tokens", 1999) == 1999


@pytest.mark.parametrize("short", [False, True], ids=["room", "no room"])
def test_sampling_under_fsdp_gathers_the_weights_once(group, monkeypatch, short):
    run = Run("--arch", "modern", parallel="fsdp")
    parallel = ParallelModel(run.model, run.args, CPU, Ranks(0, 1))
    optimizer = make_optimizer(run.model, run.args, parallel)
    if short:
        monkeypatch.setattr("parallel.parallel_model.free_memory_of", lambda device: 0.0)
    gathered, plain = [], FSDPParamGroup._to_unsharded
    monkeypatch.setattr(
        FSDPParamGroup, "_to_unsharded", lambda self: gathered.append(self) or plain(self)
    )

    def gathers(new):
        gathered.clear()
        with parallel.gathered():
            written.append(generate(run.model, [[1, 2]], new, CPU, seeds=[5])[0])
        assert all(isinstance(p, DTensor) for p in run.model.parameters())  # sharded again
        return len(gathered)

    written = []
    groups = 1 + run.args.model.n_layers
    assert gathers(3) == (1 + 3 * (groups - 1) if short else groups)
    assert gathers(10) == (1 + 10 * (groups - 1) if short else groups)
    whole = GPTModel(run.args.model, seed=run.args.seed)
    assert written[1] == generate(whole, [[1, 2]], 10, CPU, seeds=[5])[0]
    gathered.clear()
    batch = run.train.global_batch(0, run.args)
    train_step(run.model, optimizer, batch, run.args, run.state, CPU, parallel)
    assert len(gathered) == groups + (groups - 1)  # blocks once more for the backward pass


@pytest.mark.long
def test_evaluation_is_the_trainers_on_any_number_of_processes_and_any_batch_size(program):
    program(
        "train_minimal.py", *f"{TINY} --num-steps 12 --warmup-steps 2 --global-batch-size 8".split()
    )
    last = read_records(program.folder / "logs/train_minimal.jsonl")[-1]
    for ranks, batch in ((0, 1), (0, 64), (2, 7), (3, 7)):
        program(
            "eval.py",
            "--checkpoint-path",
            "checkpoints/minigpt_single.pt",
            "--batch-size",
            str(batch),
            ranks=ranks,
        )
    lines = (program.folder / "logs/eval.jsonl").read_text().splitlines()
    assert len(lines) == 4  # rank 0 alone writes
    for found in map(json.loads, lines):
        assert found["tokens"] == last["val_tokens"] == 1999
        assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
        assert found["ppl"] == pytest.approx(math.exp(last["val_loss"]), rel=1e-5)


@pytest.mark.long
def test_a_checkpoint_of_two_ranks_continues_on_one_and_back(program):
    common = f"{TINY} --checkpoint-path c.pt --save-steps 4".split()
    program(
        "train_ddp.py",
        *common,
        "--num-steps",
        "8",
        "--global-batch-size",
        "4",
        "--seed",
        "5",
        ranks=2,
    )
    program("train_minimal.py", "--resume", "--checkpoint-path", "c.pt", "--num-steps", "12")
    out = program(
        "train_ddp.py", "--resume", "--checkpoint-path", "c.pt", "--num-steps", "16", ranks=4
    )
    assert "resumed c.pt at step 12" in out and "16 steps of 4 x 16 tokens" in out
    shutil.copy(program.folder / "c.pt", program.folder / "d.pt")
    out = program(
        "train_ddp.py", "--resume", "--checkpoint-path", "d.pt", "--num-steps", "18", ranks=2
    )
    assert "a branch of run" in out and "step 18 / 18" in out
    refused = program(
        "train_ddp.py",
        "--resume",
        "--checkpoint-path",
        "c.pt",
        "--num-steps",
        "20",
        ranks=3,
        ok=False,
    )
    assert "global_batch_size=4 is not 3 ranks" in refused


@pytest.mark.long
@pytest.mark.parametrize("more", ["--optimizer adamw", MUON])
def test_three_ranks_that_resume_are_those_that_did_not_stop(program, more):
    # The order in which three ranks add is where DDP's rebuilt buckets would show.
    flags = (
        f"{TINY} {more} --dropout 0.1 --global-batch-size 12 --batch-size 2 --num-steps 24".split()
    )
    program("train_ddp.py", *flags, "--keep-every", "6", ranks=3)
    folder = program.folder
    (folder / "checkpoints/minigpt_ddp.pt").rename(folder / "straight.pt")
    shutil.copy(folder / "logs/train_ddp.jsonl", folder / "straight.jsonl")
    (folder / "checkpoints/minigpt_ddp.step000006.pt").rename(folder / "checkpoints/minigpt_ddp.pt")
    out = program("train_ddp.py", "--resume", ranks=3)
    assert "resumed checkpoints/minigpt_ddp.pt at step 6" in out
    assert first_difference(folder / "straight.jsonl", folder / "logs/train_ddp.jsonl") == ""
    assert differences(folder / "straight.pt", folder / "checkpoints/minigpt_ddp.pt")[1] == []


def test_one_process_has_the_whole_model(group):
    run = Run()
    parallel = ParallelModel(run.model, run.args, CPU, Ranks())
    stack, p = torch.randn(5, 3, 4), run.model.wte.weight
    assert parallel.net is run.model and parallel.sharded_state is None
    assert torch.equal(parallel.distribute(lambda x: 2 * x, "wte.weight", stack), 2 * stack)
    assert parallel.gather("wte.weight", p) is p and parallel.part("wte.weight", p).equal(p)


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    ["--use-tensor-parallel --dropout 0.1", f"--parallel fsdp {MUON} --bf16"],
    ids=["tp", "fsdp, muon, bf16"],
)
def test_a_run_in_parts_stops_continues_and_goes_on_alone(program, flags):
    common = f"{TINY} {flags} --global-batch-size 4 --batch-size 2 --num-steps 12".split()
    program("train_ddp.py", *common, "--keep-every", "6", ranks=2)
    folder = program.folder
    (folder / "checkpoints/minigpt_ddp.pt").rename(folder / "straight.pt")
    shutil.copy(folder / "logs/train_ddp.jsonl", folder / "straight.jsonl")
    (folder / "checkpoints/minigpt_ddp.step000006.pt").rename(folder / "checkpoints/minigpt_ddp.pt")
    out = program("train_ddp.py", "--resume", "--sample-prompt", "", ranks=2)
    assert "resumed checkpoints/minigpt_ddp.pt at step 6" in out and "Warning" not in out
    assert first_difference(folder / "straight.jsonl", folder / "logs/train_ddp.jsonl") == ""
    assert differences(folder / "straight.pt", folder / "checkpoints/minigpt_ddp.pt")[1] == []
    program("train_minimal.py", "--resume", "--num-steps", "14", "--checkpoint-path", "straight.pt")
    program("eval.py", "--checkpoint-path", "straight.pt", "checkpoints/minigpt_ddp.pt")
    found = [json.loads(x) for x in (folder / "logs/eval.jsonl").read_text().splitlines()]
    val = [r for r in read_records(folder / "straight.jsonl") if r["event"] == "eval"][-1]
    assert found[1]["loss"] == pytest.approx(val["val_loss"], rel=1e-3 if "bf16" in flags else 1e-6)


@pytest.mark.long
def test_samples_are_those_of_one_process_in_every_layout(program):
    (program.folder / "text.txt").write_text("to be or not to be, that is the question. " * 400)
    flags = "--train-data text.txt --seq-len 32 --n-layers 1 --n-heads 2 --d-model 32 --device cpu"
    flags += " --global-batch-size 8 --num-steps 20 --sample-tokens 30 --ngram-rows 500"
    said = {}
    for layout, ranks in (("", 1), ("--parallel fsdp", 2), ("--use-tensor-parallel", 2)):
        out = program(
            "train_ddp.py", *flags.split(), *layout.split(), "--sample-prompt", "to be", ranks=ranks
        )
        said[layout] = [x.split("] ", 1)[1] for x in out.splitlines() if "] sample: to be" in x]
    assert len(said[""]) == 1 and all(lines == said[""] for lines in said.values())
