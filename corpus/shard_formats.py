"""One shard of token ids: a .npy file, or a .bin file with or without llm.c's header."""

from __future__ import annotations

import codecs
import hashlib
import os
import shlex
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from corpus.bin_dtype import sample_bytes, width_of_ids
from runtime.console import one_line
from runtime.setting_fields import UserError

OTHER_FORMATS = {  # first bytes, too many to be ids by chance -> what the file is
    b"\x1f\x8b\x08": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PK\x03\x04": "a zip archive (or a PyTorch file)",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"PAR1": "a Parquet file",
    b"\x80\x02\x8a": "a pickle (or a PyTorch file)",
    b"\x80\x02}": "a pickle",
    b"\x80\x02]": "a pickle",
    b"\x80\x02c": "a pickle",
    b"\x80\x04\x95": "a pickle",
    b"\x80\x05\x95": "a pickle",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF",
}


def _other_format(start: bytes) -> str:
    """What a file is that starts with these bytes, in words for the error message, if it is known
    not to hold ids; else "".
    """
    for magic, name in OTHER_FORMATS.items():
        if start.startswith(magic):
            return name
    if _is_text(start):
        return (
            "text; use --train-data or --val-data for it (or --bin-dtype uint8 for ids of one byte)"
        )
    if bytes(512) in start:  # as llm.c has between the three numbers of its header and the ids
        return "a file with a header like llm.c's, but its first bytes differ"
    return ""


