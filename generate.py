"""Samples from a checkpoint: `python generate.py --checkpoint-path FILE --prompt TEXT`"""

from __future__ import annotations

import settings.before_torch  # noqa: F401  # before torch loads

import dataclasses
import json
import sys

from checkpoint import load_model
from runtime.console import say, say_aside, say_part
from runtime.device import pick_device, tune, use_threads
from runtime.files import expanded
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import UserError
from settings.eval_and_generate import SampleSettings
from settings.paths import checkpoint_in
from training.sampling import Sampling, lay_out_for_generation
from training.text_generation import (
    Continuation,
    continue_ids,
    note_on_context,
    printable,
    prompt_ids,
)


def prompts_of(args: SampleSettings) -> list[str]:
    """The prompts that the settings name. Raises UserError if their file can't be read."""
    if not args.prompt_file:
        return [printable(args.prompt)]
    try:
        if args.prompt_file == "-":
            text = sys.stdin.read() if sys.stdin else ""  # None where it is closed
            text.encode()  # some locales let bytes that are not UTF-8 pass
        else:
            text = expanded(args.prompt_file, "--prompt-file").read_text(encoding="utf-8")
    except (OSError, UnicodeError) as reason:
        raise UserError(f"--prompt-file {args.prompt_file} cannot be read: {reason}") from reason
    found = text.split(args.prompt_separator) if args.prompt_separator else [text]
    prompts = [prompt for prompt in found if prompt.strip()]
    if not prompts:
        raise UserError(f"--prompt-file {args.prompt_file} holds no prompt")
    return prompts


def main(args: SampleSettings) -> None:
    """Writes num_samples continuations of each prompt to the terminal, a single one while it is
    generated.
    """
    use_threads(args.threads, local_world=1)
    device = pick_device(args.device)
    tune(device)
    prompts, path = prompts_of(args), checkpoint_in(args.checkpoint_path)
    run = load_model(path, args.tokenizer_name)
    model, tokenizer = run.model.to(device.torch_device), run.tokenizer
    lay_out_for_generation(model, device)
    if tokenizer is None:
        raise UserError(
            f"{path} was trained on token ids that name no tokenizer; "
            "say which with --tokenizer-name (gpt2 for FineWeb-Edu shards)"
        )
    options = dataclasses.asdict(args)
    sampling = Sampling(**{f.name: options[f.name] for f in dataclasses.fields(Sampling)})
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    jobs = [p for p in range(len(prompts)) for _ in range(args.num_samples)]
    live = len(jobs) == 1 and not args.json  # shown while it is generated
    if live:
        say_part(prompts[0])
    for start in range(0, len(jobs), args.batch_size):
        batch = range(start, min(start + args.batch_size, len(jobs)))
        written = continue_ids(
            model,
            tokenizer,
            [encoded[jobs[job]] for job in batch],
            device,
            args.max_new_tokens,
            sampling,
            [args.seed + job for job in batch],
            args.stop,
            on_text=lambda row, text: say_part(text) if live else None,
        )
        for job, text in zip(batch, written, strict=True):
            if live:
                say(text.end_mark)
            elif args.json:
                say(as_json(prompts[jobs[job]], text, args.seed + job))
            else:
                say(heading(job, len(prompts), args))
                say(prompts[jobs[job]] + str(text))
    if note := note_on_context(max(map(len, encoded)), args.max_new_tokens, model.config):
        say_aside(note)


def heading(job: int, prompts: int, args: SampleSettings) -> str:
    """The line above a continuation that is one of several."""
    p, i = divmod(job, args.num_samples)
    prompt = f"prompt {p + 1} of {prompts}, " if prompts > 1 else ""
    return f"--- {prompt}sample {i + 1} of {args.num_samples}, seed {args.seed + job} ---"


def as_json(prompt: str, written: Continuation, seed: int) -> str:
    """A continuation as a line of JSON. end: "document", "stop" or "length"."""
    found = {"prompt": prompt, "text": written.text, "end": written.end, "seed": seed}
    return json.dumps(found, ensure_ascii=False)


if __name__ == "__main__":
    run_script(
        lambda argv: main(SampleSettings(**parse_flags(SampleSettings, "generate.py", argv)))
    )
