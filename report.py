"""Shows and compares runs: `python report.py logs/a.jsonl logs/b.jsonl`, their metrics files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reporting.plots import draw_losses
from reporting.reference import write_reference
from reporting.report_page import write_report
from reporting.report_text import report_text
from reporting.run_curves import RunCurves, read_run, runs_in
from runtime.console import say
from runtime.files import expanded
from runtime.flags import parse_flags
from runtime.run_script import run_script
from runtime.setting_fields import UserError, check_fields, flag

_WATCH_SECONDS = 5.0


@dataclass(frozen=True)
class ReportSettings:
    """Settings of report.py."""

    metrics: tuple[str, ...] = flag(
        (), "metrics files, or folders of them; none = logs", positional=True
    )
    output: str = flag("report.html", "the page", metavar="PATH")
    png: str = flag("", "write the picture of the losses here, and no page", metavar="PATH")
    text: bool = flag(False, "print a table, and write no page")
    make_reference: str = flag(
        "", "write a curve for --check-reference, of runs with other seeds", metavar="PATH"
    )
    watch: bool = flag(
        False, "write the page anew every few seconds, until Ctrl-C; it reloads itself"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.watch and (self.png or self.text or self.make_reference):
            raise UserError("--watch is about the page; give it alone")
        if self.png and self.make_reference:
            raise UserError("--png and --make-reference are two files; give one at a time")


def find_runs(given: Sequence[str]) -> list[RunCurves]:
    """The runs of the named files and folders, each with a name that tells it from the others.
    Raises UserError.
    """
    paths: list[Path] = []
    for name in given or ("logs",):
        path = expanded(name, "a path that exists")
        paths += runs_in(path) if path.is_dir() else [path]
    paths = list(dict.fromkeys(paths))
    names = [path.stem for path in paths]
    return [
        read_run(path, path.stem if names.count(path.stem) == 1 else str(path.with_suffix("")))
        for path in paths
    ]


def write(args: ReportSettings) -> None:
    """Writes or prints what the settings ask for. Raises UserError."""
    if args.text:
        say(report_text(find_runs(args.metrics)))
    path = expanded(args.make_reference or args.png or args.output, "another path")
    try:
        if args.make_reference:
            write_reference(find_runs(args.metrics), path)
        elif args.png:
            draw_losses(find_runs(args.metrics), path)
        elif args.text:
            return
        else:
            write_page(args)
    except OSError as reason:
        raise UserError(f"cannot write {path}: {reason.strerror}") from reason
    say(f"wrote {path}")


def main(args: ReportSettings) -> None:
    """Writes the report once, or with --watch until Ctrl-C."""
    if args.watch:
        watch(args)
    else:
        write(args)


def watch(args: ReportSettings) -> None:
    """Writes the page anew every few seconds until Ctrl-C. Waits for runs that are not there."""
    said = ""
    try:
        while True:
            try:
                write_page(args, _WATCH_SECONDS)
                now = f"writing {args.output} every {_WATCH_SECONDS:.0f} s, until Ctrl-C"
            except UserError as reason:
                now = f"waiting, since {reason}"
            if now != said:
                say(now)
            said = now
            time.sleep(_WATCH_SECONDS)
    except KeyboardInterrupt:
        write_page(args)


def write_page(args: ReportSettings, reload_seconds: float = 0) -> None:
    """Writes the page. Raises UserError."""
    path = expanded(args.output, "--output")
    try:
        write_report(find_runs(args.metrics), path, reload_seconds)
    except OSError as reason:
        raise UserError(f"cannot write {path}: {reason.strerror}") from reason


def short_flags(argv: list[str]) -> list[str]:
    """The arguments with -o written out."""
    return ["--output" if word == "-o" else word for word in argv]


if __name__ == "__main__":
    run_script(
        lambda argv: main(
            ReportSettings(**parse_flags(ReportSettings, "report.py", short_flags(argv)))
        )
    )
