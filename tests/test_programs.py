"""The scripts as a user runs them."""

import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import TINY

from checkpointing.commands import differences
from reporting.metrics_file import comparable, read_records

SMALL = "--n-layers 1 --n-heads 2 --d-model 16 --seq-len 16 --global-batch-size 4 --num-steps 6 --eval-steps 3 --device cpu"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "my text.txt"
    path.write_text("".join(f"line {i} of a text that is short\n" for i in range(300)))
    return str(path)


def train(script, *flags, code=0):
    done, out, err = script("train_minimal.py", *SMALL.split(), *flags)
    assert done == code, err
    return out


def test_no_argument_run_and_the_commands_that_it_prints(program):
    # As `python train_minimal.py`, only shorter; then what it tells the user to type, typed.
    out = program(
        "train_minimal.py", "--num-steps", "20", "--val-max-tokens", "5000", "--sample-tokens", "20"
    )
    lines = out.splitlines()
    assert "device: cpu" in lines[0] and "fp32 (" in lines[0]
    assert "source of the Python standard library" in lines[1] and "tokens to train on" in lines[1]
    assert "parameters" in lines[2]
    assert any("sample: " in line for line in lines) and any(
        "saved checkpoints/" in line for line in lines
    )
    assert (program.folder / "logs/train_minimal.png").stat().st_size > 10_000
    first, *_, last = (
        r for r in read_records(program.folder / "logs/train_minimal.jsonl") if "val_bpb" in r
    )
    assert first["val_bpb"] == pytest.approx(math.log2(257), abs=0.1) and last["val_bpb"] < 6.5
    commands = [shlex.split(line.split(": ", 2)[-1].strip()) for line in lines[-3:]]
    scripts = ("eval.py", "train_minimal.py", "generate.py")
    assert [c[1] for c in commands] == [str(ROOT / s) for s in scripts]  # from another folder
    results = [program(*c[1:]) for c in commands]
    assert f"avg_loss: {last['val_loss']:.6f}" in results[0] and "tokens: 4999" in results[0]
    assert (
        "resumed checkpoints/minigpt_single.pt at step 20" in results[1]
        and "step 40 / 40" in results[1]
    )
    assert results[2].startswith(commands[2][-1]) and commands[2][-2] == "--prompt"


def test_toy_data_stays_at_ln_of_the_vocabulary(script):
    code, _, err = script(
        "train_minimal.py", "--use-toy-data", "--preset", "toy", "--device", "cpu"
    )
    assert code == 0, err
    for record in read_records_of():
        for name in ("train_loss", "val_loss"):
            if name in record:
                assert abs(record[name] - math.log(10_000)) < 0.1


def read_records_of(name="train_minimal"):
    from pathlib import Path

    return read_records(Path("logs") / f"{name}.jsonl")


def test_resumed_run_writes_the_metrics_of_the_uninterrupted_one(script, text):
    common = [
        "--train-data",
        text,
        "--dropout",
        "0.2",
        "--log-steps",
        "1",
        "--checkpoint-path",
        "c.pt",
    ]

    def metrics():
        return comparable(Path("logs/c.jsonl"))

    train(script, *common, "--save-steps", "3", "--keep-every", "3")
    straight, weights = metrics(), torch.load("c.pt")["model"]
    import shutil

    shutil.copy("c.step000003.pt", "c.pt")  # as if the run had died in step 4, 5 or 6
    code, _, err = script("train_minimal.py", "--resume", "--checkpoint-path", "c.pt")
    assert code == 0, err
    assert metrics() == straight
    again = torch.load("c.pt")["model"]
    assert all(torch.equal(weights[k], again[k]) for k in weights)


def test_text_files_with_their_own_validation_file(script, text, tmp_path):
    (tmp_path / "val.txt").write_text("other words to score\n" * 9)
    out = train(
        script,
        "--train-data",
        text,
        "--val-data",
        "val.txt",
        "--arch",
        "gpt2",
        "--lr-scheduler",
        "wsd",
    )
    assert "189 held out" in out.replace("190 held out", "189 held out")
    code, out, err = script("eval.py", "--checkpoint-path", "checkpoints/minigpt_single.pt")
    assert code == 0 and "tokens: 189" in out, err  # 9 x 21 bytes and the end token, less the first
    code, out, err = script(
        "eval.py", "--checkpoint-path", "checkpoints/minigpt_single.pt", "--val-data", text
    )
    assert code == 0 and f"tokens: {len(open(text).read())}" in out, err


