import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import CPU, toy_settings

from config import to_dict
from corpus.mixtures import Mixture, share_out, weighted
from corpus.token_dataset import TokenDataset
from dataset import (
    FineWebNPYDataset,
    TextDatasetForCausalLM,
    ToyRandomDataset,
    build_tokenizer,
    open_data,
    open_validation,
    permute,
)
from runtime.setting_fields import UserError
from settings.command_line import parse_settings
from training.prefetch import Prefetch


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


def test_every_byte_of_a_text_counts_in_its_fingerprint(tmp_path):
    lines = "".join(f"some text {i}\n" for i in range(200_000))
    prints = set()
    for content in (lines, lines.replace("text 123456\n", "texT 123456\n")):
        (tmp_path / "a.txt").write_text(content)
        args = text_flags(tmp_path, "--train-data", str(tmp_path / "a.txt"))
        prints.add(open_validation(args).describe()["fingerprint"])
    assert len(prints) == 2


def mixture(weights=("0.7", "0.3"), lengths=(30, 20)):
    parts = [TokenDataset(Counting(n * 7 + 1), 8) for n in lengths]
    for i, part in enumerate(parts):
        part.source.vocab_size = 10 + i
    offset = [1000 * i for i in range(len(parts))]
    for part, add in zip(parts, offset, strict=True):
        read = part.source.read
        part.source.read = lambda start, count, read=read, add=add: read(start, count) + add
    return Mixture(parts, [Fraction(w) for w in weights])


