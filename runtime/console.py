"""Writing to a terminal: whatever its encoding is, and without what would steer it."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_PATIENCE_SECONDS = 10.0  # after which work says how far it is, and then each time twice as late


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
    here = Path(__file__).resolve().parent.parent
    path = script if here == Path.cwd() else str(here / script)
    python = os.path.dirname(sys.executable)
    name = "torchrun" if processes else "python"
    if shutil.which(name) == os.path.join(python, name):
        start = name
    else:
        start = shlex.quote(sys.executable) + (" -m torch.distributed.run" if processes else "")
    many = f" --nproc-per-node={processes}" if processes else ""
    return f"{start}{many} {shlex.quote(path)}"


def progress(items: Iterable[_T], what: str, total: int, quiet: bool = False) -> Iterator[_T]:
    """Passes on the items, of which there are `total`, and says on standard error how far it is and
    when it will be done: after 10 s, 20 s, 40 s and so on. quiet: it says nothing.
    """
    start, due = time.monotonic(), _PATIENCE_SECONDS
    for done, item in enumerate(items):
        spent = time.monotonic() - start
        if not quiet and done and spent >= due:
            left = spent * (total - done) / done
            text = f"{what}: {done / total:.0%} in {spent:.0f} s, about {left:.0f} s to go"
            print(text, file=sys.stderr, flush=True)
            due = 2 * spent
        yield item
