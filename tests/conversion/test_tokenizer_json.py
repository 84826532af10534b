import json
import random

import pytest
from conftest import ROOT, tiny
from converted import checkpoint_of, hf, random_model

from checkpoint import load_model
from conversion.tokenizer_json import (
    SAMPLE,
    huggingface_json,
    merges_of,
    tokenizer_in,
    write_tokenizer,
)
from corpus.tokenizer import BPETokenizer, ByteTokenizer, build_tokenizer
from corpus.tokenizer_json import byte_characters
from runtime.setting_fields import UserError

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer as HuggingFaceTokenizer  # noqa: E402

GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
OTHER_PATTERN = r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


def trained(pattern=GPT2_PATTERN, vocab_size=700):
    """A BPE trained on source of this project."""
    rustbpe = pytest.importorskip("rustbpe")
    learner = rustbpe.Tokenizer()
    texts = [p.read_text() for p in sorted(ROOT.glob("*.py"))] + [SAMPLE * 3]
    learner.train_from_iterator(iter(texts), vocab_size - 1, pattern=pattern)
    ranks = {bytes(token): rank for token, rank in learner.get_mergeable_ranks()}
    return BPETokenizer("mine", pattern, ranks, len(ranks), len(ranks) + 1)


def texts():
    """Real text, and random strings of the characters that tokenizers disagree on."""
    draw = random.Random(1)
    yield SAMPLE
    yield (ROOT / "model.py").read_text()
    for _ in range(200):
        yield "".join(draw.choices(SAMPLE + "  \n\n1234'aaaa", k=60))


@pytest.mark.parametrize(
    "make", [ByteTokenizer, trained, lambda: trained(OTHER_PATTERN)], ids=["bytes", "bpe", "other"]
)
def test_ids_are_those_of_the_tokenizers_library(make):
    ours = make()
    theirs = HuggingFaceTokenizer.from_str(huggingface_json(ours))
    for text in texts():
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids) == text
    assert theirs.token_to_id("<|endoftext|>") == ours.end_token
    assert theirs.get_vocab_size() == ours.vocab_size


def test_gpt2s_merges_are_found_from_its_ranks(gpt2_files):
    # vocab.bpe, the first of GPT-2's two files, lists the merges as they were learned
    (listed,) = (p for p in gpt2_files.iterdir() if p.read_bytes().startswith(b"#version"))
    wanted = [tuple(line.split(" ")) for line in listed.read_text().splitlines()[1:] if line]
    written = json.loads(huggingface_json(build_tokenizer("gpt2")))["model"]
    assert [tuple(pair) for pair in written["merges"]] == wanted and len(wanted) == 50_000
    assert len(written["vocab"]) == 50_257 and not written["ignore_merges"]


@pytest.mark.long
def test_gpt2s_ids_are_those_of_transformers_on_shakespeare(gpt2_files, shared_text):
    ours, text = build_tokenizer("gpt2"), shared_text.read_text()[:200_000]
    theirs = HuggingFaceTokenizer.from_str(huggingface_json(ours))
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist()


def test_tokens_out_of_the_order_of_merges_have_the_ids_of_tiktoken():
    # "abc" is made of "ab", which comes after it; no merge makes "xyz", only a piece of its own
    ranks = {bytes([b]): b for b in range(256)} | {b"abc": 256, b"ab": 257, b"xyz": 258}
    assert merges_of(ranks) == ([(b"ab", b"c"), (b"a", b"b")], False)
    ours = BPETokenizer("odd", r"\w+|\W+", ranks, 259, 260)
    theirs = HuggingFaceTokenizer.from_str(huggingface_json(ours))
    for text in ("abc", "abcabc", "ab c abc", "xyz", "xyzxyz", "cab"):
        assert theirs.encode(text).ids == ours.encode(text).tolist()


def test_the_256_characters_of_bytes_are_those_of_the_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_characters()) == sorted(ByteLevel.alphabet())
    chars = {byte: character for character, byte in byte_characters().items()}
    assert sorted(chars) == list(range(256))
    assert "".join(chars[b] for b in " é\n".encode()) == "ĠÃ©Ċ"


