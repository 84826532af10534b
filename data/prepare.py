"""Text to token shards: `python data/prepare.py --out data/mine --tokenizer-name gpt2 FILES...`

Train on them with `--train-npy data/mine`. Stop it at any time; started again, it goes on.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from corpus.find_text import find_texts
from corpus.tokenizer import build_tokenizer
from corpus.tokenizing import SHARD_TOKENS, note_on_documents, prepare
from runtime.console import command, say
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import UserError, check_fields, flag


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of data/prepare.py."""

    paths: tuple[str, ...] = flag((), "files, folders, globs: .txt .md .py .jsonl .parquet, packed "
                                  "with .gz or .zst too", positional=True)  # fmt: skip
    out: str = flag("", "folder to write the shards to", metavar="PATH")
    tokenizer_name: str = flag("gpt2", "bytes, a tiktoken encoding, or a trained tokenizer's file",
                               metavar="NAME|PATH")  # fmt: skip
    shard_tokens: int = flag(SHARD_TOKENS, "tokens after which a new shard begins", at_least=1)
    document_separator: str = flag("", "what parts the documents of a plain text file, such as "
                                   "<|endoftext|>; none = each file is one document",
                                   metavar="TEXT")  # fmt: skip
    workers: int = flag(0, "processes; 0 = one per core; the output is the same", at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.paths or not self.out:
            raise UserError("give the texts and a folder: prepare.py --out FOLDER FILES...")


def main(args: PrepareSettings) -> None:
    """Writes the shards and says how to train on them."""
    tokenizer, folder = build_tokenizer(args.tokenizer_name), Path(args.out)
    sources, notes = find_texts(args.paths)
    for note in notes:
        say(note)
    try:
        made = prepare(
            sources, tokenizer, folder, args.shard_tokens, args.workers, args.document_separator
        )
    except OSError as reason:
        raise UserError(f"cannot write to {folder}: {reason.strerror}") from reason
    for note in note_on_documents(made, args.document_separator):
        say(note)
    say(
        f"{folder}: {made['tokens']:,} tokens of {made['bytes']:,} bytes in {made['documents']:,} "
        f"documents, {len(made['shards'])} shards"
    )
    say(f"train: {command('train_minimal.py')} --train-npy {shlex.quote(str(folder))}")


if __name__ == "__main__":
    run_script(
        lambda argv: main(PrepareSettings(**parse_flags(PrepareSettings, "prepare.py", argv)))
    )
