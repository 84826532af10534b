import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from config import GPTConfig, Settings, from_dict, to_dict
from runtime.files import expanded
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import NothingSaved, UserError
from settings.command_line import parse_settings, trainer_flags
from settings.eval_and_generate import EvalSettings, SampleSettings
from settings.presets import PRESETS, notes_on_preset

DESIGN_FLAGS = [
    "--vocab-size",
    "--max-position-embeddings",
    "--n-layers",
    "--n-heads",
    "--d-model",
    "--d-ff",
    "--dropout",
    "--use-tensor-parallel",
    "--use-activation-checkpoint",
    "--batch-size",
    "--seq-len",
    "--num-steps",
    "--lr",
    "--no-amp",
    "--bf16",
    "--checkpoint-path",
    "--resume",
    "--lr-scheduler",
    "--warmup-steps",
    "--use-profiler",
    "--seed",
    "--grad-accum-steps",
    "--grad-clip-norm",
    "--train-data",
    "--val-data",
    "--val-ratio",
    "--eval-steps",
    "--data-mode",
    "--train-npy",
    "--val-npy",
    "--tokenizer-name",
    "--use-toy-data",
    "--max-tokens",
    "--val-max-tokens",
    "--data-seed",
    "--use-wandb",
    "--wandb-project",
    "--wandb-run-name",
    "--preset",
    "--device",
    "--arch",
    "--optimizer",
    "--precision",
    "--compile",
    "--global-batch-size",
    "--min-lr",
    "--weight-decay",
    "--beta1",
    "--beta2",
    "--log-steps",
    "--save-steps",
    "--keep-every",
    "--sample-prompt",
    "--parallel",
    "--tensor-parallel-size",
    "--wandb-mode",
    "--timeout-seconds",
]


def parse(*flags, **options):
    return parse_settings("train_minimal", list(flags), **options)


def message(*flags, **options):
    with pytest.raises(UserError) as caught:
        parse(*flags, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_flag_of_the_design_exists():
    fields = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(Settings)}
    fields |= {"--" + f.name.replace("_", "-") for f in dataclasses.fields(GPTConfig)}
    assert set(DESIGN_FLAGS) <= fields


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "finetune"])
def test_every_preset_is_complete_and_explicit_flags_win_over_it(preset):
    args = parse("--preset", preset, "--lr", "0.123")
    assert args.lr == 0.123
    assert args.model.n_layers == PRESETS[preset]["n_layers"]
    assert args.model.max_position_embeddings >= args.seq_len


def test_toy_preset_is_the_one_of_the_articles():
    args = parse("--preset", "toy")
    model = args.model
    shape = (
        model.vocab_size,
        model.n_layers,
        model.n_heads,
        model.d_model,
        model.d_ff,
        model.dropout,
    )
    assert shape == (10_000, 2, 4, 128, 512, 0.1)
    assert (args.seq_len, args.batch_size, args.num_steps, args.lr) == (32, 8, 50, 3e-4)


def test_settings_survive_a_checkpoint():
    args = parse("--preset", "gpt2-small", "--train-data", "a.txt", "b.txt")
    assert from_dict(to_dict(args)) == args


def test_no_flag_is_a_tuple_by_accident():
    for value in to_dict(parse()).values():
        assert type(value) in (int, float, str, bool, list)


BATCHES = [  # flags, ranks -> global batch, micro-batch, micro-steps (toy's batch is 8)
    ("--preset gpt2-small", 1, (480, 8, 60)),
    ("--preset gpt2-small --batch-size 4", 1, (480, 4, 120)),
    ("--preset gpt2-small --batch-size 4", 8, (480, 4, 15)),
    ("--preset gpt2-small --grad-accum-steps 120", 2, (480, 2, 120)),
    ("--preset gpt2-small --global-batch-size 12", 1, (12, 6, 2)),
    ("--preset gpt2-small --batch-size 4 --grad-accum-steps 3", 2, (24, 4, 3)),
    ("--preset toy", 1, (8, 8, 1)),
    ("--preset toy --batch-size 2", 1, (8, 2, 4)),
    ("--preset toy --batch-size 2", 2, (8, 2, 2)),
    ("--batch-size 4", 1, (24, 4, 6)),  # quickstart
    ("--batch-size 4 --grad-accum-steps 6 --global-batch-size 24", 1, (24, 4, 6)),
    ("--preset toy", 3, (9, 3, 1)),  # the nearest multiple of the ranks
    ("--preset toy --batch-size 3", 1, "--batch-size 2 or 4, or --global-batch-size 6 or 9"),
    ("--preset toy --batch-size 16", 1, "--batch-size 4 or 8, or --global-batch-size 16"),
    ("--preset toy --grad-accum-steps 3", 1, "--global-batch-size 6 or 9"),
    ("--preset toy --grad-accum-steps 16", 1, "--global-batch-size 16"),
    ("--global-batch-size 25 --batch-size 4", 3, "--global-batch-size 24 or 36"),
    ("--global-batch-size 24 --batch-size 4 --grad-accum-steps 1", 1, "--global-batch-size 24"),
]


