"""Texts of a data set of Hugging Face, read by the `datasets` library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus.read_text import Text, other_columns
from runtime.console import one_line
from runtime.setting_fields import UserError

_ROWS = 1024  # read at once


class HuggingFaceTexts:
    """The texts of one column of one split of a data set, each of them a document; empty rows are
    left out. `datasets` keeps the split in its cache on disk, and it is read from there.

    name: on the hub, a folder with data files, or one written by `save_to_disk`. config: "" = the
    only one. split: "" = the only one, or else "train". Raises UserError if one of these or the
    column is missing, or the data set can't be had.
    """

    kind = "huggingface"

    def __init__(self, name: str, config: str, split: str, column: str) -> None:
        self.name, self.column = name, column
        self._rows, self.split = _open(name, config, split)
        if column not in self._rows.column_names:
            raise UserError(f"{name} {other_columns(column, self._rows.column_names)}")
        seen, size = hashlib.sha256(), 0
        for text in self._texts():
            data = text.encode()
            seen.update(len(data).to_bytes(8, "little") + data)
            size += len(data)
        # Of the library's own fingerprint the paths and times of its cache are a part.
        self.record: dict[str, Any] = {
            "path": f"{name} ({', '.join(x for x in (config, self.split, column) if x)})",
            "bytes": size,
            "sha256": seen.hexdigest(),
        }

    def texts(self) -> Iterator[Text]:
        """All texts, in the order of the rows."""
        for text in self._texts():
            yield Text(text, len(text.encode()), True)

    def _texts(self) -> Iterator[str]:
        column = self._rows.select_columns([self.column])
        for start in range(0, len(column), _ROWS):
            for offset, text in enumerate(column[start : start + _ROWS][self.column]):
                if text is not None and not isinstance(text, str):
                    raise UserError(
                        f"{self.name}: row {start + offset} of {self.column!r} is no text but "
                        f"{type(text).__name__}; name another column with --text-column"
                    )
                if text:
                    yield text


def _open(name: str, config: str, split: str) -> tuple[Any, str]:
    """The rows of a split, and its name."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "--hf reads data sets of Hugging Face and needs a package: pip install datasets"
        ) from None
    folder = Path(name)
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    try:
        if saved:
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config or None, split=split or None)
    except Exception as reason:  # of many kinds: the hub, its files, Arrow
        said = one_line(reason)
        raise UserError(f"{name}: datasets can't load it ({type(reason).__name__}: {said})") from (
            reason
        )
    if isinstance(found, datasets.Dataset):
        splits = {str(found.split or "train") if saved else split or "train": found}
    else:
        splits = dict(found)
    chosen = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if chosen not in splits:
        raise UserError(
            f"{name} has no split {chosen!r}; name one with --split: {', '.join(splits)}"
        )
    return splits[chosen], chosen
