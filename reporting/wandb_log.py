"""Reports to Weights & Biases; no failure of it or of the network can stop or change a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from config import Settings
from settings.wandb_mode import wandb_mode
from training.step import RunState

_START_SECONDS = 8  # how long it may take to start; with its own overhead, 10
_FINISH_SECONDS = 30  # how long uploads may take at the end


class WandB:
    """A run of Weights & Biases. Whatever it or the network does, the training goes on and its
    numbers are the same.
    """

    def __init__(
        self, args: Settings, state: RunState, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self.say, self.run = say, None
        mode = wandb_mode(args)
        if mode == "disabled":
            say("wandb: disabled; nothing is sent or kept")
            return
        modes: list[Any] = list(dict.fromkeys((mode, "offline")))
        for mode in modes:
            try:
                import wandb

                self.run = wandb.init(
                    project=args.wandb_project or os.environ.get("WANDB_PROJECT") or "rosetrainer",
                    name=args.wandb_run_name or os.environ.get("WANDB_NAME") or None,
                    id=state.wandb_run_id or None,
                    resume="allow" if state.wandb_run_id else None,
                    mode=mode,
                    config=config,
                    settings=wandb.Settings(
                        init_timeout=_START_SECONDS,
                        login_timeout=_START_SECONDS,
                        finish_timeout=_FINISH_SECONDS,
                        silent=True,
                    ),
                )
                break
            except Exception as reason:  # of many kinds; none of them is worth a run
                say(
                    f"wandb {mode} did not start: {_first_line(reason)}"
                    + ("" if mode == "offline" else "; now offline")
                )
        if self.run is not None:
            state.wandb_run_id = self.run.id
            self.run.define_metric("*", step_metric="step")
            where = os.path.dirname(self.run.dir)
            say(f"wandb: offline run in {where}" if self.run.offline else f"wandb: {self.run.url}")

    def log(self, values: dict[str, Any], state: RunState) -> None:
        """Reports values at the current step, which is the x axis."""
        self._guarded(lambda run: run.log({**values, "step": state.step}))

    def finish(self) -> None:
        """Ends the run; waits for uploads no longer than finish_timeout."""
        self._guarded(lambda run: run.finish())

    def _guarded(self, call: Callable[[Any], object]) -> None:
        if self.run is None:
            return
        try:
            call(self.run)
        except Exception as reason:
            self.run = None
            self.say(f"wandb stopped: {_first_line(reason)}; training goes on without it")


def _first_line(reason: Exception) -> str:
    return f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
