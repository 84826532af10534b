import numpy as np
import pytest

from corpus import contamination as leak
from corpus.contamination import leaked_share, refuse_leak, run_hashes
from corpus.token_dataset import TokenDataset
from dataset import open_data
from runtime.setting_fields import UserError
from settings.command_line import parse_settings


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
    from corpus.find_text import stdlib_files

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


@pytest.fixture
def prose(train):
    """Two texts of 3,000 random words each, of which none repeats a piece of another."""
    words = [f"w{i:x}" for i in train[:6000].tolist()]
    return " ".join(words[:3000]), " ".join(words[3000:])


def opened(tmp_path, *flags):
    return open_data(parse_settings("train_minimal", ["--cache-dir", f"{tmp_path}/cache", *flags]))


def refused(tmp_path, *flags):
    with pytest.raises(UserError) as caught:
        opened(tmp_path, *flags)
    said = str(caught.value)
    assert "\n" not in said and "--val-ratio" not in said  # which would only hide it
    return said


def test_a_split_off_part_that_stands_in_the_rest_is_refused(tmp_path, prose):
    (tmp_path / "once.txt").write_text(prose[0])
    (tmp_path / "twice.txt").write_text(prose[0] + prose[1] + prose[0])
    assert opened(tmp_path, "--train-data", f"{tmp_path}/once.txt")[0].notes == []
    said = refused(tmp_path, "--train-data", f"{tmp_path}/twice.txt")
    assert "100% of 256 pieces" in said and "more than once" in said


def test_a_text_many_times_over_is_refused_too(tmp_path, prose):
    (tmp_path / "often.txt").write_text(prose[0] * 50)
    assert "100% of 256" in refused(tmp_path, "--train-data", f"{tmp_path}/often.txt")


def test_copies_of_files_are_named(tmp_path, prose):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text(prose[0])
    (folder / "a_backup.txt").write_text(prose[0])
    (tmp_path / "link.txt").symlink_to(folder / "a.txt")
    a, backup, link = folder / "a.txt", folder / "a_backup.txt", tmp_path / "link.txt"
    assert f"{backup} is a copy of {a}" in refused(tmp_path, "--train-data", str(folder))
    assert f"{a} is given twice" in refused(tmp_path, "--train-data", str(a), str(a))
    assert f"{link} is {a}" in refused(tmp_path, "--train-data", str(a), str(link))
    own = refused(tmp_path, "--train-data", str(folder), "--val-data", str(link))
    assert f"{link} is {a}" in own


def test_a_shard_given_by_folder_and_by_name_is_named(tmp_path, train):
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "a.npy", train[:9000].astype(np.uint16))
    said = refused(tmp_path, "--train-npy", str(folder), str(folder / "a.npy"))
    assert f"{folder}/a.npy is given twice" in said


def findings(data):
    return [note for note in data.notes if "of the sequences are from" not in note]


def test_parts_of_a_mixture_that_overlap_are_refused(tmp_path, train):
    for name, ids in (("a", train[:9000]), ("b", train[7000:16_000]), ("c", train[16_000:90_000])):
        np.save(tmp_path / f"{name}.npy", ids.astype(np.uint16))
    a, b, c = (f"{tmp_path}/{name}.npy:1" for name in "abc")
    assert findings(opened(tmp_path, "--train-npy", b, c)[0]) == []
    said = refused(tmp_path, "--train-npy", a, b, c)  # a's part: 10 % of the one, 1 % of all
    assert "100% of 256 pieces" in said and "a.npy" in said


def test_a_shard_that_is_two_parts_of_a_mixture_holds_out_the_same_part_of_both(tmp_path, train):
    np.save(tmp_path / "a.npy", train[:9000].astype(np.uint16))
    twice = [f"{tmp_path}/a.npy:1", f"{tmp_path}/a.npy:2"]
    (note,) = findings(opened(tmp_path, "--train-npy", *twice)[0])
    assert "a.npy is given twice" in note


