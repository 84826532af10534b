"""Shows and compares runs: `python report.py logs/a.jsonl logs/b.jsonl`, their metrics files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reporting.plots import draw_losses
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
    watch: bool = flag(
        False, "write the page anew every few seconds, until Ctrl-C; it reloads itself"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.watch and (self.png or self.text):
            raise UserError("--watch is about the page; leave out --png and --text")


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


def write(args: ReportSettings, reload_seconds: float = 0) -> None:
    """Writes or prints what the settings ask for. Raises UserError."""
    runs = find_runs(args.metrics)
    if args.text:
        say(report_text(runs))
    path = expanded(args.png or args.output, "--png" if args.png else "--output")
    try:
        if args.png:
            draw_losses(runs, path)
        elif not args.text:
            write_report(runs, path, reload_seconds)
    except OSError as reason:
        raise UserError(f"cannot write {path}: {reason.strerror}") from reason
    if args.png or not args.text:
        say(f"wrote {path}")


def main(args: ReportSettings) -> None:
    """Writes the report once, or with --watch until Ctrl-C."""
    write(args, _WATCH_SECONDS if args.watch else 0)
    path = expanded(args.output, "--output")
    try:
        while args.watch:
            time.sleep(_WATCH_SECONDS)
            write_report(find_runs(args.metrics), path, _WATCH_SECONDS)
    except KeyboardInterrupt:
        write_report(find_runs(args.metrics), path)


def short_flags(argv: list[str]) -> list[str]:
    """The arguments with -o written out."""
    return ["--output" if word == "-o" else word for word in argv]


if __name__ == "__main__":
    run_script(
        lambda argv: main(
            ReportSettings(**parse_flags(ReportSettings, "report.py", short_flags(argv)))
        )
    )
