"""Settings as dataclasses whose fields check themselves, and the error for a mistake of the user.

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
    """A mistake of the user: one line that says what was given, what is allowed, what to try.

    of_all: all ranks have found it together, so it does not matter which one says it.
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
    at_most: float = 2**62,
    fixed: bool = False,
    positional: bool = False,
    word: str = "",
    metavar: str = "",
    short_for: str = "",
) -> Any:
    """One setting: default, help of its flag with the unit, and the values that it may take.

    fixed: another value makes another run, so --resume takes it only with --allow-change. word:
    what a flag that is on when given alone also takes, as in --resume auto. metavar: what --help
    calls the value; with PATH in it, a typed ~ is the home directory. short_for: the flag and value
    that it is another name of; such a flag has no negation.
    """
    limits = {"choices": choices, "at_least": at_least, "at_most": at_most}
    named = {"word": word, "metavar": metavar, "short_for": short_for}
    metadata = {"help": help, "fixed": fixed, "positional": positional, **named, **limits}
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(settings: Any) -> None:
    """Raises UserError where a field has the wrong type, is not finite, or lies outside of what
    its flag allows.
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
        if at_most is not None and isinstance(value, int) and value > at_most:
            raise UserError(f"{field.name}={value} must be at most {at_most}")


def choose(name: str, given: str, allowed: Mapping[str, Any]) -> Any:
    """What `given` stands for in `allowed`. Raises UserError that names those that are close."""
    if given not in allowed:
        close = difflib.get_close_matches(given[:80], allowed, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{name}={given!r:.80} is not one of {', '.join(allowed)}{hint}")
    return allowed[given]