@pytest.mark.parametrize("own_validation", [False, True])
def test_token_shards_train_evaluate_and_sample(script, own_validation):
    draw = np.random.default_rng(0)
    for name in ("a", "b", "v"):
        np.save(f"{name}.npy", draw.integers(0, 50257, 2000).astype(np.uint16))
    flags = ["--data-mode", "fineweb_npy", "--train-npy", "a.npy", "b.npy"]
    out = train(script, *flags, *(["--val-npy", "v.npy"] if own_validation else []))
    assert "vocabulary 50,257" in out and "tokenizer: none" in out and "val bpb: n/a" in out
    assert "these token ids name no tokenizer; if they are GPT-2's, " in out
    code, out, err = script("eval.py", "--checkpoint-path", "checkpoints/minigpt_single.pt")
    assert (
        code == 0 and f"tokens: {1999 if own_validation else 399}" in out and "bpb: n/a" in out
    ), err
    code, _, err = script("generate.py")
    assert code == 2 and "--tokenizer-name" in err


def test_gpt2_tokenizer_trains_with_bits_per_byte(script, text, gpt2_files):
    out = train(script, "--train-data", text, "--tokenizer-name", "gpt2", "--sample-prompt", "line")
    assert "vocabulary 50,257" in out and "sample: line" in out
    last = [r for r in read_records_of() if r["event"] == "eval"][-1]
    content = open(text).read()
    import tiktoken

    ids = tiktoken.get_encoding("gpt2").encode_ordinary(content)
    held_out = round(0.1 * (len(ids) + 1))  # the end token of the file is one of them
    n_bytes = len(tiktoken.get_encoding("gpt2").decode_bytes(ids[len(ids) + 1 - held_out :][1:]))
    nats = last["val_loss"] * last["val_tokens"]
    assert last["val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes)


@pytest.mark.parametrize("flags", ["--no-amp", "--bf16", "--precision fp16", "--compile off"])
@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_every_precision_trains(script, text, flags, arch):
    out = train(
        script, "--train-data", text, "--arch", arch, "--use-activation-checkpoint", *flags.split()
    )
    assert f"amp: {flags in ('--bf16', '--precision fp16')}" in out


def test_profiler_writes_a_trace(script, text):
    train(script, "--train-data", text, "--use-profiler", "--num-steps", "10")
    assert re.search(r'"traceEvents"', open("logs/train_minimal_trace.json").read())


def test_too_few_steps_for_a_profile_is_said(script, text):
    out = train(script, "--train-data", text, "--use-profiler", "--num-steps", "3")
    assert "no profile: it takes 8 steps" in out


def test_train_ddp_works_without_torchrun(program):
    out = program("train_ddp.py", *SMALL.split(), "--use-toy-data", "--vocab-size", "97")
    assert "step 6 / 6" in out and re.search(
        r"continue: .*(torchrun|torch.distributed.run) --nproc-per-node=1 .*train_ddp.py", out
    )


def test_a_closed_terminal_does_not_stop_the_run(program):
    import subprocess

    flags = f"{SMALL} --use-toy-data --vocab-size 97 --num-steps 40 --log-steps 1 --eval-steps 20 --val-max-tokens 999".split()
    command = shlex.join([sys.executable, str(ROOT / "train_minimal.py"), *flags])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], cwd=program.folder, env=program.env,
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    records = read_records(program.folder / "logs/train_minimal.jsonl")
    assert records[-1]["step"] == 40 and (program.folder / "checkpoints/minigpt_single.pt").exists()


def test_prompts_are_taken_as_typed(script, text):
    train(script, "--train-data", text)
    code, out, err = script("generate.py", "--prompt", "\udcff x", "--max-new-tokens", "3")
    assert code == 0 and "x" in out, err
    code, out, err = script("generate.py", "--temperature", "1e-45", "--max-new-tokens", "3")
    assert code == 0, err


def test_a_tokenizer_that_the_model_cannot_hold_is_refused(script, text):
    np.save("a.npy", np.random.default_rng(0).integers(0, 50, 3000).astype(np.uint16))
    train(script, "--train-npy", "a.npy", "--vocab-size", "50")
    for name, flags in (
        ("generate.py", ["--tokenizer-name", "bytes"]),
        (
            "eval.py",
            [
                "--checkpoint-path",
                "checkpoints/minigpt_single.pt",
                "--val-data",
                text,
                "--tokenizer-name",
                "bytes",
            ],
        ),
        (
            "train_minimal.py",
            [
                *SMALL.split(),
                "--train-npy",
                "a.npy",
                "--vocab-size",
                "50",
                "--tokenizer-name",
                "bytes",
            ],
        ),
    ):
        code, _, err = script(name, *flags)
        assert code == 2 and "257 ids" in err and err.count("\n") == 1, err


