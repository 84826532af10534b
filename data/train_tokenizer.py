"""Trains a BPE tokenizer: `python data/train_tokenizer.py --vocab-size 4096 --out mine.json
FILES...`

With no files, on the source of Python's standard library. Use it with `--tokenizer-name mine.json`.
"""

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from corpus.find_text import find_sources, stdlib_files
from corpus.read_text import TEXT_COLUMN, read_texts
from corpus.tokenizer import BPETokenizer
from runtime.console import say
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import UserError, check_fields, flag
from settings.paths import in_folder


@dataclass(frozen=True)
class TrainTokenizerSettings:
    """Settings of data/train_tokenizer.py."""

    paths: tuple[str, ...] = flag((), "texts; none = source of Python's library", positional=True)
    out: str = flag("tokenizer.json", "file to write", metavar="PATH")
    vocab_size: int = flag(4096, "ids, the end token included", at_least=258)
    max_bytes: int = flag(1_000_000_000, "learn from at most so much of the text", at_least=1)
    text_column: str = flag(TEXT_COLUMN, "name of the text in .jsonl and .parquet", metavar="NAME")

    def __post_init__(self) -> None:
        check_fields(self)


def train_tokenizer(
    sources: list[Path], vocab_size: int, max_bytes: int, name: str, column: str = TEXT_COLUMN
) -> BPETokenizer:
    """A tokenizer whose merges are learned from the texts by rustbpe; the last id ends
    documents.
    """
    try:
        import rustbpe
    except ImportError:
        raise UserError("training a tokenizer needs a package: pip install rustbpe") from None
    from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 splits text before merging

    def texts() -> Iterator[str]:
        left = max_bytes
        for path in sources:
            for piece in read_texts(path, column=column):
                if left <= 0:
                    return
                left -= piece.n_bytes
                yield piece.text

    learner = rustbpe.Tokenizer()
    learner.train_from_iterator(texts(), vocab_size - 1, pattern=r50k_pat_str)
    ranks = {bytes(token): rank for token, rank in learner.get_mergeable_ranks()}
    return BPETokenizer(name, r50k_pat_str, ranks, len(ranks), len(ranks) + 1)


def main(args: TrainTokenizerSettings) -> None:
    """Writes the tokenizer file and says how to use it."""
    out = in_folder(args.out, "tokenizer.json")
    sources, start = find_sources(args.paths) if args.paths else stdlib_files(), time.perf_counter()
    column = args.text_column
    tokenizer = train_tokenizer(sources, args.vocab_size, args.max_bytes, Path(out).stem, column)
    if tokenizer.vocab_size < args.vocab_size:
        raise UserError(
            f"the text has merges for {tokenizer.vocab_size} ids only; give more text or "
            f"--vocab-size {tokenizer.vocab_size}"
        )
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(tokenizer.to_json(), encoding="utf-8")
    except OSError as reason:
        raise UserError(f"cannot write {out}: {reason.strerror}") from reason
    sample = "".join(next(read_texts(path, column=column)).text[:20_000] for path in sources[:200])
    rate = len(sample.encode()) / len(tokenizer.encode(sample))
    say(
        f"{out}: {tokenizer.vocab_size} ids in {time.perf_counter() - start:.1f} s; about "
        f"{rate:.2f} bytes per token; use it with --tokenizer-name {shlex.quote(out)}"
    )


if __name__ == "__main__":
    run_script(
        lambda argv: main(
            TrainTokenizerSettings(
                **parse_flags(TrainTokenizerSettings, "train_tokenizer.py", argv)
            )
        )
    )
