"""The settings of eval.py and generate.py."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.setting_fields import UserError, check_fields, flag


@dataclass(frozen=True)
class EvalSettings:
    """Settings of eval.py; what is not given comes from the checkpoint."""

    checkpoint_path: tuple[str, ...] = flag(
        (), "checkpoint files, quoted patterns such as 'runs/*.pt', or folders: all in them"
    )
    watch: bool = flag(False, "go on with the checkpoints that a training adds, until it ends")
    csv: str = flag("", "file for the table as CSV; none = not written", metavar="PATH")
    json: str = flag("", "file for the table as JSON; none = not written", metavar="PATH")
    use_wandb: bool = flag(False, "add the results to the Weights & Biases runs of the checkpoints")
    data_mode: str = flag("auto", "kind of data", "auto", "text", "fineweb_npy", "toy")
    val_data: tuple[str, ...] = flag((), "text files to evaluate on, whole")
    val_npy: tuple[str, ...] = flag((), "token shards to evaluate on, whole")
    text_column: str = flag(
        "", "name of the text in .jsonl and .parquet; none = as in training", metavar="NAME"
    )
    bin_dtype: str = flag(
        "auto",
        "ids of .bin files without header; auto = as in training",
        "auto",
        "uint8",
        "uint16",
        "uint32",
    )
    tokenizer_name: str = flag(
        "", "tokenizer of val-data; none = that of the checkpoint", metavar="NAME|PATH"
    )
    max_tokens: int = flag(0, "evaluate on at most this many tokens; 0 = all", at_least=0)
    tasks: tuple[str, ...] = flag(
        (), "tasks of lm-evaluation-harness, such as hellaswag,arc_easy", metavar="NAME"
    )
    tasks_only: bool = flag(False, "no loss on validation data, which need not be there")
    task_path: str = flag("", "folder with tasks of your own, as YAML files", metavar="PATH")
    task_limit: int = flag(0, "questions of each task; 0 = all", at_least=0)
    num_fewshot: int = flag(
        -1, "examples before each question of a task; -1 = as it says", at_least=-1
    )
    by_source: bool = flag(False, "of a mixture, the loss of each source too")
    seq_len: int = flag(0, "tokens per sequence; 0 = as in training", at_least=0)
    batch_size: int = flag(0, "sequences per rank and forward pass; 0 = as before", at_least=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    no_amp: bool = flag(False, "float32, whatever the training used")
    seed: int = flag(-1, "accepted for symmetry: evaluation draws nothing", at_least=-1)
    cache_dir: str = flag(
        "", "folder of the tokenized texts; none = as in training", metavar="PATH"
    )
    log_dir: str = flag("logs", "folder of eval.log, eval.jsonl and eval.png", metavar="PATH")
    threads: int = flag(
        0, "CPU threads of each process; 0 = cores / processes of this machine", at_least=0
    )
    timeout_seconds: int = flag(
        120, "longest wait of a rank for the others, seconds", at_least=1, at_most=604_800
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.checkpoint_path:
            raise UserError("eval.py needs --checkpoint-path FILE...; a run prints it at its end")
        if self.seq_len == 1:
            raise UserError("seq_len=1 leaves nothing to predict; try the length used in training")
        if self.val_data and self.val_npy:
            raise UserError("--val-data and --val-npy are two data sets; evaluate one at a time")
        names = [name for word in self.tasks for name in word.split(",") if name]
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(names)))
        about = ("task_path", "task_limit", "tasks_only")
        if not names and (any(getattr(self, n) for n in about) or self.num_fewshot >= 0):
            raise UserError(
                "--tasks-only, --task-path, --task-limit and --num-fewshot are of --tasks; "
                "name some"
            )
        if self.tasks_only and (self.val_data or self.val_npy or self.by_source):
            raise UserError("--tasks-only computes no loss; leave out --val-data and --by-source")
        if self.csv and self.csv == self.json:
            raise UserError(f"--csv and --json are both {self.csv}; give two files")


@dataclass(frozen=True)
class SampleSettings:
    """Settings of generate.py."""

    checkpoint_path: str = flag(
        "checkpoints/minigpt_single.pt", "checkpoint file, or folder", metavar="PATH"
    )
    prompt: str = flag("\n", "text to continue; empty = the start of a document", metavar="TEXT")
    prompt_file: str = flag("", "file of prompts, one a line; - = standard input", metavar="PATH")
    prompt_separator: str = flag(
        "\n", "what parts the prompts in prompt-file; empty = it is one prompt", metavar="TEXT"
    )
    tokenizer_name: str = flag("", "tokenizer; none = that of the checkpoint", metavar="NAME|PATH")
    max_new_tokens: int = flag(300, "tokens to write", at_least=1)
    num_samples: int = flag(1, "continuations to write of each prompt", at_least=1)
    batch_size: int = flag(8, "continuations that are computed together", at_least=1)
    temperature: float = flag(0.8, "0 = always the likeliest token; 1 = as predicted", at_least=0)
    top_k: int = flag(50, "draw among this many likeliest tokens; 0 = all", at_least=0)
    top_p: float = flag(
        1.0,
        "draw among the likeliest tokens that have this probability together",
        at_least=0,
        at_most=1,
    )
    min_p: float = flag(
        0.0, "leave out tokens below this part of the highest probability", at_least=0, at_most=1
    )
    repetition_penalty: float = flag(
        1.0, "divides the logits of tokens that have occurred; 1 = off", at_least=0
    )
    stop: tuple[str, ...] = flag(
        (), "strings that end a continuation; it is shown up to there", metavar="TEXT"
    )
    seed: int = flag(1337, "seed of the draws; each further continuation has one more", at_least=0)
    json: bool = flag(False, "print each continuation as a line of JSON, without headings")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    threads: int = flag(0, "CPU threads; 0 = as torch chooses", at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        if "" in self.stop:
            raise UserError("--stop '' would stop at once; leave it out")
        if not self.repetition_penalty:
            raise UserError("repetition_penalty=0 must be above 0; 1 = off, try 1.1")
        if self.prompt_file and self.prompt != "\n":
            raise UserError("--prompt and --prompt-file both give prompts; give one of them")
