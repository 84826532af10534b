"""Tokenizers of ours as files of Hugging Face (tokenizer.json), and back out of such a folder."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

from conversion.huggingface import import_transformers
from corpus.tokenizer import Tokenizer, build_tokenizer, tokenizer_from_json
from corpus.tokenizer_json import byte_characters
from runtime.setting_fields import UserError

END = "<|endoftext|>"
FILE, OURS = "tokenizer.json", "rosetrainer_tokenizer.json"
# Patterns by which GPT-2's text is split; the library's ByteLevel has one of the same effect.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# What tokenizers have disagreed on: contractions, runs of white space, line ends, digits, scripts,
# combining marks, emoji with joiners, letters beyond 16 bits, controls, an end in blanks.
SAMPLE = (
    "Every effort moves you: don't, we'll, I'VE they're\n\n\n  def f(x):\n\t\treturn x**2 # 1\r\n"
    "         many blanks\u00a0no-break\u2003em\u3000ideographic\u200bzero 3.14159 007 \u00bd\u0663"
    "\nna\u00efve cafe\u0301 n\u0303o\u0308 \u1e9e\ufb01 \u05e9\u05dc\u05d5\u05dd "
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u65e5\u672c\u8a9e \ud55c"
    "\uad6d\uc5b4\n\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 "
    "\U0001d54f\u00ac\u2260 <html>&amp;</html> $100,000.00 (a+b)/c == d;;; \x00\x07\x1c\x85 end   "
    "\n \n   "
)


def merges_of(ranks: dict[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The pairs whose merges make the tokens of more than one byte, in the order of the ranks, and
    whether each token is made by the merges before it.

    Byte-pair encoding merges what ranks lowest first, leftmost first. By the time that a token can
    be made, the merges of lower rank are done, and those inside its bytes are the same in any text:
    so the only pair is what they leave of its bytes alone. If that is more than two parts, the
    token is made of later ones, or found as a whole piece: then all pairs are listed.
    """
    merges, in_order = list[tuple[bytes, bytes]](), True
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            lowest = min(found)
            if lowest >= rank:
                break
            i = found.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        elif len(parts) > 2:
            in_order = False
            pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
            merges += [(a, b) for a, b in pairs if a in ranks and b in ranks]
    return merges, in_order


def huggingface_json(tokenizer: Tokenizer) -> str:
    """The text of the tokenizer.json that gives the same ids. Raises UserError for a kind of
    tokenizer that can't be written so.
    """
    record = json.loads(tokenizer.to_json())
    if kept := record.get("tokenizer_json"):
        return str(kept)
    if record.get("name") == "bytes":
        ranks = {bytes([b]): b for b in range(256)}
        split: list[dict[str, Any]] = []
    elif {"pattern", "tokens"} <= record.keys():
        coded = enumerate(record["tokens"])
        ranks = {base64.b64decode(t): i for i, t in coded if t is not None}
        regex = {"type": "Split", "pattern": {"Regex": record["pattern"]}}
        split = [{**regex, "behavior": "Isolated", "invert": False}]
    else:
        raise UserError(f"the tokenizer {tokenizer.name} has no form of Hugging Face")
    gpt2 = record.get("pattern") == _GPT2_PATTERN
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [] if gpt2 else split
    before = [*steps, {**levels, "use_regex": gpt2}]
    chars = {byte: character for character, byte in byte_characters().items()}
    merges, in_order = merges_of(ranks)
    texts = {token: "".join(chars[b] for b in token) for token in ranks}
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    written = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.end_token, "content": END, **special, "special": True}],
        "normalizer": None,
        "pre_tokenizer": before[0]
        if len(before) == 1
        else {"type": "Sequence", "pretokenizers": before},
        "post_processor": None,
        "decoder": {**levels, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": not in_order,  # tiktoken takes a whole piece that is a token first
            "vocab": {texts[token]: i for token, i in ranks.items()} | {END: tokenizer.end_token},
            "merges": [[texts[a], texts[b]] for a, b in merges],
        },
    }
    return json.dumps(written, ensure_ascii=False, indent=1)


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, longest: int, loader: str = "AutoTokenizer"
) -> None:
    """Writes the files of the tokenizer into a folder, so that transformers gives the ids that it
    gives. longest: the longest input of the model, tokens; loader: the class that reads it back.
    Raises UserError if a sample of text then has other ids.
    """
    text = huggingface_json(tokenizer)
    end = _text_of(json.loads(text), tokenizer.end_token)
    ends = {"bos_token": end, "eos_token": end} if end else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        **ends,
    }
    (folder / FILE).write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / OURS).write_text(tokenizer.to_json(), encoding="utf-8")
    theirs = getattr(import_transformers(), loader).from_pretrained(str(folder))
    ours = tokenizer.encode(SAMPLE).tolist()
    found = theirs(SAMPLE, add_special_tokens=False)["input_ids"]
    if found != ours:
        at = next(
            i for i, (a, b) in enumerate(zip([*ours, -1], [*found, -1], strict=False)) if a != b
        )
        raise UserError(
            f"the tokenizer {tokenizer.name} gives a sample of text {len(ours)} ids, and as "
            f"{FILE} {len(found)}, which differ from the one at {at} on; nothing was written"
        )


