"""Every setting, once: dataclasses that check themselves, and presets. The flags are made by
runtime/command_line.py.

A setting is one line, `name: type = flag(default, "help, with its unit")`: the flag `--name`, its
help, its type check and its place in every checkpoint follow from it. What wins: what the user
typed, then the checkpoint (with --resume) or the preset, then the default of the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake of the user: one line that says what was given, what is allowed, what to try.

    of_all: all ranks have found it together, so it does not matter which one says it.
    """

    def __init__(self, text: str, of_all: bool = False) -> None:
        super().__init__(text)
        self.of_all = of_all


class NothingSaved(UserError):
    """There is no checkpoint to resume at a path, not even a damaged one."""


def flag(
    default: Any,
    help: str,
    *choices: str,
    at_least: float | None = None,
    at_most: float = 2**62,
    fixed: bool = False,
    positional: bool = False,
    word: str = "",
    metavar: str = "",
    short_for: str = "",
) -> Any:
    """One setting: default, help of its flag with the unit, and the values that it may take.

    fixed: another value makes another run, so --resume takes it only with --allow-change. word:
    what a flag that is on when given alone also takes, as in --resume auto. metavar: what --help
    calls the value; with PATH in it, a typed ~ is the home directory. short_for: the flag and value
    that it is another name of; such a flag has no negation.
    """
    limits = {"choices": choices, "at_least": at_least, "at_most": at_most}
    named = {"word": word, "metavar": metavar, "short_for": short_for}
    metadata = {"help": help, "fixed": fixed, "positional": positional, **named, **limits}
    return dataclasses.field(default=default, metadata=metadata)