def test_shares_of_a_mixture_are_exact_over_any_stretch():
    data = mixture(("0.7", "0.2", "0.1"), (30, 20, 50))
    origin = (data.samples(0, 5000, 3)[:, 0] // 1000).numpy()
    for stretch in (10, 100, 1000):
        for start in (0, 3, 777, 4000):
            counts = np.bincount(origin[start : start + stretch], minlength=3)
            assert np.abs(counts - stretch * np.array([0.7, 0.2, 0.1])).max() < 1.01


def test_each_part_of_a_mixture_keeps_exact_epochs_in_an_order_of_its_own():
    data = mixture()
    rows = data.samples(0, 300, 3)[:, 0].numpy()
    first = (rows[rows < 1000] // 7)[:90].reshape(3, 30)  # 210 of them: seven epochs
    assert all(np.array_equal(np.sort(epoch), np.arange(30)) for epoch in first)
    assert not np.array_equal(first[0], first[1])


def test_samples_of_a_mixture_are_a_function_of_their_number():
    data = mixture()
    whole = data.samples(0, 120, 5)
    assert torch.equal(data.samples(37, 20, 5), whole[37:57])
    args = toy_settings(global_batch_size=12, data_seed=5)
    ranks = [data.global_batch(4, args, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat(ranks), whole[48:60])


def test_weights_are_read_from_the_names(tmp_path):
    assert weighted(["a.npy:0.7", "b:c.npy:3"]) == [("a.npy", Fraction(7, 10)), ("b:c.npy", 3)]
    (tmp_path / "odd:1").write_text("")
    assert weighted([str(tmp_path / "odd:1"), "C:x.npy"])[0][1] is None
    for bad in (["a:0.5", "b"], ["a:0", "b:1"], ["a:1..2"]):
        with pytest.raises(UserError):
            weighted(bad)


def test_a_mixture_of_shards_trains_and_holds_out_a_part_of_each(tmp_path):
    for i, name in enumerate("ab"):
        np.save(tmp_path / f"{name}.npy", np.full(5000, 10 + i, np.uint16))
    flags = ["--train-npy", f"{tmp_path}/a.npy:0.75", f"{tmp_path}/b.npy:0.25", "--seq-len", "16"]
    train, val, args = open_data(text_flags(tmp_path, *flags))
    batch = torch.cat([train.global_batch(step, args) for step in range(10)])
    assert (batch == 10).all(1).sum() == 180 and (batch == 11).all(1).sum() == 60
    assert val.num_tokens == 1000 and train.describe()["weights"] == ["3/4", "1/4"]
    ids = val.source.read(0, 1000)
    assert (ids[:500] == 10).all() and (ids[500:] == 11).all()


def test_a_vocabulary_far_above_the_ids_is_said_with_one_that_fits(tmp_path):
    ids = np.random.default_rng(0).integers(0, 61, 3000)
    (tmp_path / "char.bin").write_bytes(ids.astype("<u2").tobytes())
    flags = ["--train-npy", f"{tmp_path}/char.bin", "--seq-len", "16"]
    (note,) = open_data(text_flags(tmp_path, *flags))[0].notes
    assert "largest id seen" in note and "is 60," in note and "--vocab-size 61" in note
    assert open_data(text_flags(tmp_path, *flags, "--vocab-size", "61"))[0].notes == []


def test_data_of_a_resumed_run_that_are_gone_are_said_to_be_named_by_its_checkpoint(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    saved = to_dict(text_flags(tmp_path, "--train-data", f"{tmp_path}/a.txt"))
    (tmp_path / "a.txt").unlink()
    resumed = parse_settings("train_minimal", ["--resume"], saved=lambda path: saved)
    with pytest.raises(UserError, match=r"a\.txt: no such file.*checkpoint; give --train-data"):
        open_data(resumed)


def test_what_a_limit_leaves_of_a_mixture_is_shared_by_weight():
    halves = [Fraction(1, 2), Fraction(1, 2)]
    assert share_out(100, [900, 900], halves) == [50, 50]
    assert share_out(101, [900, 900], [Fraction(3), Fraction(1)]) == [76, 25]  # of 75.75, 25.25
    assert share_out(100, [10, 900], halves) == [10, 90]  # the first has no more
    assert share_out(100, [10, 20], halves) == [10, 20]


def test_a_limited_validation_of_a_mixture_has_each_source(tmp_path):
    flags = mixture_flags(tmp_path, ("0.75", "0.25"))
    val = open_data(text_flags(tmp_path, *flags, "--val-max-tokens", "100"))[1]
    assert val.num_tokens == 100 and [p.num_tokens for p in val.parts] == [75, 25]
    ids = val.source.read(0, 100)
    assert (ids[:75] // 1000 == 0).all() and (ids[75:] // 1000 == 1).all()
    assert val.limited(40).source.read(0, 40).tolist() == [*ids[:30], *ids[75:85]]


def test_a_run_from_before_keeps_the_validation_range_that_it_recorded(tmp_path):
    flags = [*mixture_flags(tmp_path, ("0.75", "0.25")), "--val-max-tokens", "80"]
    saved = to_dict(text_flags(tmp_path, *flags))
    del saved["val_by_weight"]
    resumed = parse_settings(
        "train_minimal", ["--resume"], saved=lambda path: saved | {"checkpoint_path": path}
    )
    ids = open_data(resumed)[1].source.read(0, 80)
    assert (ids // 1000 == 0).all()  # all of the first source, as it was


def mixture_flags(tmp_path, weights):
    """Two sources of 900 ids, 0 and up, 1000 and up."""
    for i, name in enumerate("ab"):
        ids = 1000 * i + np.random.default_rng(i).permutation(900)
        np.save(tmp_path / f"{name}.npy", ids.astype(np.uint16))
    named = [f"{tmp_path}/{name}.npy:{w}" for name, w in zip("ab", weights, strict=True)]
    return ["--train-npy", *named, "--seq-len", "16", "--max-position-embeddings", "16"]


def test_prefetched_batches_are_the_same_ones_in_any_order():
    data, args = TokenDataset(Counting(1000), 8), toy_settings()
    batches = Prefetch(data, args, CPU)
    for step in (0, 1, 2, 7, 8, 3):
        assert torch.equal(batches(step), data.global_batch(step, args))


def test_the_next_batch_is_read_while_the_caller_computes():
    import threading

    data, args, reads = TokenDataset(Counting(1000), 8), toy_settings(), []
    original, read_ahead = data.global_batch, threading.Event()

    def recorded(step, *rest):
        reads.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            read_ahead.set()
        return original(step, *rest)

    data.global_batch = recorded
    batches = Prefetch(data, args, CPU)
    batches(0)
    assert read_ahead.wait(10)  # without asking for it
    batches(1)
    assert reads[:2] == [(0, True), (1, False)]


def test_an_error_while_reading_ahead_reaches_the_caller():
    data, args = TokenDataset(Counting(1000), 8), toy_settings()
    original = data.global_batch

    def failing(step, *rest):
        if step == 1:
            raise UserError("token 7 is bad")
        return original(step, *rest)

    data.global_batch = failing
    batches = Prefetch(data, args, CPU)
    batches(0)
    with pytest.raises(UserError, match="token 7 is bad"):
        batches(1)


def test_far_batches_cost_what_near_ones_do_and_memory_does_not_grow(tmp_path):
    # 10 billion tokens in a sparse file: nothing may be listed, copied or read to the end.
    path = tmp_path / "huge.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<u2", "fortran_order": False, "shape": (10**10,)}
        )
        file.truncate(file.tell() + 2 * 10**10)
    data = FineWebNPYDataset([path], 1024)
    args = toy_settings(global_batch_size=8)
    assert len(data) == (10**10 - 1) // 1023
    for step in (0, 10**6, 10**9):
        assert data.global_batch(step, args).shape == (8, 1024)


def test_tokenizer_stored_beside_the_shards_is_used(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(2000, dtype=np.uint16) % 256)
    (tmp_path / "tokenizer.json").write_text(build_tokenizer("bytes").to_json())
    train, _, args = open_data(
        text_flags(tmp_path, "--train-npy", str(tmp_path), "--seq-len", "16")
    )
    assert train.tokenizer.name == "bytes" and args.model.vocab_size == 257


def test_the_keyword_names_of_the_articles_work(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 40)
    (tmp_path / "b.txt").write_text("def" * 40)
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    common = {"tokenizer": build_tokenizer("bytes"), "seq_len": 8, "cache_dir": tmp_path}
    with_end = TextDatasetForCausalLM(file_paths=files, **common)
    without = TextDatasetForCausalLM(file_paths=files, add_eos=False, **common)
    ids = with_end.source.read(0, with_end.num_tokens)
    assert (with_end.num_tokens, without.num_tokens) == (242, 240)
    assert without.source.read(0, 240).tolist() == ids[ids != 256].tolist()
    assert without.describe()["fingerprint"] != with_end.describe()["fingerprint"]
    short = TextDatasetForCausalLM(file_paths=files, max_tokens=50, add_eos=True, **common)
    assert short.num_tokens == 50 and len(short) == 7
    assert TextDatasetForCausalLM(file_paths=files, max_tokens=None, **common).num_tokens == 242


def test_a_seed_gives_items_in_the_order_of_the_first_epoch(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(2000, dtype=np.uint16))
    plain = FineWebNPYDataset(file_paths=[tmp_path / "a.npy"], seq_len=16)
    data = FineWebNPYDataset(file_paths=[tmp_path / "a.npy"], seq_len=16, seed=3, max_tokens=1500)
    items = torch.stack([data[i]["input_ids"] for i in range(len(data))])
    assert torch.equal(items, plain.limited(1500).samples(0, len(data), seed=3))
    assert torch.equal(plain[5]["input_ids"], torch.arange(75, 91))


def test_a_random_start_shifts_all_windows_by_an_offset_of_the_seed(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(2000, dtype=np.uint16))
    offsets = set()
    for seed in range(200):
        options = {"seed": seed, "random_start": True}
        data = FineWebNPYDataset(file_paths=[tmp_path / "a.npy"], seq_len=8, **options)
        again = FineWebNPYDataset(file_paths=[tmp_path / "a.npy"], seq_len=8, **options)
        assert torch.equal(data[2]["input_ids"], again[2]["input_ids"])
        firsts = data.rows(np.arange(len(data)))[:, 0]
        assert torch.equal(firsts, data.start + 7 * torch.arange(len(data)))
        assert data.describe()["start"] == data.start
        offsets.add(data.start)
    assert offsets == set(range(7))  # every token can be the first of a window
