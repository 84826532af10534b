import numpy as np
import pytest

from corpus.tokenizer import BPETokenizer, build_tokenizer, stored_tokenizer
from runtime.setting_fields import UserError

TEXTS = ["", "plain", "Grüße, 世界 🌹\n\ttabs", "<|endoftext|> is text here", "a" * 1000]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(text):
    tokenizer = build_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids.tolist()) == text


def test_bytes_end_token_stands_for_no_text():
    tokenizer = build_tokenizer("bytes")
    assert tokenizer.decode([104, 105, tokenizer.end_token]) == "hi"
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [0]
    assert tokenizer.end_token < tokenizer.vocab_size == len(tokenizer.token_bytes)


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_gives_the_ids_of_tiktoken(text, gpt2_files):
    import tiktoken

    tokenizer = build_tokenizer("gpt2")
    ids = tokenizer.encode(text)
    assert ids.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert np.asarray(tokenizer.token_bytes)[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.end_token] == 0


@pytest.fixture
def pairs():
    """GPT-2's way of splitting, and merges of two and of four equal characters."""
    from tiktoken_ext.openai_public import r50k_pat_str

    tokens = [bytes([i]) for i in range(256)]
    tokens += [c * n for n in (2, 4) for c in (b" ", b"\n", b"a", b"7", b"!")]
    ranks = {token: i for i, token in enumerate(tokens)}
    return BPETokenizer("pairs", r50k_pat_str, ranks, len(ranks), len(ranks) + 1)


@pytest.mark.parametrize("space", [" ", "\n", " \n", "\u3000"])
def test_a_million_white_space_characters_before_a_word_are_encoded(pairs, space):
    # A run that tiktoken can do gives the pattern: all but the last character make one piece.
    run, few = space * (2_000_000 // len(space)), space * 2000
    ids, short = pairs.encode(run + "word").tolist(), pairs.encode(few + "word").tolist()
    assert pairs.decode(ids) == run + "word"
    assert ids[-12:] == short[-12:]
    assert len(ids) - len(pairs.encode(run)) == len(short) - len(pairs.encode(few))


@pytest.mark.parametrize("run", ["a", "7", "!", "ab", "9 "])
def test_other_long_runs_are_encoded(pairs, run):
    text = run * (1_000_000 // len(run)) + " x"
    assert pairs.decode(pairs.encode(text).tolist()) == text


def test_long_runs_have_the_ids_of_tiktoken(pairs, monkeypatch):
    text = "say:" + " " * 5000 + "word\n\n \t it's 1234567 Grüße, 世界 🌹\r\n" + "\n" * 5000 + "x "
    wanted = pairs.encode(text).tolist()

    def too_long(*_, **__):
        raise ValueError("Max stack size exceeded")

    known = pairs._bpe
    monkeypatch.setattr(type(known), "encode_to_numpy", too_long)
    assert pairs.encode(text).tolist() == wanted


def test_missing_gpt2_files_are_named_with_the_way_out(tmp_path, monkeypatch):
    import tiktoken.load
    import tiktoken.registry

    def no_network(path):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError) as caught:
        build_tokenizer("gpt2")
    said = str(caught.value)
    assert all(
        word in said
        for word in ("vocab.bpe", "encoder.json", str(tmp_path), "--tokenizer-name bytes")
    )
    assert "\n" not in said


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"neither a file nor one of bytes, .*gpt2"):
        build_tokenizer("gpt3")


@pytest.fixture
def trained(tmp_path):
    pytest.importorskip("rustbpe")
    import runpy

    from conftest import ROOT

    (tmp_path / "a.txt").write_text("the cat sat on the mat. the dog sat on the log.\n" * 50)
    make = runpy.run_path(str(ROOT / "data/train_tokenizer.py"))["train_tokenizer"]
    return make([tmp_path / "a.txt"], 268, 10**9, "mine")


@pytest.mark.parametrize("text", TEXTS)
def test_trained_tokenizer_round_trips_and_counts_bytes(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids.tolist()) == text
    assert trained.token_bytes[ids].sum() == len(text.encode())


def test_trained_tokenizer_merges_what_is_frequent(trained):
    assert trained.vocab_size == 268 and trained.end_token == 267
    assert len(trained.encode(" the cat sat")) < 6  # 12 bytes
    assert trained.decode([trained.end_token]) == ""


def test_json_holds_the_whole_tokenizer(trained, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(trained.to_json())
    again = build_tokenizer(str(path))
    assert (again.fingerprint, again.vocab_size, again.name) == (trained.fingerprint, 268, "mine")
    assert again.encode("the dog").tolist() == trained.encode("the dog").tolist()
    assert stored_tokenizer(trained.to_json(), "", "x", 300).fingerprint == trained.fingerprint
    assert stored_tokenizer("", "", "x", 300) is None
    with pytest.raises(UserError, match=r"c\.pt was trained with mine"):
        stored_tokenizer(trained.to_json(), "bytes", "c.pt", 300)
    with pytest.raises(UserError, match=r"268 ids, but the model of c\.pt knows 97"):
        stored_tokenizer(trained.to_json(), "", "c.pt", 97)


@pytest.mark.parametrize(
    "damage", ["", "{}", "[]", "not json", '{"format": "rosetrainer tokenizer 1"}']
)
def test_damaged_tokenizer_files_are_named(tmp_path, damage):
    (tmp_path / "t.json").write_text(damage)
    with pytest.raises(UserError, match=r"t\.json: not a tokenizer file"):
        build_tokenizer(str(tmp_path / "t.json"))


def test_tokenizer_file_with_missing_bytes_or_double_tokens_is_refused(trained, tmp_path):
    import json

    record = json.loads(trained.to_json())
    for change in ({"tokens": record["tokens"][1:]}, {"tokens": [*record["tokens"], record["tokens"][5]]},
                   {"end_token": 3}, {"pattern": "("}):  # fmt: skip
        (tmp_path / "t.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(UserError, match=r"not a tokenizer file"):
            build_tokenizer(str(tmp_path / "t.json"))
