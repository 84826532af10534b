import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run(code, *argv, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    ran = subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *argv],
        cwd=ROOT, env={**clean, **env}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_threads_sleep_while_they_wait_before_torch_reads_how():
    code = "import settings.before_torch, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    assert run(code) == "passive False\n"


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "9")])
def test_what_the_user_set_stays_and_is_said(name, value):
    code = "import runtime.device as d, os; print(d.pick_device('cpu').description, os.environ['OMP_WAIT_POLICY'])"
    code = code.replace("os.environ['OMP_WAIT_POLICY']", "os.environ.get('OMP_WAIT_POLICY')")
    out = run(code, **{name: value})
    assert f"{name}={value} of the environment decides how they wait" in out
    assert out.split()[-1] == ("active" if name == "OMP_WAIT_POLICY" else "None")


@pytest.mark.parametrize("script", ["train_minimal.py", "train_ddp.py", "eval.py", "generate.py"])
def test_help_is_there_without_loading_torch(script):
    code = (
        "import sys, runpy, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        f"sys.argv = ['{script}', '--help']\n"
        f"runpy.run_path('{script}', run_name='__main__')"
    )
    out = run(code)
    assert "--checkpoint-path" in out and out.endswith("False\n")