def test_samples_appear_at_each_evaluation_only_when_asked(script, text):
    assert (
        train(script, "--train-data", text).count("sample: ") == 1 + 1
    )  # at the end, and the closing command
    out = train(script, "--train-data", text, "--sample-prompt", "Every effort moves you")
    assert out.count("sample: Every effort moves you") == 2


def test_wandb_offline_run_holds_the_metrics(script, text, tmp_path):
    pytest.importorskip("wandb").teardown()  # it remembers the folder of its first run
    train(script, "--train-data", text, "--use-wandb", "--wandb-mode", "offline")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    names = "train/loss val/loss val/ppl val/bpb grad_norm lr tokens_per_sec_per_rank global_tokens_per_sec"
    assert all(
        name.encode() in content for name in [*names.split(), "amp", "bf16", "step", "tokens"]
    )


MISTAKES = {
    "token id beyond the vocabulary": ["--train-npy", "ids.npy", "--vocab-size", "50"],
    "negative token id": ["--train-npy", "negative.npy"],
    "empty shard": ["--train-npy", "zero.npy"],
    "zero-length file as shard": ["--train-npy", "zero.txt"],
    "truncated shard": ["--train-npy", "cut.npy"],
    "grown shard": ["--train-npy", "grown.npy"],
    "two-dimensional shard": ["--train-npy", "2d.npy"],
    "float shard": ["--train-npy", "float.npy"],
    "pickled objects": ["--train-npy", "object.npy"],
    "gzip as shard": ["--train-npy", "gzip.bin"],
    "HTML as shard": ["--train-npy", "html.npy"],
    "wrong version": ["--train-npy", "version.bin"],
    "shard that is not there": ["--train-npy", "none.npy"],
    "empty text": ["--train-data", "zero.txt"],
    "text not UTF-8": ["--train-data", "latin.txt"],
    "text with NUL": ["--train-data", "nul.txt"],
    "text that is not there": ["--train-data", "none.txt"],
    "folder as text": ["--train-data", "."],
    "fewer tokens than one window": ["--train-data", "short.txt"],
    "validation too short": ["--train-data", "text.txt", "--val-ratio", "0.0001"],
    "no window left for training": ["--train-data", "text.txt", "--val-ratio", "0.999"],
    "training data as validation": ["--train-data", "text.txt", "--val-data", "text.txt"],
    "unknown tokenizer": ["--train-data", "text.txt", "--tokenizer-name", "gpt5"],
    "vocabulary below the tokenizer's": ["--train-data", "text.txt", "--vocab-size", "100"],
    "negative size": ["--d-model", "-4"],
    "heads that do not divide": ["--n-heads", "3"],
    "sequence beyond the positions": ["--seq-len", "64", "--max-position-embeddings", "32"],
    "zero steps": ["--num-steps", "0"],
    "batch that cannot be split": ["--global-batch-size", "7", "--batch-size", "4"],
    "unknown preset": ["--preset", "gpt2-smal"],
    "one token to validate on": ["--train-data", "text.txt", "--val-max-tokens", "1"],
    "folder as checkpoint": ["--train-data", "text.txt", "--checkpoint-path", "taken"],
    "unknown flag": ["--learning-rate", "1"],
    "not a number": ["--lr", "high"],
    "NaN": ["--lr", "nan"],
    "contradiction": ["--no-amp", "--bf16"],
    "device that is not there": ["--device", "cuda:9"],
    "resume without checkpoint": ["--resume"],
    "resume from a text": ["--resume", "--checkpoint-path", "text.txt"],
    "resume with other data": [
        "--resume",
        "--checkpoint-path",
        "good.pt",
        "--train-data",
        "other.txt",
    ],
    "resume with another model": ["--resume", "--checkpoint-path", "good.pt", "--d-model", "32"],
    "resume with another vocabulary": [
        "--resume",
        "--checkpoint-path",
        "good.pt",
        "--vocab-size",
        "300",
    ],
    "resume with another architecture": [
        "--resume",
        "--checkpoint-path",
        "good.pt",
        "--arch",
        "gpt2",
    ],
    "log folder is a file": ["--train-data", "text.txt", "--log-dir", "text.txt"],
    "checkpoint folder is a file": [
        "--train-data",
        "text.txt",
        "--checkpoint-path",
        "text.txt/c.pt",
    ],
    "cache folder is a file": ["--train-data", "text.txt", "--cache-dir", "text.txt"],
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    text = b"some words to train on\n" * 100
    files = {
        "zero.txt": b"", "latin.txt": "Grüße\n".encode("latin-1") * 99, "nul.txt": text + b"\0",
        "short.txt": b"ten bytes.", "text.txt": text, "other.txt": text[::-1], "gzip.bin": b"\x1f\x8b\x08\0" * 600,
        "html.npy": b"<!DOCTYPE html>" * 99, "version.bin": np.array([20240520, 9, 4], "<i4").tobytes().ljust(1032, b"\0"),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    np.save(folder / "ids.npy", np.full(500, 50, np.uint16))
    np.save(folder / "negative.npy", np.full(500, -1, np.int32))
    np.save(folder / "zero.npy", np.zeros(0, np.uint16))
    np.save(folder / "2d.npy", np.zeros((50, 50), np.uint16))
    np.save(folder / "float.npy", np.zeros(500, np.float32))
    np.save(folder / "object.npy", np.array([{}] * 500, object), allow_pickle=True)
    whole = (folder / "ids.npy").read_bytes()
    (folder / "cut.npy").write_bytes(whole[:-99])
    (folder / "grown.npy").write_bytes(whole + whole)
    (folder / "taken/minigpt_single.pt").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_clear_line(script, bad_files, monkeypatch, mistake):
    monkeypatch.chdir(bad_files)
    if not (bad_files / "good.pt").exists():
        train(script, "--train-data", "text.txt", "--checkpoint-path", "good.pt")
    shape = [] if "--resume" in MISTAKES[mistake] else SMALL.split()
    code, _, err = script("train_minimal.py", *shape, *MISTAKES[mistake])
    lines = [
        line
        for line in err.splitlines()
        if line.strip() and "step/s" not in line and "| 0/" not in line
    ]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert len(lines[0]) > 25 and "Traceback" not in err


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--checkpoint-path", "none.pt"],
        ["--checkpoint-path", "text.txt"],
        ["--checkpoint-path", "good.pt", "--val-data", "zero.txt"],
        ["--checkpoint-path", "good.pt", "--val-npy", "ids.npy", "--seq-len", "999"],
        ["--checkpoint-path", "good.pt", "--tokenizer-name", "gpt2"],
        ["--checkpoint-path", "good.pt", "--data-mode", "toy"],
        ["--checkpoint-path", "good.pt", "--batch-size", "-1"],
        ["--checkpoint-path", "good.pt", "--max-tokens", "1"],
    ],
)
def test_a_mistake_with_eval_ends_with_one_clear_line(script, bad_files, monkeypatch, flags):
    monkeypatch.chdir(bad_files)
    if not (bad_files / "good.pt").exists():
        train(script, "--train-data", "text.txt", "--checkpoint-path", "good.pt")
    code, _, err = script("eval.py", *flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err


def test_prepare_describe_and_train_on_the_result(script, text, tmp_path):
    code, out, err = script(
        "data/train_tokenizer.py", "--vocab-size", "300", "--out", "t.json", text
    )
    assert code == 0 and "t.json: 300 ids" in out, err
    code, out, err = script("data/prepare.py", "--out", "mine", "--tokenizer-name", "t.json", text)
    assert code == 0 and "in 1 documents, 1 shards" in out, err
    (tmp_path / "t.json").unlink()  # the shards carry it
    code, out, err = script("data/describe.py", "mine", text)
    assert code == 0, err
    for part in (
        "kind: token shards",
        "tokenizer: t",
        "documents: 1",
        "bytes per token:",
        "kind: text",
    ):
        assert part in out
    assert out.count("first text: 'line 0 of a text") == 2
    content = open(text).read()
    assert out.count(f"bytes: {len(content)}") == 2
    out = train(script, "--train-npy", "mine", "--sample-prompt", "line")
    assert "tokenizer: t;" in out and "vocabulary 300" in out and "val bpb: n/a" not in out
    (tmp_path / "mine" / "tokenizer.json").unlink()
    code, out, err = script("generate.py", "--prompt", "line 1", "--max-new-tokens", "5")
    assert code == 0 and out.startswith("line 1"), err  # the checkpoint carries it too


def test_trained_tokenizer_from_a_file_that_is_gone_is_in_the_checkpoint(script, text, tmp_path):
    script("data/train_tokenizer.py", "--vocab-size", "300", "--out", "t.json", text)
    train(script, "--train-data", text, "--tokenizer-name", "t.json")
    last = [r for r in read_records_of() if r["event"] == "eval"][-1]
    (tmp_path / "t.json").unlink()
    code, out, err = script("eval.py", "--checkpoint-path", "checkpoints/minigpt_single.pt")
    assert code == 0 and f"bpb: {last['val_bpb']:.6f}" in out, err


@pytest.mark.long
def test_a_run_resumes_without_its_tokenizer_file_which_comes_out_of_the_checkpoint(script, text):
    script("data/train_tokenizer.py", "--vocab-size", "300", "--out", "t.json", text)
    kept = Path("t.json").read_text()
    train(script, "--train-data", text, "--tokenizer-name", "t.json", "--checkpoint-path", "c.pt")
    Path("t.json").unlink()
    resume = ("train_minimal.py", "--resume", "--checkpoint-path", "c.pt")
    for steps in ("9", "12"):
        code, out, err = script(*resume, "--num-steps", steps)
        assert code == 0, err
        assert "tokenizer: t" in out and f"step {steps} / {steps}" in out
        shutil.rmtree("home")  # with the copy of before
    code, _, err = script(*resume, "--num-steps", "15", "--tokenizer-name", "other.json")
    assert code == 2 and "tokenizer_name='other.json' is neither a file nor" in err
    code, out, err = script("checkpoint.py", "tokenizer", "c.pt", "out/t.json")
    assert (code, out) == (0, "wrote out/t.json\n") and Path("out/t.json").read_text() == kept
    for mistake, said in (
        (["c.pt", "out/t.json"], "out/t.json is there already"),
        (["c.pt"], "takes a checkpoint and a file to write"),
        (["none.pt", "x.json"], "no such checkpoint"),
        (["c.pt", "out/t.json/x"], "cannot write the tokenizer of c.pt"),
    ):
        code, _, err = script("checkpoint.py", "tokenizer", *mistake)
        assert code == 2 and said in err and err.count("\n") == 1
    train(script, "--use-toy-data", "--vocab-size", "97", "--checkpoint-path", "toy.pt")
    code, _, err = script("checkpoint.py", "tokenizer", "toy.pt", "x.json")
    assert code == 2 and "toy.pt holds no tokenizer" in err and not Path("x.json").exists()


def test_weighted_shards_train_evaluate_and_resume(script):
    for i, name in enumerate("ab"):
        np.save(f"{name}.npy", np.random.default_rng(i).integers(0, 90, 3000).astype(np.uint16))
    train(script, "--train-npy", "a.npy:0.7", "b.npy:0.3", "--vocab-size", "97")
    code, out, err = script("eval.py", "--checkpoint-path", "checkpoints/minigpt_single.pt")
    assert code == 0 and "tokens: 599" in out, err
    code, out, err = script("train_minimal.py", "--resume", "--num-steps", "9")
    assert code == 0 and "step 9 / 9" in out, err


@pytest.mark.parametrize(
    "name, flags, said",
    [
        ("data/prepare.py", [], "give the texts and a folder"),
        (
            "data/prepare.py",
            ["--out", "o", "--tokenizer-name", "bytes", "none.txt"],
            "none.txt: cannot be read",
        ),
        ("data/prepare.py", ["--out", "o", "--tokenizer-name", "bytes", "*.xyz"], "no text in it"),
        (
            "data/prepare.py",
            ["--out", "text.txt", "--tokenizer-name", "bytes", "other.txt"],
            "cannot write",
        ),
        ("data/train_tokenizer.py", ["--vocab-size", "9999", "text.txt"], "has merges for"),
        ("data/train_tokenizer.py", ["--vocab-size", "10"], "vocab_size=10 must be at least 258"),
        ("data/describe.py", [], "give something to describe"),
        ("data/describe.py", ["cut.npy"], "1 of 1 with a problem"),
        (
            "train_minimal.py",
            ["--train-npy", "ids.npy:0.5", "ids.npy"],
            "give every source a weight",
        ),
        (
            "train_minimal.py",
            ["--train-npy", "ids.npy", "--val-npy", "ids.npy:1"],
            "takes no weights",
        ),
    ],
)
def test_a_mistake_with_data_ends_with_one_clear_line(
    script, bad_files, monkeypatch, name, flags, said
):
    monkeypatch.chdir(bad_files)
    code, _, err = script(name, *flags)
    lines = [line for line in err.splitlines() if line.strip() and "tokenizing" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], (
        err
    )


LOOKING = {
    "evaluation": ["--eval-steps", "1"],
    "sampling": ["--eval-steps", "2", "--sample-prompt", "line"],
    "profiling": ["--use-profiler"],
    "WandB": ["--use-wandb", "--wandb-mode", "offline"],
    "TensorBoard": ["--use-tensorboard"],
    "saving in the background": ["--save-steps", "1", "--checkpoint-async", "on"],
    "saving at once": ["--save-steps", "2", "--keep-every", "1", "--checkpoint-async", "off"],
    "saving by the clock": ["--save-minutes", "0.0001"],
    "rare records": ["--log-steps", "3"],
}


@pytest.mark.parametrize("looking", LOOKING)
def test_looking_at_a_run_does_not_change_it(script, text, tmp_path, looking):
    flags = ["--train-data", text, "--dropout", "0.1", "--num-steps", "9", "--log-steps", "1"]
    flags += ["--arch", "gpt2", "--global-batch-size", "8", "--grad-accum-steps", "2"]
    train(script, *flags, "--eval-steps", "9", "--save-steps", "9", "--checkpoint-path", "a.pt")
    losses = {r["step"]: r["train_loss"] for r in read_records_of("a") if r["event"] == "train"}
    train(script, *flags, *LOOKING[looking], "--checkpoint-path", "b.pt")
    found = {r["step"]: r["train_loss"] for r in read_records_of("b") if r["event"] == "train"}
    assert len(losses) == 9 and found and found.items() <= losses.items()
    assert not [d for d in differences("a.pt", "b.pt")[1] if not d.startswith("best_")]


def test_settings_that_make_another_run_need_allow_change(script, text):
    train(script, "--train-data", text)
    code, _, err = script("train_minimal.py", "--resume", "--seed", "5", "--seq-len", "12")
    assert code == 2 and "seed was 1337, is 5; seq_len was 16, is 12" in err
    assert "--allow-change seed seq_len" in err and err.count("\n") == 1
    code, out, err = script(
        "train_minimal.py", "--resume", "--seed", "5", "--num-steps", "8", "--allow-change", "seed"
    )
    assert code == 0 and "changed since it was saved: num_steps was 6, is 8; seed was 1337" in out
    code, _, err = script("train_minimal.py", "--resume", "--allow-change", "sead")
    assert code == 2 and "did you mean seed" in err


def test_other_data_is_taken_only_where_it_is_allowed(script, text, tmp_path):
    train(script, "--train-data", text)
    other = tmp_path / "other.txt"
    other.write_text("another text, of which every line is the same\n" * 200)
    flags = ["train_minimal.py", "--resume", "--train-data", str(other), "--num-steps", "8"]
    code, _, err = script(*flags)
    assert code == 2 and "train data: fingerprint was" in err
    code, out, err = script(*flags, "--allow-change", "train_data")
    assert code == 0 and "train data: fingerprint was" in out, err


def test_interruption_ends_with_one_line(script, text, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.prefetch.Prefetch.__call__", interrupted)
    code, _, err = script("train_minimal.py", *SMALL.split(), "--train-data", text)
    assert code == 130 and "interrupted" in err and "Traceback" not in err


def test_a_mistake_under_torchrun_is_named(program):
    out = program("train_ddp.py", "--n-heads", "5", ranks=2, ok=False)
    assert "error: n_heads=5 does not divide d_model=64" in out


def test_the_page_of_the_trainers_fits_a_screen():
    import ast

    for name in ("train_minimal.py", "train_ddp.py"):
        tree = ast.parse((ROOT / name).read_text())
        (main,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
        assert main.end_lineno - main.lineno + 1 <= 48


def test_eval_shows_the_loss_of_each_source_of_a_mixture(script):
    for i, name in enumerate("ab"):
        ids = np.random.default_rng(i).integers(0, 97, 2000)
        np.save(f"{name}.npy", ids.astype(np.uint16))
    train(
        script, "--train-npy", "a.npy:3", "b.npy:1", "--vocab-size", "97", "--val-max-tokens", "80"
    )
    paths = ["--checkpoint-path", "checkpoints/minigpt_single.pt"]
    code, out, err = script("eval.py", *paths, "--by-source")
    assert code == 0 and "a.npy: avg_loss" in out and "b.npy: avg_loss" in out, err
    (record,) = read_records_of("eval")
    a, b = (record["sources"][name] for name in ("a.npy", "b.npy"))
    assert (a["tokens"], b["tokens"], record["tokens"]) == (59, 19, 79)  # each but its first
    assert min(a["loss"], b["loss"]) < record["loss"] < max(a["loss"], b["loss"])
    code, _, err = script("eval.py", *paths, "--seq-len", "64")
    assert code == 2 and "16 positions" in err and "--max-position-embeddings" not in err


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_a_terminal_of_another_encoding_gets_escapes(program, encoding):
    (program.folder / "a.txt").write_text("世界 文 🌹\n" * 300)
    flags = ["--train-data", "a.txt", "--sample-prompt", "世", "--sample-tokens", "5"]
    out = program("train_minimal.py", *SMALL.split(), *flags, PYTHONIOENCODING=encoding)
    assert "sample: \\u4e16" in out and "step 6 / 6" in out and "continue: " in out
    assert "sample: 世" in (program.folder / "logs/train_minimal.log").read_text(encoding="utf-8")
    flags = ["--prompt", "界", "--max-new-tokens", "5", "--device", "cpu"]
    assert program("generate.py", *flags, PYTHONIOENCODING=encoding).startswith("\\u754c")


def test_control_characters_of_a_model_are_written_out(script, text):
    train(script, "--train-data", text)
    code, out, err = script(
        "generate.py", "--temperature", "1e9", "--top-k", "0", "--num-samples", "9"
    )
    assert code == 0, err
    assert not [c for c in out if c not in "\n\t" and (c < " " or "\x7f" <= c < "\xa0")]
    assert "\\x" in out


def test_several_samples_are_told_apart(script, text):
    train(script, "--train-data", text)
    code, out, err = script("generate.py", "--num-samples", "3", "--max-new-tokens", "4")
    assert code == 0, err
    heads = [line for line in out.splitlines() if line.startswith("--- sample ")]
    assert heads[1] == "--- sample 2 of 3, seed 1338 ---" and len(heads) == 3


def test_a_checkpoint_whose_data_are_elsewhere_says_who_named_them(script, text, tmp_path):
    train(script, "--train-data", text)
    (tmp_path / "my text.txt").rename(tmp_path / "moved.txt")
    flags = ["--checkpoint-path", "checkpoints/minigpt_single.pt"]
    code, _, err = script("eval.py", *flags)
    assert code == 2 and "no such file" in err and err.count("\n") == 1
    assert "this name is from checkpoints/minigpt_single.pt" in err and "--val-data" in err
    code, out, err = script("eval.py", *flags, "--val-data", "moved.txt")
    assert code == 0 and "data: moved.txt" in out, err


def test_every_script_computes_with_the_threads_that_are_asked_for(script, text, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    train(script, "--train-data", text, "--threads", "3")
    train(script, "--train-data", text, "--checkpoint-path", "other.pt")  # torch's own choice
    path = ("--checkpoint-path", "checkpoints/minigpt_single.pt")
    for name, flags in (("eval.py", path), ("generate.py", (*path, "--max-new-tokens", "2"))):
        code, _, err = script(name, *flags, "--threads", "3")
        assert code == 0, err
    assert chosen == [3, 3, 3]


def test_eval_says_when_it_scores_what_was_trained_on(script, text):
    path = ("--checkpoint-path", "checkpoints/minigpt_single.pt")
    train(script, "--train-data", text)
    code, out, err = script("eval.py", *path)
    assert code == 0 and "trained on" not in out, err
    code, out, err = script("eval.py", *path, "--val-data", text, "--max-tokens", "500")
    assert code == 0 and "500 of 500 tokens are from what " in out, err


def test_rows_of_other_tokenizers_say_that_bits_per_byte_compare(script, text, tmp_path):
    vocabulary = ["--vocab-size", "300", "--out", "mine.json", text]
    assert script("data/train_tokenizer.py", *vocabulary)[0] == 0
    paths = []
    for name in ("bytes", "mine.json"):
        paths.append(f"{name[:4]}.pt")
        train(
            script, "--train-data", text, "--tokenizer-name", name, "--checkpoint-path", paths[-1]
        )
    code, out, err = script("eval.py", "--checkpoint-path", *paths, "--val-data", text)
    assert code == 0 and "bits per byte (bpb) can be compared" in out, err
    assert "of tokenizer bytes" in out and "gives all checkpoints the same" not in out


def test_the_checkpoints_of_a_folder_are_named_where_none_has_the_usual_name(
    script, text, tmp_path
):
    train(script, "--train-data", text, "--checkpoint-path", "runs/a.pt")
    code, _, err = script("generate.py", "--checkpoint-path", "runs")
    assert code == 2 and "runs has no minigpt_single.pt; name one of its checkpoints: a" in err


def test_a_run_that_is_resumed_without_its_metrics_says_so(script, text, tmp_path):
    train(script, "--train-data", text, "--checkpoint-path", "a.pt", "--log-dir", "there")
    flags = ("--resume", "--num-steps", "8", "--checkpoint-path", "a.pt")
    code, out, err = script("train_minimal.py", *flags, "--log-dir", "here")
    assert code == 0 and "here has no metrics of this run before step 6" in out, err
    code, out, err = script("train_minimal.py", *flags[:2], "9", *flags[3:], "--log-dir", "here")
    assert code == 0 and "no metrics of this run" not in out, err


def test_the_weights_of_a_mixture_are_shown(script, text, tmp_path):
    (tmp_path / "b.txt").write_text("".join(f"{i * i} is a square\n" for i in range(900)))
    out = train(script, "--train-data", f"{text}:3", "b.txt:1")
    assert f"0.75 of the sequences are from {text}: " in out
    assert "0.25 of the sequences are from b.txt: " in out and " epochs" in out


@pytest.mark.parametrize("closed", [">&- 2>&- <&-", pytest.param(">&-", marks=pytest.mark.long)])
def test_a_run_goes_on_without_standard_output_or_error(program, closed):
    words = f"{sys.executable} {ROOT}/train_minimal.py {TINY} --num-steps 3 {closed}"
    ran = subprocess.run(["sh", "-c", words], cwd=program.folder, env=program.env, timeout=60)
    assert ran.returncode == 0
    assert "evaluate: " in (program.folder / "logs/train_minimal.log").read_text()
    verify = program("checkpoint.py", "verify", "checkpoints/minigpt_single.pt")
    assert ": whole, step 3" in verify
    wrong = subprocess.run(
        ["sh", "-c", f"{sys.executable} {ROOT}/train_minimal.py --no-such {closed}"],
        cwd=program.folder, env=program.env, timeout=60,
    )  # fmt: skip
    assert wrong.returncode == 2


def test_prompts_come_from_a_file_or_standard_input(script, text, tmp_path, monkeypatch):
    train(script, "--train-data", text)
    Path("prompts.txt").write_text("line 1\n\nline 22\n")
    flags = ("--max-new-tokens", "4", "--num-samples", "2", "--batch-size", "3")
    code, out, err = script("generate.py", "--prompt-file", "prompts.txt", *flags)
    assert code == 0, err
    heads = [line for line in out.splitlines() if line.startswith("--- ")]
    assert heads == [
        f"--- prompt {p} of 2, sample {i} of 2, seed {1334 + 2 * p + i} ---"
        for p in (1, 2)
        for i in (1, 2)
    ]
    alone = [
        script("generate.py", "--prompt", p, *flags[:2], "--seed", s)[1][:-1]
        for p, s in (
            ("line 1", "1337"),
            ("line 1", "1338"),
            ("line 22", "1339"),
            ("line 22", "1340"),
        )
    ]
    assert re.split(r"--- .* ---\n", out)[1:] == [f"{x}\n" for x in alone]
    assert alone[0].startswith("line 1") and alone[2].startswith("line 22")
    code, out, err = script("generate.py", "--prompt-file", "prompts.txt", *flags, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [x["seed"] for x in found] == [1337, 1338, 1339, 1340], err
    assert [x["prompt"] + x["text"] for x in found] == alone
    monkeypatch.setattr(sys, "stdin", io.StringIO("line 1\nline 22\n"))
    code, out, err = script(
        "generate.py", "--prompt-file", "-", "--prompt-separator", "", "--max-new-tokens", "4"
    )
    assert code == 0 and out.startswith("line 1\nline 22\n"), err
    for wrong in (io.StringIO("not UTF-8: \udcff\n"), None):  # None = a closed standard input
        monkeypatch.setattr(sys, "stdin", wrong)
        code, _, err = script("generate.py", "--prompt-file", "-")
        assert code == 2 and err.startswith("error: --prompt-file - ") and err.count("\n") == 1
    code, _, err = script("generate.py", "--prompt-file", "none.txt")
    assert code == 2 and "none.txt cannot be read" in err and err.count("\n") == 1


def test_a_text_longer_than_the_context_is_said_beside_it(script, text):
    train(script, "--train-data", text)  # 16 positions
    code, out, err = script("generate.py", "--prompt", "line 1", "--max-new-tokens", "11")
    assert code == 0 and err.endswith(
        "a prompt of 6 and 11 new tokens exceed the model's context of 16 "
        "(max_position_embeddings): it sees the last 13 to 16 of them\n"
    )
    assert "context" not in out
    code, _, err = script("generate.py", "--prompt", "line 1", "--max-new-tokens", "10")
    assert code == 0 and "context" not in err


def test_a_stop_string_ends_what_is_generated(script, text):
    train(script, "--train-data", text)
    flags = ("generate.py", "--prompt", "line 1", "--max-new-tokens", "20", "--seed", "3")
    code, whole, err = script(*flags)
    assert code == 0, err
    character = whole[10]
    code, out, err = script(*flags, "--stop", "zzzz", character)
    assert out == whole[: whole.index(character, 6)] + "\n"
    code, _, err = script(*flags, "--stop", "")
    assert code == 2 and "would stop at once" in err
    for flag in ("--top-p", "--min-p"):
        code, _, err = script(*flags, flag, "1.5")
        assert code == 2 and "must be at most 1" in err
