"""One checkpoint file on disk: written whole, checked to its last byte, and read without running
code from it.

The format is torch's own, so `torch.load(path, weights_only=True)` reads it. What is added is a
seal: the SHA-256 of all other bytes, in the place where a zip archive has its comment. Reading is
done here and not by torch.load, which checks no checksum, and takes the memory that a file claims
to need before it knows that the file is true.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from runtime.fields import UserError

_CHECKSUM_MARK = b"sha256:"
_CHECKSUM_BYTES = len(_CHECKSUM_MARK) + 64
_PART = 1 << 20  # bytes hashed at once
_LARGEST_PICKLE = 1 << 24  # names, settings and a tokenizer; those of GPT-2 XL take 0.2 MB
_MOST_INSTRUCTIONS = 1_000_000  # in it
_MOST_DIMENSIONS = 8
_LARGEST_TREE = 1_000_000  # as size_of counts
_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


@dataclass(frozen=True)
class TensorRef:
    """A tensor that is still in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    record: str  # its part of the archive
    offset: int  # in elements

    @property
    def nbytes(self) -> int:
        """Memory that it takes when it is read."""
        return math.prod(self.shape) * self.dtype.itemsize


class Unreadable(UserError):
    """There is no such file, or it is not as it was written."""


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts, stored or in memory."""
    if isinstance(tree, dict):
        return sum(tensor_bytes(v) for v in tree.values())
    return tree.nbytes if isinstance(tree, (torch.Tensor, TensorRef)) else 0


class _ChecksumWriter:
    """What torch.save writes into: hashes all that passes, and holds the last two bytes back.
    They are the length of the comment.
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
    """The contents of a file, once every byte of it is checked. The file stays the same one even
    while another takes its name. Raises Unreadable.
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
    """Inside this context manager, any error means that the file at `path` is damaged or not a
    checkpoint: it becomes an Unreadable that names the file.
    """
    try:
        yield
    except MemoryError:
        raise
    except UserError as reason:
        raise Unreadable(printable(f"{path}: {reason}")) from None
    except Exception as reason:  # a crafted file takes zipfile and the unpickler to many places
        what = f"{type(reason).__name__}: {' '.join(str(reason).split())[:120]}"
        raise Unreadable(printable(f"{path}: not a checkpoint, or damaged ({what})")) from reason


def printable(text: str) -> str:
    """The text on one line, with characters that would steer a terminal written as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _verify_checksum(file: IO[bytes]) -> None:
    left = file.seek(0, os.SEEK_END) - _CHECKSUM_BYTES
    file.seek(max(left, 0))
    seal = file.read(_CHECKSUM_BYTES)
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
    """What is in an open file. `tree` has a `Stored` in the place of each tensor. A seal proves
    that a file is as it was written, not that its writer meant well, so nothing here is believed.
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
            if self.records["data.pkl"].file_size > _LARGEST_PICKLE:
                raise UserError("a description of absurd size")
            if archive.read(f"{root}/byteorder") != b"little":
                raise UserError("written on a big-endian machine")
            with archive.open(f"{root}/data.pkl") as pickled:
                self.tree = _Unpickler(pickled, self.records).load()
        if size_of(self.tree) > _LARGEST_TREE:
            raise UserError("a description of absurd size")
        if tensor_bytes(self.tree) > self.size:
            raise UserError("tensors that share their numbers, which no checkpoint has")

    def read(self, tree: Any) -> Any:
        """This part of the tree with its tensors, on the CPU. Raises Unreadable."""
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


# The instructions of the pickle machine that dicts, lists, plain values and tensors need. None of
# them calls anything but what find_class returns, or sets attributes.
_INSTRUCTIONS = """
    PROTO STOP MARK EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT NONE NEWTRUE NEWFALSE BINPUT
    LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE BINPERSID
