import argparse
import json
import random
from pathlib import Path

import numpy as np
import pytest

from corpus import read_text
from corpus.shards import TokenShards
from corpus.tokenizer import build_tokenizer, stored_tokenizer, tokenizer_from_json
from corpus.tokenizing import prepare
from dataset import TextDatasetForCausalLM
from runtime.setting_fields import UserError

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

STRANGE = "🌹👩\u200d🚀 e\u0301 \u0928\u092e\u0938\u094d\u0924\u0947 \ufb01 <|endoftext|> </s>x\n\n\n y\t  z  "
LEARN = Path(argparse.__file__).read_text()
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(model, trainer, **parts):
    made = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator([LEARN, STRANGE], trainer)
    return json.loads(made.to_str())


def bpe(special=("<|endoftext|>",), alphabet=(), size=600, **parts):
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    return trained(models.BPE(), trainer, **parts)


def byte_level(split=None, add_prefix_space=False, **more):
    """Like GPT-2's, or with a split of its own, as Llama 3 has it."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    own = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated")] if split else []
    return bpe(
        pre_tokenizer=pre_tokenizers.Sequence([*own, last]) if own else last,
        decoder=decoders.ByteLevel(),
        alphabet=pre_tokenizers.ByteLevel.alphabet(),
        **more,
    )


def marks_to_spaces():
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return decoders.Sequence(steps)


def llama_2():
    """BPE over words with their space as U+2581, which bytes stand in for where it lacks characters.
    In Llama's file no pre-tokenizer splits the words; it only learned from such.
    """
    made = bpe(
        special=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        size=900,
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=marks_to_spaces(),
    )
    made["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    made["pre_tokenizer"] = None
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made["normalizer"] = json.loads(normalizers.Sequence(steps).__getstate__())
    made["added_tokens"] = made["added_tokens"][:3]
    return made


def unigram():
    """As T5's, but without changing the text."""
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        unk_token="<unk>",
        special_tokens=["<pad>", "</s>", "<unk>"],
        show_progress=False,
    )
    space = pre_tokenizers.Metaspace()
    return trained(models.Unigram(), trainer, pre_tokenizer=space, decoder=decoders.Metaspace())


def word_piece():
    trainer = trainers.WordPieceTrainer(
        vocab_size=900, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


def crossing():
    """As Llama's, with a token that has a space behind something visible: nowhere safe to cut."""
    made = llama_2()
    made["model"]["vocab"]["e▁"] = len(made["model"]["vocab"])
    made["model"]["merges"].append(["e", "▁"])
    return made


def with_words(made):
    """With words that are tokens before any other is looked for, as Gemma's and DeepSeek's have."""
    library = tokenizers.Tokenizer.from_str(json.dumps(made))
    library.add_tokens([tokenizers.AddedToken(w, normalized=False) for w in ("don't", "   ")])
    return json.loads(library.to_str())


KINDS = {
    "byte level": byte_level,
    "prefix space": lambda: byte_level(add_prefix_space=True),
    "llama 3": lambda: byte_level(LLAMA_3),
    "own split": lambda: byte_level(r"\s?\w+\s?|."),
    "composed": lambda: byte_level(normalizer=normalizers.NFC()),
    "llama 2": llama_2,
    "unigram": unigram,
    "word piece": word_piece,
    "crossing": crossing,
    "added words": lambda: with_words(byte_level()),
    "added words and space": lambda: with_words(llama_2()),
}
_made = {}


def text_of(name):
    """The content of a file of that kind, made once."""
    if name not in _made:
        _made[name] = json.dumps(KINDS[name]())
    return _made[name]


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """The name of a kind, the file of such a tokenizer, and the library's own tokenizer of it."""
    return written(tmp_path, text_of(request.param), request.param)


def written(folder, text, name="made"):
    path = folder / f"{name}.json"
    path.write_text(text)
    library = tokenizers.Tokenizer.from_str(text)
    library.encode_special_tokens = True
    return name, path, library


def ids_of_library(library, text):
    return library.encode(text, add_special_tokens=False).ids


def test_ids_are_those_of_the_library(kind):
    _, path, library = kind
    tokenizer = build_tokenizer(str(path))
    text = STRANGE.replace("</s>", "") + LEARN  # of a unigram model the library finds </s> in text
    assert tokenizer.encode(text).tolist() == ids_of_library(library, text)
    assert tokenizer.encode("").tolist() == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["byte level", "llama 2", "unigram"])
