import json

import numpy as np
import pytest
import torch
from conftest import CPU, tiny
from converted import checkpoint_of, hf, random_model
from helpers import equal

from checkpoint import load_model, read_checkpoint
from checkpointing.resuming import resumable_settings
from config import to_dict
from conversion.start import settings_of_weights, start_from_weights
from corpus.tokenizer import ByteTokenizer
from dataset import open_data
from model import GPTModel
from runtime.setting_fields import UserError
from settings.command_line import parse_settings
from training.evaluation import evaluate
from training.optimizers import make_optimizer
from training.step import RunState, train_step

TEXT = "The quick brown fox jumps over the lazy dog. " * 30
TYPED = "--seq-len 16 --batch-size 4 --global-batch-size 4 --num-steps 8 --lr 1e-2 --device cpu"


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("A slow green frog sleeps under the busy bee. " * 10)
    return "--train-data a.txt --val-data b.txt --cache-dir cache --allow-leak"


def settings(*flags, saved=None):
    words = [w for flag in flags for w in flag.split()]
    return parse_settings("train_minimal", words, 1, saved, settings_of_weights)


def started(*flags):
    """A run that starts from weights, after what train_minimal.py does before the first step."""
    train, val, args = open_data(settings(*flags))
    model, state = GPTModel(args.model, seed=args.seed), RunState()
    optimizer = make_optimizer(model, args)
    start_from_weights(args, model, state, train.tokenizer)
    return args, train, val, model, optimizer, state


def small(arch="modern", **changes):
    return tiny(arch, vocab_size=257, max_position_embeddings=16, **changes)


def weights(tmp_path, config, tokenizer=None, name="w.pt"):
    return checkpoint_of(random_model(config), tmp_path / name, tokenizer or ByteTokenizer())


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
@pytest.mark.parametrize("folder", [True, False])
def test_the_first_loss_is_that_of_the_weights_and_then_it_falls(tmp_path, text, arch, folder):
    pytest.importorskip("transformers")
    path = weights(tmp_path, small(arch))
    wanted = load_model(path).model
    if folder:
        hf("export", path, tmp_path / "x")
        path = tmp_path / "x"
    args, train, val, model, optimizer, state = started(text, TYPED, f"--init-from {path}")
    assert args.model.arch == arch and args.init_from == str(path) and args.preset == "finetune"
    first = evaluate(model, val, 4, CPU).loss
    assert first == evaluate(wanted, val, 4, CPU).loss
    assert state.step == 0 and f"{path}" in state.pending_messages[0]
    for step in range(8):
        train_step(model, optimizer, train.global_batch(step, args), args, state, CPU)
    assert evaluate(model, val, 4, CPU).loss < first - 0.5


def test_weights_of_each_kind_start_a_run(tmp_path, text):
    from test_other_trainers import nanogpt_tensors, write_llmc, write_nanogpt

    write_nanogpt(tmp_path / "n.pt", nanogpt_tensors(vocab=257), vocab_size=257)
    write_llmc(tmp_path / "l.bin", nanogpt_tensors(vocab=257), 3, vocab=257, padded=384)
    flags = text, TYPED.replace("--seq-len 16", "--seq-len 12"), "--tokenizer-name bytes"
    nano, llmc = (started(*flags, f"--init-from {f}")[3] for f in ("n.pt", "l.bin"))
    assert (nano.config.gelu, llmc.config.gelu) == ("none", "tanh")
    assert equal(nano.state_dict(), llmc.state_dict())


CONTRADICTIONS = [
    ("--n-layers 3", "n_layers=3, but the weights in w.pt have 2"),
    ("--n-heads 4", "n_heads=4, but"),
    ("--arch modern", "arch=modern, but"),
    ("--gelu none", "gelu=none, but"),
    ("--vocab-size 97", "vocab_size=97 is below the 257 of the weights in w.pt"),
    ("--resume", "--init-from with --resume"),
    ("--seq-len 32", "seq_len=32 is beyond max_position_embeddings=16"),
    ("--tokenizer-name gpt2", "vocab_size=257 is below the tokenizer's 50257"),
]


@pytest.mark.parametrize("flags, named", CONTRADICTIONS)
def test_what_the_weights_contradict_is_refused_by_name(tmp_path, text, gpt2_files, flags, named):
    weights(tmp_path, small("gpt2"))
    with pytest.raises(UserError, match=named):
        started(text, TYPED.replace("--seq-len 16", ""), flags, "--init-from w.pt")


def test_weights_without_tokenizer_want_one_named(tmp_path, text):
    checkpoint_of(random_model(small()), tmp_path / "w.pt")
    with pytest.raises(UserError, match="holds no tokenizer; say of which one"):
        started(text, TYPED, "--init-from w.pt")
    started(text, TYPED, "--init-from w.pt --tokenizer-name bytes")


def test_a_tokenizer_of_the_weights_is_taken_for_text_and_kept_in_the_cache(tmp_path, text):
    from test_tokenizer_json import trained

    ours = trained(vocab_size=300)
    config = tiny(vocab_size=300, max_position_embeddings=16)
    weights(tmp_path, config, ours)
    args, train, *_ = started(text, TYPED, "--init-from w.pt")
    assert train.tokenizer.fingerprint == ours.fingerprint
    assert args.tokenizer_name.startswith("cache/tokenizers/")


