"""Writes to a terminal, whatever its encoding is, and without others' control characters."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_PATIENCE_SECONDS = 10.0  # until the first line of progress; the time doubles with each line


def open_closed_streams() -> None:
    """Opens standard output and standard error on nothing where this process was started without
    them (`>&-` in a shell): print would fail, and the next file to be opened would get their number
    and what others write there.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def accept_any_text() -> None:
    """Makes standard output and standard error write a character that their encoding lacks as an
    escape such as \\u4e16, where it would raise an error otherwise.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def visible(text: str) -> str:
    """Returns the text with control characters as escapes such as \\x1b; line breaks and tabs stay.

    A model of bytes can generate any control character, and a terminal would obey it.
    """
    text = text.replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or not _is_control(c) else repr(c)[1:-1] for c in text)


def _is_control(c: str) -> bool:
    return c < " " or "\x7f" <= c < "\xa0"


def say(text: str) -> None:
    """Prints text that does not come from this program, such as a model's output or a file name."""
    print(visible(text), flush=True)


def say_part(text: str) -> None:
    """Prints a part of a line, as `say` does a whole one."""
    print(visible(text), end="", flush=True)


def say_aside(text: str) -> None:
    """Prints a remark on standard error, so that it is no part of the output."""
    print(visible(text), file=sys.stderr, flush=True)


def one_line(said: object, most: int = 300) -> str:
    """What an exception or another program says, without line breaks, up to `most` characters."""
    return " ".join(str(said).split())[:most]


def duration(seconds: float) -> str:
    """A time span in words, such as 45 s, 12 min or 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def aligned(rows: Iterable[Sequence[str]], least: Iterable[int] = ()) -> list[str]:
    """The rows of a table as lines, with the cells of a column below each other and two spaces
    between columns. least: the least width of each column, in characters; none = that of its cells.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths = [max(pair) for pair in zip_longest(widths, least, fillvalue=0)]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def command(script: str, processes: int = 0) -> str:
    """Returns the shell command that starts a script of this project from the current directory
    with the Python that runs now. python and torchrun appear by name where the shell finds those of
    this Python, else by path. processes: the number that torchrun starts; 0 = no torchrun.
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
    """Yields the items, of which there are `total`, and prints on standard error what part of them
    is done and how long the rest will take: after 10 s, 20 s, 40 s and so on. what: the name of the
    work in that line. quiet: print nothing.
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
