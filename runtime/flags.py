"""Makes command-line flags from the fields of a dataclass (runtime/setting_fields.py).

This is a thin layer over argparse, since presets and --resume must know which flags were typed.
tyro and simple-parsing return a complete object that doesn't tell. jsonargparse can tell, and would
need as many lines for flat names, bounds and hints.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.files import expanded
from runtime.flags_elsewhere import FOREIGN
from runtime.setting_fields import UserError


def flag_name(name: str) -> str:
    """The flag of a field, such as --batch-size of batch_size."""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help lists all flags")


class _Format(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


@dataclass(frozen=True)
class Help:
    """What --help prints besides each flag's help text: the value of each flag on this command line
    (`shown`, by field name), and the text above (`about`) and below (`epilog`) the flags.
    """

    shown: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # else its default
    about: str = "[value]: what is used where the flag is not given."
    epilog: str = ""


def parse_flags(
    kind: type, program: str, argv: list[str], describe: Callable[[], Help] = Help
) -> dict[str, Any]:
    """Returns the flags that the user typed, and no defaults, as field name -> value. Raises
    UserError for unknown flags and values of the wrong type. If argv asks for --help, prints all
    flags, with what describe() returns, and exits.

    kind: a dataclass with fields made by `flag`; a dataclass nested in it adds its fields as flags.
    program: the script's name in the help.
    """
    hints = typing.get_type_hints(kind)
    kinds = [hints[f.name] for f in dataclasses.fields(kind)]
    owners = (*(k for k in kinds if dataclasses.is_dataclass(k)), kind)
    fields = [f for owner in owners for f in dataclasses.fields(owner) if f.metadata]
    hints = {k: v for owner in owners for k, v in typing.get_type_hints(owner).items()}
    help = describe() if {"-h", "--help"} & set(argv) else Help()
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Format,
        description=help.about,
        epilog=help.epilog,
    )
    for field in fields:
        _add_flag(parser, field, hints[field.name], help.shown.get(field.name, field.default))
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [s for s in parser._option_string_actions if s.startswith("--")]
        raise UserError(f"unknown argument {unknown[0]}{_hint(unknown[0], flags, fields)}")
    paths = [f.name for f in fields if "PATH" in _metavar(f, hints[f.name])]
    return {k: _plain(v, flag_name(k) if k in paths else "") for k, v in vars(known).items()}


def _plain(value: Any, path_flag: str) -> Any:
    """Converts a parsed value to what a field holds: a list to a tuple, and a leading ~ in a path
    to the home directory. path_flag: the flag that has the value if that is a path, else "".
    """
    if isinstance(value, list):
        return tuple(_plain(v, path_flag) for v in value)
    if path_flag and isinstance(value, str) and value.startswith("~"):
        return str(expanded(value, path_flag))
    return value


def _hint(given: str, flags: list[str], fields: list[dataclasses.Field[Any]]) -> str:
    """The end of the error message for an unknown argument: what to type in its place."""
    name = given.split("=")[0].lstrip("-").replace("_", "-").lower()
    for field in fields:
        if field.metadata["short_for"] and f"--{name}" == f"--no-{flag_name(field.name)[2:]}":
            long = field.metadata["short_for"]
            return (
                f": {flag_name(field.name)} is short for {long} and has no opposite; give "
                f"{long.split()[0]}"
            )
    instead = FOREIGN.get(name, "")
    if instead and (not instead.startswith("--") or instead.split()[0].rstrip(",:") in flags):
        return f"; here that is {instead}"
    close = (
        [f"--{name}"]
        if f"--{name}" in flags
        else difflib.get_close_matches(f"--{name}", flags, n=2)
    )
    return f"; did you mean {' or '.join(close)}?" if close else "; --help lists all flags"


def _metavar(field: dataclasses.Field[Any], kind: Any) -> str:
    """The placeholder that --help shows for the value of a flag (argparse's metavar)."""
    known = field.metadata["metavar"]
    if field.metadata["choices"]:
        known = "{" + ",".join(field.metadata["choices"]) + "}"
    usual = {int: "N", float: "X", str: "NAME", bool: ""}
    return known or usual.get(kind, "PATH")


def _as_shown(value: Any) -> str:
    """A value as --help prints it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        value = " ".join(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("\n", "\\n") or "none"


def _add_flag(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], kind: Any, shown: Any
) -> None:
    name, metavar = flag_name(field.name), _metavar(field, kind)
    text = f"{field.metadata['help']} [{_as_shown(shown)}]".replace("%", "%%")
    if field.metadata["positional"]:
        text = field.metadata["help"].replace("%", "%%")
        parser.add_argument(field.name, nargs="*", metavar=metavar, help=text)
    elif word := field.metadata["word"]:
        parser.add_argument(name, nargs="?", const=True, choices=[word], metavar=word, help=text)
        parser.add_argument(
            f"--no-{field.name}",
            dest=field.name,
            action="store_const",
            const=False,
            help=argparse.SUPPRESS,
        )
    elif kind is bool and (field.metadata["short_for"] or field.name.startswith("no_")):
        parser.add_argument(name, action="store_true", help=text)
    elif kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(name, nargs="+", metavar=metavar, help=text)
    else:
        parser.add_argument(name, type=kind, metavar=metavar, help=text)