def test_ids_of_tinyshakespeare_are_those_of_the_library(name, tmp_path, shared_text):
    _, path, library = written(tmp_path, text_of(name))
    text = shared_text.read_text()
    assert build_tokenizer(str(path)).encode(text).tolist() == ids_of_library(library, text)


def documents(seed):
    """Texts of every kind of neighbours: words, spaces, line breaks, marks."""
    draw = random.Random(seed)
    some = [
        "a",
        "the",
        "It's",
        "12345",
        " ",
        "  ",
        " ",
        "\n",
        "\n\n",
        "\t",
        "!",
        "...",
        "é",
        "e\u0301",
    ]
    some += ["🌹", "世界", "_", "x", "e", "▁", "don't", "\r\n", "\xa0", "½", "ﬁ"]
    return ["x" + "".join(draw.choices(some, k=draw.randrange(3000))) for _ in range(4)]


def test_pieces_have_the_ids_of_the_whole_text(kind, tmp_path, monkeypatch):
    _, path, library = kind
    monkeypatch.setattr(read_text, "BLOCK_BYTES", 64)  # a piece is about that long
    monkeypatch.setattr(read_text, "_FORCED_CUT_BLOCKS", 1000)
    tokenizer = build_tokenizer(str(path))
    texts = [t for seed in range(3) for t in documents(seed)]
    files = [tmp_path / f"{i}.txt" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text.encode())
    made = prepare(files, tokenizer, tmp_path / "out", workers=1)
    found = TokenShards([tmp_path / "out"], tokenizer.vocab_size).read(0, made["tokens"])
    ends = np.flatnonzero(found == tokenizer.end_token)
    assert len(ends) == len(texts) == made["documents"]
    for text, ids in zip(texts, np.split(found, ends + 1), strict=False):
        assert ids[:-1].tolist() == ids_of_library(library, text)
    assert made["bytes"] == sum(len(t.encode()) for t in texts)


def test_texts_are_cut_where_that_is_known_to_be_safe(kind):
    name, path, _ = kind
    cut = build_tokenizer(str(path)).safe_cut
    everywhere, spaces = (
        ("byte level", "prefix space", "llama 3"),
        ("composed", "llama 2", "unigram"),
    )
    expected = {n: read_text.SAFE_CUT for n in everywhere}
    expected |= {n: read_text.CUT_BEFORE_SPACE for n in spaces}
    assert cut == expected.get(name)


