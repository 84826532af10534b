"""What a file or folder of tokens or text is: `python data/describe.py PATH...`"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from corpus.find_text import find_sources, kind_of
from corpus.read_text import TEXT_COLUMN, read_texts
from corpus.shards import TokenShards
from corpus.tokenizer import Tokenizer, build_tokenizer
from corpus.tokenizing import MANIFEST, TOKENIZER_FILE
from runtime.console import say
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import UserError, check_fields, flag

_BLOCK = 1 << 20
_ANY_ID = 1 << 32


@dataclass(frozen=True)
class DescribeSettings:
    """Settings of data/describe.py."""

    paths: tuple[str, ...] = flag((), "token shards, folders of them, texts", positional=True)
    tokenizer_name: str = flag("", "tokenizer of the shards; none = the one stored beside them")
    text_column: str = flag(TEXT_COLUMN, "name of the text in .jsonl and .parquet", metavar="NAME")
    bin_dtype: str = flag("auto", "ids of .bin files without header; auto = told from the data",
                          "auto", "uint8", "uint16", "uint32")  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.paths:
            raise UserError("give something to describe: describe.py PATH...")


def describe_tokens(
    path: str, tokenizer: Tokenizer | None, bin_dtype: str = "auto"
) -> dict[str, object]:
    """Counts and range of the ids of shards; with a tokenizer, bytes, documents and first text."""
    source = TokenShards([path], _ANY_ID, bin_dtype=bin_dtype)
    counts = np.zeros(1 << 16, np.int64)
    for start in range(0, source.num_tokens, _BLOCK):
        ids = source.read(start, min(_BLOCK, source.num_tokens - start))
        here = np.bincount(ids)
        counts = np.pad(counts, (0, max(0, len(here) - len(counts))))
        counts[: len(here)] += here
    used = np.flatnonzero(counts)
    if not len(used):
        return {"tokens": 0, "problem": "no tokens"}
    about: dict[str, object] = {
        "shards": len(source.shards),
        "dtype": ", ".join(sorted({str(s.dtype) for s in source.shards})),
        "tokens": source.num_tokens,
        "smallest id": int(used[0]),
        "largest id": int(used[-1]),
        "distinct ids": len(used),
    }
    if tokenizer is None:
        return about
    known = min(len(counts), tokenizer.vocab_size)
    n_bytes = int(counts[:known] @ tokenizer.token_bytes[:known])
    about |= {
        "tokenizer": tokenizer.name,
        "documents": int(counts[tokenizer.end_token]) if tokenizer.end_token < len(counts) else 0,
        "bytes": n_bytes if tokenizer.token_bytes.any() else "not known of this tokenizer",
        "bytes per token": round(n_bytes / source.num_tokens, 3),
        "first text": tokenizer.decode(source.read(0, min(60, source.num_tokens)).tolist()),
    }
    if used[-1] >= tokenizer.vocab_size:
        about["problem"] = f"ids up to {used[-1]}, but {tokenizer.name} has {tokenizer.vocab_size}"
    return about


def describe_text(path: str, column: str) -> dict[str, object]:
    """Counts of a text file or folder, read to its end."""
    documents, n_bytes, first = 0, 0, ""
    for source in find_sources([path]):
        for text in read_texts(source, column=column):
            first = first or text.text[:200]
            documents += text.ends_document
            n_bytes += text.n_bytes
    return {"documents": documents, "bytes": n_bytes, "first text": first}


def describe(
    path: str, tokenizer_name: str, bin_dtype: str = "auto", column: str = TEXT_COLUMN
) -> dict[str, object]:
    """What there is to say of a path; a problem that stops the reading is said too."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    files = Path(path).iterdir() if Path(path).is_dir() else [Path(path)]
    is_tokens = any(file.suffix.lower() in (".npy", ".bin") for file in files)
    try:
        if not is_tokens:
            return {"kind": f"text {kind_of(Path(path))[0]}".strip(), **describe_text(path, column)}
        beside = folder / TOKENIZER_FILE
        name = tokenizer_name or (str(beside) if beside.exists() else "")
        about = describe_tokens(path, build_tokenizer(name) if name else None, bin_dtype)
        if Path(path).is_dir() and (folder / MANIFEST).exists():
            promised = json.loads((folder / MANIFEST).read_text())["tokens"]
            if promised != about["tokens"]:
                about["problem"] = f"{MANIFEST} promises {promised} tokens"
        return {"kind": "token shards", **about}
    except UserError as problem:
        return {"problem": str(problem)}


def main(args: DescribeSettings) -> None:
    """Prints what each path is. Raises UserError where one has a problem."""
    problems = 0
    for path in args.paths:
        say(path)
        found = describe(path, args.tokenizer_name, args.bin_dtype, args.text_column)
        for name, value in found.items():
            problems += name == "problem"
            say(f"  {name}: {value!r}" if name == "first text" else f"  {name}: {value}")
    if problems:
        raise UserError(f"{problems} of {len(args.paths)} with a problem")


if __name__ == "__main__":
    run_script(
        lambda argv: main(DescribeSettings(**parse_flags(DescribeSettings, "describe.py", argv)))
    )
