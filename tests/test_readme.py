"""What the pages say to type works: the README's commands and its use as a library, and the changes of the code that a guide shows."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from bench import VERBS as BENCHMARKS
from bench import BenchSettings
from checkpointing.commands import VERBS, CheckpointSettings
from conversion.commands import ConversionSettings
from report import ReportSettings, short_flags
from runtime.flags import parse_flags
from settings.command_line import parse_settings
from settings.eval_and_generate import EvalSettings, SampleSettings

TEXT = (ROOT / "README.md").read_text()
CHANGES = (ROOT / "docs/guides/change-the-code.md").read_text()
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
    elif script == "report.py":
        ReportSettings(**parse_flags(ReportSettings, script, short_flags(flags)))
    elif script == "checkpoint.py":
        assert CheckpointSettings(**parse_flags(CheckpointSettings, script, flags)).verb[0] in VERBS
    elif script == "hf.py":
        verb = ConversionSettings(**parse_flags(ConversionSettings, script, flags)).verb
        assert verb[0] in ("export", "import") and len(verb) == 3
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
    assert {"train_minimal.py", "train_ddp.py", "eval.py", "generate.py", "report.py"} <= words


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", TEXT, re.M):
        assert f"\n{target}:" in makefile


TOY = "--preset toy --use-toy-data --num-steps 3 --device cpu --sample-tokens 1".split()


def run_python(folder, *words):
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def changed(tmp_path, request):
    """A copy of the project with one of the changes that the guide shows."""
    ignored = shutil.ignore_patterns(".*", "tests", "docs", "logs", "checkpoints", "runs")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    (diff,) = [x for x in re.findall(r"```diff\n(.*?)```", CHANGES, re.S) if request.param in x]
    subprocess.run(
        ["git", "apply", "-"], cwd=tmp_path / "copy", input=diff, text=True, check=True, timeout=60
    )
    return tmp_path / "copy"


def run_of_toy(folder, *flags):
    run_python(folder, "train_minimal.py", *TOY, *flags)
    return folder


def records(folder):
    lines = (folder / "logs/train_minimal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.long
@pytest.mark.parametrize("changed", ["adam_eps"], indirect=True)
def test_the_new_setting_of_the_guide_works(changed):
    plain = records(run_of_toy(changed))
    assert plain[0]["settings"]["adam_eps"] == 1e-8
    other = records(run_of_toy(changed, "--adam-eps", "0.1"))
    assert other[0]["settings"]["adam_eps"] == 0.1
    assert other[-1]["val_loss"] != plain[-1]["val_loss"]  # so small an update hardly moves it
    shown = run_python(changed, "checkpoint.py", "show", "checkpoints/minigpt_single.pt")
    assert "adam_eps=0.1" in shown


@pytest.mark.long
@pytest.mark.parametrize("changed", ["rsqrt"], indirect=True)
def test_the_new_schedule_of_the_guide_works(changed):
    flags = ["--lr-scheduler", "rsqrt", "--lr", "1e-3", "--min-lr", "0", "--warmup-steps", "0"]
    rates = [r["lr"] for r in records(run_of_toy(changed, *flags)) if r["event"] == "train"]
    assert rates == pytest.approx([1e-3, 1e-3 / 2**0.5, 1e-3 / 3**0.5])


@pytest.mark.long
@pytest.mark.parametrize("changed", ["self.gate"], indirect=True)
def test_the_other_mlp_of_the_guide_works(changed):
    numbers = records(run_of_toy(changed))[0]["parameters"]
    run_python(changed, "train_minimal.py", *TOY[-4:], "--resume", "--num-steps", "4")
    code = "from model import GPTModel; from settings.command_line import parse_settings\n"
    code += f"print(GPTModel(parse_settings('train_minimal', {TOY!r}).model).num_parameters())"
    plain = int(run_python(ROOT, "-c", code))
    assert numbers - plain == 2 * (128 * 512 + 512)  # two layers have one matrix more each


@pytest.fixture
def trained(tmp_path):
    """A folder with a checkpoint of a run on text."""
    (tmp_path / "text.txt").write_text("def main():\n    pass\n" * 3000)
    flags = [x for x in TOY if x != "--use-toy-data"]
    flags += ["--train-data", "text.txt", "--allow-leak"]
    run_python(tmp_path, str(ROOT / "train_minimal.py"), *flags)
    return tmp_path


def test_the_lines_for_a_library_work(trained):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len([line for line in code.splitlines() if line]) <= 6
    out = run_python(trained, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    assert out.endswith("\n")