@pytest.mark.parametrize("flags, world, expected", BATCHES)
def test_the_global_batch_is_the_presets_and_batch_size_its_micro_batch(flags, world, expected):
    if isinstance(expected, str):
        said = message(*flags.split(), world=world)
        assert said.startswith("global_batch_size=") and f"{world} ranks x batch_size" in said
        assert f"; try {expected}" in said
    else:
        args = parse(*flags.split(), world=world)
        assert (args.global_batch_size, args.batch_size, args.grad_accum_steps) == expected


def test_a_resumed_run_keeps_its_global_batch_whatever_sizes_the_micro_batch():
    saved = to_dict(parse("--preset", "toy", "--global-batch-size", "12"))
    for flags, expected in (("--batch-size 3", (12, 3, 4)), ("--grad-accum-steps 6", (12, 2, 6))):
        args = parse("--resume", *flags.split(), saved=lambda path: saved)
        assert (args.global_batch_size, args.batch_size, args.grad_accum_steps) == expected
    said = message("--resume", "--batch-size", "5", saved=lambda path: saved)
    assert said.endswith("try --batch-size 4 or 6, or other --nproc-per-node")


def test_zero_means_not_given():
    assert parse("--global-batch-size", "0").global_batch_size == parse().global_batch_size


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 7, 8, 16, 64])
def test_presets_start_on_any_number_of_processes(world):
    for preset in (p for p in PRESETS if p != "finetune"):
        args = parse("--preset", preset, world=world)
        assert args.global_batch_size == args.batch_size * args.grad_accum_steps * world


def test_resume_keeps_the_global_batch_on_another_number_of_processes():
    saved = to_dict(
        parse("--batch-size", "4", "--grad-accum-steps", "3", "--lr", "0.5", "--min-lr", "-1")
    )
    args = parse("--resume", world=4, saved=lambda path: saved)
    assert (args.global_batch_size, args.batch_size, args.lr) == (12, 3, 0.5)
    assert "global_batch_size=12" in message("--resume", world=5, saved=lambda path: saved)
    said = message("--resume", "--global-batch-size", "24", saved=lambda path: saved)
    assert "the run to resume has global_batch_size=12, not 24" in said
    assert parse("--resume", "--lr", "1e-4", saved=lambda path: saved).final_lr == 1e-5