def _is_text(start: bytes) -> bool:
    """Whether the bytes are UTF-8 text, perhaps cut off, without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    if len(start) < 32 and not start.isascii():  # so few ids may be UTF-8 by chance
        return False
    return not any((c < " " and c not in "\t\r\n\f") or "\x7f" <= c < "\xa0" for c in text)


class _Shard:
    """One file of token ids, whose format is recognized by its first bytes: NumPy .npy (1-D uint16,
    uint32 or int32), llm.c .bin (magic 20240520 or 20240801), or a .bin without header, as nanoGPT
    writes them. Raises UserError for any other file.

    bin_dtype: type of the ids in a file without header; "auto" = told from the ids
    (`width_of_ids`). note: a line for the log about a type that was told so, or "".
    """

    def __init__(self, path: Path, bin_dtype: str = "auto") -> None:
        self.path, self.bin_dtype, self.note = path, bin_dtype, ""
        try:
            if not path.is_file():
                raise UserError(
                    f"{path}: " + ("not a plain file" if path.exists() else "no such file")
                )
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self.offset, self.dtype, self.count = self._header(file)
        except OSError as reason:
            raise UserError(f"{path}: cannot be read: {reason.strerror}") from reason
        expected = self.offset + self.count * self.dtype.itemsize
        if self.size != expected:
            raise UserError(
                f"{path}: has {self.size} bytes, but its header stands for {expected}; is it cut "
                "off?"
            )

    def _header(self, file: BinaryIO) -> tuple[int, np.dtype[Any], int]:
        """Returns (offset of the first id in bytes, dtype of the ids, number of ids)."""
        start = file.read(1024)
        if start[:6] == b"\x93NUMPY":
            file.seek(0)
            return self._npy_header(file)
        words = np.frombuffer(start[:12].ljust(12, b"\0"), "<i4")
        for magic, version, dtype in ((20240520, 1, "<u2"), (20240801, 7, "<u4")):
            if words[0] == magic:
                if words[1] != version or len(start) < 1024:
                    raise UserError(
                        f"{self.path}: llm.c header of version {words[1]}, expected {version}, "
                        "1024 bytes"
                    )
                return 1024, np.dtype(dtype), int(words[2])
        if self.path.suffix.lower() == ".bin":
            return self._headerless(file, start)
        raise UserError(
            f"{self.path}: is neither a NumPy .npy file nor an llm.c .bin file: it starts with "
            f"{start[:8]!r}; for text use --train-data or --val-data"
        )

    def _headerless(self, file: BinaryIO, start: bytes) -> tuple[int, np.dtype[Any], int]:
        """As `_header`, for a .bin file that holds nothing but ids. Raises UserError for a file
        that is known to be something else, which the message names.
        """
        name, known = self.bin_dtype, "" if start else "an empty file"
        if name == "auto" and not known:
            known = _other_format(start)
        if known:
            raise UserError(f"{self.path}: is {known}, not a shard of token ids")
        if name == "auto":
            name, why = width_of_ids(sample_bytes(file.fileno(), self.size))
            if not name:
                raise UserError(
                    f"{self.path}: has no header, and {why}; say what its ids are with --bin-dtype "
                    "uint8, uint16 or uint32, or convert other types to one of them"
                )
            if name == "uint32":
                self.note = f"{self.path}: read as uint32 ids, since {why}"
        dtype = np.dtype(name).newbyteorder("<")
        if self.size % dtype.itemsize:
            raise UserError(
                f"{self.path}: is of odd size ({self.size} bytes), not a shard of token ids: "
                f"{name} ids take {dtype.itemsize} bytes each; is it cut off, or are its ids of "
                "another type (--bin-dtype)?"
            )
        return 0, dtype, self.size // dtype.itemsize

    def _npy_header(self, file: BinaryIO) -> tuple[int, np.dtype[Any], int]:
        try:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
        except Exception as reason:  # a damaged header takes NumPy's parser to many places
            said = one_line(reason, 100)
            raise UserError(f"{self.path}: damaged .npy header: {said}") from reason
        if len(shape) != 1 or dtype.str not in ("<u2", "<u4", "<i4"):
            raise UserError(
                f"{self.path}: holds {dtype} of shape {shape}, expected 1-D uint16, uint32 or int32"
                + (self._conversion() if dtype.kind in "iu" else "")
            )
        return file.tell(), dtype, shape[0]

    def _conversion(self) -> str:
        new = str(self.path.with_suffix(".uint32.npy"))
        code = f"import numpy as np; np.save({new!r}, np.load({str(self.path)!r}).ravel()"
        return f"; convert it: python -c {shlex.quote(code + '.astype(np.uint32))')}"

    def read(self, fd: int, start: int, stop: int, vocab_size: int) -> np.ndarray:
        """Reads the ids of positions start .. stop - 1 from the open file descriptor fd: (stop -
        start,) of the file's dtype. Raises UserError if the file has shrunk or an id is not below
        vocab_size.
        """
        size = self.dtype.itemsize
        data = os.pread(fd, (stop - start) * size, self.offset + start * size)
        if len(data) != (stop - start) * size:
            raise UserError(
                f"{self.path}: ends before token {stop}, which its header promises; did it shrink?"
            )
        ids = np.frombuffer(data, self.dtype)
        if len(ids) and (ids.max() >= vocab_size or ids.min() < 0):
            bad = int(np.argmax((ids >= vocab_size) | (ids < 0)))
            raise UserError(
                f"{self.path}: token {start + bad} is {ids[bad]}, outside of the vocabulary "
                f"0..{vocab_size - 1}; was it made with another tokenizer? A model for such ids is "
                "trained with a larger --vocab-size"
            )
        return ids

    def open(self) -> FileIO:
        """Opens the file, unbuffered, for `read`."""
        return open(self.path, "rb", buffering=0)

    def digest(self) -> bytes:
        """A hash of the dtype, the size and 64 blocks spread over the file: tells files apart
        quickly, whatever their size.
        """
        about = f"{self.dtype.str} {self.count} {self.size}"
        seen = hashlib.blake2b(about.encode(), digest_size=16)
        with open(self.path, "rb", buffering=0) as file:
            for i in range(64):
                place = i * max(self.size - 4096, 0) // 63
                seen.update(os.pread(file.fileno(), 4096, place))
        return seen.digest()
