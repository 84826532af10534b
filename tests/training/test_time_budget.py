"""What --minutes chooses: from a given speed, around typed flags, and as settings that stay."""

from itertools import pairwise

import pytest
import torch
from conftest import ROOT

from checkpoint import read_checkpoint
from config import GPTConfig, to_dict
from parallel.process_group import Ranks
from runtime.setting_fields import UserError
from settings.command_line import parse_settings
from training import time_budget
from training.deadline import seconds_to_end
from training.flops import flops_per_token, numbers_in_matrices
from training.time_budget import compiled_part, fit_to_time, regularization_for

RATE = 5e10  # FLOP/s of the machine that the tests make up


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Flags of a text of 300,000 bytes, on a machine that computes RATE and has just started."""
    monkeypatch.chdir(tmp_path)
    words = torch.randint(97, 123, (300_000,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "text.txt").write_bytes(bytes(words.tolist()))
    monkeypatch.setattr(time_budget, "seconds_since_start", lambda: 3.0)
    monkeypatch.setattr(time_budget, "MOST_EPOCHS", 1e9)
    monkeypatch.setattr(time_budget, "MOST_NUMBERS", 1e9)
    measured = []

    def speed(args, *_):
        tokens = args.global_batch_size * args.seq_len
        measured.append(args)
        return tokens * flops_per_token(args.model, args.seq_len) / RATE

    monkeypatch.setattr(time_budget, "seconds_of_step", speed)
    flags = ["--train-data", "text.txt", "--device", "cpu", "--cache-dir", "cache"]
    return flags, measured


def choose(flags, *more, ranks=None):
    argv = [*flags, *more]
    args = parse_settings("train_minimal", argv)
    return fit_to_time("train_minimal", argv, args, ranks)


def numbers(args):
    return numbers_in_matrices(args.model)


def test_more_minutes_choose_larger_models(text):
    flags, _ = text
    chosen = [choose(flags, "--minutes", m) for m in ("0.5", "3", "30", "300", "3000")]
    sizes = [numbers(args) for args in chosen]
    assert sizes == sorted(sizes) and sizes[-1] > 30 * sizes[0]
    assert all(a.num_steps > 1 for a in chosen)


@pytest.mark.parametrize("minutes", ["0.5", "2", "20", "600"])
def test_the_planned_steps_and_evaluations_fill_the_time(text, minutes):
    flags, measured = text
    args = choose(flags, "--minutes", minutes)
    assert args.open_end and args.lr_scheduler == "wsd"
    tokens = args.global_batch_size * (args.seq_len - 1)
    step = args.global_batch_size * args.seq_len * flops_per_token(args.model, args.seq_len) / RATE
    step *= compiled_part(args) if args.compile == "on" else 1.0
    evaluations = -(-args.num_steps // args.eval_steps)
    seconds = 3.0 + args.num_steps * step + evaluations * step * 30_000 / tokens / 3
    whole = 60 * float(minutes)
    assert whole - 10 - step <= seconds + seconds_to_end(args) <= whole
    # What is trained is what was measured, but for its length, decay, evaluations and compilation.
    shape = args.model.n_layers, args.model.d_model
    last = next(m for m in reversed(measured) if (m.model.n_layers, m.model.d_model) == shape)
    apart = {k for k, v in to_dict(args).items() if to_dict(last)[k] != v}
    lengths = {"num_steps", "eval_steps", "save_steps", "log_steps", "open_end", "most_steps"}
    lengths |= {"lr_scheduler", "decay_ratio", *regularization_for(9.0, args.model)}
    assert apart <= lengths | {"eval_at_start", "chosen", "compile"}


def test_where_the_data_is_the_limit_more_time_goes_into_a_larger_model(text, monkeypatch):
    flags, _ = text
    monkeypatch.setattr(time_budget, "MOST_EPOCHS", 5.0)
    monkeypatch.setattr(time_budget, "MOST_NUMBERS", 20.0)
    short, long, longest = (choose(flags, "--minutes", m) for m in ("0.5", "2", "3000"))
    assert numbers(short) < numbers(long) < numbers(longest) <= 20 * 270_000
    tokens = [a.num_steps * a.global_batch_size * (a.seq_len - 1) for a in (short, long, longest)]
    assert max(tokens) <= 5 * 270_000 and tokens[2] > 4.8 * 270_000
    assert "ends before its time" in longest.chosen and longest.num_steps == longest.most_steps
    assert (longest.model.ngram_dropout, longest.model.ngram_longest) == (0.5, 5)
    assert (longest.weight_decay, longest.ngram_weight_decay) == (1.0, 1.0)


def test_a_text_that_is_seen_more_often_is_regularized_more():
    model = GPTConfig(arch="modern", ngram_rows=10)
    found = [regularization_for(epochs, model) for epochs in (0.1, 0.4, 1.0, 2.0, 2.5, 3.0, 40.0)]
    assert [f["ngram_dropout"] for f in found] == [0.0, 0.0, 0.2, 0.5, 0.5, 0.5, 0.5]
    assert [f["weight_decay"] for f in found] == [0.1, 0.1, 0.1, 0.1, 0.32, 1.0, 1.0]
    assert [f["ngram_weight_decay"] for f in found] == [0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    assert regularization_for(3.0, GPTConfig()) == {"weight_decay": 1.0}


def test_long_runs_have_larger_batches_and_smaller_rates(text):
    flags, _ = text
    short, long = (choose(flags, "--minutes", m) for m in ("1", "30"))
    assert short.lr == pytest.approx(0.03, rel=0.2) and 0.01 <= long.lr < 0.8 * short.lr
    sizes = [a.global_batch_size * a.seq_len for a in (short, long)]
    assert sizes[0] == pytest.approx(3072, rel=0.5) and sizes[1] > 1.5 * sizes[0]


def test_no_model_is_chosen_that_does_not_fit_into_memory(text, monkeypatch):
    flags, _ = text
    large = choose(flags, "--minutes", "3000")
    need = 16 * numbers(large)
    monkeypatch.setattr(time_budget, "free_memory_of", lambda device: need)
    assert numbers(choose(flags, "--minutes", "3000")) < numbers(large)


def test_typed_flags_win_and_the_rest_goes_around_them(text):
    flags, _ = text
    typed = ["--n-layers", "3", "--lr", "0.01", "--seq-len", "64", "--optimizer", "adamw"]
    typed += ["--global-batch-size", "20", "--dropout", "0.25", "--eval-steps", "7"]
    args = choose(flags, "--minutes", "5", *typed)
    found = to_dict(args)
    wanted = {"n_layers": 3, "lr": 0.01, "seq_len": 64, "optimizer": "adamw", "dropout": 0.25}
    wanted |= {"global_batch_size": 20, "eval_steps": 7, "max_position_embeddings": 64}
    assert {k: found[k] for k in wanted} == wanted
    assert found["d_model"] in {width for _, width, _ in time_budget.SHAPES}
    steps = choose(flags, "--minutes", "5", "--num-steps", "9")
    assert steps.num_steps == 9 and not steps.open_end
    wide = choose(flags, "--minutes", "5", "--d-model", "100", "--n-heads", "5")
    assert (wide.model.d_model, wide.model.n_heads) == (100, 5)
    short = choose(flags, "--minutes", "5", "--max-position-embeddings", "200")
    assert short.seq_len == 200
    plain = choose(flags, "--minutes", "5", "--arch", "gpt2")
    assert plain.model.ngram_rows == 0


@pytest.mark.parametrize(
    ("blocks", "width", "context"), [(2, 64, 128), (3, 256, 256), (5, 400, 512)]
)
def test_a_typed_shape_has_the_context_of_the_nearest_width(text, blocks, width, context):
    flags, measured = text
    shape = ["--n-layers", str(blocks), "--d-model", str(width)]
    args = choose(flags, "--minutes", "2", *shape)
    assert (args.model.n_layers, args.model.d_model, args.seq_len) == (blocks, width, context)
    assert len(measured) == 1
    assert choose(flags, "--minutes", "2", *shape, "--seq-len", "32").seq_len == 32


def test_with_a_preset_only_the_length_is_chosen(text):
    flags, _ = text
    args = choose(flags, "--minutes", "4", "--preset", "quickstart")
    usual = to_dict(parse_settings("train_minimal", flags))
    found = to_dict(args)
    apart = {k for k, v in found.items() if usual[k] != v}
    assert apart == {
        *("minutes", "num_steps", "eval_steps", "save_steps", "chosen", "vocab_size"),
        "tokenizer_name",
    }


def test_the_evaluation_before_the_first_step_of_a_preset_is_counted(text):
    flags, _ = text
    preset = ["--minutes", "4", "--preset", "quickstart"]
    with_it, without = (choose(flags, *preset, "--eval-at-start", x) for x in ("on", "off"))
    evaluation = 30_000 / (24 * 127) / 3  # in steps of 24 x 128: a third of the work of a step
    assert without.num_steps - with_it.num_steps == pytest.approx(evaluation, abs=1)


def test_nothing_is_chosen_without_minutes_or_for_a_run_that_goes_on(text):
    flags, measured = text
    args = parse_settings("train_minimal", flags)
    assert fit_to_time("train_minimal", flags, args) is args and not measured
    with pytest.raises(UserError, match="keeps what was chosen"):
        parse_settings("train_minimal", [*flags, "--minutes", "2", "--resume"])


def test_the_global_batch_is_divided_among_the_ranks(text):
    flags, _ = text
    args = choose(flags, "--minutes", "1", ranks=Ranks(world=3))
    assert args.global_batch_size == 3 * args.batch_size


def test_the_two_lines_say_what_was_chosen_and_why(text):
    flags, _ = text
    args = choose(flags, "--minutes", "5")
    what, why = args.chosen.splitlines()
    assert what.startswith(f"chosen for 5 minutes: {args.model.n_layers} blocks of width")
    assert f"{args.num_steps:,} steps" in what and "tokens/s were measured" in why


def test_larger_models_of_the_list_compute_more_and_have_valid_heads():
    sizes = [n * width * width for n, width, _ in time_budget.SHAPES]
    assert all(a < b for a, b in pairwise(sizes))
    assert all(width % max(2, width // 64) == 0 for _, width, _ in time_budget.SHAPES)


AGAIN = """
import settings.before_torch
from dataclasses import replace
from checkpoint import read_checkpoint
from config import from_dict
from runtime.signals import StopSignals
from train_minimal import main
args = from_dict(read_checkpoint("c.pt")["settings"])
with StopSignals() as signals:
    main(replace(args, minutes=0.0, checkpoint_path="again.pt"), signals)
