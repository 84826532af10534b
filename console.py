"""Writing to a terminal: whatever its encoding is, and without what would steer it."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from pathlib import Path


def accept_any_text() -> None:
    """From now on a character that the terminal's encoding lacks is written as an escape such as
    \\u4e16, where it would raise an error otherwise.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def visible(text: str) -> str:
    """The text with its control characters written out, such as \\x1b; line breaks and tabs stay.

    A model of bytes draws any of them, and a terminal would obey.
    """
    text = text.replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or not _is_control(c) else repr(c)[1:-1] for c in text)


def _is_control(c: str) -> bool:
    return c < " " or "\x7f" <= c < "\xa0"


def say(text: str) -> None:
    """Prints text that is not ours, such as what a model wrote or how a file is called."""
    print(visible(text), flush=True)


def command(script: str, processes: int = 0) -> str:
    """How the user starts a script of this project here, with the Python that runs now: a word that
    the shell finds, or its path. processes: that torchrun is to start, 0 for none.
    """
    here = Path(__file__).resolve().parent
    path = script if here == Path.cwd() else str(here / script)
    python = os.path.dirname(sys.executable)
    name = "torchrun" if processes else "python"
    if shutil.which(name) == os.path.join(python, name):
        start = name
    else:
        start = shlex.quote(sys.executable) + (" -m torch.distributed.run" if processes else "")
    many = f" --nproc-per-node={processes}" if processes else ""
    return f"{start}{many} {shlex.quote(path)}"
