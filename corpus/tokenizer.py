"""Tokenizers: bytes, the encodings of tiktoken (GPT-2's and its successors), trained BPE files, and
those of Hugging Face and SentencePiece.

`build_tokenizer(name_or_path)` returns one. Its `to_json` text holds all of it, so a checkpoint
that stores this text can decode its own samples anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
import regex

from corpus.huggingface_tokenizer import (
    FILE_FORMAT,
    HuggingFaceTokenizer,
    config_beside,
    read_tokenizer_json,
)
from corpus.read_text import SAFE_CUT
from corpus.sentencepiece_model import read_sentencepiece
from runtime.files import write_atomically
from runtime.setting_fields import UserError


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    name: str
    vocab_size: int
    end_token: int  # put after each document; stands for no byte of text
    token_bytes: np.ndarray  # (vocab_size,) int64: bytes of text that each id stands for
    is_text: np.ndarray  # (vocab_size,) bool: ids that stand for some text
    fingerprint: str  # two tokenizers that give some text different ids differ in it
    safe_cut: re.Pattern[str] | None  # where a text can be cut for `encode_rest`; None = nowhere

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, without any special token: (n,) of an integer type. Raises UserError
        for a text that has none.
        """
        ...

    def encode_rest(self, text: str) -> np.ndarray:
        """The ids of a text that goes on at a `safe_cut` of a document: together with those of the
        text before it they are the ids of the document.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def to_json(self) -> str:
        """The whole tokenizer as JSON, for `tokenizer_from_json`."""
        ...


class ByteTokenizer:
    """Each UTF-8 byte is a token; id 256 ends a document. Never needs a file."""

    name, vocab_size, end_token, fingerprint = "bytes", 257, 256, "bytes"
    safe_cut: re.Pattern[str] | None = SAFE_CUT

    def __init__(self) -> None:
        self.token_bytes = np.array([1] * 256 + [0])
        self.is_text = self.token_bytes > 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    encode_rest = encode

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"format": FILE_FORMAT, "name": "bytes"})


class BPETokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) of bytes, computed by tiktoken.

    pattern: the regular expression that splits text before merging. ranks: token to id, in the
    order of the merges. end_token: an id that is not in ranks. All ids are below vocab_size.
    """

    safe_cut: re.Pattern[str] | None = SAFE_CUT

    def __init__(
        self, name: str, pattern: str, ranks: dict[bytes, int], end_token: int, vocab_size: int
    ) -> None:
        import tiktoken

        self.name, self.end_token, self.vocab_size = name, end_token, vocab_size
        self._pattern, self._ranks = pattern, ranks
        self._bpe = tiktoken.Encoding(
            name,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": end_token},
        )
        self._texts: dict[int, bytes] = {i: token for token, i in ranks.items()}
        self.token_bytes = np.zeros(vocab_size, np.int64)
        for token, i in ranks.items():
            self.token_bytes[i] = len(token)
        self.is_text = self.token_bytes > 0
        self.fingerprint = hashlib.blake2b(
            json.dumps(self._record()).encode(), digest_size=16
        ).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        try:
            return self._bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its regex engine fails on about a million white-space characters
            pieces = (m.group() for m in regex.finditer(self._pattern, text))
            ids = [i for piece in pieces for i in self._bpe._encode_single_piece(piece)]
            return np.array(ids, np.uint32)

    encode_rest = encode

    def decode(self, ids: list[int]) -> str:
        return b"".join(self._texts.get(i, b"") for i in ids).decode(errors="replace")

    def _record(self) -> dict[str, object]:
        tokens = [self._texts.get(i) for i in range(self.vocab_size)]
        coded = [None if t is None else base64.b64encode(t).decode() for t in tokens]
        return {"pattern": self._pattern, "end_token": self.end_token, "tokens": coded}

    def to_json(self) -> str:
        return json.dumps({"format": FILE_FORMAT, "name": self.name, **self._record()})