def test_documents_of_a_file_are_encoded_whole_where_no_cut_is_safe(tmp_path, monkeypatch):
    monkeypatch.setattr(read_text, "BLOCK_BYTES", 16)
    texts = ["some words of a document", "and the words of another one"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    found = list(read_text.read_texts(tmp_path / "a.txt", "<|endoftext|>", cut=None))
    assert [t.text for t in found] == texts and all(t.ends_document for t in found)


def test_bytes_of_the_ids_are_those_of_the_text(kind):
    name, path, _ = kind
    tokenizer = build_tokenizer(str(path))
    # Without what Unicode composes, and with characters that all these know or have bytes for.
    text = LEARN + ("Grüße 🌹\n\n" if name != "unigram" else "")
    ids = [*tokenizer.encode(text).tolist(), tokenizer.end_token]
    counted = tokenizer.token_bytes[ids].sum()
    unknown = name in ("word piece", "added words and space")
    assert counted == (0 if unknown else len(text.encode()))
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size > max(ids)
    assert tokenizer.is_text[tokenizer.encode(LEARN)].all()
    assert not tokenizer.is_text[tokenizer.end_token]
    assert unknown or (tokenizer.is_text == (tokenizer.token_bytes > 0)).all()


def test_the_space_before_a_document_is_not_counted(tmp_path):
    _, path, _ = written(tmp_path, text_of("llama 2"))
    tokenizer = build_tokenizer(str(path))
    ids = tokenizer.encode("ab").tolist()
    assert tokenizer.decode(ids) == "ab"
    assert (
        tokenizer.token_bytes[ids].sum() == 3 and tokenizer.token_bytes[tokenizer.end_token] == -1
    )


def test_text_comes_back(kind):
    name, path, _ = kind
    tokenizer = build_tokenizer(str(path))  # of these kinds even the library does not give it back
    if name in ("word piece", "unigram", "prefix space", "added words and space"):
        return
    text = STRANGE if name != "composed" else STRANGE.replace("e\u0301", "é")
    assert tokenizer.decode([*tokenizer.encode(text).tolist(), tokenizer.end_token]) == text


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_that_stand_in_a_text_are_text(name, tmp_path):
    _, path, _ = written(tmp_path, text_of(name))
    tokenizer = build_tokenizer(str(path))
    special = {a["id"] for a in json.loads(text_of(name))["added_tokens"]}
    special -= {tokenizer.encode("\u1234")[-1]}  # of unknown characters
    assert tokenizer.end_token in special
    text = "a <|endoftext|> </s> <s> <pad> [SEP] b"
    found = set(tokenizer.encode(text).tolist())
    assert not special & found and max(found) < tokenizer.vocab_size


def test_nothing_is_put_around_a_text_and_nothing_cut_off_or_drawn(tmp_path):
    plain = byte_level()
    _, path, _ = written(tmp_path, json.dumps(plain), "plain")
    framed = tokenizers.Tokenizer.from_str(json.dumps(plain))
    framed.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    framed.enable_truncation(5)
    framed.enable_padding(length=100)
    framed = json.loads(framed.to_str())
    framed["model"]["dropout"] = 0.9
    _, other, _ = written(tmp_path, json.dumps(framed), "framed")
    first, second = build_tokenizer(str(path)), build_tokenizer(str(other))
    assert second.encode(LEARN).tolist() == first.encode(LEARN).tolist()
    assert second.fingerprint == first.fingerprint


def end_of(folder):
    tokenizer = build_tokenizer(str(folder))
    names = {i: t for t, i in tokenizer._whole.get_vocab().items()}
    return names.get(tokenizer.end_token, tokenizer.end_token).lstrip("\0")


def test_the_end_token_is_the_one_of_the_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(byte_level(special=["<bos>", "<stop>", "</s>"]))
    )
    assert end_of(tmp_path) == "</s>"
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert end_of(tmp_path) == end_of(tmp_path / "tokenizer.json") == "<stop>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<bos>", "x": 1}')
    assert end_of(tmp_path) == "<bos>"
    assert build_tokenizer(str(tmp_path)).name == tmp_path.name
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(UserError, match=r"eos_token '<none>' is no token of it"):
        build_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not a JSON object"):
        build_tokenizer(str(tmp_path))


def test_an_unknown_end_token_is_asked_for(tmp_path):
    _, path, _ = written(tmp_path, json.dumps(byte_level(special=["<bos>", "<stop>"])))
    with pytest.raises(
        UserError, match="special tokens are <bos>, <stop>; name one in tokenizer_con"
    ):
        build_tokenizer(str(path))


