"""What has to be settled before torch loads: every script imports this first.

Loading torch takes seconds, and meanwhile the OpenMP library reads from the environment how its
threads are to wait for each other.
"""

from __future__ import annotations

import os
import sys

from config import EvalSettings, SampleSettings, Settings
from runtime.command_line import parse_flags

_SETTINGS = {
    "train_minimal.py": Settings,
    "train_ddp.py": Settings,
    "eval.py": EvalSettings,
    "generate.py": SampleSettings,
}


# Threads that wait for the others of a matrix product spin by default. On a machine with other
# work they take the cores from those they wait for: one busy process made steps 3 to 4 times as
# long, two made small ones 70 times as long, and with threads that sleep it is at most twice, at
# the price of small steps on an idle machine (docs/speed.md). What the user has set stays.
WAITING_SET_BY_USER = {
    name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ
}
if WAITING_SET_BY_USER in ({}, {"OMP_WAIT_POLICY": "passive"}):  # the latter from who started this
    WAITING_SET_BY_USER = {}
    os.environ["OMP_WAIT_POLICY"] = "passive"


def answer_help() -> None:
    """Prints the help of the script that was started, if that is asked for, and exits."""
    script = os.path.basename(sys.argv[0])
    if script in _SETTINGS and {"-h", "--help"} & set(sys.argv[1:]):
        parse_flags(_SETTINGS[script], script, sys.argv[1:])


answer_help()
