"""What the parts of a tokenizer.json of Hugging Face mean for the text: how many bytes each id
stands for, where a long text can be cut, and which token ends a document.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from corpus.read_text import CUT_BEFORE_SPACE, SAFE_CUT
from runtime.setting_fields import UserError

Parts = dict[str, Any]  # the parsed file, or a part of it

SPACE = "\u2581"  # stands for a space in the tokens of SentencePiece
_SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_DOUBLE_FIRST_MARK = {"type": "Replace", "pattern": {"Regex": rf"\A{SPACE}"}, "content": SPACE * 2}
_COMPOSING = ("NFC", "NFD")  # other code points for what is the same text by Unicode's rules
_COMPATIBILITY = ("NFKC", "NFKD")
_KEEPING = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts")
# How GPT-2, cl100k and Llama 3, and Qwen split text. All pieces end at the places of SAFE_CUT.
_GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_OLD_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN_SPLITS = (
    _GPT2_SPLIT,
    _OLD_GPT2_SPLIT,
    _CL100K_SPLIT % r"\p{N}{1,3}",
    _CL100K_SPLIT % r"\p{N}",
)
# Names of the token that ends a document, as published models call it.
_END_TOKENS = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "[SEP]",
)  # fmt: skip
ADDED_END = "<|endoftext|>"
_NO_TEXT = "\0\0"  # before the name of a token that no text may become


def flat(part: Parts | None) -> list[Parts]:
    """The parts of a normalizer, pre-tokenizer or decoder in their order, without `Sequence`s."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    kinds = ("normalizers", "pretokenizers", "decoders", "processors")
    inner: list[Parts] = next((part[kind] for kind in kinds if kind in part), [])
    return [single for one in inner for single in flat(one)]


def complete(parts: Parts) -> bool:
    """Gives ByteLevel parts the fields that some files leave out and the library wants to see, with
    the defaults of its constructor. Returns whether there were any.
    """
    changed = False
    for name in ("pre_tokenizer", "decoder", "post_processor"):
        for part in flat(parts.get(name)):
            for field in ("add_prefix_space", "trim_offsets", "use_regex"):
                if part["type"] == "ByteLevel" and field not in part:
                    part[field] = changed = True
    return changed


def vocabulary(parts: Parts) -> dict[str, int]:
    """All tokens with their ids, special ones too."""
    known = parts["model"]["vocab"]
    vocab = dict(known) if isinstance(known, dict) else {t: i for i, (t, _) in enumerate(known)}
    return vocab | {a["content"]: a["id"] for a in parts.get("added_tokens") or []}


def special_ids(parts: Parts) -> set[int]:
    """The ids that stand for no text: special tokens, and the one of unknown characters."""
    model, vocab = parts["model"], vocabulary(parts)
    found = {a["id"] for a in parts.get("added_tokens") or [] if a["special"]}
    unknown = model.get("unk_id", vocab.get(model.get("unk_token")))
    return found if unknown is None else found | {unknown}


def for_text(parts: Parts) -> Parts:
    """The tokenizer for text alone: it adds nothing, cuts nothing, draws nothing, and does not know
    its special tokens by their names, so that a text in which these stand is like any other.
    """
    model, special = dict(parts["model"]), special_ids(parts)
    model |= {"dropout": None} if "dropout" in model else {}  # it would draw other ids each time
    known = model["vocab"]
    if isinstance(known, dict):
        model["vocab"] = {(_NO_TEXT + t if i in special else t): i for t, i in known.items()}
        if known.get(model.get("unk_token")) in special:
            model["unk_token"] = _NO_TEXT + model["unk_token"]
    else:
        model["vocab"] = [
            [_NO_TEXT + t if i in special else t, score] for i, (t, score) in enumerate(known)
        ]
    nothing = {"truncation": None, "padding": None, "post_processor": None}
    return {**parts, **nothing, "model": model, "added_tokens": _added_words(parts)}


def _starts_text(part: Parts) -> bool:
    """Whether a normalizer acts on the start of a text alone, where it puts a space."""
    return part["type"] == "Prepend" or part == _DOUBLE_FIRST_MARK


def adds_space(parts: Parts) -> bool:
    """Whether each text gets a space before it that is not in it."""
    return any(p["type"] == "Prepend" for p in flat(parts.get("normalizer"))) or any(
        p.get("prepend_scheme", "never") != "never" or p.get("add_prefix_space", False)
        for p in flat(parts.get("pre_tokenizer"))
    )


def for_rest(parts: Parts) -> Parts:
    """The tokenizer for a text that goes on where another ended: it puts no space before it."""
    if not adds_space(parts):
        return parts
    normalizers = [p for p in flat(parts.get("normalizer")) if not _starts_text(p)]
    splits = [dict(p) for p in flat(parts.get("pre_tokenizer"))]
    for p in splits:
        p.pop("add_prefix_space", None)
        if p["type"] == "ByteLevel":
            p["add_prefix_space"] = False
        if p["type"] == "Metaspace":
            p["prepend_scheme"] = "never"
    return {
        **parts,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
    }


