import argparse
import json
import random
from pathlib import Path

import pytest

from corpus import read_text, sentencepiece_model
from corpus.shards import TokenShards
from corpus.tokenizer import build_tokenizer
from corpus.tokenizing import prepare
from runtime.setting_fields import UserError

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("tokenizers")

LEARN = Path(argparse.__file__).read_text()
STRANGE = "🌹👩\u200d🚀 e\u0301 \u00e9 ü \u0928\u092e\u0938\u094d\u0924\u0947 \ufb01 \u2460 </s>x  y   ,z  \t q"


def model(folder, text=LEARN, **options):
    """A trained model: its path, and SentencePiece's own tokenizer of it."""
    (folder / "learn.txt").write_text(text)
    chosen = {"model_type": "unigram", "vocab_size": 500, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "learn.txt"), model_prefix=str(folder / "m"), **chosen
    )
    path = folder / "m.model"
    return path, sentencepiece.SentencePieceProcessor(model_file=str(path))


def same(found, original, text, model_type):
    """Whether the ids are those of SentencePiece, or, for a unigram model, the same pieces in another
    order, which are as probable: there the rounding of its float32 sums decides, and Hugging Face has
    float64.
    """
    wanted = original.encode(text)
    reordered = sorted(found) == sorted(wanted) and original.decode(found) == original.decode(
        wanted
    )
    return found == wanted or (model_type == "unigram" and reordered)


EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
OPTIONS = {
    "as trained without options": {},
    "of exact text with bytes": {**EXACT, "byte_fallback": True},
    "without space before a text": {**EXACT, "add_dummy_prefix": False},
    "with symbols of the user": {"user_defined_symbols": ["<sep>", "parse"]},
    "without end token": {"eos_id": -1, "bos_id": -1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_ids_are_those_of_sentencepiece(model_type, options, tmp_path):
    path, original = model(tmp_path, model_type=model_type, **options)
    tokenizer = build_tokenizer(str(path))
    lines = [*LEARN.splitlines(), STRANGE, STRANGE * 3, "<sep>a parse<sep> b", "", " ", "▁ a"]
    for text in [*lines, "\n".join(lines[:200])]:
        assert same(tokenizer.encode(text).tolist(), original, text, model_type), text
    assert tokenizer.vocab_size == len(original) + ("eos_id" in options)


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_ids_of_tinyshakespeare_are_those_of_sentencepiece(model_type, tmp_path, shared_text):
    text = shared_text.read_text()
    path, original = model(tmp_path, text, model_type=model_type, vocab_size=1000)
    tokenizer = build_tokenizer(str(path))
    for speech in text.split("\n\n"):
        assert same(tokenizer.encode(speech).tolist(), original, speech, model_type), speech


def test_of_two_equally_probable_splits_either_is_right(tmp_path, monkeypatch):
    model = sentencepiece.sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 0
    scores = {"\u2581": -3.53382416, "=": -4.80986827, "==": -5.56759718}
    for piece in ("<unk>", "<s>", "</s>", *scores):
        kind = {"<unk>": 2, "<s>": 3, "</s>": 3}.get(piece, 1)
        model.pieces.add(piece=piece, score=scores.get(piece, 0), type=kind)
    path = tmp_path / "m.model"
    path.write_bytes(model.SerializeToString())
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert original.encode("===") == [3, 5, 4]  # though 3, 4, 5 is as probable
    monkeypatch.setattr(sentencepiece_model, "_SAMPLE", "===")
    tokenizer = build_tokenizer(str(path))
    assert tokenizer.encode("===").tolist() == [3, 4, 5]
    assert same([3, 4, 5], original, "===", "unigram")
    assert not same([3, 4, 5], original, "===", "bpe")
    assert not same([3, 4, 4, 4], original, "===", "unigram")
    assert not sentencepiece_model._equally_probable(original, [3, 4, 5], [3, 4, 4, 4])
    assert not sentencepiece_model._equally_probable(original, [3, 4, 5], [3, 5])


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_bytes_text_and_pieces_are_right(model_type, tmp_path, monkeypatch):
    path, original = model(tmp_path, model_type=model_type, **EXACT, byte_fallback=True)
    tokenizer = build_tokenizer(str(path))
    text = STRANGE + LEARN
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == original.decode(ids) == text
    assert tokenizer.token_bytes[[*ids, tokenizer.end_token]].sum() == len(text.encode())
    assert tokenizer.end_token == original.eos_id()
    monkeypatch.setattr(read_text, "BLOCK_BYTES", 1000)
    (tmp_path / "a.txt").write_text(text)
    made = prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out", workers=1)
    found = TokenShards([tmp_path / "out"], tokenizer.vocab_size).read(0, made["tokens"])
    assert found.tolist() == [*ids, tokenizer.end_token]


def test_text_that_it_changes_has_no_known_bytes(tmp_path):
    path, original = model(tmp_path)  # compatibility forms and extra spaces go
    tokenizer = build_tokenizer(str(path))
    assert not tokenizer.token_bytes.any() and tokenizer.safe_cut is None
    # Its ids stand for text all the same, so that they can be drawn.
    special = [original.unk_id(), original.bos_id(), original.eos_id()]
    assert (~tokenizer.is_text).nonzero()[0].tolist() == sorted(special)


def test_a_checkpoint_can_keep_it(tmp_path):
    path, original = model(tmp_path)
    stored = build_tokenizer(str(path)).to_json()
    path.unlink()
    (tmp_path / "kept.json").write_text(stored)
    assert build_tokenizer(str(tmp_path / "kept.json")).encode(
        "a word"
    ).tolist() == original.encode("a word")
    assert json.loads(json.loads(stored)["tokenizer_json"])["model"]["type"] == "Unigram"


def test_other_models_are_refused(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"bad\.model: is no model of SentencePiece"):
        build_tokenizer(str(tmp_path / "bad.model"))
    path, _ = model(tmp_path, model_type="word", vocab_size=100, hard_vocab_limit=False)
    with pytest.raises(UserError, match="neither a unigram nor a BPE model"):
        build_tokenizer(str(path))
    path, _ = model(tmp_path, treat_whitespace_as_suffix=True)
    with pytest.raises(UserError, match="spaces at the end of its tokens"):
        build_tokenizer(str(path))


def test_damaged_models_are_refused_in_one_line_or_read(tmp_path):
    path, _ = model(tmp_path)
    data, draw, refused = path.read_bytes(), random.Random(1), 0
    for i in range(40):
        damaged = bytearray(data[: draw.randrange(len(data))] if i % 4 == 0 else data)
        for _ in range(draw.choice((1, 20))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            build_tokenizer(str(path)).encode("some text")
        except UserError as reason:
            refused += 1
            assert "\n" not in str(reason)
    assert refused > 20
