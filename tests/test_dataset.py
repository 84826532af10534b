import dataclasses

import numpy as np
import pytest
import torch
from conftest import toy_settings

from cli import parse_settings
from config import UserError
from dataset import (
    FineWebNPYDataset,
    TextDatasetForCausalLM,
    TokenDataset,
    ToyRandomDataset,
    build_tokenizer,
    open_data,
    open_validation,
    permute,
    same_data,
)


class Counting:
    """A source whose token at position p is p, so that windows show where they come from."""

    name, fingerprint, vocab_size = "counting", "counting", 10**9

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens

    def read(self, start, count):
        assert start >= 0 and start + count <= self.num_tokens
        return np.arange(start, start + count)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 63, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(n):
    for key in range(5):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_works_far_out_in_constant_memory():
    n = 10**12 + 39
    out = permute(np.array([0, 1, 2, n - 1]), n, key=7)
    assert len(set(out.tolist())) == 4 and out.min() >= 0 and out.max() < n


def test_orders_of_epochs_and_seeds_are_unrelated():
    # The rank correlation of two random orders of 20,000 has standard deviation 1/sqrt(20,000) = 0.007;
    # a random permutation has 1 fixed point on average.
    n, orders = 20_000, []
    data = TokenDataset(Counting(n * 7 + 1), 8)
    for seed, epoch in [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]:
        orders.append(data.sample_windows(epoch * n, n, seed))
    for i, a in enumerate([np.arange(n), *orders]):
        for b in orders[i:]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 * 0.0071
            assert (a == b).sum() < 10


