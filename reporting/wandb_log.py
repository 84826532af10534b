"""Reports to Weights & Biases; no failure of it or of the network can stop or change a run."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from config import Settings
from settings.wandb_mode import wandb_mode
from training.step import RunState

_START_SECONDS = 8  # how long it may take to start; with its own overhead, 10
_FINISH_SECONDS = 30  # how long uploads may take at the end


class WandB:
    """A run of Weights & Biases. Whatever it or the network does, the training goes on and its
    numbers are the same.

    All values of one step become one row, whose number is the step. Of a resumed run, rows that the
    server has are not sent again: the steps that such a run computes again are there once.
    """

    def __init__(
        self, args: Settings, state: RunState, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        """Starts the run, or goes on with that of state.wandb_run_id; sets that. config: what the
        server shows about the run. say: logs a line. Raises UserError for a bad WANDB_MODE.
        """
        self.say = say
        self.run = _start(
            args,
            state.wandb_run_id,
            say,
            name=args.wandb_run_name or os.environ.get("WANDB_NAME") or None,
            group=args.wandb_group or None,  # none: the client reads WANDB_RUN_GROUP
            tags=list(args.wandb_tags) or None,  # likewise WANDB_TAGS
            config=config,
        )
        self.first = 0  # the first step to report
        if self.run is not None:
            resumed, state.wandb_run_id = bool(state.wandb_run_id), self.run.id
            if resumed:  # offline it is not known what an earlier process could still write
                self.first = state.step + 1 if self.run.offline else self.run.starting_step
            self._guarded(lambda run: run.define_metric("*", step_metric="step"))

    def log(self, values: dict[str, float], step: int) -> None:
        """Reports values of a step. They are sent when values of a later step come."""
        self._send(lambda _: values, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Reports a text, such as a sample, of a step."""
        page = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'

        self._send(lambda wandb: {name: wandb.Html(page, inject=False)}, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Uploads a PNG as of a step."""

        self._send(lambda wandb: {name: wandb.Image(str(path))}, step)

    def finish(self) -> None:
        """Ends the run; waits for uploads no longer than _FINISH_SECONDS."""
        run, self.run = self.run, None
        if run is not None:
            _finish(run, self.say)

    def _send(self, make: Callable[[Any], dict[str, Any]], step: int) -> None:
        """Reports what make(wandb) returns, unless the step is one that the server has."""

        def send(run: Any) -> None:
            import wandb

            run.log({**make(wandb), "step": step}, step=step)

        if step >= self.first:
            self._guarded(send)

    def _guarded(self, call: Callable[[Any], object]) -> None:
        if self.run is None:
            return
        try:
            call(self.run)
        except Exception as reason:
            self.run = None
            self.say(f"wandb stopped: {_first_line(reason)}; training goes on without it")


def log_evaluations(
    args: Settings,
    wandb_run_id: str,
    results: Sequence[tuple[int, dict[str, float | None]]],
    say: Callable[[str], None],
) -> None:
    """Adds evaluations of a run's checkpoints to its run of Weights & Biases, as eval/loss and so
    on over eval/step. It never raises, and takes no longer than a start and an end of a run may.

    args: the settings in the checkpoints, with their project and mode. wandb_run_id: in them; "" if
    there is none, which is said. results: updates finished, and the values by their names; None =
    not known. say: prints a line.
    """
    if not wandb_run_id:
        say("wandb: the checkpoint belongs to no run of Weights & Biases; nothing is sent")
        return
    run = None
    try:
        run = _start(args, wandb_run_id, say)
        if run is None:
            return
        run.define_metric("eval/*", step_metric="eval/step")
        for step, found in results:
            values = {**found, "step": step}
            # Without step=: the next row after those that the run has; the client ignores others.
            run.log({f"eval/{name}": value for name, value in values.items() if value is not None})
    except Exception as reason:
        say(f"wandb: the evaluations were not sent: {_first_line(reason)}")
    if run is not None:
        _finish(run, say)


def _start(args: Settings, run_id: str, say: Callable[[str], None], **options: Any) -> Any:
    """Starts a run of the client, offline if it can't be online; None if it can't be at all, or is
    disabled. Says what became of it. run_id: of the run to go on with, "" for a new one. options:
    more of wandb.init's. Raises UserError for a bad WANDB_MODE.
    """
    mode = wandb_mode(args)
    if mode == "disabled":
        say("wandb: disabled; nothing is sent or kept")
        return None
    run, modes = None, [mode, "offline"] if mode == "online" else [mode]
    for mode in modes:
        try:
            import wandb

            run = wandb.init(
                project=args.wandb_project or os.environ.get("WANDB_PROJECT") or "rosetrainer",
                id=run_id or None,
                resume="allow" if run_id else None,
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(**_client_settings(wandb.Settings.model_fields)),
                **options,
            )
            where = os.path.dirname(run.dir)
            say(f"wandb: offline run in {where}" if run.offline else f"wandb: {run.url}")
            break
        except Exception as reason:  # of many kinds; none of them is worth a run
            say(
                f"wandb {mode} did not start: {_first_line(reason)}"
                + ("" if mode == "offline" else "; now offline")
            )
    return run


def _client_settings(known: Container[str]) -> dict[str, Any]:
    """The settings of the client, of those that it knows: the last ones are newer than others."""
    wanted: dict[str, Any] = {
        "init_timeout": _START_SECONDS,
        "login_timeout": _START_SECONDS,
        "silent": True,
        "finish_timeout": _FINISH_SECONDS,
        "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": 1.0,  # seconds that a kill may cost an offline run: 15
    }
    return {name: value for name, value in wanted.items() if name in known}


def _finish(run: Any, say: Callable[[str], None]) -> None:
    try:
        run.finish()
    except Exception as reason:
        say(
            f"wandb: not all was sent: {_first_line(reason)}; `wandb sync` sends what is in "
            f"{os.path.dirname(run.dir)}"
        )


def _first_line(reason: Exception) -> str:
    return f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
