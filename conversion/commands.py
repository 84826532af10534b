"""`python hf.py export X.pt DIR` and `python hf.py import DIR|NAME|FILE OUT.pt`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import build_checkpoint, load_model
from checkpointing.writing import write_checkpoint
from config import GPTConfig, Settings
from conversion.agreement import check_agreement
from conversion.huggingface import MODELING, load_huggingface, to_huggingface
from conversion.opening import open_weights
from conversion.tokenizer_json import write_tokenizer
from conversion.weights import Weights
from model import GPTModel
from runtime.console import one_line, say
from runtime.setting_fields import UserError, check_fields, choose, flag
from training.step import RunState


@dataclass(frozen=True)
class ConversionSettings:
    """Settings of hf.py."""

    verb: tuple[str, ...] = flag(
        (),
        "export X.pt DIR: writes the model of a checkpoint for transformers; import FROM OUT.pt: "
        "writes weights as a checkpoint; FROM is a folder of Hugging Face, a name on its hub, a "
        "checkpoint of nanoGPT, or a model file of llm.c",
        positional=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)


def export(path: str, folder: str) -> None:
    """Writes the model and the tokenizer of a checkpoint into a new folder that transformers reads.
    What was written is read back, by transformers and by our own reader, before the folder gets its
    name. Raises UserError.
    """
    run = load_model(path)
    config = run.model.config
    theirs = to_huggingface(run.model, run.tokenizer)
    with _new_folder(Path(folder)) as made:
        theirs.save_pretrained(str(made))
        if run.tokenizer:
            # With code in the folder, AutoTokenizer would ask whether to run it.
            loader = "PreTrainedTokenizerFast" if config.ngram_rows else "AutoTokenizer"
            write_tokenizer(run.tokenizer, made, config.max_position_embeddings, loader)
        say(check_agreement(run.model, load_huggingface(made)))
        if config.ngram_rows:
            shutil.copyfile(MODELING, made / MODELING.name)
        mode = (made / "config.json").stat().st_mode  # safetensors keeps others from reading
        for file in made.iterdir():
            file.chmod(mode)
        with open_weights(made) as back:
            wrong = [n for n, p in run.model.state_dict().items() if not back.read(n).equal(p)]
            if wrong:
                raise UserError(f"{wrong[0]} is not the same when read back; nothing was written")
    _say_how_to_load(type(theirs).__name__, folder, config, bool(run.tokenizer))


def _say_how_to_load(kind: str, folder: str, config: GPTConfig, has_tokenizer: bool) -> None:
    if not has_tokenizer:
        say("the checkpoint holds no tokenizer, so there is none in the folder")
    remote = ""
    if config.ngram_rows:
        remote = ", trust_remote_code=True"
        say(
            f"transformers has no n-gram embeddings: {MODELING.name} in the folder is code for them"
        )
    say(f"{folder}: a {kind}, all weights bit for bit those of the checkpoint")
    say(f'  AutoModelForCausalLM.from_pretrained("{folder}"{remote})')
    if has_tokenizer:
        say(f'  AutoTokenizer.from_pretrained("{folder}"{remote})')


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder beside `folder`, and renames it to that at the
    end; after an error it is gone. Raises UserError if `folder` exists and is not empty.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; give another name, or remove it")
    target = Path(os.path.realpath(folder))
    made = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        made.mkdir(parents=True)
        yield made
        os.replace(made, target)
    except OSError as reason:
        raise UserError(f"cannot write {folder}: {reason}; give another folder") from reason
    finally:
        shutil.rmtree(made, ignore_errors=True)


def import_weights(source: str, out: str) -> None:
    """Writes the weights at a path, or of a name on the hub, as a checkpoint of ours. Raises
    UserError.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} is there already; give another name")
    path = Path(source)
    with ExitStack() as stack:
        if not path.exists():
            path = _from_hub(source)
        weights = stack.enter_context(open_weights(path))
        if weights.theirs is None:
            raise UserError(f"{source} is a checkpoint of ours already; copy it")
        model = weights.model()
        say(check_agreement(model, weights.theirs()))
    for note in weights.notes:
        say(note)
    write_checkpoint(out, imported_checkpoint(model, weights, out))
    tokenizer = weights.tokenizer.name if weights.tokenizer else "none"
    say(f"{out}: {weights.source}, {model.num_parameters():,} parameters, tokenizer: {tokenizer}")
    say(f"start training from it with --init-from {out}")


def imported_checkpoint(model: GPTModel, weights: Weights, out: str) -> dict[str, object]:
    """The content of a checkpoint with the weights of a model that no run of ours has trained."""
    args = Settings(
        model=model.config,
        seq_len=max(2, model.config.max_position_embeddings),
        checkpoint_path=out,
    )
    stored = weights.tokenizer.to_json() if weights.tokenizer else ""
    no_state = torch.optim.SGD(model.parameters())
    data = {"tokenizer": stored, "imported": weights.source}
    return build_checkpoint(model, no_state, RunState(), args, data)


def _from_hub(name: str) -> Path:
    """The folder of a model of this name, downloaded from the hub. Raises UserError."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".pt", ".bin")):
        raise UserError(f"{name}: no such file or folder, and not a name on Hugging Face's hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: no such file or folder; to download a model of that name needs a package: "
            "pip install huggingface_hub"
        ) from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
        return folder
    except Exception as reason:  # of many kinds, by where the network fails
        what = f"{type(reason).__name__}: {one_line(reason, 120)}"
        raise UserError(
            f"{name}: no such file or folder, and not to be had from Hugging Face's hub ({what}); "
            "where there is no network, copy the model's folder here"
        ) from None


VERBS = {"export": export, "import": import_weights}


def run_command(args: ConversionSettings) -> None:
    """Runs a command of hf.py. args.verb: its name, what to read, what to write."""
    if len(args.verb) != 3:
        raise UserError(
            "say what to do: hf.py export X.pt DIR, or hf.py import DIR|NAME|FILE OUT.pt"
        )
    choose("verb", args.verb[0], VERBS)(*args.verb[1:])
