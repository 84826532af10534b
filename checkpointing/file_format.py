"""One checkpoint file on disk: written in full, verified to its last byte, and read without running
code from it.

The format is torch's own, so `torch.load(path, weights_only=True)` reads it. What is added is a
checksum: the SHA-256 of all other bytes, in the place where a zip archive has its comment. Reading
is done here and not by torch.load, which verifies no checksum, and takes the memory that a file
claims to need before it knows that the claim is true.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from checkpointing.safe_pickle import (
    LARGEST_PICKLE,
    LARGEST_TREE,
    SafeUnpickler,
    TensorRef,
    size_of,
)
from runtime.console import one_line
from runtime.setting_fields import UserError

_CHECKSUM_MARK = b"sha256:"
_CHECKSUM_BYTES = len(_CHECKSUM_MARK) + 64
_PART = 1 << 20  # bytes hashed at once


class Unreadable(UserError):
    """Raised for a checkpoint file that does not exist, is damaged, or is not a checkpoint."""


def tensor_bytes(tree: Any) -> int:
    """The bytes of all tensors in nested dicts, in memory or still in a file (TensorRef)."""
    if isinstance(tree, dict):
        return sum(tensor_bytes(v) for v in tree.values())
    return tree.nbytes if isinstance(tree, (torch.Tensor, TensorRef)) else 0


class _ChecksumWriter:
    """The file object that torch.save writes to: hashes all bytes that pass, and holds back the
    last two. They are the length of the zip comment, which `seal` replaces.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.held = file, hashlib.sha256(), b""

    def write(self, data: bytes) -> int:
        if len(data) < 2:
            whole = self.held + data
            self._pass_on(whole[:-2])
            self.held = whole[-2:]
        else:
            self._pass_on(self.held)
            self._pass_on(memoryview(data)[:-2])
            self.held = bytes(data[-2:])
        return len(data)

    def _pass_on(self, data: bytes | memoryview) -> None:
        self.hash.update(data)
        self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> None:
        assert self.held == b"\0\0", "torch.save writes archives without a comment"
        self._pass_on(struct.pack("<H", _CHECKSUM_BYTES))
        self.file.write(_CHECKSUM_MARK + self.hash.hexdigest().encode())


def write_with_checksum(path: Path, content: dict[str, Any]) -> None:
    """Writes content, nested dicts of tensors and plain values, to a new file at `path`. It is on
    disk when this returns. Raises OSError, or RuntimeError from torch.save.
    """
    with open(path, "wb") as file:
        sealing = _ChecksumWriter(file)
        torch.save(content, sealing)  # type: ignore[arg-type]  # needs no more than write, flush
        sealing.seal()
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def open_verified(path: str | Path) -> Iterator[CheckpointReader]:
    """Context manager that opens a file, verifies the checksum over all its bytes, and yields its
    CheckpointReader. It goes on reading that file, even if another one takes the name meanwhile.
    Raises Unreadable.
    """
    if not os.path.isfile(path):
        raise Unreadable(
            f"{path}: " + ("not a plain file" if os.path.exists(path) else "no such checkpoint")
        )
    with ExitStack() as stack:
        with as_unreadable(path):
            file = stack.enter_context(open(path, "rb"))
            _verify_checksum(file)
            contents = CheckpointReader(file, path)
        yield contents


@contextmanager
def as_unreadable(path: str | Path) -> Iterator[None]:
    """Inside this context manager, any error but MemoryError means that the file at `path` is
    damaged or not a checkpoint: it becomes an Unreadable that names the file.
    """
    try:
        yield
    except MemoryError:
        raise
    except UserError as reason:
        raise Unreadable(printable(f"{path}: {reason}")) from None
    except Exception as reason:  # a crafted file takes zipfile and the unpickler to many places
        what = f"{type(reason).__name__}: {one_line(reason, 120)}"
        raise Unreadable(printable(f"{path}: not a checkpoint, or damaged ({what})")) from reason


