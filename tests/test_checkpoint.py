import copy
import dataclasses
import math
import os
import shutil
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from conftest import toy_settings
from helpers import DATA, FP16, Run, content, equal

import checkpoint
from checkpoint import (
    load_checkpoint,
    load_model,
    read_checkpoint,
    save_checkpoint,
    saved_settings,
)
from checkpointing import commands as inspection
from checkpointing import writing
from checkpointing.commands import CheckpointSettings, differences
from checkpointing.file_format import Unreadable, write_with_checksum
from checkpointing.reading import latest_valid
from checkpointing.resuming import resumable_settings
from checkpointing.writing import write_checkpoint
from config import to_dict
from corpus.tokenizer import build_tokenizer
from model import GPTModel
from runtime.flags import parse_flags
from runtime.setting_fields import UserError
from settings.paths import variant_path
from training.optimizers import make_optimizer, note_on_rising_rate
from training.step import RunState


@pytest.fixture(scope="module")
def trained():
    run = Run("--dropout", "0.1", "--global-batch-size", "8", "--grad-accum-steps", "2")
    run.steps(3)
    return run


@pytest.fixture
def run(trained):
    return copy.deepcopy(trained)


@pytest.fixture
def path(tmp_path, run):
    return save(run, tmp_path / "c.pt")


def save(run, path, data=None, **changes):
    args = dataclasses.replace(run.args, **changes)
    save_checkpoint(path, run.model, run.optimizer, run.state, args, data)
    return path


def refused(call, *parts, kind=UserError):
    with pytest.raises(kind) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and all(part in said for part in parts), said
    return said


# What a file holds


@pytest.mark.parametrize("device", [None, FP16])
def test_continued_run_equals_the_uninterrupted_one(tmp_path, device):
    options = {"device": device} if device else {}
    straight, stopped, continued = (Run("--dropout", "0.1", **options) for _ in range(3))
    losses = straight.steps(8)
    assert stopped.steps(4) == losses[:4]
    path = save(stopped, tmp_path / "c.pt")
    torch.manual_seed(99)
    load_checkpoint(path, continued.model, continued.optimizer, continued.state)
    assert continued.state.step == 4 and continued.state.tokens == stopped.state.tokens
    assert continued.state.scaler.scale == stopped.state.scaler.scale
    assert continued.steps(4) == losses[4:]
    wanted = straight.weights()
    assert all(torch.equal(wanted[k], v) for k, v in continued.weights().items())


def test_the_safe_loader_of_torch_reads_it_and_it_holds_what_the_design_says(path, run):
    content = torch.load(path, weights_only=True)
    wanted = {"format", "model", "optimizer", "step", "tokens", "settings", "data", "scaler"}
    wanted |= {"best_val_loss", "best_step", "bad_in_row", "environment"}
    assert wanted | {"run_id", "wandb_run_id"} == set(content)
    assert set(content["model"]) == {k for k, _ in run.model.named_parameters()}
    assert set(content["optimizer"]) == set(content["model"])
    assert content["settings"]["n_layers"] == 2 and content["step"] == 3
    assert equal(content, read_checkpoint(path))


def test_the_whole_state_comes_back(tmp_path, run):
    run.state.best_val_loss, run.state.best_step, run.state.wandb_run_id = 2.5, 2, "w-1"
    run.state.bad_in_row = torch.tensor(4.0)
    save(run, tmp_path / "c.pt")
    state = load_checkpoint(tmp_path / "c.pt", run.model)
    for field in dataclasses.fields(RunState):
        if field.name not in ("scaler", "skipped", "home"):
            assert getattr(state, field.name) == getattr(run.state, field.name), field.name
    assert state.home == run.args.checkpoint_path
    assert state.step == 3 and state.tokens == 3 * 8 * 15  # 2 x 4 sequences of 16 tokens


def test_names_have_no_wrapper_prefixes_after_compile(tmp_path, run, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)  # to import it takes 8 s
    run.model.compile()
    assert run.model._compiled_call_impl is not None
    content = read_checkpoint(save(run, tmp_path / "c.pt"))
    assert set(content["optimizer"]) == set(content["model"]) == set(run.weights())
    assert not any("_orig_mod" in k or "module." in k for k in content["model"])


def test_moments_belong_to_names_not_positions(path, run):
    other = Run("--dropout", "0.1", "--global-batch-size", "8", "--grad-accum-steps", "2")
    other.optimizer.param_groups[0]["params"].reverse()
    load_checkpoint(path, other.model, other.optimizer)
    for name, p in other.model.named_parameters():
        mine = run.optimizer.state[dict(run.model.named_parameters())[name]]
        assert torch.equal(other.optimizer.state[p]["exp_avg"], mine["exp_avg"])


