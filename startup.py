"""What has to be settled before torch loads: every script imports this first.

Loading torch takes seconds, and meanwhile the OpenMP library reads from the environment how its
threads are to wait for each other.
"""

from __future__ import annotations

import os
import sys

from cli import parse_flags
from config import EvalSettings, SampleSettings, Settings

_SETTINGS = {
    "train_minimal.py": Settings,
    "train_ddp.py": Settings,
    "eval.py": EvalSettings,
    "generate.py": SampleSettings,
}


def answer_help() -> None:
    """Prints the help of the script that was started, if that is asked for, and exits."""
    script = os.path.basename(sys.argv[0])
    if script in _SETTINGS and {"-h", "--help"} & set(sys.argv[1:]):
        parse_flags(_SETTINGS[script], script, sys.argv[1:])


answer_help()