"""


class _Unpickler(pickle._Unpickler):
    """Pickles without code: builds dicts, lists, plain values and `Stored`. The Python version of
    the class, as the one in C reserves gigabytes for a memo index of that size.
    """

    def __init__(self, file: IO[bytes], records: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(file)
        self.records, self.left = records, _MOST_INSTRUCTIONS
        known: dict[int, Any] = {
            **pickle._Unpickler.dispatch,
            pickle.SETITEM[0]: lambda me: set_items(me, [me.stack.pop(-2), me.stack.pop()]),
            pickle.SETITEMS[0]: lambda me: set_items(me, me.pop_mark()),
        }
        codes = [getattr(pickle, name)[0] for name in _INSTRUCTIONS.split()]
        self.dispatch = {code: self.counted(known[code]) for code in codes}  # type: ignore[misc]

    def counted(self, run: Callable[[Any], object]) -> Callable[[Any], object]:
        """An instruction, as long as there are not too many."""

        def one(machine: Any) -> None:
            self.left -= 1
            if self.left < 0:
                raise UserError("a description of absurd size")
            run(machine)

        return one

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return _no_hooks
        raise UserError(f"it would run {module[:80]}.{name[:80]}, which no checkpoint needs")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, count = pid
        if type(key) is not str:
            raise UserError("a tensor without numbers")
        record = f"data/{key}"
        if record not in self.records:
            raise UserError(f"the numbers of tensor {key!r:.20} are missing")
        found = self.records[record].file_size
        if type(dtype) is not torch.dtype or type(count) is not int or count < 0:
            raise UserError("a tensor without type or size")
        if count * dtype.itemsize != found:
            raise UserError(f"a tensor that claims {count} elements and has {found} bytes")
        return dtype, record, count

    def rebuild_tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any
    ) -> TensorRef:
        """In place of torch._utils._rebuild_tensor_v2."""
        dtype, record, count = storage
        small = all(type(n) is int and 0 <= n < 2**62 for n in (offset, *shape))
        if not small or len(shape) > _MOST_DIMENSIONS:
            raise UserError(f"a tensor of impossible shape in a space of {count}")
        needed, ordered = 1, True  # elements from one index to the next, if there are no gaps
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            ordered = ordered and (size == 1 or step == needed)
            needed *= size
        if needed and not ordered:
            raise UserError("a tensor whose elements are not in their order")
        if offset + needed > count:
            raise UserError(f"a tensor of {needed} elements in a space of {count}")
        return TensorRef(dtype, tuple(shape), record, offset)


def set_items(machine: Any, pairs: list[Any]) -> None:
    """Puts keys and values, in turn, into the dict on the stack. Keys other than strings can be
    made so that hashing them takes hours, or all of the C stack.
    """
    table = machine.stack[-1]
    if type(table) is not dict or any(type(k) is not str for k in pairs[::2]):
        raise UserError("a table whose keys are not names")
    table.update(zip(pairs[::2], pairs[1::2], strict=True))


def _no_hooks() -> dict[str, Any]:
    return {}


def size_of(tree: Any, depth: int = 8) -> int:
    """A bound on the work that a tree takes: 1 for each value and for each 32 characters. A part
    that is referred to several times counts each time, since a small file whose parts refer to each
    other can stand for a tree that takes hours or all of the memory. Raises UserError where the
    tree is nested too deep, or made of what no checkpoint has.
    """
    if type(tree) in (int, float, bool, type(None), TensorRef):
        return 1
    if type(tree) is str:
        tree.encode()  # raises UnicodeError for halves of characters
        return 1 + len(tree) // 32
    if type(tree) is not dict and type(tree) is not list:
        raise UserError(f"a {type(tree).__name__}, which no checkpoint has")
    if depth == 0:
        raise UserError("values nested too deep")
    size = 1
    for part in tree if isinstance(tree, list) else (*tree.keys(), *tree.values()):
        size += size_of(part, depth - 1)
        if size > _LARGEST_TREE:
            break
    return size