def test_a_run_that_has_not_begun_is_saved_and_loaded(tmp_path):
    run = Run()
    path = save(run, tmp_path / "c.pt")
    kept = read_checkpoint(path)["optimizer"]
    assert kept.keys() == run.model.shapes.keys()
    assert not any(x.any() for moments in kept.values() for x in moments.values())
    assert load_checkpoint(path, run.model, run.optimizer).step == 0


def test_load_model_needs_only_the_file(path, run):
    trained = load_model(path)
    assert trained.settings.model == run.args.model and trained.data == {}
    assert equal(dict(trained.model.state_dict()), dict(run.model.state_dict()))
    assert not trained.model.training
    with pytest.raises(UserError, match="holds no tokenizer"):
        trained.encode("a")


def test_a_loaded_model_has_its_tokenizer_ready(tmp_path, run):
    data = {**DATA, "tokenizer": build_tokenizer("bytes").to_json()}
    model = GPTModel(dataclasses.replace(run.args.model, vocab_size=257))
    args = dataclasses.replace(run.args, model=model.config)
    save_checkpoint(tmp_path / "b.pt", model, make_optimizer(model, args), RunState(), args, data)
    trained = load_model(tmp_path / "b.pt")
    ids = trained.encode("def é")
    assert ids.dtype == torch.int64 and ids.tolist() == [list("def é".encode())]
    assert trained.decode(ids) == "def é" and trained.model(ids)[0].shape == (1, 6, 257)


def test_settings_come_back_without_those_of_a_resume(tmp_path, run):
    changes = {"resume": True, "allow_change": ("seed", "lr"), "train_data": ()}
    path = save(run, tmp_path / "c.pt", **changes)
    assert load_model(path).settings == run.args
    assert saved_settings(path) == to_dict(run.args)


def test_transposed_and_expanded_tensors_are_written_as_they_look(tmp_path, run):
    tree = content(run)
    weight = tree["model"]["wte.weight"]
    tree["model"]["wte.weight"] = weight.t().contiguous().t()
    bias = tree["model"]["norm_f.bias"] = torch.zeros(()).expand(16)
    write_checkpoint(tmp_path / "c.pt", tree)
    back = read_checkpoint(tmp_path / "c.pt")["model"]
    assert equal(back["wte.weight"], weight) and equal(back["norm_f.bias"], bias)


# How it is written


def test_bare_name_missing_folder_and_odd_names_work(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("bare.pt", "new/folder/c.pt", "with space and ünïcode\n.pt", "none", ".hidden"):
        for _ in range(2):
            save(run, path)
        assert read_checkpoint(path)["step"] == 3
        assert read_checkpoint(variant_path(path, "previous"))["step"] == 3


def test_a_symbolic_link_stays_one(tmp_path, run):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "real" / "c.pt")
    for _ in range(2):
        save(run, tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert sorted(os.listdir(tmp_path / "real")) == ["c.previous.pt", "c.pt"]
    assert read_checkpoint(tmp_path / "link.pt")["step"] == 3


def test_the_one_before_is_kept(tmp_path):
    run = Run()
    for step in range(1, 4):
        run.step()
        path = save(run, tmp_path / "c.pt")
        assert read_checkpoint(path)["step"] == step
    assert read_checkpoint(variant_path(path, "previous"))["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["c.previous.pt", "c.pt"]


def test_labels_are_names_of_the_same_file_and_stay(tmp_path, run):
    path, best, kept = (tmp_path / name for name in ("c.pt", "c.best.pt", "c.step3.pt"))
    write_checkpoint(path, content(run), "best", "step3")
    assert os.path.samefile(path, best) and os.path.samefile(path, kept)
    run.step()
    write_checkpoint(path, content(run))
    assert [read_checkpoint(p)["step"] for p in (path, best, kept)] == [4, 3, 3]
    run.step()
    write_checkpoint(path, content(run), "best")
    assert [read_checkpoint(p)["step"] for p in (path, best, kept)] == [5, 5, 3]


def test_without_hard_links_the_names_are_copies(tmp_path, run, monkeypatch):
    def no_link(*a, **k):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    path = tmp_path / "c.pt"
    write_checkpoint(path, content(run), "best")
    run.step()
    write_checkpoint(path, content(run))
    names = ["c.best.pt", "c.previous.pt", "c.pt"]
    assert sorted(os.listdir(tmp_path)) == names
    assert [read_checkpoint(tmp_path / name)["step"] for name in names] == [3, 3, 4]
    assert all(os.stat(tmp_path / name).st_nlink == 1 for name in names)


def failing(monkeypatch, name, nth=1):
    original, calls = getattr(os, name), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) >= nth:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, fail)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("name, nth", [("fsync", 1), *(("replace", n) for n in (1, 2, 3))])
