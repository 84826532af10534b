import dataclasses
import os
import zipfile

import pytest
import torch
from test_step import FP16, Run

import checkpoint
from checkpoint import (
    claim_checkpoint,
    load_checkpoint,
    load_model,
    read_checkpoint,
    save_checkpoint,
    set_aside,
)
from config import UserError
from model import GPTModel
from step import RunState


@pytest.fixture
def run():
    run = Run("--dropout", "0.1", "--grad-accum-steps", "2")
    run.steps(3)
    return run


def save(run, path, **changes):
    save_checkpoint(
        path, run.model, run.optimizer, run.state, dataclasses.replace(run.args, **changes)
    )
    return path


def refused(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and all(part in said for part in parts), said


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
    assert continued.state.scaler.get_scale() == stopped.state.scaler.get_scale()
    assert continued.steps(4) == losses[4:]
    wanted = straight.weights()
    assert all(torch.equal(wanted[k], v) for k, v in continued.weights().items())


def test_file_is_read_by_the_safe_loader_and_holds_what_the_design_says(tmp_path, run):
    content = torch.load(save(run, tmp_path / "c.pt"), weights_only=True)
    wanted = {"format", "model", "optimizer", "step", "tokens", "settings", "data", "scaler"}
    assert wanted | {"best_val_loss", "run_id", "wandb_run_id"} == set(content)
    assert set(content["model"]) == {k for k, _ in run.model.named_parameters()}
    assert set(content["optimizer"]) == set(content["model"])
    assert content["settings"]["n_layers"] == 2 and content["step"] == 3


def test_names_have_no_wrapper_prefixes_after_compile(tmp_path, run):
    run.model.compile()
    content = torch.load(save(run, tmp_path / "c.pt"), weights_only=True)
    assert not any(
        "_orig_mod" in k or "module." in k for k in (*content["model"], *content["optimizer"])
    )


def test_bare_name_missing_folder_and_odd_names_work(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("bare.pt", "new/folder/c.pt", "with space and ünïcode.pt"):
        save(run, path)
        assert read_checkpoint(path)["step"] == 3


def test_a_symbolic_link_stays_one(tmp_path, run):
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    save(run, tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and read_checkpoint(tmp_path / "real.pt")[
        "step"
    ] == 3


def test_a_save_that_fails_leaves_the_old_file_and_no_rest(tmp_path, run, monkeypatch):
    path = save(run, tmp_path / "c.pt")
    before = path.read_bytes()
    for failing in ("fsync", "replace"):

        def fail(*a, **k):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, failing, fail)
            refused(lambda: save(run, path), str(path), "No space left on device")
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.pt"]


def test_a_full_disk_inside_torch_save_is_named(tmp_path, run, monkeypatch):
    def fail(content, file):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 as torch.save does

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    refused(lambda: save(run, tmp_path / "c.pt"), "No space left on device")


def test_the_file_appears_by_a_rename_after_fsync(tmp_path, run, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            checkpoint.os, name, lambda *a, n=name, o=original: (events.append(n), o(*a))[1]
        )
    save(run, tmp_path / "c.pt")
    assert events == ["fsync", "replace", "fsync"]  # file, rename, folder


def test_damage_is_found(tmp_path, run):
    path = save(run, tmp_path / "c.pt")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda i: i.file_size)
    middle = member.header_offset + 200 + member.file_size // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content, said in [
        (flipped, "wrong checksum"),
        (whole[: len(whole) // 2], "damaged"),
        (whole[:-1], "damaged"),
        (b"", "damaged"),
        (b"<html>404</html>", "damaged"),
    ]:
        path.write_bytes(content)
        refused(lambda: read_checkpoint(path), str(path), said)
    refused(lambda: read_checkpoint(tmp_path), "not a plain file")
    refused(lambda: read_checkpoint(tmp_path / "none.pt"), "no such checkpoint")


def test_odd_attributes_are_damage_too(tmp_path, run):
    # The "directory" bit of an entry passes the checksums and makes torch.load return noise.
    path = save(run, tmp_path / "c.pt")
    whole = bytearray(path.read_bytes())
    entry = whole.index(b"PK\x01\x02")  # first entry of the central directory
    whole[entry + 38] ^= 0x10
    path.write_bytes(whole)
    refused(lambda: read_checkpoint(path), "wrong checksum or attributes")


def test_random_damage_never_ends_in_a_traceback_or_a_wrong_weight(tmp_path, run):
    import random

    path, draw = save(run, tmp_path / "c.pt"), random.Random(0)
    whole, wanted, refusals = path.read_bytes(), run.weights(), 0
    for _ in range(400):
        damaged, at = bytearray(whole), draw.randrange(len(whole))
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        for lazily in (True, False):
            try:
                content = read_checkpoint(path, lazily)
            except UserError as error:
                assert "\n" not in str(error)
                refusals += not lazily
        if refusals == 0:
            assert all(torch.equal(content["model"][k], wanted[k]) for k in wanted)
    assert refusals > 300  # the rest is padding and names that nothing reads


@pytest.fixture
def claim(tmp_path):
    def held(path, resume=False):
        lock, aside = claim_checkpoint(path, resume)
        locks.append(lock)
        return aside

    locks = []
    yield held
    for lock in locks:
        lock.close()


def test_a_second_run_on_the_same_path_is_refused_with_the_name_of_the_first(tmp_path, claim):
    claim(tmp_path / "c.pt")
    said = ("in use by another run", f"process {os.getpid()}")
    refused(lambda: claim(tmp_path / "c.pt"), *said)
    refused(lambda: claim(tmp_path / "c.pt", resume=True), *said)
    claim(tmp_path / "other.pt")


def test_milestones_of_an_earlier_run_are_set_aside_too(tmp_path, claim):
    for name in ("c.pt", "c.step000003.pt", "d.step000003.pt"):
        (tmp_path / name).write_text("old")
    aside = claim(tmp_path / "c.pt")
    assert [(a.name, b.name) for a, b in aside] == [
        ("c.pt", "c.1.pt"),
        ("c.step000003.pt", "c.step000003.1.pt"),
    ]
    assert (tmp_path / "d.step000003.pt").exists()


def test_what_is_not_a_file_is_never_renamed(tmp_path, claim, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    refused(lambda: claim("folder"), "not a plain file")
    refused(lambda: claim("."), "not a plain file")
    assert (tmp_path / "folder").is_dir()


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_code_in_a_file_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Evil()}, "c.pt")
    refused(lambda: read_checkpoint("c.pt"), "not a checkpoint")
    assert not os.path.exists("evil")


def test_another_format_is_named(tmp_path):
    torch.save({"format": 99}, tmp_path / "c.pt")
    refused(lambda: read_checkpoint(tmp_path / "c.pt"), "format 99", "reads 1")
    torch.save([1, 2], tmp_path / "c.pt")
    refused(lambda: read_checkpoint(tmp_path / "c.pt"), "format None")


def test_all_differences_to_the_model_are_listed_and_nothing_is_changed(tmp_path, run):
    path = save(run, tmp_path / "c.pt")
    other = Run("--d-ff", "32", "--vocab-size", "90")
    before = other.weights()
    refused(
        lambda: load_checkpoint(path, other.model, other.optimizer),
        "wte.weight is (97, 16), expected (90, 16)",
        *(f"blocks.{i}.mlp.fc.bias is (64,), expected (32,)" for i in (0, 1)),
    )
    assert all(torch.equal(before[k], v) for k, v in other.weights().items())
    deeper, modern = Run("--n-layers", "3"), Run("--arch", "modern")
    refused(lambda: load_checkpoint(path, deeper.model), "blocks.2.attn.qkv.weight is missing")
    refused(lambda: load_checkpoint(path, modern.model), "norm_f.bias is unknown")


def test_other_data_is_refused(tmp_path, run):
    save_checkpoint(
        tmp_path / "c.pt",
        run.model,
        run.optimizer,
        run.state,
        run.args,
        {"train": {"fingerprint": "a"}, "val": {}},
    )
    now = {"train": {"fingerprint": "b"}, "val": {}}
    refused(
        lambda: load_checkpoint(tmp_path / "c.pt", run.model, run.optimizer, RunState(), now),
        "train data: fingerprint was 'a', is 'b'",
    )


def test_moments_belong_to_names_not_positions(tmp_path, run):
    path = save(run, tmp_path / "c.pt")
    other = Run("--dropout", "0.1", "--grad-accum-steps", "2")
    other.optimizer.param_groups[0]["params"].reverse()
    load_checkpoint(path, other.model, other.optimizer)
    for name, p in other.model.named_parameters():
        mine = run.optimizer.state[dict(run.model.named_parameters())[name]]
        assert torch.equal(other.optimizer.state[p]["exp_avg"], mine["exp_avg"])


def test_moments_of_another_shape_are_refused(tmp_path, run):
    path = save(run, tmp_path / "c.pt")
    content = torch.load(path)
    content["optimizer"]["wte.weight"]["exp_avg"] = torch.zeros(3, 3)
    torch.save(content, path)
    refused(lambda: load_checkpoint(path, run.model, run.optimizer), "wte.weight (exp_avg)")


def test_milestones_are_kept(tmp_path):
    run = Run()
    for _ in range(4):
        run.step()
        save(run, tmp_path / "c.pt", keep_every=2)
    assert sorted(os.listdir(tmp_path)) == ["c.pt", "c.step000002.pt", "c.step000004.pt"]
    assert read_checkpoint(tmp_path / "c.step000002.pt")["step"] == 2


def test_load_model_needs_only_the_file(tmp_path, run):
    model, settings, _ = load_model(save(run, tmp_path / "c.pt"))
    assert isinstance(model, GPTModel) and settings.model == run.args.model
    assert all(torch.equal(v, run.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_set_aside_never_overwrites(tmp_path):
    path = tmp_path / "c.pt"
    assert set_aside(path) is None
    for i in (1, 2):
        path.write_text(str(i))
        assert set_aside(path) == tmp_path / f"c.{i}.pt"
    assert (tmp_path / "c.1.pt").read_text() == "1" and not path.exists()


def test_toy_settings_are_those_that_come_back(tmp_path, run):
    _, settings, _ = load_model(save(run, tmp_path / "c.pt", resume=True))
    assert settings == dataclasses.replace(run.args, resume=False)
