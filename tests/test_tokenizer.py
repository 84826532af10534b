import numpy as np
import pytest

from config import UserError
from tokenizer import build_tokenizer

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
