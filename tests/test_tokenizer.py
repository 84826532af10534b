import numpy as np
import pytest

from config import UserError
from tokenizer import build_tokenizer, stored_tokenizer

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