def test_resume_takes_typed_flags_over_saved_ones():
    saved = to_dict(parse("--no-amp"))
    args = parse("--resume", "--bf16", "--num-steps", "900", saved=lambda path: saved)
    assert (args.precision, args.num_steps) == ("bf16", 900)


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--n-heads", "5", "--d-model", "128"],
            "n_heads=5 does not divide d_model=128; try 4 or 8",
        ),
        (["--seq-len", "256", "--max-position-embeddings", "128"], "seq_len=256 is beyond"),
        (["--num-steps", "0"], "num_steps=0 must be at least 1"),
        (["--batch-size", "-3"], "batch_size=-3 must be at least 1"),
        (["--d-model", "-8"], "d_model=-8 must be at least 1"),
        (["--lr", "nan"], "lr=nan must be a finite number"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--dropout", "1.0"], "dropout=1.0"),
        (["--beta2", "1"], "beta2=1.0"),
        (["--min-lr", "1"], "min_lr=1.0 is above lr"),
        (
            ["--warmup-steps", "900", "--num-steps", "900"],
            "warmup_steps=900 must be below num_steps",
        ),
        (["--val-ratio", "1.5"], "val_ratio=1.5 must lie between 0 and 1"),
        (["--preset", "quikstart"], "did you mean quickstart?"),
        (["--lr-schedular", "cosine"], "did you mean --lr-scheduler"),
        (["--lr-scheduler", "cosin"], "did you mean cosine?"),
        (["--bf16", "--no-amp"], "contradicts"),
        (["--precision", "fp16", "--bf16"], "contradicts"),
        (["--data-mode", "fineweb_npy"], "needs --train-npy"),
        (["--use-toy-data", "--train-data", "x.txt"], "give one of"),
        (["--train-data", "x.txt", "--val-npy", "y.npy"], "text goes with text"),
        (["--preset", "toy", "--resume"], "--preset with --resume"),
        (["--timeout-seconds", "10000000000000"], "must be at most 604800"),
        (["--arch", "gpt2", "--ngram-rows", "100"], "ngram_rows=100 is for --arch modern"),
        (["--muon-momentum", "1"], "muon_momentum=1.0 must be at least 0 and below 1"),
        (["--micro-batch", "auto", "--batch-size", "4"], "--micro-batch auto chooses batch_size"),
        (["--micro-batch", "all"], "micro_batch='all' is not one of given, auto"),
        (["--parallel", "fsdp"], "are for several processes: torchrun"),
        (["--tensor-parallel-size", "2"], "are for several processes: torchrun"),
        (["--tensor-parallel-size", "3"], "tensor_parallel_size=3 does not divide n_heads=2; try"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(flags, said):
    assert said in message(*flags, saved=lambda path: {})


@pytest.mark.parametrize(
    "values, said",
    [
        ({"n_layers": "12"}, "n_layers='12' must be of type int"),
        ({"n_layers": True}, "must be of type int"),
        ({"lr": float("inf")}, "finite"),
        ({"vocab_size": 10**30}, "at most"),
        ({"evil": 1}, "unknown settings evil"),
        ({"model": {}}, "unknown settings model"),
    ],
)
def test_settings_of_a_hostile_file_are_refused(values, said):
    with pytest.raises(UserError) as caught:
        from_dict(values)
    assert said in str(caught.value)


def shown(capsys, *flags, kind=Settings, program="train_minimal.py"):
    """What --help prints, each help of a flag in one line."""
    with pytest.raises(SystemExit) as ended:
        if kind is Settings:
            trainer_flags(program.removesuffix(".py"), [*flags, "--help"])
        else:
            parse_flags(kind, program, [*flags, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def help_of(out, flag):
    part = out[re.search(rf"^  {flag}(?![\w-])", out, re.M).start() + 2 :]
    return " ".join(re.split(r"\n  -|\n\n", part)[0].split())


def test_help_names_every_flag(capsys):
    out = shown(capsys)
    assert all(name in out for name in DESIGN_FLAGS)


@pytest.mark.parametrize(
    "flags, values",
    [
        ([], "arch modern, n-layers 2, optimizer muon, lr 0.02, global-batch-size 24, min-lr 0"),
        (["--preset", "gpt2-small"], "arch gpt2, d-model 768, d-ff 3072, lr 0.0006, min-lr 6e-05"),
        (["--preset", "toy", "--lr", "0.5"], "lr 0.5, min-lr 0.05, num-steps 50, d-ff 512"),
        (["--optimizer", "adamw"], "lr 0.003, warmup-steps 50"),
        (["--batch-size", "4"], "batch-size 4, grad-accum-steps 6, global-batch-size 24"),
        (["--data-mode", "fineweb_npy"], "arch modern, seq-len 128"),  # not complete yet
        (["--resume", "auto"], "num-steps 800, resume off, train-data none"),
        (["--bf16"], "precision bf16, log-dir logs, use-wandb off, threads 0"),
    ],
)
def test_help_shows_what_the_command_line_would_use(capsys, flags, values):
    out = shown(capsys, *flags)
    for name, value in (pair.split() for pair in values.split(", ")):
        assert help_of(out, f"--{name}").endswith(f" [{value}]"), name


def test_the_preset_for_given_weights_wants_them():
    assert "--preset finetune goes with --init-from" in message("--preset", "finetune")


def test_help_shows_the_presets_with_their_values(capsys):
    out = shown(capsys)
    header, *rows = (line.split() for line in out[out.index("\npreset ") :].splitlines()[1:])
    table = {r[0]: dict(zip(header, r, strict=True)) for r in rows if len(r) == len(header)}
    assert set(PRESETS) <= set(table)
    for name, values in PRESETS.items():
        for key in ("n_layers", "d_model", "global_batch_size", "num_steps", "lr"):
            assert key not in values or float(table[name][key]) == values[key]
    assert "quickstart with --optimizer adamw: lr 0.003, warmup_steps 50" in out


@pytest.mark.parametrize(
    "kind, program",
    [(Settings, "train_ddp.py"), (EvalSettings, "eval.py"), (SampleSettings, "generate.py")],
)
def test_help_has_a_sound_word_for_each_value_and_no_empty_default(capsys, kind, program):
    out = shown(capsys, kind=kind, program=program)
    body = out[out.index("\noptions:") :]
    assert set(re.findall(r"^  --[\w-]+ ([A-Z|]+)\b", body, re.M)) <= {
        "N", "X", "NAME", "PATH", "NAME|PATH", "TEXT"
    }  # fmt: skip
    assert "[]" not in body and "(default" not in body


def test_help_needs_no_torch():
    code = "import config, settings.command_line, settings.before_torch, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    "given, said",
    [
        ("--learning-rate", "here that is --lr"),
        ("--epochs", "here that is --num-steps: runs are counted in optimizer steps"),
        ("--max_iters=5000", "here that is --num-steps"),
        ("--block-size", "here that is --seq-len"),
        ("--n_layer=4", "here that is --n-layers"),
        ("--n-head", "here that is --n-heads"),
        ("--n-embd", "here that is --d-model"),
        ("--weight-tying", "the embedding and the output head always share their weights"),
        ("--gradient_accumulation_steps", "here that is --grad-accum-steps"),
        ("--dtype", "here that is --precision"),
        ("--batch_size", "did you mean --batch-size?"),
        ("--Seq-Len", "did you mean --seq-len?"),
        ("--xyzzy", "--help lists all flags"),
    ],
)
def test_a_flag_of_another_trainer_is_answered_with_ours(given, said):
    assert said in message(given, "1")


def test_a_foreign_flag_is_answered_only_with_one_that_the_script_has():
    with pytest.raises(UserError) as caught:
        parse_flags(SampleSettings, "generate.py", ["--learning-rate", "1"])
    assert "--lr" not in str(caught.value)


@pytest.mark.parametrize("flag", ["bf16", "no-amp", "use-toy-data", "use-tensor-parallel"])
def test_an_alias_has_no_negation_and_says_what_to_give(flag):
    said = message(f"--no-{flag}")
    assert f"--{flag} is short for --" in said and "has no opposite; give --" in said


def test_tensor_parallelism_of_all_ends_with_a_typed_size():
    saved = {**to_dict(parse()), "use_tensor_parallel": True, "tensor_parallel_size": 2}
    flags = ["--resume", "--tensor-parallel-size", "1"]
    args = parse_settings("train_ddp", flags, 2, lambda path: saved)
    assert args.tensor_parallel_size == 1


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--min-lr -0.5", "min_lr=-0.5 is below 0; give 0 or more, or -1 for a tenth of --lr"),
        ("--decay-ratio 0.5", "--decay-ratio goes with --lr-scheduler wsd"),
        ("--lr-scheduler none --min-lr 0.001", "--min-lr goes with a --lr-scheduler that is not"),
        ("--optimizer adamw --muon-momentum 0.9", "--muon-momentum goes with --optimizer muon"),
        ("--preset toy --muon-lr-ratio 1", "--muon-lr-ratio goes with --optimizer muon"),
        ("--train-data a --val-data b --val-ratio 0.2", "--val-ratio goes with data without"),
        ("--train-data a --bin-dtype uint16", "--bin-dtype goes with --train-npy"),
        ("--train-npy a --document-separator x", "--document-separator goes with text"),
        ("--wandb-project p", "--wandb-project goes with --use-wandb"),
        ("--wandb-mode offline", "--wandb-mode goes with --use-wandb"),
        ("--wandb-group g", "--wandb-group goes with --use-wandb"),
        ("--wandb-tags a b", "--wandb-tags goes with --use-wandb"),
    ],
)
def test_what_nothing_would_read_is_refused(flags, said):
    assert said in message(*flags.split())


def test_what_is_read_is_taken():
    assert parse("--min-lr", "-1", "--lr", "0.3").final_lr == pytest.approx(0.03)
    assert parse(*"--lr-scheduler wsd --decay-ratio 0.5".split()).decay_ratio == 0.5
    assert parse("--wandb-mode", "disabled").wandb_mode == "disabled"
    assert from_dict({"min_lr": -0.5, "lr": 1.0}).final_lr == 0.1  # as old checkpoints mean it


def test_rates_that_a_preset_has_because_of_other_flags_are_said():
    assert notes_on_preset(parse()) == []
    (said,) = notes_on_preset(parse("--optimizer", "adamw"))
    assert said.startswith("lr is 0.003, which preset quickstart has with adamw (with muon 0.02)")
    (said,) = notes_on_preset(parse("--preset", "gpt2-small", "--num-steps", "1000"))
    assert said.startswith("warm-up is 100 steps, a tenth of --num-steps, where preset gpt2-small")
    assert notes_on_preset(parse("--optimizer", "adamw", "--lr", "0.1")) == []


def test_a_tilde_is_the_home_directory_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = "checkpoint-path log-dir cache-dir tokenizer-name train-data val-data"
    typed = parse_flags(Settings, "train_minimal.py", [f"--{name}=~/x y" for name in paths.split()])
    assert set(typed.values()) == {"/home/me/x y", ("/home/me/x y",)} and len(typed) == 6
    mixture = parse_flags(Settings, "train_minimal.py", ["--train-npy", "~/a.npy:0.7", "b:0.3"])
    assert mixture["train_npy"] == ("/home/me/a.npy:0.7", "b:0.3")
    typed = parse_flags(EvalSettings, "eval.py", ["--checkpoint-path=~/c.pt", "--log-dir=~/l"])
    assert set(typed.values()) == {("/home/me/c.pt",), "/home/me/l"}
    typed = parse_flags(SampleSettings, "generate.py", ["--checkpoint-path=~/c", "--prompt=~/c"])
    assert typed == {"checkpoint_path": "/home/me/c", "prompt": "~/c"}


def test_a_folder_as_checkpoint_path_gets_the_usual_name_in_it(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in (f"{tmp_path}/new/", f"{tmp_path}/there"):
        where = Path(folder)
        args = parse("--checkpoint-path", folder)
        assert Path(args.checkpoint_path) == where / "minigpt_single.pt"
        args = parse_settings("train_ddp", ["--checkpoint-path", folder])
        assert Path(args.checkpoint_path) == where / "minigpt_ddp.pt"
    assert parse("--checkpoint-path", f"{tmp_path}/c").checkpoint_path == f"{tmp_path}/c"


def test_a_run_that_torchrun_starts_again_continues_what_it_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = to_dict(parse_settings("train_ddp", ["--num-steps", "7", "--device", "cpu"]))
    typed = ["--preset", "toy", "--checkpoint-path", "c.pt"]

    def nothing(path):
        raise NothingSaved("no such checkpoint")

    again = parse_settings("train_ddp", typed, saved=nothing, restarted=True)
    assert not again.resume and again.num_steps == 50
    again = parse_settings("train_ddp", typed, saved=lambda path: saved, restarted=True)
    assert again.resume and again.num_steps == 7
    assert not parse_settings("train_ddp", typed, saved=lambda path: saved).resume
    with pytest.raises(NothingSaved):  # which was asked for
        parse_settings("train_ddp", ["--resume"], saved=nothing, restarted=True)


def test_resume_auto_continues_what_is_there_or_starts():
    saved = to_dict(parse("--preset", "toy", "--num-steps", "70", "--grad-accum-steps", "2"))
    # The flags of the first start, which a requeued job repeats.
    typed = (
        "--preset toy --num-steps 90 --resume auto --grad-accum-steps 2 --allow-change lr".split()
    )

    def nothing(path):
        raise NothingSaved("no such checkpoint")

    started = parse(*typed, saved=nothing)
    assert started.resume is False and started.num_steps == 90
    continued = parse(*typed, saved=lambda path: {**saved, "lr": 0.5}, world=2)
    assert continued.resume is True and continued.num_steps == 90 and continued.lr == 0.5
    assert continued.global_batch_size == saved["global_batch_size"]  # of one process
    with pytest.raises(NothingSaved):
        parse("--resume", saved=nothing)

    def damaged(path):
        raise UserError("no whole checkpoint")

    with pytest.raises(UserError, match="no whole checkpoint"):  # never started anew
        parse(*typed, saved=damaged)


@pytest.mark.parametrize(
    "stored, logs, there, path, expected",
    [
        ("runs/a/c.pt", "runs/a/logs", ["runs/b/logs"], "runs/b/c.pt", "runs/b/logs"),  # moved
        ("runs/a/c.pt", "runs/a", ["runs/b"], "runs/b/c.pt", "runs/b"),
        (
            "runs/a/c.pt",
            "runs/a/logs",
            ["runs/b"],
            "runs/b/c.pt",
            "runs/b/logs",
        ),  # logs thrown away
        ("runs/a/c.pt", "runs/a/l", ["runs/a/l", "runs/b/l"], "runs/b/c.pt", "runs/b/l"),  # copied
        ("c.pt", "logs", ["logs", "old"], "old/c.pt", "logs"),  # the checkpoint alone was moved
        ("c.pt", "logs", ["project/logs"], "project/c.pt", "project/logs"),  # from another folder
        ("checkpoints/c.pt", "logs", ["new"], "new/c.pt", "logs"),  # beside it, not below
        ("runs/a/c.pt", "runs/a/logs", ["runs/a/logs"], "runs/a/c.pt", "runs/a/logs"),
    ],
)
def test_logs_move_with_the_folder_of_their_checkpoint(
    tmp_path, monkeypatch, stored, logs, there, path, expected
):
    monkeypatch.chdir(tmp_path)
    for folder in there:
        (tmp_path / folder).mkdir(parents=True)
    saved = to_dict(parse("--checkpoint-path", stored, "--log-dir", logs))
    flags = ["--resume", "--checkpoint-path", path]
    assert parse(*flags, saved=lambda p: saved).log_dir == expected
    assert parse(*flags, "--log-dir", "mine", saved=lambda p: saved).log_dir == "mine"


def test_a_user_without_a_home_is_told_what_to_give(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where pwd knows no such user
    said = "~/x: this user has no home directory; set HOME, or name another folder with --cache-dir"
    with pytest.raises(UserError) as caught:
        expanded("~/x", "--cache-dir")
    assert str(caught.value) == said and expanded("/x", "--cache-dir") == Path("/x")


def test_resume_is_alone_or_auto():
    assert parse("--resume", saved=lambda path: to_dict(parse())).resume is True
    assert parse("--no-resume").resume is False
    assert "invalid choice: 'x.pt' (choose from 'auto')" in message("--resume", "x.pt")


def test_allow_change_is_for_resumed_runs():
    with pytest.raises(UserError, match="give --resume too"):
        parse_settings("train_minimal", ["--allow-change", "seed"])


def test_other_parts_than_the_presets_get_rates_that_suit_them():
    muon, adamw = parse(), parse("--optimizer", "adamw")
    assert muon.optimizer == "muon" and muon.warmup_steps == 0
    assert adamw.lr == pytest.approx(0.15 * muon.lr) and adamw.warmup_steps == 50
    assert parse("--optimizer", "adamw", "--lr", "0.5").lr == 0.5
    assert parse("--arch", "gpt2").model.ngram_rows == 0 < muon.model.ngram_rows


def test_memory_that_runs_out_is_one_line(capsys):
    for reason in (
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_script(lambda argv, reason=reason: (_ for _ in ()).throw(reason))
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("error: out of memory; lower --batch-size")
    with pytest.raises(RuntimeError, match="other"):
        run_script(lambda argv: (_ for _ in ()).throw(RuntimeError("other")))