def test_a_tokenizer_without_special_tokens_gets_an_end_token(tmp_path):
    # As the library wrote them before ByteLevel had fields.
    text = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "ByteLevel"}}
    text["decoder"] = {"type": "ByteLevel"}
    text["model"] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    (tmp_path / "t.json").write_text(json.dumps(text))
    tokenizer = build_tokenizer(str(tmp_path / "t.json"))
    assert (tokenizer.vocab_size, tokenizer.end_token) == (4, 3)
    assert tokenizer.encode("abba").tolist() == [2, 1, 0]
    assert tokenizer.decode([2, 1, 0, 3]) == "abba"
    for text in ("abc", "ab" * 50 + "🌹" + "ab" * 20):
        with pytest.raises(UserError, match=r"no token for '[c🌹]', so that it would"):
            tokenizer.encode(text)
    stored = json.loads(json.loads(tokenizer.to_json())["tokenizer_json"])
    assert stored["added_tokens"][0]["content"] == "<|endoftext|>"


def test_an_id_that_the_library_does_not_give_is_refused(tmp_path):
    made = json.loads(text_of("byte level"))
    made["added_tokens"].append({**made["added_tokens"][0], "id": 5000, "content": "<pad>"})
    (tmp_path / "t.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match="'<pad>' has the id 5000 there, but"):
        build_tokenizer(str(tmp_path / "t.json"))


def test_json_holds_the_whole_tokenizer(kind):
    _, path, _ = kind
    tokenizer = build_tokenizer(str(path))
    again = tokenizer_from_json(tokenizer.to_json(), "c.pt")
    same = ("name", "fingerprint", "vocab_size", "end_token", "safe_cut")
    assert all(getattr(again, n) == getattr(tokenizer, n) for n in same)
    assert again.encode(STRANGE).tolist() == tokenizer.encode(STRANGE).tolist()
    assert json.loads(tokenizer.to_json())["tokenizer_json"] == path.read_text()
    assert stored_tokenizer(tokenizer.to_json(), str(path), "c.pt", 10**6) is not None
    with pytest.raises(UserError, match=r"c\.pt was trained with"):
        stored_tokenizer(tokenizer.to_json(), "bytes", "c.pt", 10**6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model": {"type": "BPE", "vocab": {}}}', "the tokenizers library can't read it"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "has no tokens"),
        ('{"model": {"type": "Nothing"}, "version": "1.0"}', "can't read it"),
        ('{"model": {}}', "can't read it"),
        ('{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}', "can't read it"),
        ('{"model": 5}', "not a tokenizer file"),
        ('{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}', "4,000,000,000"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(text, said, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError) as caught:
        build_tokenizer(str(tmp_path / "t.json"))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a folder without a tokenizer\.json"):
        build_tokenizer(str(tmp_path))


def test_without_bits_per_byte_the_log_says_why(tmp_path):
    _, path, _ = written(tmp_path, text_of("word piece"), "wp")
    (tmp_path / "a.txt").write_text("some text " * 20)
    data = TextDatasetForCausalLM([tmp_path / "a.txt"], build_tokenizer(str(path)), 8, tmp_path)
    assert any("wp changes text" in note and "no bits per byte" in note for note in data.notes)


@pytest.mark.long
def test_a_run_carries_its_tokenizer(program, tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(text_of("byte level"))
    (tmp_path / "a.txt").write_text(LEARN[:40_000])
    flags = "--preset toy --tokenizer-name tok --train-data a.txt --num-steps 4 --warmup-steps 1 "
    flags += "--device cpu --cache-dir cache --sample-tokens 4 --checkpoint-path a.pt"
    program("train_minimal.py", *flags.split())
    (tmp_path / "tok" / "tokenizer.json").unlink()
    program("train_minimal.py", "--resume", "--checkpoint-path", "a.pt", "--num-steps", "6")
    assert "bpb: " in program("eval.py", "--checkpoint-path", "a.pt")
    program("checkpoint.py", "tokenizer", "a.pt", "out.json")
    assert build_tokenizer(str(tmp_path / "out.json")).name == "tok"
    out = program(
        "generate.py", "--checkpoint-path", "a.pt", "--prompt", "def ", "--max-new-tokens", "5"
    )
    assert "def " in out