def test_a_save_that_fails_leaves_the_file_and_no_rest(tmp_path, run, monkeypatch, name, nth):
    path = tmp_path / "c.pt"
    for labels in (("best",), (), ()):
        write_checkpoint(path, content(run), *labels)
        run.step()
    before = files(tmp_path)
    assert len(set(before.values())) == 3
    failing(monkeypatch, name, nth)
    refused(
        lambda: write_checkpoint(path, content(run), "best"),
        str(path),
        "No space left on device",
        "change --checkpoint-path",
    )
    after = files(tmp_path)
    assert after.keys() == before.keys()
    assert (after["c.pt"] == before["c.pt"]) == (name == "fsync" or nth < 3)
    for kept in after:
        read_checkpoint(tmp_path / kept)


@pytest.mark.parametrize("n_bytes", [0, 1, 100, 5000, 50_000])
def test_a_disk_that_gets_full_while_writing_is_named(tmp_path, run, path, monkeypatch, n_bytes):
    before = files(tmp_path)
    written = [0]

    def write(self, data):
        written[0] += len(data)
        if written[0] > n_bytes:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpointing.file_format._ChecksumWriter._pass_on", write)
    refused(lambda: save(run, path), str(path), "No space left on device")
    assert files(tmp_path) == before


def test_a_file_that_reads_back_differently_is_never_put_in_place(tmp_path, run, path, monkeypatch):
    before, fsync = files(tmp_path), os.fsync

    def lose_a_bit(fd):
        os.pwrite(fd, b"\1", os.fstat(fd).st_size // 2)
        fsync(fd)

    run.step()
    monkeypatch.setattr(os, "fsync", lose_a_bit)
    refused(lambda: save(run, path), "damaged")
    assert files(tmp_path) == before


def test_the_file_appears_by_a_rename_after_fsync(tmp_path, run, monkeypatch):
    events = []
    for name in ("fsync", "link", "replace"):
        original = getattr(os, name)

        def noted(*args, name=name, original=original):
            events.append(f"{name} {args[-1].name}" if name != "fsync" else name)
            return original(*args)

        monkeypatch.setattr(os, name, noted)
    write_checkpoint(tmp_path / "c.pt", content(run))
    assert events == ["fsync", "replace c.pt", "fsync"]  # file, rename, folder
    events.clear()
    write_checkpoint(tmp_path / "c.pt", content(run), "best")
    pid = os.getpid()
    assert events == [
        "fsync",
        *(f"link c.previous.pt.{pid}.tmp", "replace c.previous.pt"),
        "replace c.pt",
        *(f"link c.best.pt.{pid}.tmp", "replace c.best.pt"),
        "fsync",
    ]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("saves", [1, 2])
@pytest.mark.parametrize("nth", range(1, 6))
def test_whatever_file_a_killed_save_leaves_there_is_one_to_resume(
    tmp_path, run, monkeypatch, nth, saves
):
    # Killed before the n-th link, rename or removal of the last save.
    path = tmp_path / "c.pt"
    for _ in range(saves - 1):
        write_checkpoint(path, content(run), "best")
        run.step()
    calls = []

    def kill(function):
        def call(*args, **more):
            calls.append(args)
            if len(calls) >= nth:
                raise Killed
            return function(*args, **more)

        return call

    for name in ("link", "replace", "unlink"):
        monkeypatch.setattr(os, name, kill(getattr(os, name)))
    with pytest.raises(Killed):
        write_checkpoint(path, content(run), "best", "step000003")
    monkeypatch.undo()
    left = [p for p in tmp_path.iterdir() if p.suffix == ".pt"]
    if saves == 1 and not left:
        refused(lambda: resumable_settings(path), "no such checkpoint to resume; start without")
    else:
        assert resumable_settings(path)["seq_len"] == run.args.seq_len
    # Nothing with a label is newer than what is resumed.
    steps = [read_checkpoint(p)["step"] for p in left]
    assert not left or read_checkpoint(path)["step"] == max(steps)


def test_the_previous_one_stays_when_asked_for(tmp_path, run):
    for keep in (False, False, True, True):
        write_checkpoint(tmp_path / "c.pt", content(run), keep_previous=keep)
        run.step()
    held = [read_checkpoint(tmp_path / name)["step"] for name in ("c.previous.pt", "c.pt")]
    assert held == [3, 6]


def test_the_space_is_asked_for_before_a_byte_is_written(tmp_path, run, path, monkeypatch):
    tree = content(run)
    tensors = [
        *tree["model"].values(),
        *(t for m in tree["optimizer"].values() for t in m.values()),
    ]
    needed = sum(t.numel() * 4 for t in tensors) + 1_000_000
    before = files(tmp_path)
    monkeypatch.setattr(writing, "write_with_checksum", None)
    for free, said in ((needed - 1, "free"), (needed, "")):
        monkeypatch.setattr(shutil, "disk_usage", lambda p, free=free: SimpleNamespace(free=free))
        if said:
            refused(lambda: save(run, path), "MB are needed", str(path))
        else:
            with pytest.raises(TypeError):  # None was called: it would have been written
                save(run, path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "exp_avg", "exp_avg_sq"])
