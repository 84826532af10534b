"""Runs a script: exit codes, and one line instead of a traceback for a mistake of the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from runtime.console import accept_any_text, open_closed_streams, visible
from runtime.setting_fields import UserError

_NO_MEMORY = ("out of memory", "can't allocate memory")  # parts of torch's error messages


def _rank_prefix() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def run_script(
    body: Callable[[list[str]], int | None],
    is_first_reporter: Callable[[str], bool] = lambda text: True,
) -> None:
    """Calls body with the command-line arguments and exits with the code that it returns; None is
    0. UserError and lack of memory end the script with one line on standard error and exit code 2.
    is_first_reporter(line): whether no other rank has printed this line.
    """
    open_closed_streams()
    accept_any_text()
    try:
        code = body(sys.argv[1:])
    except UserError as mistake:
        if is_first_reporter(str(mistake)):
            rank = "" if mistake.of_all else _rank_prefix()
            print(f"{rank}error: {visible(str(mistake))}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (RuntimeError, MemoryError) as reason:
        if not (isinstance(reason, MemoryError) or any(x in str(reason) for x in _NO_MEMORY)):
            raise
        print(
            f"{_rank_prefix()}error: out of memory; lower --batch-size, with which a trainer keeps "
            "its global batch. It chooses itself with --micro-batch auto, and needs less with "
            "--use-activation-checkpoint",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has closed it, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if code:
        sys.exit(code)
