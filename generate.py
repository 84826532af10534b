"""Sampling: `generate(...)`, used by the trainers, and the command line `python generate.py
--prompt TEXT`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from checkpoint import load_model
from cli import parse_flags, run_script
from config import SampleSettings, Settings, UserError
from device import Device, pick_device, tune
from model import GPTModel
from tokenizer import Tokenizer, stored_tokenizer


@torch.no_grad()
def generate(
    model: GPTModel,
    ids: Tensor,
    max_new_tokens: int,
    device: Device,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Tensor:
    """Continues ids (B, T) int64 by max_new_tokens: (B, T + max_new_tokens) on the CPU. Reads no
    global random state.

    temperature 0 takes the likeliest token; top_k 0 draws among all. vocab_size: never draw ids at
    or above it. The model sees the last max_position_embeddings tokens. Raises ValueError for an
    empty prompt.
    """
    if not ids.shape[1]:
        raise ValueError("the prompt has no tokens; give at least one")
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        seen = ids[:, -model.config.max_position_embeddings :].to(device.torch)
        # A compiled model would be compiled again for each length.
        with device.autocast(), torch.compiler.set_stance("force_eager"):
            logits, _ = model(seen, logits_to_keep=1)
        logits = logits[:, -1].float().cpu()[:, :vocab_size]  # (B, V)
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            if 0 < top_k < logits.shape[-1]:
                floor = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < floor, float("-inf"))
            new = torch.multinomial(
                ((logits - logits.amax(-1, True)) / temperature).softmax(-1), 1, generator=generator
            )
        ids = torch.cat((ids, new), dim=1)
    model.train(was_training)
    return ids


def continue_text(
    model: GPTModel, tokenizer: Tokenizer, prompt: str, device: Device, **options: Any
) -> str:
    """The prompt and what the model writes after it. options: those of `generate`,
    max_new_tokens among them.
    """
    prompt = prompt.encode("utf-8", "surrogateescape").decode(errors="replace")  # as typed
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.end_token]
    out = generate(
        model, torch.tensor([ids]), device=device, vocab_size=tokenizer.vocab_size, **options
    )
    return tokenizer.decode(out[0].tolist())


def sample(
    model: GPTModel, tokenizer: Tokenizer | None, args: Settings, device: Device
) -> str | None:
    """A short continuation of args.sample_prompt for the log; None without a tokenizer."""
    if tokenizer is None:
        return None
    prompt = args.sample_prompt or "\n"
    return continue_text(
        model, tokenizer, prompt, device, max_new_tokens=args.sample_tokens, seed=args.seed
    )


def main(args: SampleSettings) -> None:
    """Writes num_samples continuations of the prompt to the terminal."""
    device = pick_device(args.device)
    tune(device)
    model, _, data = load_model(args.checkpoint_path)
    model.to(device.torch)
    stored = data.get("tokenizer", "")
    tokenizer = stored_tokenizer(
        stored, args.tokenizer_name, args.checkpoint_path, model.config.vocab_size
    )
    if tokenizer is None:
        raise UserError(
            f"{args.checkpoint_path} was trained on token ids that name no tokenizer; "
            "say which with --tokenizer-name (gpt2 for FineWeb-Edu shards)"
        )
    for i in range(args.num_samples):
        options = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed + i}
        print(
            continue_text(
                model, tokenizer, args.prompt, device, max_new_tokens=args.max_new_tokens, **options
            )
        )


if __name__ == "__main__":
    run_script(
        lambda argv: main(SampleSettings(**parse_flags(SampleSettings, "generate.py", argv)))
    )