def test_shards_of_another_tokenizer_are_refused_unless_it_is_typed(tmp_path, text):
    weights(tmp_path, small())
    from test_tokenizer_json import trained

    other = trained(vocab_size=257 + 40)
    (tmp_path / "tokenizer.json").write_text(other.to_json())
    ids = np.random.default_rng(0).integers(0, 257, 2000).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    flags = f"--train-npy ids.npy --cache-dir cache {TYPED} --init-from w.pt --vocab-size 297"
    with pytest.raises(UserError, match=r"of tokenizer mine, .* if you mean it, --tokenizer-name"):
        started(flags)
    state = started(flags, "--tokenizer-name tokenizer.json")[5]
    assert any("start out as those of other text" in m for m in state.pending_messages)


def test_new_ids_start_as_the_mean_and_are_said(tmp_path, text):
    path = weights(tmp_path, small())
    old, (*_, model, _, state) = (
        load_model(path).model,
        started(text, TYPED, "--init-from w.pt --vocab-size 300"),
    )
    for name in ("wte.weight", "lm_head.weight"):
        new, known = model.get_parameter(name), old.get_parameter(name)
        assert torch.equal(new[:257], known)
        assert torch.allclose(new[257:], known.double().mean(0).float().expand(43, -1), atol=1e-7)
        assert f"43 new rows of {name} start as the mean of its 257" in state.pending_messages


def test_learned_positions_are_added_and_cut_and_rotary_ones_are_computed(tmp_path, text):
    old = load_model(weights(tmp_path, small("gpt2"))).model.wpe.weight
    flags = text, TYPED.replace("--seq-len 16", "--seq-len 8"), "--init-from w.pt"
    *_, more, _, state = started(*flags, "--max-position-embeddings 20")
    assert torch.equal(more.wpe.weight, torch.cat((old, old[-1:].expand(4, -1))))
    assert "4 new positions start as a copy of the last of 16" in state.pending_messages
    *_, fewer, _, state = started(*flags, "--max-position-embeddings 10")
    assert torch.equal(fewer.wpe.weight, old[:10])
    assert "the last 6 of 16 learned positions are left out" in state.pending_messages
    weights(tmp_path, small("modern"))
    *_, model, _, state = started(*flags, "--max-position-embeddings 40")
    assert model.cos.shape[0] == 40 and "seen 16 positions" in state.pending_messages[-1]


def test_an_imported_checkpoint_is_not_resumed_and_names_init_from(tmp_path):
    pytest.importorskip("transformers")
    hf("export", weights(tmp_path, small()), tmp_path / "x")
    hf("import", tmp_path / "x", tmp_path / "i.pt")
    with pytest.raises(
        UserError, match=r"no run has trained; start one from them with --init-from"
    ):
        resumable_settings(tmp_path / "i.pt")


def test_with_resume_auto_the_run_wins_over_the_weights(tmp_path):
    weights(tmp_path, small())
    flags = "--use-toy-data --resume auto --init-from w.pt".replace("w.pt", str(tmp_path / "w.pt"))

    def nothing(path):
        from runtime.setting_fields import NothingSaved

        raise NothingSaved("none")

    fresh = settings(flags, saved=nothing)
    assert not fresh.resume and fresh.init_from and fresh.model.arch == "modern"
    (tmp_path / "w.pt").unlink()  # a run that goes on does not need its first weights
    again = settings(flags, saved=lambda path: to_dict(fresh))
    assert again.resume and again.model == fresh.model
    with pytest.raises(UserError, match=r"init_from was .*w\.pt, is .*v\.pt"):
        settings(flags.replace("w.pt", "v.pt"), saved=lambda path: to_dict(fresh))


@pytest.mark.long
def test_every_layout_starts_from_the_same_weights(tmp_path, program):
    """First and last loss of one process, of DDP, FSDP and tensor parallelism; and a resume."""
    config = small("gpt2", n_layers=2, n_heads=4, d_model=32)
    weights(tmp_path, config)
    (tmp_path / "a.txt").write_text(TEXT * 9)
    alone = TYPED.replace("--batch-size 4", "", 1)  # the micro-batch follows from the ranks
    flags = (
        f"--train-data a.txt --val-ratio 0.1 --allow-leak {alone} --init-from w.pt --vocab-size 260"
    )
    flags += " --log-steps 1 --eval-steps 4 --cache-dir cache --resume auto --compile off"
    ways = {"one": 0, "ddp": 2, "fsdp": 2, "tp": 2}
    extra = {"fsdp": "--parallel fsdp", "tp": "--use-tensor-parallel"}
    losses = {}
    for way, ranks in ways.items():
        script = "train_ddp.py" if ranks else "train_minimal.py"
        more = f"--checkpoint-path {way}.pt {extra.get(way, '')}"
        out = program(script, *flags.split(), *more.split(), ranks=ranks)
        assert "starts from checkpoint w.pt" in out and "3 new rows of wte.weight" in out
        if way == "one":  # the same command goes on, where nothing is left to do
            again = program(script, *flags.split(), *more.split())
            assert "resumed one.pt at step 8" in again and "starts from" not in again
        lines = (tmp_path / f"logs/{way}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses[way] = [r["val_loss"] for r in records if r.get("event") == "eval"]
        kept = read_checkpoint(tmp_path / f"{way}.pt")
        assert kept["settings"]["init_from"] == "w.pt"
    assert len(losses["one"]) == 3 and losses["one"][0] > losses["one"][-1]
    for found in losses.values():
        assert found == pytest.approx(losses["one"], rel=2e-6)
