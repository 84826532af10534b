import time

import pytest
from conftest import toy_settings

from reporting.wandb_log import WandB
from runtime.setting_fields import UserError
from training.step import RunState

wandb = pytest.importorskip("wandb")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    wandb.teardown()  # it remembers the settings of the first start in a process
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def test_offline_run_holds_the_metrics(here):
    said, state = [], RunState(step=7)
    log = WandB(
        toy_settings(wandb_mode="offline", wandb_run_name="my name"), state, {"lr": 1}, said.append
    )
    log.log({"train/loss": 2.5}, state)
    log.finish()
    wandb.teardown()  # its process may write the file after finish() has returned, until it ends
    assert state.wandb_run_id and said[0].startswith("wandb: offline run in ")
    (file,) = here.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert all(part in content for part in (b"train/loss", b"2.5", b"my name", b"step"))


def test_without_a_server_the_run_goes_on_offline_within_ten_seconds(here, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    said, state, start = [], RunState(), time.monotonic()
    log = WandB(toy_settings(wandb_mode="online"), state, {}, said.append)
    assert time.monotonic() - start < 14  # 10 on an idle machine
    assert "wandb online did not start" in said[0] and "now offline" in said[0]
    log.log({"train/loss": 1.0}, state)
    log.finish()
    assert list(here.glob("wandb/offline-run-*"))


def test_without_a_key_the_run_goes_on_offline(here):
    said, state = [], RunState()
    log = WandB(toy_settings(wandb_mode="online"), state, {}, said.append)
    log.finish()
    assert "did not start" in said[0] and "offline run in" in said[1]


def test_a_failure_while_logging_is_said_once_and_ends_only_wandb(here):
    class Broken:
        id = "x"

        def log(self, values):
            raise RuntimeError("service died\nlong traceback")

    said, state = [], RunState()
    log = WandB(toy_settings(wandb_mode="offline"), state, {}, said.append)
    log.finish()
    log.run, said[:] = Broken(), []
    log.log({"a": 1}, state)
    log.log({"a": 1}, state)
    assert said == ["wandb stopped: RuntimeError: service died; training goes on without it"]


def test_missing_package_is_said(here, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    said = []
    WandB(toy_settings(wandb_mode="offline"), RunState(), {}, said.append)
    assert "did not start" in said[0]


@pytest.mark.parametrize(
    "settings, environment, expected",  # mode, project, name; "" = not given
    [
        (("auto", "", ""), ("", "", ""), ("online", "rosetrainer", None)),
        (("auto", "", ""), ("offline", "env-p", "env-n"), ("offline", "env-p", "env-n")),
        (("online", "my-p", "my-n"), ("offline", "env-p", "env-n"), ("online", "my-p", "my-n")),
        (("auto", "", "my-n"), ("dryrun", "env-p", ""), ("offline", "env-p", "my-n")),
    ],
)
def test_flags_win_over_the_environment_and_that_over_defaults(
    here, monkeypatch, settings, environment, expected
):
    started = {}
    names = ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME")
    for name, value in zip(names, environment, strict=True):
        monkeypatch.setenv(name, value)

    def init(**options):
        started.update({} if started else options)  # of the first try
        raise RuntimeError("enough")

    monkeypatch.setattr("wandb.init", init)
    flags = dict(zip(("wandb_mode", "wandb_project", "wandb_run_name"), settings, strict=True))
    WandB(toy_settings(**flags), RunState(), {}, lambda text: None)
    assert (started["mode"], started["project"], started["name"]) == expected


@pytest.mark.parametrize("flag, environment", [("auto", "disabled"), ("disabled", "online")])
def test_disabled_starts_nothing(here, monkeypatch, flag, environment):
    monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # to import it would fail
    said, state = [], RunState()
    log = WandB(toy_settings(wandb_mode=flag), state, {}, said.append)
    log.log({"a": 1}, state)
    log.finish()
    assert said == ["wandb: disabled; nothing is sent or kept"] and not state.wandb_run_id


def test_a_mode_that_wandb_does_not_know_is_refused(here, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(UserError, match=r"WANDB_MODE='offlin' is not one of .*mean offline"):
        toy_settings("--use-wandb")
    toy_settings()  # it is read by nothing