def keeps_text(parts: Parts) -> bool:
    """Whether the text can be made of the ids again, but for characters without a token and for
    Unicode's canonical composition.
    """
    model = parts["model"]
    normalizers_keep = all(
        p["type"] in (*_COMPOSING, "ByteLevel") or _starts_text(p) or p == _SPACE_TO_MARK
        for p in flat(parts.get("normalizer"))
    )
    splits_keep = all(
        p["type"] in _KEEPING and p.get("behavior", "Isolated") != "Removed"
        for p in flat(parts.get("pre_tokenizer"))
    )
    whole_words = not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
    words = _added_words(parts)
    # Such a word may swallow spaces beside it, and what follows it is a text with its own space.
    words_keep = not any(a["lstrip"] or a["rstrip"] for a in words)
    words_keep &= not (words and adds_space(parts))
    return normalizers_keep and splits_keep and whole_words and words_keep


def _added_words(parts: Parts) -> list[Parts]:
    """The added tokens that are found in text before all others."""
    return [a for a in parts.get("added_tokens") or [] if not a["special"]]


def is_byte_level(parts: Parts) -> bool:
    """Whether the characters of tokens stand for bytes, as in GPT-2's vocabulary."""
    every = flat(parts.get("pre_tokenizer")) + flat(parts.get("normalizer"))
    return any(p["type"] == "ByteLevel" for p in every)


def _marks_spaces(parts: Parts) -> bool:
    splits, normalizers = flat(parts.get("pre_tokenizer")), flat(parts.get("normalizer"))
    return any(p["type"] == "Metaspace" for p in splits) or _SPACE_TO_MARK in normalizers


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's vocabulary: printable ones of Latin-1 for
    themselves, then those from U+0100 on for the other bytes in their order (Radford et al. 2019,
    their encoder.py).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def token_bytes(parts: Parts, vocab: dict[str, int], end_token: int) -> np.ndarray:
    """The bytes of text that each id stands for: (largest id + 1,) int64, all 0 where the text
    can't be made of the ids again.

    Special and unknown tokens stand for none. Where each text gets a space before it that is not in
    it, the token that ends the text before takes that byte back: it stands for -1.
    """
    table = np.zeros(max(vocab.values()) + 1, np.int64)
    if not keeps_text(parts):
        return table
    model, alphabet = parts["model"], byte_characters() if is_byte_level(parts) else {}
    marked, by_bytes = _marks_spaces(parts), model.get("byte_fallback")
    for token, i in vocab.items():
        if by_bytes and re.fullmatch("<0x[0-9A-F]{2}>", token):
            table[i] = 1
        elif alphabet and all(c in alphabet for c in token):
            table[i] = len(token)
        else:
            table[i] = len((token.replace(SPACE, " ") if marked else token).encode())
    for added in parts.get("added_tokens") or []:
        table[added["id"]] = len(added["content"].encode())
    table[list(special_ids(parts))] = 0
    table[end_token] = -1 if adds_space(parts) else 0
    return table


def safe_cut(parts: Parts, vocab: dict[str, int]) -> re.Pattern[str] | None:
    """The places where a text can be cut so that its pieces have the ids of the uncut text, if all
    but the first are encoded by the tokenizer `for_rest`. None where no such place is known.
    """
    normalizers, splits = flat(parts.get("normalizer")), flat(parts.get("pre_tokenizer"))
    simple = (*_COMPOSING, *_COMPATIBILITY)
    local = all(p["type"] in simple or _starts_text(p) or p == _SPACE_TO_MARK for p in normalizers)
    if not local or _added_words(parts):
        return None
    if splits and splits[-1]["type"] == "ByteLevel":
        first = splits[0]
        known = first["type"] == "Split" and first["pattern"].get("Regex") in _KNOWN_SPLITS
        plain = known and first["behavior"] == "Isolated" and not first["invert"]
        if (len(splits) == 1 and first.get("use_regex", True)) or (len(splits) == 2 and plain):
            return CUT_BEFORE_SPACE if normalizers else SAFE_CUT
        return None
    if not _marks_spaces(parts) or any(p["type"] != "Metaspace" for p in splits):
        return None
    # No token reaches over a place between something visible and a space: then merges on the two
    # sides don't depend on each other, and the likeliest tokens of a text are those of its sides.
    across = re.compile(f"[^{SPACE}]{SPACE}")
    if SPACE not in vocab or any(across.search(token) for token in vocab):
        return None
    return CUT_BEFORE_SPACE


def end_token_of(parts: Parts, vocab: dict[str, int], config: Parts, where: str) -> int | None:
    """The id of the token that ends a document: the one that `config` (tokenizer_config.json or
    special_tokens_map.json) calls eos_token, or else a usual name. None if the tokenizer has no
    special token at all. where: the file, for error messages. Raises UserError if it has some and
    none is known to end a document.
    """
    named = config.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if named:
        if named not in vocab:
            raise UserError(f"{where}: eos_token {named!r} is no token of it; correct its name")
        return vocab[named]
    special = [a["content"] for a in parts.get("added_tokens") or [] if a["special"]]
    for name in _END_TOKENS:
        if name in special:
            return vocab[name]
    if special:
        raise UserError(
            f"{where}: which token ends a document? Its special tokens are {', '.join(special[:8])}"
            f"{', ...' if len(special) > 8 else ''}; name one in tokenizer_config.json beside it: "
            '{"eos_token": "..."}'
        )
    return None