def printable(text: str) -> str:
    """The text on one line, with control characters and the like written as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_sealed(file: IO[bytes]) -> bool:
    """Whether an open file ends in a checksum, as a checkpoint does; not whether that is right."""
    return _seal_of(file)[1].startswith(_CHECKSUM_MARK)


def _seal_of(file: IO[bytes]) -> tuple[int, bytes]:
    """The number of bytes before the checksum (below 0 in a file that is too short) and those at
    the place of the checksum.
    """
    before = file.seek(0, os.SEEK_END) - _CHECKSUM_BYTES
    file.seek(max(before, 0))
    return before, file.read(_CHECKSUM_BYTES)


def _verify_checksum(file: IO[bytes]) -> None:
    left, seal = _seal_of(file)
    if left < 0 or not seal.startswith(_CHECKSUM_MARK):
        raise UserError("no checksum at its end: cut off, or not a checkpoint of this program")
    file.seek(0)
    digest, part = hashlib.sha256(), memoryview(bytearray(_PART))
    while left:
        n = file.readinto(part[: min(left, _PART)])  # type: ignore[attr-defined]
        if not n:
            raise UserError("it shrinks while it is read")
        digest.update(part[:n])
        left -= n
    if seal != _CHECKSUM_MARK + digest.hexdigest().encode():
        raise UserError("damaged: its bytes do not have the checksum stored with them")


class CheckpointReader:
    """The content of an open checkpoint file. `tree` has a TensorRef in the place of each tensor. A
    checksum proves that a file is as it was written, not that its writer meant well, so nothing
    that it claims is believed without a check.
    """

    def __init__(self, file: IO[bytes], path: str | Path) -> None:
        self.file, self.path, self.size = file, path, os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [m.filename for m in members]
            root = names[0].split("/")[0]
            self.records = {m.filename[len(root) + 1 :]: m for m in members}
            known = r"(data\.pkl|data/\d+|version|byteorder|\.\w+|\.data/serialization_id)"
            for name in names:
                if not re.fullmatch(re.escape(root) + "/" + known, name):
                    raise UserError(f"a part named {name!r:.80}, which no checkpoint has")
            if len(set(names)) < len(names) or "data.pkl" not in self.records:
                raise UserError("its parts are doubled or missing")
            if any(m.compress_type or m.file_size != m.compress_size for m in members):
                raise UserError("compressed parts, which no checkpoint has")
            if sum(m.file_size for m in members) > self.size:
                raise UserError("parts that claim to be larger than the file")
            if self.records["data.pkl"].file_size > LARGEST_PICKLE:
                raise UserError("a description of absurd size")
            if archive.read(f"{root}/byteorder") != b"little":
                raise UserError("written on a big-endian machine")
            with archive.open(f"{root}/data.pkl") as pickled:
                self.tree = SafeUnpickler(pickled, self.records).load()
        if size_of(self.tree) > LARGEST_TREE:
            raise UserError("a description of absurd size")
        if tensor_bytes(self.tree) > self.size:
            raise UserError("tensors that share their numbers, which no checkpoint has")

    def read(self, tree: Any) -> Any:
        """Returns this part of `tree` with tensors on the CPU in place of TensorRefs. Raises
        Unreadable.
        """
        if isinstance(tree, dict):
            return {k: self.read(v) for k, v in tree.items()}
        if not isinstance(tree, TensorRef):
            return tree
        with as_unreadable(self.path):
            return self._tensor(tree)

    def _tensor(self, stored: TensorRef) -> torch.Tensor:
        header = self.records[stored.record].header_offset
        self.file.seek(header)
        name, extra = struct.unpack("<HH", self.file.read(30)[26:])
        position = header + 30 + name + extra + stored.offset * stored.dtype.itemsize
        if position + stored.nbytes > self.size:
            raise UserError("a tensor that reaches beyond the end of the file")
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        into, left = tensor.view(-1).view(torch.uint8).numpy(), stored.nbytes
        self.file.seek(position)
        while left:
            n = self.file.readinto(into[-left:].data)  # type: ignore[attr-defined]
            if not n:
                raise UserError("it shrinks while it is read")
            left -= n
        return tensor