# fmt: off
@dataclass(frozen=True)
class GPTConfig:
    """Shape of a `GPTModel`. With no argument: GPT-2 small (Radford et al. 2019, table 2)."""

    arch: str = flag("gpt2", "architecture of the blocks", "gpt2", "modern")
    vocab_size: int = flag(50257, "token ids that exist; 0 = as the tokenizer", at_least=0)
    max_position_embeddings: int = flag(1024, "longest input, tokens", at_least=1,
                                         at_most=2**20)
    n_layers: int = flag(12, "blocks", at_least=1, at_most=4096)
    n_heads: int = flag(12, "attention heads per block", at_least=1, fixed=True)
    d_model: int = flag(768, "width of the residual stream", at_least=1)
    d_ff: int = flag(0, "hidden width of the MLP; 0 = 4 x d_model", at_least=0)
    dropout: float = flag(0.0, "probability of dropping an activation", at_least=0)
    ngram_rows: int = flag(0, "modern: rows of the hashed n-gram embedding; 0 = none", at_least=0)
    use_activation_checkpoint: bool = flag(False, "recompute blocks backward to save memory")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.d_ff == 0:
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        if self.d_model % self.n_heads:
            near = sorted(
                (n for n in range(1, 2 * self.n_heads + 1) if self.d_model % n == 0),
                key=lambda n: (abs(n - self.n_heads), -n),
            )[:2]
            raise UserError(
                f"n_heads={self.n_heads} does not divide d_model={self.d_model}; "
                f"try {' or '.join(map(str, sorted(near)))}"
            )
        if self.arch == "modern" and (self.d_model // self.n_heads) % 2:
            raise UserError(
                f"d_model/n_heads={self.d_model // self.n_heads} is odd, and rotary positions "
                "need an "
                "even width per head; try another n_heads"
            )
        if self.arch == "gpt2" and self.ngram_rows:
            raise UserError(f"ngram_rows={self.ngram_rows} is for --arch modern; leave it at 0")
        if not self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1; try 0.1")


@dataclass(frozen=True)
class Settings:
    """All settings of a training run, complete and checked; `parse_settings` in
    runtime/command_line.py makes one.
    """

    model: GPTConfig = dataclasses.field(default_factory=GPTConfig)

    preset: str = flag("quickstart", "named set of defaults; explicit flags win")
    seed: int = flag(1337, "seed of initial weights, dropout and sampling", at_least=0,
                     fixed=True)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = flag("auto", "of matrix products; auto = bf16 or fp16 on CUDA, else fp32",
                          "auto", "fp32", "bf16", "fp16")
    no_amp: bool = flag(False, "same as --precision fp32", short_for="--precision fp32")
    bf16: bool = flag(False, "same as --precision bf16", short_for="--precision bf16")
    compile: str = flag("auto", "torch.compile; auto = on CUDA", "auto", "on", "off")

    data_mode: str = flag("auto", "kind of data; auto = by the data flags",
                          "auto", "text", "fineweb_npy", "toy")
    train_data: tuple[str, ...] = flag((), "UTF-8 text files; none = source of Python's library")
    val_data: tuple[str, ...] = flag((), "text files held out; none = last part of the text")
    train_npy: tuple[str, ...] = flag((), "token shards: .npy, or llm.c .bin")
    val_npy: tuple[str, ...] = flag((), "token shards held out; none = last part of train-npy")
    document_separator: str = flag("", "what parts the documents of a plain text file, such as "
                                   "<|endoftext|>; none = each file is one document",
                                   metavar="TEXT")
    bin_dtype: str = flag("auto", "ids of .bin files without header; auto = told from the data",
                          "auto", "uint8", "uint16", "uint32", fixed=True)
    use_toy_data: bool = flag(False, "random tokens: nothing to learn, everything to test",
                              short_for="--data-mode toy")
    tokenizer_name: str = flag("", "bytes, gpt2, a tokenizer file; none = bytes for text, none for "
                               "shards", metavar="NAME|PATH")
    val_ratio: float = flag(0.1, "part of the tokens held out without val files", at_least=0,
                            fixed=True)
    max_tokens: int = flag(0, "train on at most this many tokens; 0 = all", at_least=0,
                           fixed=True)
    val_max_tokens: int = flag(0, "validate on at most this many tokens; 0 = all", at_least=0,
                               fixed=True)
    val_by_weight: bool = True  # False: of a mixture's parts joined, the first val_max_tokens
    allow_leak: bool = flag(False, "train though validation text stands in the training data")
    data_seed: int = flag(-1, "seed of the order of the data; -1 = seed", at_least=-1, fixed=True)
    cache_dir: str = flag("~/.cache/rosetrainer", "folder of the tokenized texts", metavar="PATH")

    batch_size: int = flag(12, "micro-batch: sequences per rank and micro-step. Alone it leaves "
                           "the global batch as it is", at_least=1, at_most=2**20)
    grad_accum_steps: int = flag(0, "micro-steps per optimizer step; 0 = as needed. With "
                                 "batch-size it sets the global batch, their product x ranks",
                                 at_least=0)
    global_batch_size: int = flag(0, "global batch: sequences per optimizer step, over all ranks; "
                                  "0 = that of the preset", at_least=0, at_most=2**20, fixed=True)
    micro_batch: str = flag("given", "auto = the largest batch-size that is estimated to fit",
                            "given", "auto")
    allow_memory: bool = flag(False, "start though the estimate says that memory will not do")
    seq_len: int = flag(128, "tokens per sequence; all but the first are scored", at_least=2,
                        fixed=True)
    num_steps: int = flag(1000, "optimizer steps of the whole run", at_least=1)
    optimizer: str = flag("adamw", "update rule", "adamw", "muon", fixed=True)
    lr: float = flag(1e-3, "peak learning rate, after warm-up", at_least=0)
    min_lr: float = flag(-1.0, "learning rate at the end; -1 = a tenth of lr", at_least=-1)
    lr_scheduler: str = flag("cosine", "course after warm-up; wsd = stable, then linear decay",
                             "none", "cosine", "linear", "wsd")
    warmup_steps: int = flag(100, "steps of linear warm-up", at_least=0)
    decay_ratio: float = flag(0.2, "part of num_steps in which wsd decays", at_least=0)
    weight_decay: float = flag(0.1, "decoupled decay of matrices; vectors have none", at_least=0)
    beta1: float = flag(0.9, "AdamW: decay of the mean gradient", at_least=0)
    beta2: float = flag(0.95, "AdamW: decay of the mean squared gradient; at 0, layouts "
                        "are not equal", at_least=0)
    muon_lr_ratio: float = flag(0.5, "Muon: learning rate of matrices in blocks, as part of lr",
                                at_least=0)
    muon_momentum: float = flag(0.95, "Muon: decay of the mean gradient", at_least=0)
    grad_clip_norm: float = flag(1.0, "largest global gradient norm; 0 = no limit", at_least=0)

    eval_steps: int = flag(100, "steps between evaluations; always at the end", at_least=1)
    eval_at_start: str = flag("auto", "evaluate before the first step; auto = unless on a CPU the "
                              "validation tokens x parameters are above 10^12, some 20 seconds",
                              "auto", "on", "off")
    log_steps: int = flag(10, "steps between metrics records", at_least=1)
    save_steps: int = flag(500, "steps between checkpoints, and the best one since then is written "
                           "with them; always at the end", at_least=1)
    keep_every: int = flag(0, "steps between checkpoints kept for good; 0 = none", at_least=0)
    save_minutes: float = flag(0.0, "minutes after which a checkpoint is due too; 0 = no limit",
                               at_least=0)
    checkpoint_async: str = flag("auto", "save in the background, from a copy in memory; auto = "
                                 "where that fits", "auto", "on", "off")
    checkpoint_path: str = flag("", "checkpoint file, or the folder for one of the usual name",
                                metavar="PATH")
    resume: bool = flag(False, "continue the checkpoint, with its settings where none is typed; "
                        "auto = if there is one, else start", word="auto")
    allow_change: tuple[str, ...] = flag((), "settings that may differ from those of the run to "
                                         "resume though they make it another run", metavar="NAME")
    log_dir: str = flag("logs", "folder of the text log, metrics and loss picture", metavar="PATH")
    sample_prompt: str = flag("", "text to continue at each evaluation; none = only at the end",
                              metavar="TEXT")
    sample_tokens: int = flag(120, "tokens of each sample", at_least=1)
    use_profiler: bool = flag(False, "profile a few steps; the trace goes to log-dir")
    use_wandb: bool = flag(False, "report to Weights & Biases")
    wandb_project: str = flag("", "Weights & Biases project; none = WANDB_PROJECT of the "
                              "environment, or else rosetrainer")
    wandb_run_name: str = flag("", "Weights & Biases run name; none = WANDB_NAME of the "
                               "environment, or else chosen by it")
    wandb_mode: str = flag("auto", "Weights & Biases mode; auto = WANDB_MODE of the environment, "
                           "or else online", "auto", "online", "offline", "disabled")

    parallel: str = flag("ddp", "ddp = each process has the model; fsdp = a part of each layer "
                         "and of its optimizer state", "ddp", "fsdp")
    tensor_parallel_size: int = flag(1, "processes that compute each layer together", at_least=1)
    use_tensor_parallel: bool = flag(False, "all processes compute each layer together",
                                     short_for="--tensor-parallel-size with all processes")
    threads: int = flag(0, "CPU threads of each process; 0 = cores / processes of this machine",
                        at_least=0)
    deterministic: bool = flag(False, "GPUs: only kernels that give the same bits each time")
    timeout_seconds: int = flag(120, "longest wait of a rank for the others, seconds", at_least=1,
                                at_most=604_800)

    def __post_init__(self) -> None:
        check_fields(self)
        self._resolve_aliases()
        names = [f.name for kind in (GPTConfig, Settings) for f in dataclasses.fields(kind)]
        allowed = tuple(name.replace("-", "_") for name in self.allow_change)
        for name in allowed:
            choose("allow_change", name, dict.fromkeys(names))
        object.__setattr__(self, "allow_change", allowed)
        self._check_data()
        self._check_schedule()
        if self.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"seq_len={self.seq_len} is beyond max_position_embeddings="
                f"{self.model.max_position_embeddings}; lower --seq-len or raise "
                "--max-position-embeddings"
            )
        self._check_parts()

    @property
    def final_lr(self) -> float:
        """Where the learning rate ends."""
        return self.lr / 10 if self.min_lr < 0 else self.min_lr

    @property
    def has_val_files(self) -> bool:
        """Whether validation has files of its own."""
        return bool(self.val_data or self.val_npy)

    def _resolve_aliases(self) -> None:
        for alias, precision in (("no_amp", "fp32"), ("bf16", "bf16")):
            if getattr(self, alias):
                if self.precision not in ("auto", precision):
                    raise UserError(
                        f"--{alias.replace('_', '-')} contradicts precision={self.precision}; "
                        "give one"
                    )
                object.__setattr__(self, "precision", precision)
                object.__setattr__(self, alias, False)
        if self.data_seed < 0:
            object.__setattr__(self, "data_seed", self.seed)

    def _check_parts(self) -> None:
        parts, model = self.tensor_parallel_size, self.model
        sizes = {"n_heads": model.n_heads, "d_ff": model.d_ff}
        bad = next((name for name, size in sizes.items() if size % parts), None)
        if bad:
            both = math.gcd(*sizes.values())
            fitting = [n for n in range(1, both + 1) if both % n == 0]
            near = sorted(sorted(fitting, key=lambda n: abs(n - parts))[:2])
            raise UserError(
                f"tensor_parallel_size={parts} does not divide {bad}={sizes[bad]}; "
                f"try {' or '.join(map(str, near))}"
            )
        vocab = model.vocab_size
        if vocab and (parts - 1) * -(-vocab // parts) >= vocab:  # the last part would be empty
            raise UserError(
                f"tensor_parallel_size={parts} is too much for vocab_size={vocab}; lower it"
            )

    def _check_data(self) -> None:
        kinds = {"text": self.train_data, "fineweb_npy": self.train_npy, "toy": self.use_toy_data}
        given = [kind for kind, value in kinds.items() if value]
        if self.data_mode == "auto":
            object.__setattr__(self, "data_mode", given[0] if given else "text")
        if given and given != [self.data_mode]:
            raise UserError(
                f"data_mode={self.data_mode} with data for {' and '.join(given)}; "
                "give one of --train-data, --train-npy, --use-toy-data"
            )
        if self.data_mode == "fineweb_npy" and not self.train_npy:
            raise UserError("data_mode=fineweb_npy needs --train-npy FILE...")
        if (self.val_data and self.data_mode != "text") or (
            self.val_npy and self.data_mode != "fineweb_npy"
        ):
            raise UserError(
                f"{'--val-data' if self.val_data else '--val-npy'} does not fit "
                f"data_mode={self.data_mode}; text goes with text, shards with shards"
            )
        if not self.has_val_files and not 0 < self.val_ratio < 1:
            raise UserError(
                f"val_ratio={self.val_ratio} must lie between 0 and 1 where no validation files "
                "are given; try 0.1"
            )

    def _check_schedule(self) -> None:
        if self.min_lr > self.lr:
            raise UserError(f"min_lr={self.min_lr} is above lr={self.lr}; lower it")
        if self.warmup_steps >= self.num_steps:
            raise UserError(
                f"warmup_steps={self.warmup_steps} must be below num_steps={self.num_steps}; "
                f"try --warmup-steps {self.num_steps // 10}"
            )
        if not self.decay_ratio <= 1:
            raise UserError(f"decay_ratio={self.decay_ratio} must be at most 1; try 0.2")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not getattr(self, name) < 1:
                raise UserError(
                    f"{name}={getattr(self, name)} must be at least 0 and below 1; try 0.9"
                )


@dataclass(frozen=True)
class EvalSettings:
    """Settings of eval.py; what is not given comes from the checkpoint."""

    checkpoint_path: tuple[str, ...] = flag((), "checkpoint files, or folders")
    data_mode: str = flag("auto", "kind of data", "auto", "text", "fineweb_npy", "toy")
    val_data: tuple[str, ...] = flag((), "text files to evaluate on, whole")
    val_npy: tuple[str, ...] = flag((), "token shards to evaluate on, whole")
    bin_dtype: str = flag("auto", "ids of .bin files without header; auto = as in training",
                          "auto", "uint8", "uint16", "uint32")
    tokenizer_name: str = flag("", "tokenizer of val-data; none = that of the checkpoint",
                               metavar="NAME|PATH")
    max_tokens: int = flag(0, "evaluate on at most this many tokens; 0 = all", at_least=0)
    by_source: bool = flag(False, "of a mixture, the loss of each source too")
    seq_len: int = flag(0, "tokens per sequence; 0 = as in training", at_least=0)
    batch_size: int = flag(0, "sequences per rank and forward pass; 0 = as before", at_least=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    no_amp: bool = flag(False, "float32, whatever the training used")
    seed: int = flag(-1, "accepted for symmetry: evaluation draws nothing", at_least=-1)
    cache_dir: str = flag("", "folder of the tokenized texts; none = as in training",
                          metavar="PATH")
    log_dir: str = flag("logs", "folder of eval.log and eval.jsonl", metavar="PATH")
    threads: int = flag(0, "CPU threads of each process; 0 = cores / processes of this machine",
                        at_least=0)
    timeout_seconds: int = flag(120, "longest wait of a rank for the others, seconds", at_least=1,
                                at_most=604_800)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.checkpoint_path:
            raise UserError("eval.py needs --checkpoint-path FILE...; a run prints it at its end")
        if self.seq_len == 1:
            raise UserError("seq_len=1 leaves nothing to predict; try the length used in training")
        if self.val_data and self.val_npy:
            raise UserError("--val-data and --val-npy are two data sets; evaluate one at a time")


@dataclass(frozen=True)
class SampleSettings:
    """Settings of generate.py."""

    checkpoint_path: str = flag("checkpoints/minigpt_single.pt", "checkpoint file, or folder",
                                metavar="PATH")
    prompt: str = flag("\n", "text to continue; empty = the start of a document",
                       metavar="TEXT")
    tokenizer_name: str = flag("", "tokenizer; none = that of the checkpoint",
                               metavar="NAME|PATH")
    max_new_tokens: int = flag(300, "tokens to write", at_least=1)
    num_samples: int = flag(1, "continuations to write", at_least=1)
    temperature: float = flag(0.8, "0 = always the likeliest token; 1 = as predicted", at_least=0)
    top_k: int = flag(50, "draw among this many likeliest tokens; 0 = all", at_least=0)
    seed: int = flag(1337, "seed of the draws", at_least=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    threads: int = flag(0, "CPU threads; 0 = as torch chooses", at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)


_GPT2 = dict(
    arch="gpt2", vocab_size=50257, max_position_embeddings=1024, seq_len=1024,
    tokenizer_name="gpt2", batch_size=8, global_batch_size=480, num_steps=20_000,
    warmup_steps=700, eval_steps=250, save_steps=1000, val_max_tokens=1_048_576,
)

PRESETS: dict[str, dict[str, Any]] = {
    # Learns visibly in about a minute on two CPU cores.
    "quickstart": dict(
        arch="modern", vocab_size=0, max_position_embeddings=0, n_layers=2, n_heads=2, d_model=64,
        ngram_rows=10_500, seq_len=128, batch_size=24, global_batch_size=24, num_steps=800,
        optimizer="muon", lr=0.02, muon_lr_ratio=0.4, min_lr=0.0, lr_scheduler="linear",
        warmup_steps=0, eval_steps=200, save_steps=200, val_max_tokens=100_000,
    ),
    "toy": dict(
        arch="gpt2", vocab_size=10_000, max_position_embeddings=0, n_layers=2, n_heads=4,
        d_model=128, d_ff=512, dropout=0.1, seq_len=32, batch_size=8, global_batch_size=8,
        num_steps=50, lr=3e-4, warmup_steps=5, eval_steps=10, log_steps=1, val_max_tokens=10_000,
    ),
    # Shapes: Radford et al. 2019, table 2. Learning rates: Brown et al. 2020, table 2.1.
    "gpt2-small": dict(_GPT2, n_layers=12, n_heads=12, d_model=768, lr=6e-4),
    "gpt2-medium": dict(_GPT2, n_layers=24, n_heads=16, d_model=1024, lr=3e-4),
    "gpt2-large": dict(_GPT2, n_layers=36, n_heads=20, d_model=1280, lr=2.5e-4),
    # The recipe of quickstart at the size of GPT-2 small; its rates are those that trainers of that
    # size publish (matrices: 0.02 of Jordan et al. 2024 is 0.0036 here), not measured here.
    "modern-small": dict(
        _GPT2 | dict(arch="modern"), n_layers=12, n_heads=12, d_model=768, ngram_rows=50_304,
        optimizer="muon", lr=6e-3, muon_lr_ratio=0.6, min_lr=0.0, lr_scheduler="linear",
    ),
    "gpt2-xl": dict(_GPT2, n_layers=48, n_heads=25, d_model=1600, lr=2e-4),
}

# What a preset made for Muon has with --optimizer adamw instead: without Muon's even steps, large
# rates need a warm-up and are still too large.
WITH_ADAMW: dict[str, dict[str, Any]] = {
    "quickstart": dict(lr=3e-3, warmup_steps=50),
    "modern-small": dict(lr=9e-4, warmup_steps=1250),
}
# fmt: on


def preset_values(preset: str, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a preset where the flags that were typed leave them. Raises UserError."""
    values = dict(choose("preset", preset, PRESETS))
    if typed.get("data_mode") == "fineweb_npy" or typed.get("train_npy"):
        values.pop("tokenizer_name", None)  # shards need none, and its files may not be at hand
    if typed.get("arch") == "gpt2":
        values.pop("ngram_rows", None)  # a part of the other architecture
    if typed.get("optimizer") == "adamw":
        values |= WITH_ADAMW.get(preset, {})
    if "num_steps" in typed:
        values["warmup_steps"] = min(values["warmup_steps"], typed["num_steps"] // 10)
    return values


def notes_on_preset(args: Settings) -> list[str]:
    """Which rates of its preset a run does not have because of flags that don't name them."""
    preset = PRESETS.get(args.preset, {})
    own = WITH_ADAMW.get(args.preset, {}) if args.optimizer == "adamw" else {}
    planned = (preset | own).get("warmup_steps", 0)
    notes = []
    if own and args.lr == own["lr"]:
        notes.append(
            f"lr is {args.lr:g}, which preset {args.preset} has with adamw (with muon "
            f"{preset['lr']:g}); --lr sets another"
        )
    if args.warmup_steps == args.num_steps // 10 < planned:
        notes.append(
            f"warm-up is {args.warmup_steps} steps, a tenth of --num-steps, where preset "
            f"{args.preset} has {planned}; --warmup-steps sets another"
        )
    return notes


def wandb_mode(args: Settings) -> str:
    """online, offline or disabled: what the settings say, or with auto the environment. Raises
    UserError for a WANDB_MODE that is none of those that wandb knows.
    """
    if args.wandb_mode != "auto":
        return args.wandb_mode
    found = os.environ.get("WANDB_MODE") or "online"
    known = {"online": "online", "offline": "offline", "disabled": "disabled"}
    return str(choose("WANDB_MODE", found, known | {"run": "online", "dryrun": "offline"}))


def default_checkpoint(script: str) -> str:
    """Where a trainer saves unless told otherwise."""
    return f"checkpoints/minigpt_{'ddp' if script == 'train_ddp' else 'single'}.pt"


def in_folder(path: str, default: str) -> str:
    """The path, or in a folder the file there with the name of the default path; "" is that."""
    if path and (path.endswith("/") or os.path.isdir(path)):
        return os.path.join(path, os.path.basename(default))
    return path or default


def checkpoint_in(path: str) -> str:
    """The path of a checkpoint to read; of a folder, that of the trainer whose usual name is there.
    Raises UserError where both are.
    """
    usual = [in_folder(path, default_checkpoint(x)) for x in ("train_minimal", "train_ddp")]
    found = [p for p in dict.fromkeys(usual) if os.path.exists(p)]
    if len(found) == 2:
        raise UserError(f"{path} holds {found[0]} and {found[1]}; say which")
    if not found and os.path.isdir(path):
        others = sorted(p.name for p in Path(path).glob("*.pt"))
        if others:
            raise UserError(
                f"{path} has no {Path(usual[0]).name}; name one of its checkpoints: "
                f"{', '.join(others[:4])}{', ...' if len(others) > 4 else ''}"
            )
    return found[0] if found else usual[0]


# What runs did before these settings existed: a checkpoint that lacks them means this.
BEFORE: dict[str, Any] = {"val_by_weight": False, "allow_leak": True}


def expanded(path: str | Path, flag: str) -> Path:
    """A path in which ~ may stand for the home directory. Raises UserError where the user has none:
    HOME is not set, and the number of the user stands for no account, as in some containers.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: this user has no home directory; set HOME, or name another folder with {flag}"
        ) from None


def log_base(args: Settings) -> Path:
    """What the logs of a run are called, without their endings: in log_dir, as its checkpoint is,
    or for a trainer's default checkpoint as the trainer.
    """
    name = Path(args.checkpoint_path).stem
    for script in ("train_minimal", "train_ddp"):
        if os.path.abspath(args.checkpoint_path) == os.path.abspath(default_checkpoint(script)):
            name = script
    return Path(args.log_dir) / name


def from_dict(values: Mapping[str, Any]) -> Settings:
    """Settings from a flat mapping, as a checkpoint stores it. Raises UserError for unknown
    names and bad values.
    """
    names = {f.name for f in dataclasses.fields(GPTConfig)}
    model = {k: v for k, v in values.items() if k in names}
    run: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k not in names
    }
    unknown = sorted(
        set(run) - {f.name for f in dataclasses.fields(Settings)} | ({"model"} & set(run))
    )
    if unknown:
        raise UserError(
            f"unknown settings {', '.join(unknown)}; were they written by another version?"
        )
    return Settings(model=GPTConfig(**model), **run)


def to_dict(args: Settings) -> dict[str, Any]:
    """The settings as one flat mapping of plain values; the inverse of `from_dict`."""
    values = dataclasses.asdict(args)
    return {
        **values.pop("model"),
        **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
    }


def with_vocab_size(args: Settings, vocab_size: int, tokenizer_name: str) -> Settings:
    """The same settings with what the data settles: the tokenizer's name, and a vocabulary size
    that holds its ids.
    """
    if args.model.vocab_size and args.model.vocab_size < vocab_size:
        raise UserError(
            f"vocab_size={args.model.vocab_size} is below the tokenizer's {vocab_size} ids; "
            f"try --vocab-size {vocab_size}"
        )
    model = dataclasses.replace(args.model, vocab_size=args.model.vocab_size or vocab_size)
    return dataclasses.replace(args, model=model, tokenizer_name=tokenizer_name)


def check_fields(settings: Any) -> None:
    """Raises UserError where a field has the wrong type, is not finite, or lies outside of what
    its flag allows.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), hints[field.name]
        if kind is float and type(value) is int:
            value = float(value)
            object.__setattr__(settings, field.name, value)
        accepted = tuple if typing.get_origin(kind) is tuple else kind
        if type(value) is not accepted or (
            accepted is tuple and not all(type(v) is str for v in value)
        ):
            raise UserError(
                f"{field.name}={value!r:.80} must be of type {getattr(kind, '__name__', kind)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{field.name}={value} must be a finite number")
        choices, at_least = field.metadata.get("choices"), field.metadata.get("at_least")
        if choices:
            choose(field.name, str(value), dict.fromkeys(choices))
        if at_least is not None and value < at_least:
            raise UserError(f"{field.name}={value} must be at least {at_least}")
        at_most = field.metadata.get("at_most")
        if at_most is not None and isinstance(value, int) and value > at_most:
            raise UserError(f"{field.name}={value} must be at most {at_most}")


def choose(name: str, given: str, allowed: Mapping[str, Any]) -> Any:
    """What `given` stands for in `allowed`. Raises UserError that names those that are close."""
    if given not in allowed:
        close = difflib.get_close_matches(given[:80], allowed, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{name}={given!r:.80} is not one of {', '.join(allowed)}{hint}")
    return allowed[given]
