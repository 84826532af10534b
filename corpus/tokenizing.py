"""Turns text into shards of token ids, as a stream, in parallel workers, and resumable; the bytes
are the same for any number of workers.

`prepare` writes a folder of shards (data/prepare.py); `tokenize_files` keeps such a folder in a
cache, for training on text directly.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    ThreadPoolExecutor,
)
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from corpus.find_text import kind_of
from corpus.huggingface_dataset import HuggingFaceTexts
from corpus.read_text import (
    BLOCK_BYTES,
    TEXT_COLUMN,
    USUAL_SEPARATOR,
    Text,
    in_pieces,
    read_texts,
)
from corpus.tokenizer import Tokenizer
from corpus.tokenizing_workers import encode_in_order
from runtime.locks import lock
from runtime.setting_fields import UserError

MANIFEST, TOKENIZER_FILE, _PROGRESS = "tokens.json", "tokenizer.json", "progress.json"
_FORMAT = "rosetrainer tokens 1"
SHARD_TOKENS = 100_000_000


Sources = Sequence[Path] | HuggingFaceTexts


class _ShardFile:
    """A .npy file of token ids that grows; it gets its final name when it is complete."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        self.temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
        self.file = open(self.temporary, "wb")  # noqa: SIM115
        self._header(10**18)  # room for any count
        self.start = self.file.tell()
        self.tokens = self.bytes = self.documents = self.pieces = self.separators = 0

    def _header(self, count: int) -> None:
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(self.file, about)

    def add(self, piece: list[Text], ids: bytes) -> None:
        self.file.write(ids)
        self.tokens += len(ids) // self.dtype.itemsize
        self.bytes += sum(t.n_bytes for t in piece)
        self.documents += sum(t.ends_document for t in piece)
        self.separators += sum(t.text.count(USUAL_SEPARATOR) for t in piece)
        self.pieces += 1

    def finish(self) -> dict[str, Any]:
        self.file.seek(0)
        self._header(self.tokens)
        assert self.file.tell() == self.start, "NumPy's header changed its size"
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        names = ("tokens", "bytes", "documents", "pieces", "separators")
        return {"file": self.path.name, **{k: getattr(self, k) for k in names}}

    def drop(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def _digest(path: Path) -> dict[str, Any]:
    seen = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                seen.update(block)
            return {"path": str(path), "bytes": file.tell(), "sha256": seen.hexdigest()}
    except OSError as reason:
        raise UserError(f"{path}: cannot be read: {reason.strerror}") from reason


def _describe_job(
    sources: Sources,
    tokenizer: Tokenizer,
    shard_tokens: int,
    workers: int,
    separator: str,
    column: str,
    add_eos: bool = True,
) -> dict[str, Any]:
    """A record of all that determines the bytes of the output. Its entry `key` is a hash of that,
    in which the paths of the sources have no part.
    """
    if isinstance(sources, HuggingFaceTexts):
        digests, kinds = [sources.record], [sources.kind]
    else:
        with ThreadPoolExecutor(workers) as pool:
            digests = list(pool.map(_digest, sources))
        kinds = [kind_of(p)[0] for p in sources]
    decides = [_FORMAT, tokenizer.fingerprint, shard_tokens, BLOCK_BYTES, kinds]
    decides += [d["sha256"] for d in digests]
    if separator:
        decides.append(["separator", separator])
    if column != TEXT_COLUMN:
        decides.append(["column", column])
    if not add_eos:
        decides.append(["no end tokens"])
    return {
        "format": _FORMAT,
        "key": hashlib.blake2b(json.dumps(decides).encode(), digest_size=16).hexdigest(),
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16" if tokenizer.vocab_size <= 65536 else "uint32",
        "sources": digests,
    }


def prepare(
    sources: Sources,
    tokenizer: Tokenizer,
    folder: Path,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 0,
    separator: str = "",
    column: str = TEXT_COLUMN,
) -> dict[str, Any]:
    """Tokenizes the sources and writes the ids as shards into folder, with the end token after each
    document.

    A shard ends with the first piece of text that brings it to shard_tokens or more. A call that
    was killed at any moment and is repeated keeps the finished shards and ends with the same bytes.
    workers: 0 = one per core. separator: the text between two documents of a plain text file.
    column: the name of the text in JSON lines and Parquet. Returns the manifest, which is also
    written as tokens.json. Raises UserError.
    """
    workers = workers or os.cpu_count() or 1
    job = _describe_job(sources, tokenizer, shard_tokens, workers, separator, column)
    texts = _texts_of(sources, tokenizer, separator, column)
    return _write_shards(texts, tokenizer, folder, job, shard_tokens, workers)


def _texts_of(
    sources: Sources, tokenizer: Tokenizer, separator: str, column: str
) -> Iterator[Text]:
    """All texts in their order, long documents in parts where the tokenizer allows that."""
    if isinstance(sources, HuggingFaceTexts):
        yield from sources.texts()
    else:
        for path in sources:
            yield from read_texts(path, separator, column, tokenizer.safe_cut)


def _write_shards(
    texts: Iterator[Text],
    tokenizer: Tokenizer,
    folder: Path,
    job: dict[str, Any],
    shard_tokens: int,
    workers: int,
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    shards = _finished(folder, job)
    if (folder / MANIFEST).exists():
        return json.loads((folder / MANIFEST).read_text())
    dtype = np.dtype("<u2" if job["dtype"] == "uint16" else "<u4")
    for rest in folder.glob(f"*.{os.uname().nodename}.*.tmp"):
        rest.unlink()
    pieces = islice(in_pieces(texts), sum(s["pieces"] for s in shards), None)
    packed = any(kind_of(Path(s["path"]))[1] for s in job["sources"])
    total = None if packed else sum(s["bytes"] for s in job["sources"])
    shard: _ShardFile | None = None
    bar = tqdm(
        total=total, initial=sum(s["bytes"] for s in shards), unit="B", unit_scale=True,
        desc=f"tokenizing ({tokenizer.name})", delay=1,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    try:
        for piece, ids in encode_in_order(pieces, tokenizer, dtype, workers):
            if not (folder / TOKENIZER_FILE).exists():  # written while the workers work
                _write_whole(folder / TOKENIZER_FILE, tokenizer.to_json())
            shard = shard or _ShardFile(folder / f"tokens_{len(shards):06d}.npy", dtype)
            shard.add(piece, ids)
            bar.update(sum(t.n_bytes for t in piece))
            if shard.tokens >= shard_tokens:
                shards.append(shard.finish())
                shard = None
                _write_whole(folder / _PROGRESS, json.dumps({"key": job["key"], "shards": shards}))
        if shard is not None:
            shards.append(shard.finish())
            shard = None
    finally:
        bar.close()
        if shard is not None:
            shard.drop()
    if not shards:
        raise UserError(f"{', '.join(s['path'] for s in job['sources'][:3])}: no text in it")
    names = ("tokens", "bytes", "documents", "separators")
    counts = {k: sum(s.get(k, 0) for s in shards) for k in names}
    manifest = {**job, **counts, "shards": shards}
    _write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
    (folder / _PROGRESS).unlink(missing_ok=True)
    return manifest


def _finished(folder: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards that an earlier call for the same job has finished. Raises UserError if the folder
    has shards of another job.
    """
    for name in (MANIFEST, _PROGRESS):
        if (folder / name).exists():
            earlier = json.loads((folder / name).read_text())
            if earlier["key"] != job["key"]:
                raise UserError(
                    f"{folder} holds the tokens of other text, tokenizer or shard size (see {name} "
                    "there); name another folder, or delete it"
                )
            return list(earlier["shards"])
    return []


def _write_whole(path: Path, content: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def note_on_documents(manifest: dict[str, Any], separator: str) -> list[str]:
    """A note for the log if the usual separator occurs in the text but is not used as one, or if
    the separator that the user gave does not occur; else an empty list.
    """
    kinds = {kind_of(Path(t["path"]))[0] for t in manifest["sources"]}
    if separator and manifest["documents"] <= len(manifest["sources"]):
        return [f"--document-separator {separator!r} parts no text"]
    if not separator and manifest.get("separators") and not kinds <= {".jsonl", ".parquet"}:
        return [
            f"{USUAL_SEPARATOR} stands {manifest['separators']:,} times in the text and is read as "
            f"characters; --document-separator '{USUAL_SEPARATOR}' takes it as the end of a "
            "document"
        ]
    return []


def tokenize_files(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    cache_dir: Path,
    separator: str = "",
    column: str = TEXT_COLUMN,
    add_eos: bool = True,
) -> tuple[list[Path], dict[str, Any]]:
    """Returns (the shards with the token ids of the files, made now or found in the cache; their
    manifest). The manifest's `key` is a hash of all that determines the ids, and its `sources` are
    the files as given. add_eos: put the end token after each document; without, the manifest counts
    no documents.

    The cache is keyed by content and tokenizer. If several processes start together, the first one
    does the work under a file lock and the others wait for it. Raises UserError.
    """
    workers = os.cpu_count() or 1
    job = _describe_job(files, tokenizer, SHARD_TOKENS, workers, separator, column, add_eos)
    texts = _texts_of(files, tokenizer, separator, column)
    if not add_eos:
        texts = (text._replace(ends_document=False) for text in texts)
    folder = cache_dir / f"{Path(tokenizer.name).name}-{job['key']}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(cache_dir / f"{folder.name}.lock", "w") as held:
            lock(held)
            manifest = _write_shards(texts, tokenizer, folder, job, SHARD_TOKENS, workers)
    except OSError as reason:
        raise UserError(
            f"cannot write the token cache {folder}: {reason.strerror}; name another folder with "
            "--cache-dir"
        ) from reason
    return [folder / s["file"] for s in manifest["shards"]], {**manifest, **job}
