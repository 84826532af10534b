"""Samples from a checkpoint: `python generate.py --checkpoint-path FILE --prompt TEXT`"""

from __future__ import annotations

import settings.before_torch  # noqa: F401  # before torch loads

from typing import Any

from checkpoint import load_model
from runtime.console import say
from runtime.device import pick_device, tune, use_threads
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import UserError
from settings.eval_and_generate import SampleSettings
from settings.paths import checkpoint_in
from training.sampling import continue_text


def main(args: SampleSettings) -> None:
    """Writes num_samples continuations of the prompt to the terminal."""
    use_threads(args.threads, local_world=1)
    device = pick_device(args.device)
    tune(device)
    path = checkpoint_in(args.checkpoint_path)
    run = load_model(path, args.tokenizer_name)
    model, tokenizer = run.model.to(device.torch_device), run.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{path} was trained on token ids that name no tokenizer; "
            "say which with --tokenizer-name (gpt2 for FineWeb-Edu shards)"
        )
    for i in range(args.num_samples):
        if args.num_samples > 1:
            say(f"--- sample {i + 1} of {args.num_samples}, seed {args.seed + i} ---")
        options: dict[str, Any] = {
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "seed": args.seed + i,
        }
        say(continue_text(model, tokenizer, args.prompt, device, **options))


if __name__ == "__main__":
    run_script(
        lambda argv: main(SampleSettings(**parse_flags(SampleSettings, "generate.py", argv)))
    )
