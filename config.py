"""All settings, each defined once, in dataclasses that check themselves. Presets, and how the
command line becomes such settings, are in settings/.

A setting is one line, `name: type = flag(default, "help, with its unit")`: the flag `--name`, its
help, its type check and its place in every checkpoint follow from it. Precedence: what the user
typed, then the checkpoint (with --resume) or the preset, then the default of the field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.setting_fields import UserError, check_fields, flag


def _divisors_near(wanted: int, size: int) -> str:
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    near = sorted(divisors, key=lambda n: (abs(n - wanted), -n))[:2]
    return " or ".join(map(str, sorted(near)))


# fmt: off
@dataclass(frozen=True)
class GPTConfig:
    """The shape of a `GPTModel`; the defaults are GPT-2 small (Radford et al. 2019, table 2)."""

    arch: str = flag("gpt2", "architecture of the blocks", "gpt2", "modern")
    vocab_size: int = flag(50257, "token ids that exist; 0 = as the tokenizer", at_least=0)
    max_position_embeddings: int = flag(1024, "longest input, tokens", at_least=1, at_most=2**20)
    n_layers: int = flag(12, "blocks", at_least=1, at_most=4096)
    n_heads: int = flag(12, "attention heads per block", at_least=1, fixed=True)
    d_model: int = flag(768, "width of the residual stream", at_least=1)
    d_ff: int = flag(0, "hidden width of the MLP; 0 = 4 x d_model", at_least=0)
    gelu: str = flag("tanh", "gpt2: GELU by its tanh form, or none = exact, as nanoGPT has it",
                     "tanh", "none", fixed=True)
    dropout: float = flag(0.0, "probability of dropping an activation", at_least=0)
    ngram_rows: int = flag(0, "modern: rows of the hashed n-gram embedding; 0 = none", at_least=0)
    ngram_longest: int = flag(4, "modern: ids of the longest n-gram that has a row", at_least=2,
                              at_most=16)
    ngram_dropout: float = flag(0.0, "probability of leaving out an n-gram's row", at_least=0)
    use_activation_checkpoint: bool = flag(False, "recompute blocks backward to save memory")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.d_ff == 0:
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        if self.d_model % self.n_heads:
            raise UserError(
                f"n_heads={self.n_heads} does not divide d_model={self.d_model}; "
                f"try {_divisors_near(self.n_heads, self.d_model)}"
            )
        if self.arch == "modern" and (self.d_model // self.n_heads) % 2:
            raise UserError(
                f"d_model/n_heads={self.d_model // self.n_heads} is odd, and rotary positions need "
                "an even width per head; try another n_heads"
            )
        if self.arch == "gpt2" and self.ngram_rows:
            raise UserError(f"ngram_rows={self.ngram_rows} is for --arch modern; leave it at 0")
        for name in ("dropout", "ngram_dropout"):
            if not getattr(self, name) < 1:
                value = getattr(self, name)
                raise UserError(f"{name}={value} must be at least 0 and below 1; try 0.1")

    @property
    def drops(self) -> bool:
        """Whether a forward pass in training leaves something out at random."""
        return self.dropout + self.ngram_dropout > 0


@dataclass(frozen=True)
class Settings:
    """All settings of a training run, complete and checked; `parse_settings` in
    settings/command_line.py makes one.
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
    text_column: str = flag("text", "name of the text in .jsonl and .parquet", metavar="NAME")
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
    val_by_weight: bool = True  # False: the first val_max_tokens of a mixture's joined parts
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
    ngram_optimizer: str = flag("adamw", "update rule of the n-gram embedding; rmsprop = of the "
                                "rows in use, each with a step size of its own", "adamw",
                                "rmsprop", fixed=True)
    ngram_weight_decay: float = flag(0.0, "rmsprop: decoupled decay of the rows in use", at_least=0)
    lr_width: int = flag(0, "d_model at which lr holds: matrices of wider models take smaller "
                         "steps; 0 = lr at any width", at_least=0, fixed=True)
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
    init_from: str = flag("", "weights to start from: a checkpoint, or a folder of Hugging Face; "
                          "none = fresh ones", metavar="PATH", fixed=True)
    log_dir: str = flag("logs", "folder of the text log, metrics and loss picture", metavar="PATH")
    sample_prompt: str = flag("", "text to continue at each evaluation; none = only at the end",
                              metavar="TEXT")
    sample_tokens: int = flag(120, "tokens of each sample", at_least=1)
    use_profiler: bool = flag(False, "profile a few steps; the trace goes to log-dir")
    check_reference: str = flag("", "reference curve that the validation loss must follow",
                                metavar="PATH")
    use_tensorboard: bool = flag(False, "write what Weights & Biases gets for TensorBoard too")
    use_wandb: bool = flag(False, "report to Weights & Biases")
    wandb_project: str = flag("", "Weights & Biases project; none = WANDB_PROJECT of the "
                              "environment, or else rosetrainer")
    wandb_run_name: str = flag("", "Weights & Biases run name; none = WANDB_NAME of the "
                               "environment, or else chosen by it")
    wandb_group: str = flag("", "Weights & Biases group of the run", metavar="NAME")
    wandb_tags: tuple[str, ...] = flag((), "Weights & Biases tags of the run", metavar="NAME")
    wandb_mode: str = flag("auto", "Weights & Biases mode; auto = WANDB_MODE of the environment, "
                           "or else online", "auto", "online", "offline", "disabled")

    parallel: str = flag("ddp", "ddp = each process has the model; fsdp = a part of each layer "
                         "and of its optimizer state", "ddp", "fsdp")
    tensor_parallel_size: int = flag(1, "processes that compute each layer together", at_least=1)
    use_tensor_parallel: bool = flag(False, "all processes compute each layer together",
                                     short_for="--tensor-parallel-size with all processes")
    minutes: float = flag(0.0, "choose the model and its training for so many minutes on this "
                          "device; 0 = do not", at_least=0)
    chosen: str = ""  # what --minutes chose, and why
    open_end: bool = False  # whether num_steps is a plan that --minutes still changes
    most_steps: int = 0  # to which it may raise num_steps; 0 = no limit
    threads: int = flag(0, "CPU threads of each process; 0 = cores / processes of this machine",
                        at_least=0)
    dry_run: bool = flag(False, "say what the run would take, after three measured steps, and end")
    deterministic: bool = flag(False, "GPUs: only kernels that give the same bits each time")
    timeout_seconds: int = flag(120, "longest wait of a rank for the others, seconds", at_least=1,
                                at_most=604_800)

    def __post_init__(self) -> None:
        check_fields(self)
        self._resolve_aliases()
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
        """The learning rate at the end of the schedule."""
        return self.lr / 10 if self.min_lr < 0 else self.min_lr

    @property
    def has_val_files(self) -> bool:
        """Whether validation has files of its own; else part of the training data is held out."""
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
            raise UserError(f"tensor_parallel_size={parts} does not divide {bad}={sizes[bad]}; "
                            f"try {_divisors_near(parts, math.gcd(*sizes.values()))}")
        vocab = model.vocab_size
        if vocab and (parts - 1) * -(-vocab // parts) >= vocab:  # the last part would be empty
            raise UserError(f"tensor_parallel_size={parts} is too much for vocab_size={vocab}; "
                            "lower it")

    def _check_data(self) -> None:
        kinds = {"text": self.train_data, "fineweb_npy": self.train_npy, "toy": self.use_toy_data}
        given = [kind for kind, value in kinds.items() if value]
        if self.data_mode == "auto":
            object.__setattr__(self, "data_mode", given[0] if given else "text")
        if given and given != [self.data_mode]:
            raise UserError(f"data_mode={self.data_mode} with data for {' and '.join(given)}; "
                            "give one of --train-data, --train-npy, --use-toy-data")
        if self.data_mode == "fineweb_npy" and not self.train_npy:
            raise UserError("data_mode=fineweb_npy needs --train-npy FILE...")
        for name, mode in (("val_data", "text"), ("val_npy", "fineweb_npy")):
            if getattr(self, name) and self.data_mode != mode:
                raise UserError(f"--{name.replace('_', '-')} does not fit "
                                f"data_mode={self.data_mode}; text goes with text, shards with "
                                "shards")
        if not self.has_val_files and not 0 < self.val_ratio < 1:
            raise UserError(f"val_ratio={self.val_ratio} must lie between 0 and 1 where no "
                            "validation files are given; try 0.1")

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

# fmt: on


# Values of settings that are missing in old checkpoints: what runs did before they existed.
BEFORE: dict[str, Any] = {"val_by_weight": False, "allow_leak": True}


def from_dict(values: Mapping[str, Any]) -> Settings:
    """Returns the settings from a flat mapping of names to values, as a checkpoint stores it.
    Raises UserError for unknown names and bad values.
    """
    names = {f.name for f in dataclasses.fields(GPTConfig)}
    model = {k: v for k, v in values.items() if k in names}
    rest = {k: v for k, v in values.items() if k not in names}
    run: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in rest.items()}
    known = {f.name for f in dataclasses.fields(Settings)} - {"model"}
    if unknown := sorted(run.keys() - known):
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