def test_a_copy_elsewhere_in_the_training_data_is_only_said(tmp_path, prose):
    for name, content in zip("abc", (*prose, prose[0]), strict=True):
        (tmp_path / f"{name}.txt").write_text(content)
    paths = [f"{tmp_path}/{name}.txt" for name in "acb"]
    notes = opened(tmp_path, "--train-data", *paths)[0].notes
    assert len(notes) == 1 and f"{tmp_path}/c.txt is a copy of {tmp_path}/a.txt" in notes[0]


def test_small_files_that_are_alike_are_not_worth_a_line(tmp_path, prose):
    for name, content in (("a", "x = 1\n"), ("b", prose[0]), ("y", "x = 1\n"), ("z", "x = 1\n")):
        (tmp_path / f"{name}.txt").write_text(content)
    paths = [f"{tmp_path}/{name}.txt" for name in "abyz"]
    assert opened(tmp_path, "--train-data", *paths)[0].notes == []


def test_a_license_in_each_file_is_no_leak(tmp_path, train):
    license = " ".join(f"L{i:x}" for i in train[:200].tolist()) + "\n"  # about 1 KB
    for i in range(60):  # as much license as text
        words = " ".join(f"w{x:x}" for x in train[1000 + 200 * i : 1200 + 200 * i].tolist())
        (tmp_path / f"{i:02}.txt").write_text(license + words)
    (tmp_path / "one.txt").write_text(license + "some words " + license[::-1])
    notes = opened(tmp_path, "--train-data", f"{tmp_path}/[0-9]*.txt")[0].notes
    assert notes == [f"{tmp_path}/[0-9]*.txt: 60 files read, 0 left out"]
    flags = ["--train-data", f"{tmp_path}/[0-9]*.txt", "--val-data", f"{tmp_path}/one.txt"]
    assert "of the different text" in opened(tmp_path, *flags)[0].notes[1]  # half of so little


def test_too_little_or_too_uniform_text_is_said_and_not_refused(tmp_path):
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    (tmp_path / "tiny.txt").write_text("th")
    flags = ["--train-data", f"{tmp_path}/fox.txt"]
    for more in ([], ["--val-data", f"{tmp_path}/tiny.txt"]):
        notes = opened(tmp_path, *flags, *more)[0].notes
        assert len(notes) == 1 and "measures memory" in notes[0]


def test_character_ids_in_a_wide_vocabulary_are_searched_as_characters(tmp_path, train):
    # Phrases of 40 characters recur all over; runs of 128 do not.
    phrases = train[: 50 * 40].reshape(50, 40) % 60
    ids = phrases[train[:3000] % 50].ravel()
    np.save(tmp_path / "chars.npy", ids.astype(np.uint16))
    (note,) = opened(tmp_path, "--train-npy", f"{tmp_path}/chars.npy")[0].notes
    assert "--vocab-size 60" in note


def test_allow_leak_trains_and_says_so(tmp_path, prose):
    (tmp_path / "twice.txt").write_text(prose[0] * 2)
    train, _, _ = opened(tmp_path, "--train-data", f"{tmp_path}/twice.txt", "--allow-leak")
    assert "100% of the different text" in train.notes[0]


def test_the_default_corpus_is_accepted_whatever_a_version_of_it_repeats(tmp_path, monkeypatch):
    train, val, _ = opened(tmp_path)
    held_out, rest = (d.source.read(d.start, d.num_tokens).tobytes() for d in (val, train))
    pieces = {held_out[i : i + 200] for i in range(0, len(held_out), 4000)}
    repeated = sum(piece in rest for piece in pieces) / len(pieces)
    # 29 % with Debian's Python 3.11.2, 3 % with 3.11.7
    assert train.notes == [] or (repeated > 0.15 and "of the different text" in train.notes[0])
    for share, said in ((0.03, []), (0.5, ["50% of the different text"])):
        monkeypatch.setattr(leak, "leaked_share", lambda *_, share=share: share)
        notes = opened(tmp_path, "--cache-dir", str(tmp_path / str(share)))[0].notes
        assert [note[:25] for note in notes] == said
