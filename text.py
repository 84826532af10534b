"""Text files to one file of token ids, kept in a cache: tokenized once, read by position ever
after.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError
from tokenizer import Tokenizer

_BLOCK_BYTES = 4 << 20  # text is tokenized in pieces of about this size
_STDLIB_LEAST_BYTES = 1_000_000


def stdlib_files() -> list[Path]:
    """The Python standard library's source without its tests, in an order that mixes its
    packages. Raises UserError.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [
        p
        for p in root.rglob("*.py")
        if not skip & set(p.relative_to(root).parts) and p.stat().st_size
    ]
    found = sum(p.stat().st_size for p in files)
    if found < _STDLIB_LEAST_BYTES:
        raise UserError(
            f"this Python has only {found} bytes of its standard library's source in {root}, too "
            "little to "
            "train on; give your own text with --train-data FILE, or --use-toy-data"
        )
    return sorted(
        files, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest()
    )


def tokenize_files(files: Sequence[Path], tokenizer: Tokenizer, cache_dir: Path) -> Path:
    """The .npy of the files' token ids, each file followed by the end token, made now or found in
    the cache.

    Keyed by content and tokenizer. Processes that start together share the work: the first one does
    it under a file lock, the others wait. Raises UserError for files that can't be read or are not
    text, naming file and position.
    """
    key = hashlib.blake2b(tokenizer.name.encode(), digest_size=16)
    for path in files:
        try:
            with open(path, "rb") as file:
                key.update(
                    hashlib.file_digest(file, "sha256").digest()
                    if sys.version_info >= (3, 11)
                    else hashlib.sha256(file.read()).digest()
                )
        except OSError as reason:
            raise UserError(f"{path}: cannot be read: {reason.strerror}") from reason
    target = cache_dir / f"{tokenizer.name}-{key.hexdigest()}.npy"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _write_tokens(files, tokenizer, target)
    except OSError as reason:
        raise UserError(
            f"cannot write the token cache {target}: {reason.strerror}; name another folder with "
            "--cache-dir"
        ) from reason
    return target


def _write_tokens(files: Sequence[Path], tokenizer: Tokenizer, target: Path) -> None:
    temporary = target.with_suffix(
        f".{os.getpid()}.{os.uname().nodename}.tmp"
    )  # its own, should a lock not hold
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
    end = np.array([tokenizer.end_token], dtype)
    header = {"descr": dtype.str, "fortran_order": False}
    try:
        with (
            open(temporary, "wb") as out,
            tqdm(
                total=sum(p.stat().st_size for p in files),
                unit="B",
                unit_scale=True,
                desc="tokenizing",
                delay=1,
                mininterval=0.1 if sys.stderr.isatty() else 10,
            ) as bar,
        ):
            np.lib.format.write_array_header_1_0(
                out, {**header, "shape": (10**18,)}
            )  # room for any count
            data_start, count = out.tell(), 0
            for path in files:
                for text, size in _text_pieces(path):
                    ids = tokenizer.encode(text).astype(dtype)
                    out.write(ids.tobytes())
                    count += len(ids)
                    bar.update(size)
                out.write(end.tobytes())
                count += 1
            out.seek(0)
            np.lib.format.write_array_header_1_0(out, {**header, "shape": (count,)})
            assert out.tell() == data_start, "NumPy's header grew"
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _text_pieces(path: Path) -> Iterator[tuple[str, int]]:
    """(text, its bytes) piece by piece. Cut only where no tokenizer merges across, so the ids are
    those of the whole.

    That is after a line break between a visible character and an ASCII letter: the patterns that
    BPE tokenizers split text by (GPT-2's and its successors') never match across such a place.
    """
    kept, done = b"", 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            if (nul := block.find(0)) >= 0:
                raise UserError(
                    f"{path}: byte {done + len(kept) + nul} is NUL; is this a text file?"
                )
            kept += block
            cuts = [m.end() for m in re.finditer(rb"[!-~]\n(?=[A-Za-z])", kept)]
            if cuts:
                yield _decoded(path, kept[: cuts[-1]], done), cuts[-1]
                kept, done = kept[cuts[-1] :], done + cuts[-1]
    if done + len(kept) == 0:
        raise UserError(f"{path} is empty; give a file with text")
    if kept:
        yield _decoded(path, kept, done), len(kept)


def _decoded(path: Path, data: bytes, position: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as reason:
        raise UserError(
            f"{path}: byte {position + reason.start} is {data[reason.start]:#04x}, not UTF-8; "
            "convert it first, for example with iconv"
        ) from reason
