"""The three kinds of data as data sets: text, shards of token ids, random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corpus.find_text import find_texts, stdlib_files
from corpus.hashing import hash_of
from corpus.huggingface_tokenizer import HuggingFaceTokenizer
from corpus.read_text import TEXT_COLUMN
from corpus.shards import Source, TokenShards, ToyTokens
from corpus.token_dataset import TokenDataset
from corpus.tokenizer import Tokenizer
from corpus.tokenizing import note_on_documents, tokenize_files
from runtime.files import expanded


class TextDatasetForCausalLM(TokenDataset):
    """Text, tokenized once into a cache.

    file_paths: files, folders and globs (see corpus/find_text.py); none = the Python standard
    library's source. document_separator: the text between two documents of a plain text file; "" =
    each file is one document. text_column: the name of the text in JSON lines and Parquet. add_eos:
    put the tokenizer's end token after each document; False = documents run into each other.
    max_tokens: only the first so many; 0 or None = all. seed: data[i] is window i of a shuffled
    order, the first epoch of training with that data seed; None = the order of the text. Training
    draws windows by its own data seed, whatever this one is. Raises UserError.
    """

    def __init__(
        self,
        file_paths: Sequence[str | Path],
        tokenizer: Tokenizer,
        seq_len: int,
        cache_dir: str | Path = "~/.cache/rosetrainer",
        document_separator: str = "",
        text_column: str = TEXT_COLUMN,
        add_eos: bool = True,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> None:
        files, notes = find_texts(file_paths) if file_paths else (stdlib_files(), [])
        cache = expanded(cache_dir, "--cache-dir")
        shards, made = tokenize_files(
            files, tokenizer, cache, document_separator, text_column, add_eos
        )
        name = f"source of the Python standard library ({len(files)} files)"
        name = ", ".join(map(str, file_paths)) or name
        texts = [(t["path"], t["sha256"], t["bytes"]) for t in made["sources"]]
        source = TokenShards(shards, tokenizer.vocab_size, name, made["key"], texts=texts)
        super().__init__(source, seq_len, 0, _stop(source, 0, max_tokens), tokenizer, seed)
        self.notes = notes + (note_on_documents(made, document_separator) if add_eos else [])
        if isinstance(tokenizer, HuggingFaceTokenizer) and add_eos:
            ends = f"{tokenizer.end_text!r} (id {tokenizer.end_token})"
            self.notes.append(f"documents end with {ends} of tokenizer {tokenizer.name}")
        if not tokenizer.token_bytes.any():
            self.notes.append(
                f"tokenizer {tokenizer.name} changes text before it finds tokens, so there are no "
                "bits per byte"
            )


class FineWebNPYDataset(TokenDataset):
    """Existing shards of token ids, such as those of FineWeb-Edu; needs no tokenizer.

    file_paths: .npy and .bin files, folders of them, globs. max_tokens and seed are as those of
    `TextDatasetForCausalLM`. random_start: the first window starts at a token below seq_len - 1
    that is drawn from the seed (None counts as 0), and all others follow it, so that windows of two
    seeds begin at other tokens. Raises UserError.
    """

    def __init__(
        self,
        file_paths: Sequence[str | Path],
        seq_len: int,
        vocab_size: int = 50257,
        tokenizer: Tokenizer | None = None,
        bin_dtype: str = "auto",
        max_tokens: int | None = None,
        seed: int | None = None,
        random_start: bool = False,
    ) -> None:
        shards = TokenShards(file_paths, vocab_size, bin_dtype=bin_dtype)
        start = hash_of(seed or 0) % (seq_len - 1) if random_start else 0
        start = min(start, shards.num_tokens)
        stop = _stop(shards, start, max_tokens)
        super().__init__(shards, seq_len, start, stop, tokenizer, seed)
        self.notes = list(shards.notes)
        largest = shards.largest_id_seen()
        if tokenizer is None and 4 * (largest + 1) <= vocab_size:
            self.notes.append(
                f"the largest id seen in {shards.name} is {largest:,}, and the model has "
                f"{vocab_size:,} of them; --vocab-size {largest + 1} fits it to what was seen"
            )


class ToyRandomDataset(TokenDataset):
    """Uniformly random tokens. No model can predict unseen ones, so a validation loss clearly below
    ln(vocab_size) means a bug.
    """

    def __init__(
        self, vocab_size: int, seq_len: int, num_tokens: int = 1_000_000, seed: int = 0
    ) -> None:
        super().__init__(ToyTokens(num_tokens, vocab_size, seed), seq_len)


def _stop(source: Source, start: int, max_tokens: int | None) -> int:
    """The end of the first max_tokens tokens from start on; 0 or None = of all."""
    return min(source.num_tokens, start + max_tokens) if max_tokens else source.num_tokens