def test_a_state_that_is_not_finite_is_never_written(tmp_path, run, path, value, where):
    before = files(tmp_path)
    weight = run.model.blocks[1].mlp.fc.weight
    tensor = weight.data if where == "weight" else run.optimizer.state[weight][where]
    tensor[-1, -1] = value
    refused(lambda: save(run, path), "blocks.1.mlp.fc.weight", "not finite")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["", ".", "folder"])
def test_a_folder_is_never_replaced(tmp_path, run, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    refused(lambda: save(run, name))
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir("folder")


def test_a_place_that_cannot_be_is_named(tmp_path, run):
    (tmp_path / "file").write_text("x")
    refused(lambda: save(run, tmp_path / "file" / "c.pt"), "cannot write the checkpoint")
    refused(lambda: save(run, tmp_path / ("x" * 300)), "cannot write the checkpoint")


def test_a_rest_that_is_a_name_of_the_best_is_not_written_to(tmp_path, run):
    write_checkpoint(tmp_path / "c.pt", content(run), "best")
    os.link(tmp_path / "c.best.pt", tmp_path / f"c.pt.{os.getpid()}.tmp")
    run.step()
    save(run, tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.best.pt")["step"] == 3


# Does it fit?


def test_all_differences_to_the_model_are_listed_and_nothing_is_changed(path):
    other = Run("--d-ff", "32", "--vocab-size", "90")
    before = other.weights()
    said = refused(
        lambda: load_checkpoint(path, other.model),
        f"{path} does not fit this run",
        "wte.weight is (97, 16), expected (90, 16)",
        *(f"blocks.{i}.mlp.fc.bias is (64,), expected (32,)" for i in (0, 1)),
    )
    assert said.count(";") + 1 == 7  # wte, and of both layers fc.weight, fc.bias and proj.weight
    assert refused(lambda: load_checkpoint(path, other.model, other.optimizer)) == said
    assert equal(before, other.weights())
    assert not any(x.any() for m in other.optimizer.state.values() for x in m.values())
    assert other.state.step == 0


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--n-layers", "3"), "blocks.2.attn.qkv.weight is missing"),
        (("--n-layers", "1"), "blocks.1.attn.qkv.weight is unknown"),
        (("--arch", "modern"), "norm_f.bias is unknown"),
        (("--max-position-embeddings", "17"), "wpe.weight is (16, 16), expected (17, 16)"),
    ],
)
def test_another_model_is_refused(path, flags, said):
    refused(lambda: load_checkpoint(path, Run(*flags).model), said)


def test_another_type_is_refused(path, run):
    refused(
        lambda: load_checkpoint(path, run.model.bfloat16()),
        "blocks.0.attn.qkv.weight is torch.float32, expected torch.bfloat16",
    )


def changed(path, change):
    """The checkpoint with a changed content, sealed like any other."""
    tree = torch.load(path, weights_only=True)
    change(tree)
    write_with_checksum(path, tree)
    return path


def take(*keys):
    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        del tree[keys[-1]]

    return change


def put(*keys):
    def change(tree):
        for key in keys[:-2]:
            tree = tree[key]
        tree[keys[-2]] = keys[-1]

    return change


W = "wte.weight"


