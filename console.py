"""Writing to a terminal: whatever its encoding is, and without what would steer it."""

from __future__ import annotations

import io
import sys


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
