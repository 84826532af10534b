"""Models and checkpoints that the tests of conversions use."""

import dataclasses

import torch
from conftest import tiny, toy_settings

from checkpoint import build_checkpoint
from checkpointing.writing import write_checkpoint
from conversion.commands import ConversionSettings, run_command
from model import GPTModel
from training.step import RunState


def random_model(config, seed=1):
    """A model of which no weight is 0 or 1, and with logits, scores and biases as large as those of
    trained ones: fresh weights would hide mistakes.
    """
    model, draw = GPTModel(config, seed=0).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            if p.ndim == 1:
                p.add_(0.1 * noise)
            elif name in ("wte.weight", "wpe.weight", "ngrams.weight"):
                p.copy_(0.1 * noise)
            else:
                p.copy_((2 if "qkv" in name else 1) * p.shape[1] ** -0.5 * noise)
    return model


def checkpoint_of(model, path, tokenizer=None):
    """Writes a checkpoint with the model at step 0, as a run on random tokens would."""
    args = dataclasses.replace(toy_settings(), model=model.config, checkpoint_path=str(path))
    data = {"tokenizer": tokenizer.to_json()} if tokenizer else {}
    no_state = torch.optim.SGD(model.parameters())
    write_checkpoint(path, build_checkpoint(model, no_state, RunState(), args, data))
    return path


def hf(*verb):
    """Runs a command of hf.py."""
    run_command(ConversionSettings(verb=tuple(map(str, verb))))


KINDS = {
    "gpt2": tiny(d_ff=45),
    "gpt2, exact gelu": tiny(gelu="none"),
    "modern": tiny("modern", d_ff=45),
    "modern with n-grams": tiny("modern", ngram_rows=53, ngram_longest=6),
}