@pytest.mark.parametrize("batch", [1, 3, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_uses_every_window_once(batch, world):
    data = TokenDataset(Counting(30 * 7 + 5), 8)  # 30 windows and a remainder
    args = toy_settings(global_batch_size=batch * world, data_seed=4)
    steps = 30 // np.gcd(30, batch * world)  # whole epochs
    seen = []
    for step in range(steps):
        for rank in range(world):
            rows = data.global_batch(step, args, rank, world)
            assert rows.shape == (batch, 8) and rows.dtype == torch.int64
            seen += (rows[:, 0] // 7).tolist()
    epochs = steps * batch * world // 30
    assert np.array_equal(np.bincount(seen), np.full(30, epochs))
    assert set(seen[:30]) == set(range(30)) or world > 1


def test_ranks_share_the_batch_of_one_process():
    data = TokenDataset(Counting(1000), 8)
    args = toy_settings(global_batch_size=12)
    whole = data.global_batch(5, args)
    for world in (2, 3, 4):
        parts = [data.global_batch(5, args, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)


def test_batches_of_a_step_do_not_depend_on_what_was_read_before():
    data, args = TokenDataset(Counting(1000), 8), toy_settings()
    fresh = data.global_batch(17, args)
    for step in (3, 99, 0):
        data.global_batch(step, args)
    torch.manual_seed(0)
    assert torch.equal(data.global_batch(17, args), fresh)
    assert not torch.equal(data.global_batch(18, args), fresh)
    other = dataclasses.replace(args, data_seed=args.data_seed + 1)
    assert not torch.equal(data.global_batch(17, other), fresh)


@pytest.mark.parametrize("num_tokens", [2, 5, 8, 9, 15, 16, 64, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_scores_every_token_but_the_first_once(num_tokens, batch_size, world):
    val = TokenDataset(Counting(500), 8, start=300, stop=300 + num_tokens)
    scored = []
    for rank in range(world):
        for ids, labels in val.batches(batch_size, rank, world):
            assert ids.shape == labels.shape and ids.shape[1] == 8 and len(ids) <= batch_size
            target = labels[:, 1:]
            scored += target[target != -100].tolist()
            context = ids[:, :-1][target != -100]  # the token before each target is its predecessor
            assert torch.equal(context + 1, target[target != -100])
    assert sorted(scored) == list(range(301, 300 + num_tokens))


def test_train_and_validation_share_no_token():
    args = toy_settings()
    train, val, _ = open_data(dataclasses.replace(args, val_ratio=0.13, val_max_tokens=0))
    assert train.stop == val.start and val.stop == train.source.num_tokens
    last = train.rows(np.array([len(train) - 1]))
    assert train.start + (len(train) - 1) * (train.seq_len - 1) + last.shape[1] <= val.start


def test_limits_shorten_both_parts():
    train, val, _ = open_data(toy_settings("--max-tokens", "1000", "--val-max-tokens", "100"))
    assert (train.num_tokens, val.num_tokens) == (1000, 100)


def test_public_data_sets_are_torch_data_sets(tmp_path):
    (tmp_path / "a.txt").write_text("hello world, hello data. " * 20)
    np.save(tmp_path / "a.npy", np.arange(200, dtype=np.uint16))
    tokenizer = build_tokenizer("bytes")
    sets = [
        TextDatasetForCausalLM([tmp_path / "a.txt"], tokenizer, 16, tmp_path / "cache"),
        FineWebNPYDataset([tmp_path / "a.npy"], 16),
        ToyRandomDataset(97, 16, num_tokens=500),
    ]
    for data in sets:
        batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)))
        assert {k: v.shape for k, v in batch.items()} == {
            k: (3, 16) for k in ("input_ids", "attention_mask", "labels")
        }
        with pytest.raises(IndexError):
            data[len(data)]


def text_flags(tmp_path, *flags):
    return parse_settings("train_minimal", ["--cache-dir", str(tmp_path / "cache"), *flags])


def test_too_little_data_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(UserError, match="fewer than one window of seq_len=128"):
        open_data(text_flags(tmp_path, "--train-data", str(tmp_path / "a.txt")))
    with pytest.raises(UserError, match="the validation part has 1 tokens"):
        open_validation(
            text_flags(tmp_path, "--train-data", str(tmp_path / "a.txt"), "--val-ratio", "0.01")
        )


def test_same_file_for_training_and_validation_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    flags = ["--train-data", str(tmp_path / "a.txt"), "--val-data", str(tmp_path / "link.txt")]
    with pytest.raises(UserError, match="also stand in the training data"):
        open_data(text_flags(tmp_path, *flags))


def test_vocabulary_comes_from_the_tokenizer_and_must_hold_it(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    flags = ["--train-data", str(tmp_path / "a.txt")]
    assert open_data(text_flags(tmp_path, *flags))[2].model.vocab_size == 257
    assert open_data(text_flags(tmp_path, *flags, "--vocab-size", "300"))[2].model.vocab_size == 300
    with pytest.raises(UserError, match="vocab_size=200 is below the tokenizer's 257 ids"):
        open_data(text_flags(tmp_path, *flags, "--vocab-size", "200"))


def test_shards_need_no_tokenizer(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.arange(2000, dtype=np.uint16))
    monkeypatch.setattr(
        "dataset.build_tokenizer", lambda name: pytest.fail("asked for a tokenizer")
    )
    for preset in ("quickstart", "gpt2-small"):
        args = text_flags(
            tmp_path, "--preset", preset, "--train-npy", str(tmp_path / "a.npy"), "--seq-len", "16"
        )
        train, _, args = open_data(args)
        assert (
            train.tokenizer is None and args.model.vocab_size == 50257 and args.tokenizer_name == ""
        )


def test_prompt_without_tokenizer_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(2000, dtype=np.uint16))
    args = text_flags(tmp_path, "--train-npy", str(tmp_path / "a.npy"), "--sample-prompt", "x")
    with pytest.raises(UserError, match="--sample-prompt needs a tokenizer"):
        open_data(args)


def test_changed_data_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    args = text_flags(tmp_path, "--train-data", str(tmp_path / "a.txt"))
    recorded = open_validation(args).describe()
    same_data(recorded, open_validation(args))
    (tmp_path / "a.txt").write_text("some texT\n" * 100)
    with pytest.raises(UserError, match="fingerprint was"):
        same_data(recorded, open_validation(args))