def _text_of(record: dict[str, Any], i: int) -> str:
    """The text of an id in a tokenizer.json; "" if it has none."""
    added = {t["id"]: t["content"] for t in record.get("added_tokens") or []}
    vocab = record.get("model", {}).get("vocab", {})
    known = {v: k for k, v in vocab.items()} if isinstance(vocab, dict) else {}
    return str(added.get(i, known.get(i, "")))


def tokenizer_in(folder: Path, vocab_size: int) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer in a folder of Hugging Face, None if it has none that can be used, and notes
    about it. A folder that was exported here has our own beside it, and one with GPT-2's vocabulary
    has "gpt2".
    """
    path, notes = folder / FILE, list[str]()
    if not path.is_file() and not (folder / "vocab.json").is_file():
        return None, [f"{folder} has no {FILE}: no tokenizer"]
    try:
        tokenizer = _exported(folder) or _gpt2(folder)
        if tokenizer is None and path.is_file():
            tokenizer = build_tokenizer(str(path))
    except (UserError, OSError, ValueError) as reason:
        return None, [f"no tokenizer: {reason}"]
    except (TypeError, AttributeError, LookupError) as reason:  # JSON, but of another form
        return None, [f"no tokenizer: {path} is damaged ({type(reason).__name__}: {reason})"]
    if tokenizer is None:
        return None, [f"{folder} has a vocabulary that is not GPT-2's, but no {FILE}: no tokenizer"]
    if tokenizer.vocab_size > vocab_size:
        notes.append(
            f"no tokenizer: that of {folder} has {tokenizer.vocab_size} ids, the model {vocab_size}"
        )
        return None, notes
    return tokenizer, notes


def _exported(folder: Path) -> Tokenizer | None:
    """Our tokenizer in a folder that was exported here, if tokenizer.json is still what it was."""
    if not (folder / OURS).is_file() or not (folder / FILE).is_file():
        return None
    ours = tokenizer_from_json((folder / OURS).read_text(encoding="utf-8"), str(folder / OURS))
    same = huggingface_json(ours) == (folder / FILE).read_text(encoding="utf-8")
    return ours if same else None


def _gpt2(folder: Path) -> Tokenizer | None:
    """The tokenizer "gpt2" if the folder has exactly its vocabulary, and its files are here."""
    if (folder / FILE).is_file():
        vocab = json.loads((folder / FILE).read_text(encoding="utf-8"))["model"].get("vocab")
    else:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    if not isinstance(vocab, dict) or len(vocab) not in (50256, 50257):
        return None
    try:
        ours = build_tokenizer("gpt2")
    except UserError:
        return None
    known = json.loads(huggingface_json(ours))["model"]["vocab"]
    return ours if {**known, **vocab} == known else None
