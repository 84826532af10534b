import csv
import importlib.util
import json
import math
import random
import sys
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, ROOT, tiny

sys.path.append(str(ROOT / "tests/conversion"))

from converted import checkpoint_of, hf

from corpus.huggingface_tokenizer import read_tokenizer_json
from corpus.tokenizer import build_tokenizer
from corpus.tokenizer_json import byte_characters
from model import GPTModel
from runtime.setting_fields import UserError
from settings.eval_and_generate import EvalSettings
from training.sampling import Sampling
from training.tasks import TaskModel, _harness_model, score_tasks

WORDS = "the cat sat on a mat with some dogs and birds, who sang: don't! 12 Grüße 🌹".split()


def model_of(tokenizer, longest=48, arch="gpt2"):
    """A model whose predictions are far from even, in float32."""
    model = GPTModel(
        tiny(arch, vocab_size=tokenizer.vocab_size, max_position_embeddings=longest), seed=3
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))) * 0.15)
    return model.eval()


def words(draw, low, high):
    return " ".join(draw.choices(WORDS, k=draw.randrange(low, high)))


def task(folder, name="mine", **config):
    """A task of a file of questions beside it; many contexts are longer than the model's."""
    draw = random.Random(1)
    rows = []
    for _ in range(24):
        # Among the contexts are some that end with a space, and none.
        context = words(draw, 1, 30) + draw.choice(["", "", " ", "\n"])
        rows.append({"q": context, "choices": [words(draw, 1, 4) for _ in range(4)]})
        rows[-1] |= {"gold": draw.randrange(4), "text": context + words(draw, 5, 60)}
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    about = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True}
            for m in ("acc", "acc_norm")
        ],
        **config,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(about))  # JSON is YAML
    return name


def byte_tokenizer_json():
    """The byte tokenizer as a tokenizer.json: a token of each byte, and the end of a document."""
    end = {"id": 256, "content": "<|endoftext|>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model = {"type": "BPE", "vocab": byte_characters(), "merges": []}
    parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end]}
    parts |= {"normalizer": None, "pre_tokenizer": {**byte_level, "use_regex": True}}
    parts |= {"post_processor": None, "decoder": {**byte_level, "use_regex": True}, "model": model}
    return json.dumps(parts)


