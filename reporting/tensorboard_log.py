"""Writes for TensorBoard what Weights & Biases gets, under the same names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.step import RunState


class TensorBoard:
    """The event files of one run, in a folder of its own. If they can't be written, as on a full
    disk, a line says so, and the run goes on without them.

    A resumed run goes on in its folder: TensorBoard then leaves out what lies there beyond the
    step of the checkpoint.
    """

    def __init__(
        self, base: Path, state: RunState, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        """Opens the folder base_tensorboard/ID, where ID is that of the run. config: what is shown
        about the run. say: logs a line.
        """
        self.say = say
        self.writer: Any = None
        folder = Path(f"{base}_tensorboard") / state.run_id
        self.first = state.step + 1 if folder.exists() else 0  # the first step to write

        def start() -> None:
            from torch.utils.tensorboard import SummaryWriter  # here: an optional package

            # A new run has a purge_step too: TensorBoard takes the first one that it finds for the
            # beginning of the run, and leaves out points only at the ones after it.
            self.writer = SummaryWriter(folder, purge_step=self.first)

        self._guarded(start)
        self.text("run", json.dumps(config, indent=2), self.first)
        if self.writer is not None:
            say(f"tensorboard: tensorboard --logdir {folder.parent}")

    def log(self, values: dict[str, float], step: int) -> None:
        """Writes values of a step; they are in the file when this returns."""
        self._add(lambda writer: [writer.add_scalar(k, v, step) for k, v in values.items()], step)

    def text(self, name: str, text: str, step: int) -> None:
        """Writes a text, such as a sample, of a step."""
        as_it_is = "".join(f"    {line}\n" for line in text.split("\n"))  # Markdown's code block
        self._add(lambda writer: writer.add_text(name, as_it_is, step), step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Writes a PNG as of a step."""

        def add(writer: Any) -> None:
            from matplotlib.image import imread

            writer.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

        self._add(add, step)

    def finish(self) -> None:
        """Closes the file."""
        if self.writer is not None:
            self._guarded(self.writer.close)

    def _add(self, add: Callable[[Any], object], step: int) -> None:
        if self.writer is not None and step >= self.first:
            writer = self.writer
            self._guarded(lambda: add(writer) or writer.flush())

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as reason:
            self.writer = None
            self.say(f"tensorboard stopped: {reason}; training goes on without it")
