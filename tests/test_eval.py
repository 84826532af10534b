import csv
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, tiny, toy_settings

from corpus.token_dataset import TokenDataset
from dataset import TextDatasetForCausalLM, build_tokenizer, open_data
from model import GPTModel
from parallel.context import ParallelContext
from reporting.evaluation_table import Evaluation, as_csv
from reporting.evaluations import EvalReport
from runtime.device import Device
from training.evaluation import EvalResult, evaluate, perplexity, starts_with_evaluation
from training.tasks import TaskScores


def awake_model(**changes):
    model = GPTModel(tiny(**changes), seed=1)
    with torch.no_grad():
        model.wte.weight.mul_(40)
    return model


@pytest.fixture
def val():
    whole = open_data(toy_settings())[1]
    return TokenDataset(whole.source, 16, whole.start, whole.start + 1234)


def test_loss_is_the_mean_over_scored_tokens(val):
    model = awake_model()
    total, count = 0.0, 0
    for ids, labels in val.batches(1):
        logits = model(ids)[0].double()
        total += F.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=-100,
            reduction="sum",
        ).item()
        count += (labels[:, 1:] != -100).sum().item()
    result = evaluate(model, val, 8, CPU)
    assert result.tokens == count == 1233
    assert result.loss == pytest.approx(total / count, rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(result.loss))


class Part(ParallelContext):
    """Of one of several ranks: keeps what it would add to the others', or gets the sum."""

    def __init__(self, rank, world, whole=None):
        self.dp_rank, self.dp_size, self.whole = rank, world, whole

    def sum(self, sums):
        self.sums = sums
        return torch.ones(7) if self.whole is None else self.whole


def test_batch_size_and_ranks_change_nothing(val):
    model = awake_model()
    one = evaluate(model, val, 8, CPU)
    for batch_size in (1, 7, 64):
        for world in (1, 2, 3):
            parts = [Part(rank, world) for rank in range(world)]
            for part in parts:
                evaluate(model, val, batch_size, CPU, part)
            whole = torch.stack([part.sums for part in parts]).sum(0)
            joint = evaluate(model, val, batch_size, CPU, Part(0, world, whole))
            assert joint.tokens == one.tokens
            assert joint.loss == pytest.approx(one.loss, rel=1e-7)
            assert joint.loss_se == pytest.approx(one.loss_se, rel=1e-5)


def test_standard_error_is_that_of_independent_windows(val):
    # For windows of equal length the ratio estimator is the plain standard error of the window means.
    model, means = awake_model(), []
    even = TokenDataset(val.source, 16, val.start, val.start + 60 * 15 + 1)
    for ids, labels in even.batches(1):
        means.append(model(ids, labels=labels)[1].item())
    means = torch.tensor(means, dtype=torch.float64)
    assert len(means) == 60
    assert evaluate(model, even, 8, CPU).loss_se == pytest.approx(
        (means.std() / 60**0.5).item(), rel=1e-4
    )


def test_bits_per_byte_divides_by_bytes_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("some text, nothing else\n" * 20)
    val = TextDatasetForCausalLM([tmp_path / "a.txt"], build_tokenizer("bytes"), 16, tmp_path)
    result = evaluate(awake_model(vocab_size=257), val, 4, CPU)
    # 480 bytes and the end token, which is scored but stands for no byte; the first byte is not scored.
    assert result.tokens == 480
    assert result.bpb == pytest.approx(result.loss * 480 / 479 / math.log(2))


def test_bits_per_byte_is_unknown_without_a_tokenizer(val):
    assert evaluate(awake_model(), val, 8, CPU).bpb is None


def test_mode_and_random_state_are_left_as_they_were(val):
    model = awake_model(dropout=0.5)
    state = torch.get_rng_state()
    first = evaluate(model.train(), val, 8, CPU)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert evaluate(model.eval(), val, 8, CPU) == first and not model.training


def test_perplexity_overflows_to_inf_and_keeps_nan():
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))
    assert perplexity(0.0) == 1.0


def report(folder, capsys, *evaluations):
    """The lines that eval.py prints about them at its end, but for that about its files."""
    log = EvalReport(str(folder))
    for evaluation in evaluations:
        log.record(evaluation)
    log.finish(evaluations)
    lines = capsys.readouterr().out.splitlines()
    files = f"wrote {folder}/eval.log, {folder}/eval.jsonl"
    assert (lines[-1] == files) == (len(evaluations) > 1)
    return [line for line in lines if line != files]


def test_several_checkpoints_make_a_table(tmp_path, capsys):
    one = Evaluation("a.pt", "r", 5, EvalResult(2.5, 0.1, 12.18, 3.6, 99), 1.26)
    other = Evaluation("longer.pt", "r", 10, EvalResult(800.0, 0.0, math.inf, None, 99), 60.0)
    rows = report(tmp_path, capsys, one, other)
    head = ["checkpoint", "step", "avg_loss", "loss_se", "ppl", "bpb", "tokens", "seconds"]
    assert len(rows) == 3 and rows[0].split() == head
    assert rows[1].index("2.5") == rows[2].index("800") and rows[1].endswith(" 1.3")
    assert "inf" in rows[2] and "n/a" in rows[2]
    assert (tmp_path / "eval.log").read_text().count("\n") == 3
    assert len((tmp_path / "eval.jsonl").read_text().splitlines()) == 2


