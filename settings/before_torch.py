"""What must happen before torch loads; every script imports this module first.

While torch loads, the OpenMP library reads from the environment how its threads are to wait for
each other (set in runtime/threads.py). And --help is answered here, since loading torch takes
seconds.
"""

from __future__ import annotations

import runtime.start_time  # isort: skip
import runtime.threads  # noqa: F401

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from runtime.flags import parse_flags
from settings.command_line import trainer_flags
from settings.eval_and_generate import EvalSettings, SampleSettings

_FLAGS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "train_minimal.py": partial(trainer_flags, "train_minimal"),
    "train_ddp.py": partial(trainer_flags, "train_ddp"),
    "eval.py": partial(parse_flags, EvalSettings, "eval.py"),
    "generate.py": partial(parse_flags, SampleSettings, "generate.py"),
}


def answer_help() -> None:
    """Prints the help of the running script and exits, if its arguments ask for help."""
    script = os.path.basename(sys.argv[0])
    if script in _FLAGS and {"-h", "--help"} & set(sys.argv[1:]):
        _FLAGS[script](sys.argv[1:])


answer_help()
