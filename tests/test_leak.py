import numpy as np
import pytest

import leak
from config import UserError
from dataset import TokenDataset
from leak import leaked_share, refuse_leak, run_hashes


class Ids:
    def __init__(self, ids, vocab_size=50257):
        self.ids, self.num_tokens, self.vocab_size = np.asarray(ids), len(ids), vocab_size
        self.name, self.fingerprint = "ids", str(hash(self.ids.tobytes()))

    def read(self, start, count):
        return self.ids[start : start + count].astype(np.uint16)


def data(ids):
    return TokenDataset(Ids(ids), 64)


@pytest.fixture
def train():
    return np.random.default_rng(0).integers(0, 50257, 300_000)


def test_a_copy_of_a_part_is_found_at_any_place(train):
    for start in (0, 1, 65_500, 123_457, 290_000):
        assert leaked_share(data(train), data(train[start : start + 10_000])) == 1.0


def test_other_text_of_the_same_words_is_not(train):
    shuffled = np.random.default_rng(1).permutation(train)[:10_000]
    assert leaked_share(data(train), data(shuffled)) == 0.0


def test_phrases_that_source_code_repeats_are_no_leak(tmp_path):
    import dataset
    from text import stdlib_files

    tokenizer = dataset.build_tokenizer("bytes")
    files = [p for p in stdlib_files() if "encodings" not in p.parts][:200]  # they do repeat
    train, val = (
        dataset.TextDatasetForCausalLM(part, tokenizer, 64, tmp_path)
        for part in (files[:180], files[180:])
    )
    assert leaked_share(train, val) < 0.05
    assert (
        leaked_share(train, dataset.TextDatasetForCausalLM(files[7:9], tokenizer, 64, tmp_path))
        == 1.0
    )


def test_a_partial_copy_gives_its_share(train):
    mixed = np.concatenate(
        [train[5000:15_000], np.random.default_rng(2).integers(0, 50257, 30_000)]
    )
    assert leaked_share(data(train), data(mixed)) == pytest.approx(0.25, abs=0.02)


def test_a_short_validation_text_is_looked_for_whole(train):
    assert leaked_share(data(train), data(train[777:790])) == 1.0
    assert leaked_share(data(train), data([1, 2])) in (0.0, 1.0)


def test_beyond_the_limit_a_spread_part_is_read_and_the_share_estimated(train, monkeypatch):
    monkeypatch.setattr(leak, "_BLOCK", 1000)
    monkeypatch.setattr(leak, "_MOST_TOKENS", 60_000)
    read = []
    source = data(train)
    original = source.source.read
    source.source.read = lambda start, count: (read.append(count), original(start, count))[1]
    share = leaked_share(source, data(train[100_000:200_000]))
    assert 55_000 < sum(read) < 65_000 and share == pytest.approx(1.0, abs=0.3)


def test_a_leak_is_refused_in_one_line_and_the_search_is_kept(train, tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        refuse_leak(data(train), data(train[1000:9000]), tmp_path)
    assert "100% of 256 pieces" in str(caught.value) and "\n" not in str(caught.value)
    clean = data(np.random.default_rng(3).integers(0, 50257, 5000))
    assert refuse_leak(data(train), clean, tmp_path) == 0.0
    monkeypatch.setattr(leak, "leaked_share", lambda *_: pytest.fail("searched again"))
    assert refuse_leak(data(train), clean, tmp_path) == 0.0


def test_hash_of_a_run_is_the_same_wherever_it_stands():
    ids = np.arange(100, dtype=np.uint16) % 7
    hashes = run_hashes(ids, 3)
    assert len(hashes) == 93 and np.array_equal(hashes[:80], hashes[7:87])
    assert len(set(hashes[:7].tolist())) == 7
