"""`make gpu` itself, at toy size on a CPU: no mistake in it may cost time on a GPU."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_stage_of_the_gpu_check_passes_on_a_cpu(tmp_path):
    ran = subprocess.run(
        [sys.executable, str(ROOT / "scripts/gpu.py"), "--device", "cpu"],
        cwd=tmp_path, env={**os.environ, "OUT": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=880,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-5000:]
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == [
        "smoke",
        "tests",
        "curves",
        "minutes",
        "train",
        "profile",
        "loss",
        "optim",
        "generate",
    ]
    assert not any(stage["failed"] for stage in stages.values())
    assert stages["train"]["table"][0]["side"] == "ours"
    assert stages["curves"]["table"][-1]["largest"] == "same bits"


def test_without_a_gpu_the_check_says_how_to_try_it():
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, str(ROOT / "scripts/gpu.py")], env=env, capture_output=True, text=True
    )
    assert ran.returncode == 1 and "make gpu DEVICE=cpu" in ran.stderr