def tokenizer_from_json(text: str, where: str) -> Tokenizer:
    """Returns the tokenizer that `to_json` has written, or that of a tokenizer.json of Hugging
    Face. where: the file that the text is from, for error messages; a tokenizer_config.json beside
    it may name the end token of the latter. Raises UserError for any other text.
    """
    try:
        record = json.loads(text)
        if isinstance(record, dict) and isinstance(record.get("model"), dict):
            return read_tokenizer_json(text, where, config_beside(Path(where)))
        if not isinstance(record, dict) or record.get("format") != FILE_FORMAT:
            raise ValueError("it does not say so")
        if record["name"] == "bytes":
            return ByteTokenizer()
        if "tokenizer_json" in record:
            return HuggingFaceTokenizer(
                str(record["name"]), record["tokenizer_json"], int(record["end_token"])
            )
        tokens = [None if t is None else base64.b64decode(t) for t in record["tokens"]]
        ranks = {t: i for i, t in enumerate(tokens) if t is not None}
        missing = 256 - sum(len(t) == 1 for t in ranks)
        if missing or len(ranks) != sum(t is not None for t in tokens):
            raise ValueError(f"{missing} of the 256 bytes missing, or tokens twice")
        if type(record["end_token"]) is not int or record["end_token"] in ranks.values():
            raise ValueError("the end token is one of the text")
        return BPETokenizer(
            str(record["name"]), record["pattern"], ranks, record["end_token"], len(tokens)
        )
    except UserError:
        raise
    except Exception as reason:  # a damaged file may fail in json, base64 or tiktoken
        raise UserError(
            f"{where}: not a tokenizer file ({type(reason).__name__}: {str(reason)[:100]}); "
            "data/train_tokenizer.py makes them"
        ) from reason


def build_tokenizer(name_or_path: str) -> Tokenizer:
    """Returns the tokenizer "bytes", a tiktoken encoding by its name ("gpt2"), or that of a file:
    one made by data/train_tokenizer.py, a tokenizer.json of Hugging Face or a folder with one, or a
    model of SentencePiece.

    Raises UserError for any other name, and if the files of an encoding are not here and can't be
    downloaded.
    """
    import tiktoken

    if name_or_path == "bytes":
        return ByteTokenizer()
    if name_or_path in tiktoken.list_encoding_names():
        try:
            known = tiktoken.get_encoding(name_or_path)
        except Exception as reason:  # requests raises many kinds, tiktoken ValueError
            raise UserError(_files_missing(name_or_path, reason)) from reason
        ranks = known._mergeable_ranks
        return BPETokenizer(name_or_path, known._pat_str, ranks, known.eot_token, known.n_vocab)
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{name_or_path}: is a folder without a tokenizer.json; name a file")
    if path.is_file():
        if path.suffix == ".model":
            return read_sentencepiece(path)
        try:
            return tokenizer_from_json(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as reason:
            raise UserError(
                f"{name_or_path}: not a tokenizer file ({reason}); data/train_tokenizer.py makes "
                "them"
            ) from reason
    raise UserError(
        f"tokenizer_name={name_or_path!r:.80} is neither a file nor one of bytes, "
        f"{', '.join(sorted(tiktoken.list_encoding_names()))}"
    )


def stored_tokenizer(stored: str, name: str, where: str, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that a checkpoint stores, else the one called `name`, else None.

    stored: the JSON of the tokenizer in the checkpoint, "" if it has none. where: the checkpoint,
    for error messages. Raises UserError if both are given and differ, or if the tokenizer has more
    than vocab_size ids.
    """
    kept = tokenizer_from_json(stored, where) if stored else None
    named = build_tokenizer(name) if name else None
    if kept and named and kept.fingerprint != named.fingerprint:
        raise UserError(f"tokenizer_name={name}, but {where} was trained with {kept.name}")
    chosen = kept or named
    if chosen and chosen.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {chosen.name} has {chosen.vocab_size} ids, but the model of {where} knows "
            f"{vocab_size}; it was trained with another one"
        )
    return chosen


def _files_missing(name: str, reason: Exception) -> str:
    folder = (
        os.environ.get("TIKTOKEN_CACHE_DIR")
        or os.environ.get("DATA_GYM_CACHE_DIR")
        or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    )
    if name == "gpt2":
        files = (
            "two files vocab.bpe and encoder.json, there named "
            "6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
        )
    else:
        files = f"file {name}.tiktoken, there named by the SHA-1 of its address"
    return (
        f"the {name} tokenizer needs its {files}: tiktoken looks for them in {folder} "
        "(TIKTOKEN_CACHE_DIR names another folder), and downloading them failed "
        f"({type(reason).__name__}); --tokenizer-name bytes works offline"
    )


def write_tokenizer_file(stored: str, path: str | Path, to: Path) -> None:
    """Writes a tokenizer to the file `to`. stored: its JSON from the checkpoint at `path`. Raises
    UserError if that is no tokenizer or the file can't be written.
    """
    tokenizer_from_json(stored, f"the tokenizer in {path}")  # raises for any other text
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, stored.encode())
    except OSError as reason:
        raise UserError(
            f"cannot write the tokenizer of {path} to {to}: {reason.strerror}"
        ) from None
