"""Text to token shards: `python data/prepare.py --out data/mine --tokenizer-name gpt2 FILES...`

Train on them with `--train-npy data/mine`. Stop it at any time; started again, it goes on.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from corpus.find_text import find_texts, kind_of
from corpus.huggingface_dataset import HuggingFaceTexts
from corpus.read_text import TEXT_COLUMN
from corpus.tokenizer import build_tokenizer
from corpus.tokenizing import SHARD_TOKENS, Sources, note_on_documents, prepare
from runtime.console import command, say
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import UserError, check_fields, flag


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of data/prepare.py."""

    paths: tuple[str, ...] = flag((), "files, folders, globs: .txt .md .py .jsonl .parquet, packed "
                                  "with .gz or .zst too", positional=True)  # fmt: skip
    hf: str = flag("", "instead of files: data set of Hugging Face, by its name on the hub, or its "
                   "folder", metavar="NAME|PATH")  # fmt: skip
    config: str = flag("", "of --hf: its configuration; none = the only one", metavar="NAME")
    split: str = flag("", "of --hf: none = the only one, or else train", metavar="NAME")
    text_column: str = flag(TEXT_COLUMN, "name of the text in .jsonl, .parquet and --hf",
                            metavar="NAME")  # fmt: skip
    column: str = flag("", "of --hf: same as --text-column", metavar="NAME")
    out: str = flag("", "folder to write the shards to", metavar="PATH")
    tokenizer_name: str = flag("gpt2", "bytes, a tiktoken encoding, a trained tokenizer's file, a "
                               "tokenizer.json, or a SentencePiece .model",
                               metavar="NAME|PATH")  # fmt: skip
    shard_tokens: int = flag(SHARD_TOKENS, "tokens after which a new shard begins", at_least=1)
    document_separator: str = flag("", "what parts the documents of a plain text file, such as "
                                   "<|endoftext|>; none = each file is one document",
                                   metavar="TEXT")  # fmt: skip
    workers: int = flag(0, "processes; 0 = one per core; the output is the same", at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.paths or self.hf) or not self.out:
            raise UserError("give the texts and a folder: prepare.py --out FOLDER FILES...")
        if self.paths and self.hf:
            raise UserError(
                f"--hf {self.hf} and {self.paths[0]} are two corpora; prepare each alone"
            )
        if (self.config or self.split or self.column) and not self.hf:
            raise UserError(
                "--config, --split and --column are of a data set of Hugging Face; give its --hf"
            )
        if self.column:
            if self.text_column not in (TEXT_COLUMN, self.column):
                raise UserError(f"--column {self.column} contradicts --text-column; give one")
            object.__setattr__(self, "text_column", self.column)


def open_sources(args: PrepareSettings) -> Sources:
    """The texts that the settings name; prints what is left out of folders. Raises UserError."""
    if args.hf:
        if args.document_separator:
            raise UserError("--document-separator parts plain text; a row of --hf is a document")
        return HuggingFaceTexts(args.hf, args.config, args.split, args.text_column)
    files, notes = find_texts(args.paths)
    for note in notes:
        say(note)
    if args.text_column != TEXT_COLUMN and not any(
        kind_of(file)[0] in (".jsonl", ".parquet") for file in files
    ):
        raise UserError(f"--text-column {args.text_column}: none of the files has columns")
    return files


def main(args: PrepareSettings) -> None:
    """Writes the shards and says how to train on them."""
    tokenizer, folder = build_tokenizer(args.tokenizer_name), Path(args.out)
    sources = open_sources(args)
    try:
        made = prepare(
            sources,
            tokenizer,
            folder,
            args.shard_tokens,
            args.workers,
            args.document_separator,
            args.text_column,
        )
    except OSError as reason:
        raise UserError(f"cannot write to {folder}: {reason.strerror}") from reason
    for note in note_on_documents(made, args.document_separator) if not args.hf else ():
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