@pytest.mark.parametrize(
    "change, said",
    [
        (take("optimizer", W), f"optimizer state of {W} is missing"),
        (take("optimizer", W, "exp_avg"), f"optimizer state of {W} is ['exp_avg_sq', 'step']"),
        (put("optimizer", "x", {}), "optimizer state of x, a parameter unknown here"),
        (put("optimizer", W, "extra", torch.zeros(97, 16)), "'extra'"),
        (
            put("optimizer", W, "exp_avg", torch.zeros(3, 3)),
            f"optimizer state of {W} (exp_avg) is (3, 3) torch.float32, not (97, 16) float32",
        ),
        (put("optimizer", W, "exp_avg", torch.zeros(())), "exp_avg) is ()"),
        (put("optimizer", W, "exp_avg", torch.zeros(97, 16).long()), "torch.int64, not (97, 16)"),
        (put("optimizer", W, "step", torch.zeros(97, 16)), "(step) is (97, 16)"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_refused(path, run, change, said):
    before = copy.deepcopy(run.optimizer.state_dict()["state"])
    changed(path, change)
    refused(lambda: load_checkpoint(path, run.model, run.optimizer), "does not fit", said)
    assert equal(before, run.optimizer.state_dict()["state"])
    load_checkpoint(path, run.model)  # evaluation needs none


def test_another_optimizer_may_have_other_moments(tmp_path, run):
    sgd = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    for p in run.model.parameters():
        sgd.state[p]["momentum_buffer"] = torch.ones_like(p)
    save_checkpoint(tmp_path / "c.pt", run.model, sgd, run.state, run.args)
    refused(lambda: load_checkpoint(tmp_path / "c.pt", run.model, run.optimizer), "momentum_buffer")
    fresh = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    load_checkpoint(tmp_path / "c.pt", run.model, fresh)
    assert all(fresh.state[p]["momentum_buffer"].sum() == p.numel() for p in run.model.parameters())


def test_other_data_is_refused_and_every_difference_listed(tmp_path, run):
    save(run, tmp_path / "c.pt", DATA)
    now = {
        "train": {"fingerprint": "x", "tokens": 8, "source": "/elsewhere"},
        "val": {"fingerprint": "y"},
    }
    load = (tmp_path / "c.pt", run.model, run.optimizer, RunState(), now)
    said = (
        "train data: fingerprint was 'a', is 'x'",
        "train data: tokens was 9, is 8",
        "val data: fingerprint was 'b', is 'y'",
    )
    assert "elsewhere" not in refused(lambda: load_checkpoint(*load), *said)
    seed_may_change = dataclasses.replace(run.args, allow_change=("seed",))
    refused(lambda: load_checkpoint(*load, seed_may_change), *said)
    own_val = {"data_mode": "text", "train_data": ("a",), "val_data": ("b",), "use_toy_data": False}
    one_part = dataclasses.replace(run.args, allow_change=("max_tokens",), **own_val)
    left = refused(lambda: load_checkpoint(*load, one_part), said[2], "--allow-change val_data")
    assert "train data" not in left
    allowed = dataclasses.replace(run.args, allow_change=("max_tokens",))
    state = load_checkpoint(*load, allowed)
    (note,) = state.pending_messages
    assert all(part in note for part in said)
    assert (state.best_val_loss, state.best_step) == (math.inf, -1)  # was of other data


def test_the_same_data_elsewhere_is_no_difference(tmp_path, run):
    save(run, tmp_path / "c.pt", DATA)
    now = {"train": {**DATA["train"], "source": "/elsewhere"}, "val": DATA["val"]}
    state = load_checkpoint(tmp_path / "c.pt", run.model, run.optimizer, RunState(), now, run.args)
    assert state.pending_messages == []


def test_what_changed_is_noted(tmp_path, run):
    write_checkpoint(tmp_path / "c.pt", content(run))
    changes = {"lr": 0.5, "resume": True, "allow_change": ("lr",), "checkpoint_path": "x"}
    args = dataclasses.replace(run.args, **changes)
    now = {"python": "4", "cpus": 2}
    state = load_checkpoint(tmp_path / "c.pt", run.model, args=args, environment=now)
    was = run.args.lr
    assert state.pending_messages == [
        f"changed since it was saved: lr was {was}, is 0.5; python was '3', is '4'"
    ]


# A description that does not fit its file. All of these are sealed.


@pytest.mark.parametrize(
    "change, said",
    [
        (put("format", 1), "checkpoint format 1, this version reads 2"),
        (put("format", [1] * 1000), "checkpoint format [1, 1"),
        (take("format"), "checkpoint format None"),
        (take("model"), "model"),
        (take("best_step"), "best_step"),
        *(
            (put(key, value), key)
            for key, value in (
                *(("step", "3"), ("step", 3.0), ("step", True), ("step", None), ("tokens", [])),
                *(("run_id", 7), ("run_id", "../../x"), ("run_id", "a/b"), ("run_id", "a\n")),
                *(("run_id", "x" * 129), ("run_id", "a b"), ("wandb_run_id", ".."), ("data", [])),
                *(("best_val_loss", 1), ("scaler", None), ("environment", "x"), ("model", [])),
                *(("settings", []), ("optimizer", None), ("bad_in_row", 0.0)),
            )
        ),
        (put("model", W, 1.0), "tensors"),
        (put("model", W, {}), "tensors"),
        (put("optimizer", W, []), "tensors"),
        (put("optimizer", W, "exp_avg", 0.5), "tensors"),
        (put("model", {}), "another model"),
        (put("model", W, torch.zeros(97, 16).half()), "another model: wte.weight is torch.float16"),
        (put("model", W, torch.zeros(16, 97)), "another model: wte.weight is (16, 97)"),
        (take("model", W), "another model: wte.weight is missing"),
        (put("model", "more", torch.zeros(1)), "another model: more is unknown"),
        *(
            (put("settings", key, value), said)
            for key, value, said in (
                ("n_layers", 1, "another model"),
                ("n_layers", 10**9, "at most"),
                ("n_layers", 2**62, "at most"),
                ("n_layers", 2**70, "n_layers"),
                ("n_layers", -1, "n_layers=-1"),
                ("n_layers", "2", "n_layers='2'"),
                ("n_layers", None, "n_layers=None"),
                ("vocab_size", 0, "another model"),
                ("vocab_size", 10**12, "another model"),
                ("vocab_size", 2**62, ""),
                ("d_model", 2**62, ""),
                ("d_ff", 10**12, "another model"),
                ("max_position_embeddings", 2**24, "at most"),
                ("max_position_embeddings", 2**40, "at most"),
                ("n_heads", 3, "n_heads=3"),
                ("arch", "modern", "another model"),
                ("arch", "x", "arch='x'"),
                ("lr", math.nan, "lr=nan"),
                ("lr", "0.1", "lr='0.1'"),
                ("train_data", [1], "train_data"),
                ("train_data", "x", "train_data"),
                ("model", {}, "unknown settings model"),
                ("surprise", 1, "unknown settings surprise"),
            )
        ),
    ],
)
def test_a_description_that_fits_not_is_refused(path, run, change, said):
    changed(path, change)
    before = run.weights()
    text = refused(lambda: load_checkpoint(path, run.model, run.optimizer), str(path), said)
    assert len(text) < 1000 + len(str(path)) and equal(before, run.weights())


def test_a_description_is_checked_whoever_reads_it(path):
    changed(path, put("settings", "n_layers", 10**9))
    for call in (read_checkpoint, load_model, saved_settings, resumable_settings):
        refused(lambda call=call: call(path), "at most")
    for call in (inspection.show, inspection.verify):
        with pytest.raises(UserError):
            call((str(path),))
    refused(lambda: differences(path, path), "at most")


def test_absurd_sizes_take_no_memory(path, monkeypatch):
    changed(path, put("settings", "vocab_size", 10**9))  # 64 GB of weights
    monkeypatch.setattr(GPTModel, "load_state_dict", None)
    tracemalloc.start()
    refused(lambda: load_model(path), "another model")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


@pytest.mark.parametrize(
    "change",
    [put("settings", "a\nb", 1), put("model", "a\nb", torch.zeros(1)), put("settings", "\x1b", 1)],
)
def test_a_refusal_is_one_line_whatever_the_file_says(path, change):
    changed(path, change)
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("keys", [("format",), ("settings", "n_layers"), ("settings", "lr")])
def test_a_wrong_value_is_not_printed_whole(path, keys):
    text = "x" * 100_000
    changed(path, put(*keys, [text] * 500))
    tracemalloc.start()
    try:
        refused(lambda: read_checkpoint(path))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10e6


def test_a_long_wrong_choice_takes_no_memory(path):
    changed(path, put("settings", "arch", "x" * 400_000))
    tracemalloc.start()
    try:
        refused(lambda: read_checkpoint(path), "arch=")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10e6


def test_layers_that_are_not_there_are_not_made(path, monkeypatch):
    def add(tree):
        tree["settings"]["n_layers"] = 6_000
        tree["model"] |= dict.fromkeys((f"x{i}" for i in range(6_000)), torch.zeros(0))

    changed(path, add)
    made = []
    monkeypatch.setattr("model.Block", lambda config: made.append(1) or torch.nn.Identity())
    refused(lambda: read_checkpoint(path))
    assert len(made) < 5_000


def test_an_absurd_count_of_bad_updates_is_refused(path, run):
    changed(path, put("bad_in_row", 10**400))
    refused(lambda: load_checkpoint(path, run.model))


@pytest.mark.parametrize("key", ["step", "tokens", "bad_in_row"])
def test_a_negative_count_is_refused(path, run, key):
    changed(path, put(key, -1))
    refused(lambda: load_checkpoint(path, run.model))


@pytest.mark.parametrize("scaler", [{"scale": 1.0}, {"x": 1}])
def test_a_loss_scale_without_its_parts_is_refused(tmp_path, scaler):
    run = Run(device=FP16)
    path = save(run, tmp_path / "c.pt")
    changed(path, put("scaler", scaler))
    refused(lambda: load_checkpoint(path, run.model, run.optimizer, run.state))


def test_what_is_announced_as_saved_can_be_loaded(tmp_path, run):
    run.state.wandb_run_id = "my.run"  # as WANDB_RUN_ID may be
    try:
        save(run, tmp_path / "c.pt")
    except UserError:
        return
    assert load_checkpoint(tmp_path / "c.pt", run.model).step == 3


# Which file is used


def whole(run, path):
    save(run, path)


def cut(run, path):
    save(run, path)
    os.truncate(path, path.stat().st_size - 1)


def absent(run, path):
    pass


@pytest.mark.parametrize(
    "latest, previous, used",
    [
        (whole, whole, "c.pt"),
        (whole, cut, "c.pt"),
        (whole, absent, "c.pt"),
        (cut, whole, "c.previous.pt"),
        (absent, whole, "c.previous.pt"),
    ],
)
def test_the_newest_whole_checkpoint_is_used(tmp_path, run, latest, previous, used):
    previous(run, tmp_path / "c.previous.pt")
    latest(run, tmp_path / "x.pt")
    if (tmp_path / "x.pt").exists():
        os.rename(tmp_path / "x.pt", tmp_path / "c.pt")
    step, file, wrong = latest_valid(tmp_path / "c.pt", lambda p: read_checkpoint(p)["step"])
    assert (step, file) == (3, tmp_path / used)
    assert len(wrong) == (used != "c.pt") and all(str(tmp_path / "c.pt") in w for w in wrong)
    assert resumable_settings(tmp_path / "c.pt") == to_dict(run.args)


def test_no_whole_checkpoint_names_what_is_wrong_and_what_else_there_is(tmp_path, run):
    for name in ("c.pt", "c.previous.pt"):
        (tmp_path / name).write_text("<html>")
    for name in ("c.best.pt", "c.step000500.pt", "c.1.pt", "d.best.pt", "c.pt.lock"):
        (tmp_path / name).touch()
    said = refused(
        lambda: resumable_settings(tmp_path / "c.pt"),
        f"no whole checkpoint: {tmp_path}/c.pt: no checksum",
        f"{tmp_path}/c.previous.pt: no checksum",
    )
    assert said.endswith("; there are also c.1.pt, c.best.pt, c.step000500.pt")


def test_no_checkpoint_at_all_says_how_to_start(tmp_path):
    refused(lambda: resumable_settings(tmp_path / "c.pt"), "c.pt: no such", "without --resume")
    refused(lambda: resumable_settings("no/such/folder/c.pt"), "no such", "without --resume")


def test_a_mistake_that_is_no_damage_is_not_passed_over(path, run):
    save(run, path)
    with pytest.raises(UserError, match="does not fit"):
        latest_valid(path, lambda p: load_checkpoint(p, Run("--n-layers", "1").model))


def test_the_previous_one_is_found_through_a_symbolic_link(tmp_path, run):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "real" / "c.pt")
    for _ in range(2):
        save(run, tmp_path / "link.pt")
    os.truncate(tmp_path / "link.pt", 99)
    assert resumable_settings(tmp_path / "link.pt") == to_dict(run.args)


@pytest.mark.parametrize(
    "path, label, wanted",
    [
        ("a/c.pt", "best", "a/c.best.pt"),
        ("c", "previous", "c.previous"),
        ("c.x.pt", "step000001", "c.x.step000001.pt"),
        (".c", "best", ".c.best"),
    ],
)
def test_siblings_have_their_label_before_the_suffix(path, label, wanted):
    assert str(variant_path(path, label)) == wanted


# The command line


def command(*argv):
    inspection.run_command(
        CheckpointSettings(**parse_flags(CheckpointSettings, "checkpoint.py", list(argv)))
    )


def test_verify_says_which_files_are_whole(tmp_path, path, capsys):
    command("verify", str(path))
    assert capsys.readouterr().out == f"{path}: whole, step 3, {path.stat().st_size:,} bytes\n"
    shutil.copy(path, tmp_path / "bad.pt")
    os.truncate(tmp_path / "bad.pt", 1000)
    refused(
        lambda: command("verify", str(tmp_path / "bad.pt"), str(path), "none.pt"),
        "2 of 3 not whole",
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [
        "no checksum at its end",
        "whole",
        "no such checkpoint",
    ]


def test_show_prints_what_is_in_a_file(tmp_path, run, capsys):
    write_checkpoint(tmp_path / "c.pt", content(run))
    command("show", str(tmp_path / "c.pt"))
    out = capsys.readouterr().out
    for part in (
        f"written by run {run.state.run_id}",
        "step: 3",
        f"tokens: {3 * 8 * 15}",
        "python=3",
        "n_layers=2",
        "train data: fingerprint=a, tokens=9",
        "wte.weight (97, 16) float32; exp_avg, exp_avg_sq, step",
    ):
        assert part in out, part


def test_compare_finds_what_differs(tmp_path, run, capsys):
    a, b = (str(tmp_path / name) for name in ("a.pt", "b.pt"))
    write_checkpoint(a, content(run))
    command("compare", a, a)
    assert capsys.readouterr().out == "no difference\n"
    weight = run.model.norm_f.weight.data
    weight[3] = 1.0
    write_checkpoint(a, content(run))
    weight[3] = 1.5
    was, run.state.run_id = run.state.run_id, "other"
    run.state.step, run.state.best_step = 4, 2
    write_checkpoint(b, content(run, lr=0.5))
    refused(lambda: command("compare", a, b), f"{a} and {b} are different states")
    about = [f"settings lr: {run.args.lr} | 0.5", f"run_id: {was} | other"]
    state = ["step: 3 | 4", "best_step: -1 | 2", "model norm_f.weight: up to 0.5 apart"]
    assert capsys.readouterr().out.splitlines() == about + state
    assert differences(a, b) == (about, state)
    weight[3] = 1.0
    write_checkpoint(b, content(run))
    refused(lambda: command("compare", a, b), f"{a} and {b} are different states")
    assert capsys.readouterr().out.endswith("\nthe weights are equal, bit for bit\n")


def test_runs_that_continue_alike_are_the_same_state_whatever_is_said_of_them(
    tmp_path, run, capsys
):
    a, b = (str(tmp_path / name) for name in ("a.pt", "b.pt"))
    write_checkpoint(a, content(run))
    write_checkpoint(b, {**content(run, log_dir="elsewhere"), "run_id": "x", "environment": {}})
    command("compare", a, b)
    out = capsys.readouterr().out
    assert "settings log_dir: 'logs' | 'elsewhere'" in out and "environment cpus: 2 | None" in out


def test_a_single_bit_is_a_difference(tmp_path, run):
    a, b = (tmp_path / name for name in ("a.pt", "b.pt"))
    write_checkpoint(a, content(run))
    moment = run.optimizer.state[run.model.wte.weight]["exp_avg_sq"]
    moment.view(torch.int32)[0, 0] ^= 1
    write_checkpoint(b, content(run))
    (line,) = differences(a, b)[1]
    assert line.startswith("optimizer wte.weight exp_avg_sq: up to ")


def test_compare_of_other_shapes_lists_them(tmp_path):
    a, b = (tmp_path / name for name in ("a.pt", "b.pt"))
    save(Run("--n-layers", "1"), a)
    save(Run("--vocab-size", "90"), b)
    state = differences(a, b)[1]
    assert "model wte.weight: (97, 16) torch.float32 | (90, 16) torch.float32" in state
    only = [line.split()[0] for line in state if "in one file only" in line]
    # Of gpt2's second block 12 parameters, with 3 tensors of the optimizer for each.
    assert only.count("model") == 12 and only.count("optimizer") == 36


@pytest.mark.parametrize(
    "argv, said",
    [
        ((), "verify|show|compare"),
        (("verify",), "verify|show|compare"),
        (("verfy", "c.pt"), "did you mean verify?"),
        (("compare", "a.pt"), "two files, not 1"),
        (("compare", "a.pt", "b.pt", "c.pt"), "two files, not 3"),
        (("compare", "a.pt", "b.pt"), "a.pt: no such checkpoint"),
        (("show", "a.pt"), "a.pt: no such checkpoint"),
        (("verify", "a.pt", "--all"), "--all"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(argv, said):
    refused(lambda: command(*argv), said)


def test_compare_names_the_file_that_shrank(path, tmp_path, run, monkeypatch):
    other = save(run, tmp_path / "b.pt")
    original = checkpoint.CheckpointReader.read

    def read(self, tree):
        if self.file.name == str(path):
            raise Unreadable(f"{self.path}: it shrinks while it is read")
        return original(self, tree)

    monkeypatch.setattr(checkpoint.CheckpointReader, "read", read)
    refused(lambda: inspection.compare((path, other)), str(path), kind=Unreadable)


def test_odd_data_is_refused(path):
    changed(path, put("data", {"train": "x"}))
    refused(lambda: inspection.show((str(path),)), "not what it must be: data")


def test_half_a_character_is_refused(path):
    changed(path, put("environment", {"a": "\ud800"}))
    refused(lambda: inspection.show((str(path),)), "UnicodeEncodeError")


@pytest.mark.parametrize(
    "flags, said",  # the run had lr 0.4 and ended at step 4
    [
        ({"num_steps": 8}, "was 0.1 in step 4 and is 0.2 in the next: linear now ends at step 8"),
        ({"num_steps": 8, "lr": 0.1}, ""),
        ({"num_steps": 8, "lr_scheduler": "none"}, "and is 0.4 in the next: none now ends"),
        ({"num_steps": 4}, ""),
    ],
)
def test_a_learning_rate_that_goes_up_again_is_said_with_both_rates(flags, said):
    before = toy_settings(
        num_steps=4, lr=0.4, min_lr=0.0, warmup_steps=0, lr_scheduler="linear"
    )  # 0.4, 0.3, 0.2, 0.1
    note = note_on_rising_rate(before, dataclasses.replace(before, **flags), 4)
    assert said in note and bool(said) == bool(note)