def merged_tokenizer_json():
    parts = json.loads(byte_tokenizer_json())
    merges = ["t h", "th e", "Ġ the", "Ġ s", "a t", "Ġs at", "Ġ c", "Ġc at", "i n", "n d", "Ġ m"]
    vocab = parts["model"]["vocab"]
    vocab |= {m.replace(" ", ""): 257 + i for i, m in enumerate(merges)}
    vocab["<|endoftext|>"] = 256
    parts["model"]["merges"] = merges
    return json.dumps(parts)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    if not importlib.util.find_spec("datasets"):
        return
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=["bytes", "bpe"])
def pair(request, tmp_path):
    """Our model and tokenizer, and the harness's own backend of both as hf.py exports them."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    if request.param == "bytes":
        ours = build_tokenizer("bytes")
    else:
        ours = read_tokenizer_json(merged_tokenizer_json(), "made")
    model = model_of(ours)
    hf("export", checkpoint_of(model, tmp_path / "model.pt", ours), tmp_path / "exported")
    backend = huggingface.HFLM(pretrained=str(tmp_path / "exported"), device="cpu", batch_size=3)
    return SimpleNamespace(
        lm_eval=lm_eval, scored=TaskModel(model, ours, CPU, 5), theirs=backend, model=model
    )


@pytest.mark.long
def test_accuracy_and_log_likelihoods_are_those_of_the_hf_backend(pair, tmp_path):
    from lm_eval.tasks import TaskManager

    name, options = task(tmp_path), {"num_fewshot": 1}
    options["task_manager"] = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = pair.lm_eval.simple_evaluate(pair.theirs, tasks=[name], **options)
    ours = score_tasks([name], pair.scored, str(tmp_path), num_fewshot=1)[name]
    assert (ours.samples, ours.num_fewshot) == (24, 1)
    for metric in ("acc", "acc_norm", "acc_stderr"):
        assert ours.metrics[metric] == pytest.approx(
            theirs["results"][name][f"{metric},none"], abs=1e-4
        )
    largest, likelihoods = 0.0, set()
    for mine, other in zip(ours.details, theirs["samples"][name], strict=True):
        assert mine["doc_id"] == other["doc_id"]
        for (a, greedy), (b, also) in zip(
            mine["filtered_resps"], other["filtered_resps"], strict=True
        ):
            largest = max(largest, abs(a - b))
            likelihoods.add(round(a, 3))
            assert greedy == also
    print("largest difference of a log-likelihood", largest)
    assert largest < 1e-4
    assert len(likelihoods) > 90  # of 24 x 4: the model tells them apart


@pytest.mark.long
def test_rolling_log_likelihoods_are_those_of_the_hf_backend(pair):
    from lm_eval.api.instance import Instance

    draw = random.Random(2)
    texts = [words(draw, 1, 70) for _ in range(6)] + ["a"]
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    theirs = pair.theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    ours = _harness_model(pair.scored).loglikelihood_rolling(asked)
    assert ours == pytest.approx(theirs, abs=1e-3)  # a sum over up to 500 tokens


@pytest.mark.long
def test_written_texts_are_those_of_the_hf_backend(pair):
    from lm_eval.api.instance import Instance

    draw, asked = random.Random(4), []
    for i in range(5):
        options = {"until": [draw.choice("aeio")], "max_gen_toks": 12, "do_sample": False}
        asked.append(Instance("generate_until", {}, (words(draw, 1, 20), options), i))
    theirs = pair.theirs.generate_until(asked, disable_tqdm=True)
    assert _harness_model(pair.scored).generate_until(asked) == theirs


@pytest.fixture
def scored():
    tokenizer = build_tokenizer("bytes")
    return TaskModel(model_of(tokenizer, arch="modern"), tokenizer, CPU, 4)


@torch.no_grad()
def likelihood(model, context, continuation):
    """Token after token, each with all that fits before it."""
    ids, total = context + continuation, 0.0
    for i in range(len(context), len(ids)):
        seen = ids[max(0, i - model.config.max_position_embeddings) : i]
        total += float(model(torch.tensor([seen]))[0][0, -1].double().log_softmax(-1)[ids[i]])
    return total


def test_log_likelihoods_are_the_sum_over_tokens_for_any_batch_size(scored):
    pairs = [([7, 8, 9], [1, 2]), ([3], [4]), ([5] * 20, [6, 7, 8, 9]), ([1, 2], [3] * 40)]
    wanted = [likelihood(scored.model, *pair) for pair in pairs]
    for batch_size in (1, 2, 4):
        scored.batch_size = batch_size
        assert [x for x, _ in scored.log_likelihoods(pairs)] == pytest.approx(wanted, abs=1e-4)


def test_greedy_is_said_of_the_likeliest_tokens_alone(scored):
    with torch.no_grad():
        ids = [10, 20, 30]
        for _ in range(5):
            ids.append(int(scored.model(torch.tensor([ids]))[0][0, -1].argmax()))
    likeliest, other = ids[3:], [*ids[3:7], (ids[7] + 1) % 257]
    found = scored.log_likelihoods([(ids[:3], likeliest), (ids[:3], other)])
    assert [greedy for _, greedy in found] == [True, False]


def test_a_continuation_longer_than_the_context_is_scored_once_per_token(scored):
    continuation = [random.Random(0).randrange(256) for _ in range(130)]  # the model sees 48
    parts = scored._parts([1, 2, 3], continuation)
    assert [i for _, wanted in parts for i in wanted] == continuation
    for ids, wanted in parts:
        assert len(ids) <= 48 and len(wanted) <= 24
    assert all(len(ids) - len(wanted) >= 23 for ids, wanted in parts[1:])
    (total, _), *_ = scored.log_likelihoods([([1, 2, 3], continuation)])
    assert math.isfinite(total) and total < -130


def test_a_boundary_inside_a_token_leaves_something_to_score():
    pytest.importorskip("lm_eval")
    tokenizer = read_tokenizer_json(merged_tokenizer_json(), "made")
    harness = _harness_model(TaskModel(model_of(tokenizer), tokenizer, CPU, 4))
    assert harness._encode_pair("cats", " the")[1] == tokenizer.encode(" the").tolist()
    before, after = harness._encode_pair("t", "h")  # "th" is one token
    assert before == [tokenizer.end_token] and after == tokenizer.encode("th").tolist()


def test_texts_end_at_the_given_strings(scored, monkeypatch):
    asked = []

    def write(model, prompts, most, device, sampling, seeds, *limits, on_token):
        asked.append((len(prompts), most, sampling, seeds))
        ids = b"one two\nthree\n\nfour"
        return [
            list(takewhile(lambda i, row=row: not on_token(row, i), ids))
            for row in range(len(prompts))
        ]

    monkeypatch.setattr("training.text_generation.generate", write)
    cut = {"\n": "one two", ("three", "two"): "one ", "\n\n": "one two\nthree"}
    for until, wanted in cut.items():
        options = {"until": list(until) if isinstance(until, tuple) else until}
        assert scored.texts_after([("x", options)]) == [wanted]
    assert asked[-1] == (1, 256, Sampling(temperature=0), [0])
    asked.clear()
    few, hot = {"max_gen_toks": 9}, {"do_sample": True, "temperature": 2.0, "top_p": 0.9}
    scored.texts_after([("x", few), ("y", hot), *[("z", few)] * 4])
    assert asked == [  # four at a time, and those with the same options together
        (4, 9, Sampling(temperature=0), [0, 2, 3, 4]),
        (1, 9, Sampling(temperature=0), [5]),
        (1, 256, Sampling(2.0, 0, 0.9), [1]),
    ]
    scored.texts_after([("x", {"max_new_tokens": 7})])
    assert asked[-1][1] == 7
    with pytest.raises(UserError, match=r"wants num_beams=4 of the text to write"):
        scored.texts_after([("x", {"num_beams": 4})])


def test_a_broken_task_is_one_line(scored, tmp_path):
    pytest.importorskip("lm_eval")
    name = task(tmp_path, doc_to_text="{{missing.part}}")
    with pytest.raises(UserError, match="the harness can't do it") as caught:
        score_tasks([name], scored, str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_an_unknown_task_is_one_line(scored, tmp_path):
    pytest.importorskip("lm_eval")
    said = f"no task of that name is in lm_eval .* or in {tmp_path}"
    with pytest.raises(UserError, match=said) as caught:
        score_tasks(["nothing_of_the_kind"], scored, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_tasks_are_named_by_words_or_commas():
    args = EvalSettings(checkpoint_path=("a.pt",), tasks=("one,two", "three", "one"))
    assert args.tasks == ("one", "two", "three")
    for alone in ({"num_fewshot": 2}, {"tasks_only": True}, {"task_path": "x"}):
        with pytest.raises(UserError, match="are of --tasks; name some"):
            EvalSettings(checkpoint_path=("a.pt",), **alone)
    with pytest.raises(UserError, match="computes no loss"):
        EvalSettings(checkpoint_path=("a.pt",), tasks=("a",), tasks_only=True, val_data=("a.txt",))


@pytest.mark.long
def test_eval_prints_and_records_the_scores_offline(program, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "a.txt").write_text("the cat sat on a mat with some dogs.\n" * 2000)
    flags = (
        "--preset toy --train-data a.txt --allow-leak --num-steps 4 --warmup-steps 1 --seq-len 64"
    )
    flags += " --device cpu --cache-dir c --sample-tokens 1 --save-steps 2 --keep-every 2"
    program("train_minimal.py", *flags.split(), "--checkpoint-path", "runs/a.pt")
    (tmp_path / "tasks").mkdir()
    names = (
        task(tmp_path / "tasks"),
        task(tmp_path / "tasks", "other", metric_list=[{"metric": "acc"}]),
    )
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": "cache"}
    more = ["--tasks", ",".join(names), "--task-path", "tasks", "--task-limit", "10"]
    said = program("eval.py", "--checkpoint-path", "runs/a.pt", *more, **env)
    (line,) = [x for x in said.splitlines() if x.startswith("mine: ")]
    (record,) = map(json.loads, (tmp_path / "logs/eval.jsonl").read_text().splitlines())
    found = record["tasks"]["mine"]
    assert found["samples"] == 10 and found["num_fewshot"] == 0
    assert f"acc {found['metrics']['acc']:.4f} +- {found['metrics']['acc_stderr']:.4f}" in line
    assert line in (tmp_path / "logs/eval.log").read_text() and "(10 questions, 0-shot)" in line
    assert set(record["tasks"]) == {"mine", "other"}
    more += ["--csv", "t.csv", "--num-fewshot", "2"]
    said = program("eval.py", "--checkpoint-path", "runs", *more, **env)
    table = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert len(table) > 1 and all(0 <= float(row["mine/acc_norm"]) <= 1 for row in table)
    assert "mine/acc" in said and "other/acc" in said
    said = program("eval.py", "--checkpoint-path", "runs/a.pt", *more, ranks=2, ok=False, **env)
    assert "--tasks works in one process" in said
    (tmp_path / "a.txt").unlink()  # without the data of the run
    said = program("eval.py", "--checkpoint-path", "runs/a.pt", *more, ok=False, **env)
    assert "no such file" in said
    said = program("eval.py", "--checkpoint-path", "runs/a.pt", "--tasks-only", *more, **env)
    assert "checkpoint: runs/a.pt\nmine: acc " in said and "loss" not in said
    last = json.loads((tmp_path / "logs/eval.jsonl").read_text().splitlines()[-1])
    assert "loss" not in last and last["tasks"]["mine"]["num_fewshot"] == 2
