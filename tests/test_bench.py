import json
import os
import time

import pytest
import torch
from conftest import tiny

import bench
from benchmarks import generation, recipe, threads
from benchmarks.common import BenchSettings, Side, medians, side_by_side
from benchmarks.growth import growth_shapes
from benchmarks.speed import Parts, gpt2_small
from config import to_dict
from model import GPTModel
from runtime.setting_fields import UserError
from settings.command_line import parse_settings
from training.sampling import generate


def build_counter(start):
    found = [start]

    def count():
        found[0] += 1
        return found[0], os.getpid()

    return count


def test_sides_live_in_processes_of_their_own_and_run_in_turns():
    sides = {
        "a": Side(build_counter, 0),
        "b": Side(build_counter, 10),
    }
    found = side_by_side(sides, repeats=2, warm_up=1)
    assert [n for n, _ in found["a"]] == [2, 3] and [n for n, _ in found["b"]] == [12, 13]
    assert len({pid for runs in found.values() for _, pid in runs} | {os.getpid()}) == 3


def test_medians_are_taken_figure_by_figure():
    assert medians([{"a": 1.0, "b": 9.0}, {"a": 5.0, "b": 2.0}, {"a": 3.0, "b": 4.0}]) == {
        "a": 3.0,
        "b": 4.0,
    }


def test_the_parts_of_a_step_add_up_to_it():
    model = GPTModel(tiny(), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 97, (2, 16))

    def step():
        time.sleep(0.05)
        model(ids, labels=ids)[1].backward()
        time.sleep(0.1)
        optimizer.step()

    found = Parts(model, optimizer, "cpu").time(step)
    parts = sum(found[k] for k in ("data", "forward", "backward", "optimizer"))
    assert found["data"] >= 0.05 and found["backward"] >= 0.1
    assert parts == pytest.approx(found["seconds"], abs=0.02)


def test_the_plain_recipe_is_that_of_nanogpt_on_a_cpu():
    args = parse_settings("train_minimal", [*recipe.PLAIN, "--seq-len", "64"])
    shape = (args.model.arch, args.model.n_layers, args.model.n_heads, args.model.d_model)
    assert shape == ("gpt2", 4, 4, 128) and args.optimizer == "adamw" and args.model.dropout == 0
    assert (args.global_batch_size, args.num_steps, args.lr, args.min_lr) == (12, 2000, 1e-3, 1e-4)
    assert (args.beta1, args.beta2, args.weight_decay, args.warmup_steps) == (0.9, 0.99, 0.1, 100)
    assert (args.lr_scheduler, args.grad_clip_norm) == ("cosine", 1.0)


def test_the_default_recipe_has_at_most_850_000_parameters_on_bytes():
    args = parse_settings("train_minimal", ["--vocab-size", "257", "--seq-len", "64"])
    assert GPTModel(args.model).num_parameters() <= 850_000


@pytest.mark.parametrize("part", recipe.PARTS)
def test_each_part_can_be_taken_out(part):
    whole, without = (
        parse_settings("train_minimal", ["--vocab-size", "257", *flags])
        for flags in ([], recipe.PARTS[part])
    )
    names = [flag[2:].replace("-", "_") for flag in recipe.PARTS[part] if flag.startswith("--")]
    assert all(to_dict(whole)[name] != to_dict(without)[name] for name in names)


@pytest.mark.parametrize("worst, said", [(1.8, "4.0 times faster"), (1.95, "did not get there")])
def test_the_last_line_of_recipe_says_how_many_times_faster(
    monkeypatch, tmp_path, capsys, worst, said
):
    def train(args, flags):
        plain = "gpt2" in flags
        end = 1.9 if plain else worst if "2" in flags[-1:] else 1.7
        return {
            "steps": 1, "parameters": 5, "seconds": 40.0 if plain else 10.0,
            "val_loss": end, "val_bpb": end,
        }  # fmt: skip

    monkeypatch.setattr(recipe, "train", train)
    bench.main(BenchSettings(verb=("recipe",), log_dir=str(tmp_path)))
    assert said in capsys.readouterr().out.splitlines()[-1]
    assert len(json.loads((tmp_path / "bench_recipe.json").read_text())["rows"]) == 2


def test_a_run_that_fails_is_said(tmp_path):
    with pytest.raises(UserError, match=r"train_minimal.py failed: .*cannot be read"):
        recipe.train(BenchSettings(train_data=(str(tmp_path / "no.txt"),)), [])


def test_shapes_grow_one_at_a_time():
    shapes = list(growth_shapes())
    assert len(shapes) == 30
    for name, shape in shapes:
        assert all(shape[k] > 0 for k in shape) and name in shape
    args = parse_settings("train_minimal", gpt2_small(4))
    assert (args.seq_len, args.global_batch_size, args.model.vocab_size) == (1024, 4, 50257)


def test_ways_to_wait_take_turns_beside_processes_that_compute(monkeypatch):
    seen, busy, beside, start = [], [], [], threads.subprocess.Popen

    def measured(flags, environment):
        busy.append(sum(process.poll() is None for process in beside))
        seen.append((tuple(environment), flags))
        return float(len(seen))

    def counted(*args, **more):
        beside.append(start(*args, **more))
        return beside[-1]

    monkeypatch.setattr(threads, "step_milliseconds", measured)
    monkeypatch.setattr(threads.subprocess, "Popen", counted)
    rows = threads.bench_threads(BenchSettings(verb=("threads",), repeats=2))
    each = len(threads.WAYS) * len(threads.STEPS)
    assert busy == 2 * ([0] * each + [1] * each + [2] * each)
    assert all(process.returncode is not None for process in beside)
    assert len(seen) == 2 * 3 * each and seen[:each] == seen[each : 2 * each]
    assert [row["threads wait"] for row in rows] == list(threads.WAYS)
    assert rows[0]["quickstart, 0 busy"] == 1 + 3 * each / 2  # medians of runs 1 and 3 each + 1


@pytest.mark.parametrize("side", ["cached", "uncached", "hugging face"])
def test_each_side_of_the_generation_benchmark_writes_so_many_tokens(monkeypatch, side):
    written = []
    monkeypatch.setattr(generation, "generate", lambda *a, **k: written.append(generate(*a, **k)))
    args = BenchSettings(small=True, batch_size=2, new_tokens=5, device="cpu")
    assert generation.build_generation(args, side)() > 0
    if side != "hugging face":
        assert [len(row) for row in written[0]] == [5, 5]
