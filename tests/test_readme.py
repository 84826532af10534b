"""The commands of the README exist and take the flags that it gives them."""

import re
import shlex

import pytest
from conftest import ROOT

from bench import VERBS as BENCHMARKS
from bench import BenchSettings
from checkpointing.inspection import VERBS, CheckpointSettings
from runtime.flags import parse_flags
from settings.command_line import parse_settings
from settings.scripts import EvalSettings, SampleSettings

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line.split("  #")[0])
    for line in re.sub(r"\\\n\s*", "", TEXT).splitlines()
    if re.match(r"    (\S*python|torchrun) .*\.py", line)
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_is_accepted(command):
    place = next(i for i, word in enumerate(command) if word.endswith(".py"))
    script, flags = command[place], command[place + 1 :]
    assert (ROOT / script).exists()
    if script == "eval.py":
        EvalSettings(**parse_flags(EvalSettings, script, flags))
    elif script == "generate.py":
        SampleSettings(**parse_flags(SampleSettings, script, flags))
    elif script == "checkpoint.py":
        assert CheckpointSettings(**parse_flags(CheckpointSettings, script, flags)).verb[0] in VERBS
    elif script == "bench.py":
        own, _, trainer = " ".join(flags).partition(" -- ")
        settings = BenchSettings(**parse_flags(BenchSettings, script, own.split()))
        assert settings.verb[0] in BENCHMARKS
        parse_settings("train_minimal", trainer.split())
    else:
        saved = {"num_steps": 500, "warmup_steps": 50}
        parse_settings(script[:-3], flags, world=2, saved=lambda path: saved)


def test_there_are_commands_of_every_script():
    words = {word for command in COMMANDS for word in command}
    assert {"train_minimal.py", "train_ddp.py", "eval.py", "generate.py"} <= words


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", TEXT, re.M):
        assert f"\n{target}:" in makefile