def test_one_checkpoint_makes_the_lines_that_scripts_know(tmp_path, capsys):
    one = Evaluation("a.pt", "r", 5, EvalResult(2.5, 0.1, 12.18, 3.6, 99), 1.26)
    expected = "checkpoint: a.pt|avg_loss: 2.500000|loss_se: 0.100000|ppl: 12.1800|bpb: 3.600000"
    assert report(tmp_path, capsys, one) == [*expected.split("|"), "tokens: 99"]


def test_data_are_named_and_rows_of_different_data_are_marked(tmp_path, capsys):
    one = {"source": "a.txt", "fingerprint": "f", "start": 5, "stop": 105, "tokenizer": ""}
    moved, other = {**one, "source": "b/a.txt"}, {**one, "start": 55}
    result = EvalResult(2.5, 0.1, 12.18, 3.6, 99)

    def shown(*data):
        found = [Evaluation(f"{d}.pt", "r", d, result, data=x) for d, x in enumerate(data)]
        return report(tmp_path, capsys, *found)

    assert shown(one)[-1] == "data: a.txt, tokens 5..104"
    same = shown(one, moved)
    assert len(same) == 4 and "data" not in same[0]
    head, *rows = shown(one, other, moved)
    assert [row.split()[-1] for row in (head, *rows[:3])] == ["data", "1", "2", "1"]
    assert rows[3:5] == ["data 1: a.txt, tokens 5..104", "data 2: a.txt, tokens 55..104"]
    assert "can't be compared" in rows[5]
    records = [json.loads(x) for x in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert records[-2]["data"] == other


@pytest.mark.parametrize(
    "tokens, parameters, device, flag, step, expected",
    [
        (100_000, 803_200, "cpu", "auto", 0, True),  # the quickstart
        (1_048_576, 124_439_808, "cpu", "auto", 0, False),  # gpt2-small: 1.3e14
        (1_048_576, 124_439_808, "cuda", "auto", 0, True),
        (1_048_576, 124_439_808, "cpu", "on", 0, True),
        (100_000, 803_200, "cpu", "off", 0, False),
        (100_000, 803_200, "cpu", "on", 5, False),  # resumed
        (100_000, 803_200, "cpu", "auto", 5, False),
    ],
)
def test_a_run_evaluates_before_its_first_step_unless_that_takes_long(
    tokens, parameters, device, flag, step, expected, monkeypatch
):
    monkeypatch.setattr("training.evaluation.num_numbers", lambda config: (parameters, 0))
    there = Device(torch.device(device), "fp32", "test")
    args = toy_settings(eval_at_start=flag)
    found = starts_with_evaluation(step, SimpleNamespace(num_tokens=tokens), args, there)
    assert found is expected


def test_the_total_of_an_evaluation_is_the_number_of_its_batches(monkeypatch):
    from training import evaluation as module

    totals = []

    def told(items, what, total, quiet):
        items = list(items)
        totals.append((len(items), total))
        return items

    monkeypatch.setattr(module, "progress", told)
    _, val, args = open_data(toy_settings(val_max_tokens=1000))
    for size in (1, 7, 66, 67, 100):  # 67 windows of 15 scored tokens
        evaluate(GPTModel(args.model, seed=0), val, size, CPU)
    assert totals == [(n, n) for n in (67, 10, 2, 1, 1)]


def test_scores_of_tasks_go_to_table_lines_and_wandb(tmp_path, capsys):
    metrics = {"acc": 0.25, "acc_stderr": 0.0442, "f1,strict": 0.5}
    tasks = {"mine": TaskScores(metrics, samples=96, num_fewshot=2)}
    result = EvalResult(2.5, 0.1, 12.18, None, 99)
    one, other = (Evaluation(f"{i}.pt", "r", i, result, tasks=tasks) for i in (1, 2))
    assert one.values == {
        "loss": 2.5, "ppl": 12.18, "bpb": None, "mine/acc": 0.25, "mine/f1,strict": 0.5
    }  # fmt: skip
    lines = report(tmp_path, capsys, one)
    assert "mine: acc 0.2500 +- 0.0442, f1,strict 0.5000 (96 questions, 2-shot)" in lines
    header, row = report(tmp_path, capsys, one, other)[:2]
    assert header.split()[-2:] == ["mine/acc", "mine/f1,strict"]
    assert row.split()[-2:] == ["0.2500", "0.5000"]
    alone = Evaluation("3.pt", "r", 3, None, tasks=tasks)
    assert report(tmp_path, capsys, alone) == ["checkpoint: 3.pt", lines[-1]]
    assert report(tmp_path, capsys, one, alone)[2].split()[2:7] == ["n/a"] * 5
    assert alone.values == {"mine/acc": 0.25, "mine/f1,strict": 0.5}
    (read,) = csv.DictReader(io.StringIO(as_csv([one.row])))
    assert float(read["mine/acc"]) == one.row["mine/acc"] == 0.25
