"""Tokenizers of Hugging Face: a tokenizer.json, computed by the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from corpus.tokenizer_json import (
    ADDED_END,
    Parts,
    byte_characters,
    complete,
    end_token_of,
    for_rest,
    for_text,
    is_byte_level,
    keeps_text,
    safe_cut,
    special_ids,
    token_bytes,
    vocabulary,
)
from runtime.console import one_line
from runtime.setting_fields import UserError

FILE_FORMAT = "rosetrainer tokenizer 1"  # how a tokenizer is stored, here and in tokenizer.py
# The library has no kinds of errors, and what it calls a panic is no Exception.
_NOT_OF_THE_LIBRARY = (KeyboardInterrupt, SystemExit, GeneratorExit)
_MOST_IDS = 1 << 24  # the largest vocabularies have some 2^18


class HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json. Its ids are those of the library for the text alone: no
    token is put before or after it, and special tokens that stand in the text are text.

    text: of the file. end_token: the id that ends a document. token_bytes is all 0 where the
    tokenizer changes the text (lower case, compatibility forms, white space dropped), so that no
    bits per byte are given; see `tokenizer_json.token_bytes` for the space before each text.
    """

    def __init__(self, name: str, text: str, end_token: int) -> None:
        self.name, self.text, self.end_token = name, text, end_token
        whole: Parts = json.loads(text)
        vocab, self._special = vocabulary(whole), special_ids(whole) | {end_token}
        parts = for_text(whole)
        rest = for_rest(parts)
        self._whole = _library_tokenizer(parts, name)
        self._rest = self._whole if rest is parts else _library_tokenizer(rest, name)
        self.end_text = next((t for t, i in vocab.items() if i == end_token), "")
        self.vocab_size = max(vocab.values()) + 1
        self.token_bytes = token_bytes(whole, vocab, end_token)
        self.is_text = np.zeros(self.vocab_size, bool)  # also where the bytes are not known
        self.is_text[[i for token, i in vocab.items() if token and i not in self._special]] = True
        self.safe_cut = safe_cut(parts, vocab)
        # A byte without a token would be dropped without a word.
        self._incomplete = (
            is_byte_level(parts)
            and keeps_text(parts)
            and not parts.get("normalizer")
            and not byte_characters().keys() <= vocab.keys()
        )
        about = json.dumps([parts, end_token], sort_keys=True)
        self.fingerprint = hashlib.blake2b(about.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self._encode(self._whole, text)

    def encode_rest(self, text: str) -> np.ndarray:
        return self._encode(self._rest, text)

    def _encode(self, library: Any, text: str) -> np.ndarray:
        try:
            # Of the ways to encode, only that of batches leaves out the positions in the text.
            found = library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except _NOT_OF_THE_LIBRARY:
            raise
        except BaseException as reason:
            said = one_line(reason, 100)
            raise UserError(f"tokenizer {self.name}: {said} ({text[:40]!r})") from reason
        ids = np.array(found, np.uint32)
        if self._incomplete and self.token_bytes[ids].clip(0).sum() < len(text.encode()):
            half = len(text) // 2
            if half:  # its own half says which character it is
                self._encode(self._rest, text[:half])
                self._encode(self._rest, text[half:])
            raise UserError(
                f"tokenizer {self.name} has no token for {text[:20]!r}, so that it "
                "would be lost; take a tokenizer that has one for each byte"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._whole.decode([i for i in ids if i not in self._special])

    def to_json(self) -> str:
        record = {"format": FILE_FORMAT, "name": self.name, "end_token": self.end_token}
        return json.dumps({**record, "tokenizer_json": self.text})


def _library_tokenizer(parts: Parts, where: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "a tokenizer.json of Hugging Face needs a package: pip install tokenizers"
        ) from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads don't survive a fork
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(parts))
    except _NOT_OF_THE_LIBRARY:
        raise
    except BaseException as reason:
        raise UserError(
            f"{where}: the tokenizers library can't read it ({one_line(reason, 100)})"
            "; another version of it might: pip install -U tokenizers"
        ) from reason


def read_tokenizer_json(text: str, where: str, config: Parts | None = None) -> HuggingFaceTokenizer:
    """The tokenizer of the text of a tokenizer.json. where: its path, which also names it. config:
    what tokenizer_config.json says, of which `eos_token` counts. A tokenizer without any special
    token gets one more id, which ends documents. Raises UserError if the text can't be read, or has
    special tokens none of which is known to end a document.
    """
    parts: Parts = json.loads(text)
    if complete(parts):
        text = json.dumps(parts, ensure_ascii=False)
    library, vocab = _library_tokenizer(parts, where), vocabulary(parts)
    if not vocab:
        raise UserError(f"{where}: has no tokens; take another tokenizer")
    if max(vocab.values()) >= _MOST_IDS:
        raise UserError(
            f"{where}: has ids up to {max(vocab.values()):,}; the most is {_MOST_IDS:,}"
        )
    for token in (a["content"] for a in parts.get("added_tokens") or []):
        if library.token_to_id(token) != vocab[token]:
            raise UserError(
                f"{where}: {token!r} has the id {vocab[token]} there, but the tokenizers library "
                f"gives it {library.token_to_id(token)}; save it again with that library"
            )
    end_token = end_token_of(parts, vocab, config or {}, where)
    if end_token is None:
        end_token = max(vocab.values()) + 1
        added: Parts = {"id": end_token, "content": ADDED_END, "special": True}
        added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        if isinstance(parts["model"]["vocab"], dict):
            parts["model"]["vocab"][ADDED_END] = end_token
        parts["added_tokens"] = [*(parts.get("added_tokens") or []), added]
        text = json.dumps(parts, ensure_ascii=False)
    path = Path(where)
    return HuggingFaceTokenizer(
        path.resolve().parent.name if path.stem == "tokenizer" else path.stem, text, end_token
    )


def config_beside(path: Path) -> Parts:
    """What tokenizer_config.json and special_tokens_map.json in the folder of a tokenizer.json say
    of its end token; {} without them. Raises UserError for a file that is not JSON.
    """
    found: Parts = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter one wins
        file = path.parent / name
        if not file.is_file():
            continue
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            found |= {k: v for k, v in said.items() if k == "eos_token" and v}
        except (OSError, ValueError, AttributeError) as reason:
            raise UserError(f"{file}: not a JSON object ({str(reason)[:100]})") from reason
    return found