"""


@pytest.mark.long
def test_a_run_of_a_few_seconds_ends_and_goes_on_with_what_was_chosen(program):
    words = torch.randint(97, 123, (300_000,), generator=torch.Generator().manual_seed(0))
    (program.folder / "text.txt").write_bytes(bytes(words.tolist()))
    data = ["--train-data", "text.txt", "--checkpoint-path", "c.pt", "--val-max-tokens", "3000"]
    out = program("train_minimal.py", *data, "--minutes", "0.2", "--sample-tokens", "1")
    assert "chosen for 0.2 minutes" in out and "because" in out
    run = read_checkpoint(program.folder / "c.pt")
    settings = run["settings"]
    assert f"the run has {settings['num_steps']:,} steps in all" in out
    # The same settings without a clock give the same weights: the run does not depend on it.
    (program.folder / "again.py").write_text(AGAIN)
    program(str(program.folder / "again.py"), PYTHONPATH=str(ROOT))
    again = read_checkpoint(program.folder / "again.pt")
    assert again["step"] == run["step"] == settings["num_steps"]
    assert all(torch.equal(p, again["model"][name]) for name, p in run["model"].items())
    more = str(settings["num_steps"] + 2)
    program("train_minimal.py", "--resume", "--num-steps", more, "--checkpoint-path", "c.pt")
    after = read_checkpoint(program.folder / "c.pt")["settings"]
    changed = {k for k in settings if settings[k] != after[k]}
    assert changed <= {"num_steps", "resume", "log_dir"}
    two = program("train_ddp.py", *data[:2], "--minutes", "0.2", "--sample-tokens", "1", ranks=2)
    assert "chosen for 0.2 minutes" in two
    assert settings["chosen"].splitlines() == [
        x.split("] ", 1)[1] for x in out.splitlines() if "] chosen for" in x or "] because" in x
    ]
