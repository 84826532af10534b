import dataclasses
from pathlib import Path

import pytest

from cli import parse_flags, parse_settings, run_script
from config import (
    PRESETS,
    GPTConfig,
    NothingSaved,
    Settings,
    UserError,
    expanded,
    flat,
    settings_from,
)

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


@pytest.mark.parametrize("preset", PRESETS)
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
    assert settings_from(flat(args)) == args


def test_no_flag_is_a_tuple_by_accident():
    for value in flat(parse()).values():
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
    saved = flat(parse("--preset", "toy", "--global-batch-size", "12"))
    for flags, expected in (("--batch-size 3", (12, 3, 4)), ("--grad-accum-steps 6", (12, 2, 6))):
        args = parse("--resume", *flags.split(), saved=lambda path: saved)
        assert (args.global_batch_size, args.batch_size, args.grad_accum_steps) == expected
    said = message("--resume", "--batch-size", "5", saved=lambda path: saved)
    assert said.endswith("try --batch-size 4 or 6, or other --nproc-per-node")


def test_zero_means_not_given():
    assert parse("--global-batch-size", "0").global_batch_size == parse().global_batch_size


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 7, 8, 16, 64])
def test_presets_start_on_any_number_of_processes(world):
    for preset in PRESETS:
        args = parse("--preset", preset, world=world)
        assert args.global_batch_size == args.batch_size * args.grad_accum_steps * world


def test_resume_keeps_the_global_batch_on_another_number_of_processes():
    saved = flat(
        parse("--batch-size", "4", "--grad-accum-steps", "3", "--lr", "0.5", "--min-lr", "-1")
    )
    args = parse("--resume", world=4, saved=lambda path: saved)
    assert (args.global_batch_size, args.batch_size, args.lr) == (12, 3, 0.5)
    assert "global_batch_size=12" in message("--resume", world=5, saved=lambda path: saved)
    said = message("--resume", "--global-batch-size", "24", saved=lambda path: saved)
    assert "the run to resume has global_batch_size=12, not 24" in said
    assert parse("--resume", "--lr", "1e-4", saved=lambda path: saved).final_lr == 1e-5


def test_resume_takes_typed_flags_over_saved_ones():
    saved = flat(parse("--no-amp"))
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
        settings_from(values)
    assert said in str(caught.value)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Settings, "train_minimal.py", ["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in DESIGN_FLAGS)


def test_a_run_that_torchrun_starts_again_continues_what_it_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = flat(parse_settings("train_ddp", ["--num-steps", "7", "--device", "cpu"]))
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
    saved = flat(parse("--preset", "toy", "--num-steps", "70", "--grad-accum-steps", "2"))
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
    saved = flat(parse("--checkpoint-path", stored, "--log-dir", logs))
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
    assert parse("--resume", saved=lambda path: flat(parse())).resume is True
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
