"""Unpickles the description in a checkpoint: plain values, and references to tensors in the file. A
pickle that needs anything else is refused, so no code from it can run.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch

from runtime.setting_fields import UserError

LARGEST_PICKLE = 1 << 24  # bytes of names, settings and tokenizer; GPT-2 XL needs 0.2 MB
_MOST_INSTRUCTIONS = 1_000_000  # of that pickle
_MOST_DIMENSIONS = 8
LARGEST_TREE = 1_000_000  # as `size_of` counts
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
    record: str  # the member of the zip archive that has its elements
    offset: int  # in elements

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes, once it is read."""
        return math.prod(self.shape) * self.dtype.itemsize


# The instructions of the pickle machine that dicts, lists, plain values and tensors need. None of
# them calls anything but what find_class returns, or sets attributes.
_INSTRUCTIONS = """
    PROTO STOP MARK EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT NONE NEWTRUE NEWFALSE BINPUT
    LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE BINPERSID
"""


class SafeUnpickler(pickle._Unpickler):
    """An unpickler that runs no code: it builds only dicts, lists, plain values and TensorRefs. Its
    base is the Python version of the class, as the one in C reserves gigabytes for a large memo
    index.
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
        """Wraps an instruction so that it raises UserError once there have been too many."""

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
        """Makes a TensorRef, in place of torch._utils._rebuild_tensor_v2. Raises UserError unless
        the tensor is contiguous and lies inside of its storage.
        """
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
    """Puts keys and values, in turn, into the dict on the stack. Only strings may be keys: others
    can be made so that hashing them takes hours, or all of the C stack. Raises UserError.
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
        if size > LARGEST_TREE:
            break
    return size
