"""Dataclass fields that describe and check a setting, and the error for a mistake of the user.

`flag` describes one field; the command line (runtime/flags.py) is made from such fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """A mistake of the user, in one line that says what was given, what is allowed and what to try.

    of_all: all ranks raise the same error, so the printed message does not name a rank.
    """

    def __init__(self, text: str, of_all: bool = False) -> None:
        super().__init__(text)
        self.of_all = of_all


class NothingSaved(UserError):
    """There is no checkpoint to resume at a path, not even a damaged one."""


def flag(
    default: Any,
    help: str,
    *choices: str,
    at_least: float | None = None,
    at_most: float | None = None,
    fixed: bool = False,
    positional: bool = False,
    word: str = "",
    metavar: str = "",
    short_for: str = "",
) -> Any:
    """Returns a dataclass field for one setting, with its default, the help text of its flag (which
    names the unit), and the values that are allowed.

    fixed: with another value it would be another run, so --resume accepts a change only with
    --allow-change. positional: the values are given without a flag. word: the one value that a
    boolean flag accepts besides being given alone, as in --resume auto. metavar: the placeholder
    for the value in --help; if it contains PATH, a leading ~ becomes the home directory. short_for:
    the flag and value that this flag abbreviates; it then has no --no- form.
    """
    limits = {"choices": choices, "at_least": at_least, "at_most": at_most}
    named = {"word": word, "metavar": metavar, "short_for": short_for}
    metadata = {"help": help, "fixed": fixed, "positional": positional, **named, **limits}
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(settings: Any) -> None:
    """Raises UserError if a field has the wrong type, is not finite, or is outside of what its flag
    allows. An int in a float field becomes a float.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), hints[field.name]
        if kind is float and type(value) is int:
            value = float(value)
            object.__setattr__(settings, field.name, value)
        accepted = tuple if typing.get_origin(kind) is tuple else kind
        if type(value) is not accepted or (
            accepted is tuple and not all(type(v) is str for v in value)
        ):
            raise UserError(
                f"{field.name}={value!r:.80} must be of type {getattr(kind, '__name__', kind)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{field.name}={value} must be a finite number")
        choices, at_least = field.metadata.get("choices"), field.metadata.get("at_least")
        if choices:
            choose(field.name, str(value), dict.fromkeys(choices))
        if at_least is not None and value < at_least:
            raise UserError(f"{field.name}={value} must be at least {at_least}")
        at_most = field.metadata.get("at_most")
        if at_most is None and isinstance(value, int):
            at_most = 2**62  # what torch and NumPy take
        if at_most is not None and value > at_most:
            raise UserError(f"{field.name}={value} must be at most {at_most}")


def choose(name: str, given: str, allowed: Mapping[str, Any]) -> Any:
    """Returns allowed[given]. Raises UserError if there is none, which lists the allowed words and
    those that are spelled like `given`. name: the setting, for the message.
    """
    if given not in allowed:
        close = difflib.get_close_matches(given[:80], allowed, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{name}={given!r:.80} is not one of {', '.join(allowed)}{hint}")
    return allowed[given]