@pytest.mark.parametrize("make", [ByteTokenizer, trained])
def test_a_tokenizer_comes_back_from_an_export_as_it_was(make, tmp_path):
    ours = make()
    model = random_model(tiny(vocab_size=ours.vocab_size + 3))  # padded, as is usual
    hf("export", checkpoint_of(model, tmp_path / "a.pt", ours), tmp_path / "x")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert theirs(SAMPLE)["input_ids"] == ours.encode(SAMPLE).tolist()
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_token
    assert theirs.decode(theirs(SAMPLE)["input_ids"]) == SAMPLE
    entries = json.loads((tmp_path / "x/config.json").read_text())
    assert (entries["eos_token_id"], entries["pad_token_id"]) == (ours.end_token, None)
    hf("import", tmp_path / "x", tmp_path / "b.pt")
    back = load_model(tmp_path / "b.pt").tokenizer
    assert back.to_json() == ours.to_json() and back.fingerprint == ours.fingerprint


def test_a_tokenizer_json_that_was_changed_since_is_not_taken_for_ours(tmp_path, capsys):
    hf(
        "export",
        checkpoint_of(random_model(tiny(vocab_size=257)), tmp_path / "a.pt", ByteTokenizer()),
        tmp_path / "x",
    )
    text = (tmp_path / "x/tokenizer.json").read_text()
    (tmp_path / "x/tokenizer.json").write_text(
        text.replace('"merges": []', '"merges": [["a", "b"]]')
    )
    hf("import", tmp_path / "x", tmp_path / "b.pt")
    back = load_model(tmp_path / "b.pt").tokenizer
    assert back is None or back.fingerprint != "bytes"


@pytest.mark.long
def test_gpt2s_vocabulary_is_known_as_gpt2(gpt2_files, tmp_path):
    ours = build_tokenizer("gpt2")
    config = tiny(vocab_size=50257, d_model=4, n_heads=1, n_layers=1)
    hf("export", checkpoint_of(random_model(config), tmp_path / "a.pt", ours), tmp_path / "x")
    (tmp_path / "x/rosetrainer_tokenizer.json").unlink()
    hf("import", tmp_path / "x", tmp_path / "b.pt")
    assert load_model(tmp_path / "b.pt").tokenizer.name == "gpt2"
    vocab = json.loads((tmp_path / "x/tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "x/tokenizer.json").unlink()  # as in the folders of earlier years
    (tmp_path / "x/vocab.json").write_text(json.dumps(vocab))
    hf("import", tmp_path / "x", tmp_path / "c.pt")
    assert load_model(tmp_path / "c.pt").tokenizer.fingerprint == ours.fingerprint


@pytest.mark.parametrize("damaged", ["[]", '{"model": null}', '{"model": {"vocab": 3}}', "{"])
def test_a_damaged_tokenizer_is_a_note_and_not_the_end_of_an_import(damaged, tmp_path):
    (tmp_path / "tokenizer.json").write_text(damaged)
    tokenizer, notes = tokenizer_in(tmp_path, 257)
    assert tokenizer is None and len(notes) == 1 and notes[0].startswith("no tokenizer: ")


class FromHuggingFace:
    """A stand-in for a tokenizer that keeps the text of its tokenizer.json."""

    name, end_token, vocab_size = "theirs", 256, 257

    def __init__(self, text, encode):
        self.text, self.encode = text, encode

    def to_json(self):
        return json.dumps({"name": "theirs", "tokenizer_json": self.text})


def test_the_text_of_a_tokenizer_json_is_exported_as_it_is(tmp_path):
    text = huggingface_json(ByteTokenizer())
    write_tokenizer(FromHuggingFace(text, ByteTokenizer().encode), tmp_path, 16)
    assert (tmp_path / "tokenizer.json").read_text() == text


def test_other_ids_are_refused(tmp_path):
    text = huggingface_json(ByteTokenizer())
    other = FromHuggingFace(text, lambda t: ByteTokenizer().encode(t + "!"))
    with pytest.raises(UserError, match="differ from the one at"):
        write_tokenizer(other, tmp_path, 16)
