"""Tokenizers: `build_tokenizer("bytes")` works anywhere; `build_tokenizer("gpt2")` is OpenAI's
BPE through tiktoken.
"""

from __future__ import annotations

import os
import tempfile
from typing import Protocol

import numpy as np

from config import UserError


class Tokenizer(Protocol):
    """What the rest of the program needs of a tokenizer."""

    name: str
    vocab_size: int
    end_token: int  # put after each document; stands for no byte of text
    token_bytes: np.ndarray  # (vocab_size,) int64: bytes of text that each id stands for

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, 1-D, without any special token."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...


class ByteTokenizer:
    """Each UTF-8 byte is a token; id 256 ends a document. Never needs a file."""

    name, vocab_size, end_token = "bytes", 257, 256

    def __init__(self) -> None:
        self.token_bytes = np.array([1] * 256 + [0])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class GPT2Tokenizer:
    """Byte-pair encoding of GPT-2 (Radford et al. 2019, sec. 2.2), 50257 ids, computed by
    tiktoken.
    """

    name, vocab_size, end_token = "gpt2", 50257, 50256

    def __init__(self) -> None:
        import tiktoken

        try:
            self._bpe = tiktoken.get_encoding("gpt2")
        except (
            Exception
        ) as reason:  # requests raises many kinds, tiktoken ValueError for a wrong hash
            raise UserError(_files_missing(reason)) from reason
        lengths = [len(self._bpe.decode_single_token_bytes(i)) for i in range(self.end_token)]
        self.token_bytes = np.array([*lengths, 0])

    def encode(self, text: str) -> np.ndarray:
        return self._bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        return self._bpe.decode([i for i in ids if i < self.end_token])


def _files_missing(reason: Exception) -> str:
    folder = (
        os.environ.get("TIKTOKEN_CACHE_DIR")
        or os.environ.get("DATA_GYM_CACHE_DIR")
        or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    )
    return (
        "the gpt2 tokenizer needs its two files vocab.bpe and encoder.json: tiktoken looks for "
        "them in "
        f"{folder} (TIKTOKEN_CACHE_DIR names another folder) under the names "
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6, "
        f"and downloading them failed ({type(reason).__name__}); --tokenizer-name bytes works "
        "offline"
    )


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name: "bytes" or "gpt2". Raises UserError for others, and where its
    files can't be had.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer()
    raise UserError(f"tokenizer_name={name!r:.80} is not one of bytes, gpt2")
