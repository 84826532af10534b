"""The weights of a model that were opened somewhere. Start here, then see opening.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from config import GPTConfig
from conversion.huggingface import filled, gpt2_entries, import_transformers
from conversion.names import Read, from_gpt2, gpt2_name
from corpus.tokenizer import Tokenizer
from model import GPTModel
from runtime.setting_fields import UserError


@dataclass(frozen=True)
class Weights:
    """The weights of a model, which are read one parameter at a time.

    source: what it is and where, for messages. read_raw(name): our parameter of that name, of any
    floating type. theirs(): the model of transformers that the source stands for, read without our
    conversion; None for a checkpoint of ours. tokenizer: None where the source has none. notes:
    what the user should know of it.
    """

    source: str
    config: GPTConfig
    read_raw: Read
    theirs: Callable[[], Any] | None = None
    tokenizer: Tokenizer | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def read(self, name: str) -> Tensor:
        """Our parameter of that name, float32 on the CPU. Raises UserError if it is missing, or of
        another shape than the configuration says.
        """
        found, wanted = self.read_raw(name), self.shapes[name]
        if tuple(found.shape) != wanted:
            raise UserError(
                f"{self.source}: {name} has the shape {tuple(found.shape)}, and its configuration "
                f"makes it {wanted}"
            )
        return found.float()

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of our parameters by name. Raises UserError without a vocabulary."""
        if not self.config.vocab_size:
            raise UserError(f"{self.source}: vocab_size=0 is no model")
        with torch.device("meta"):  # shapes without memory
            return GPTModel(self.config).shapes

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """All parameters by name."""
        return {name: self.read(name) for name in self.shapes}

    def model(self) -> GPTModel:
        """A `GPTModel` with these weights, in evaluation mode on the CPU."""
        model = GPTModel(self.config)
        model.load_state_dict(self.state_dict)
        return model.eval()


def of_gpt2(source: str, config: GPTConfig, read: Read, notes: list[str]) -> Weights:
    """Weights that `read` gives by the names and in the layout of Hugging Face's GPT2Model."""

    def theirs() -> Any:
        transformers = import_transformers()
        with torch.device("meta"):
            made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2_entries(config)))
            names = [gpt2_name(name) for name in GPTModel(config).shapes]
        return filled(made, {f"transformer.{n}": read(n).float().contiguous() for n in names})

    return Weights(source, config, lambda name: from_gpt2(name, read, config), theirs, None, notes)
