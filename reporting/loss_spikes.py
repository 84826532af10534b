"""Finds losses far above those before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

_SPIKE_RECORDS = 20
_SPIKE_SIGMAS = 5.0


class SpikeDetector:
    """Finds losses far above those of the records before.

    known: the losses of a resumed run so far; None stands for one that was not finite.
    """

    def __init__(self, known: Iterable[float | None] = ()) -> None:
        finite = (x for x in known if x is not None)
        self.losses = deque[float](finite, maxlen=_SPIKE_RECORDS)

    def found(self, loss: float) -> str:
        """Returns what a loss is compared with if it is a spike, else "". Later losses are then
        compared with this one too, unless it is not finite.
        """
        text = ""
        if len(self.losses) == _SPIKE_RECORDS:
            usual = statistics.fmean(self.losses)
            spread = max(statistics.pstdev(self.losses), usual / 100)
            if not loss <= usual + _SPIKE_SIGMAS * spread:
                text = (
                    f"{loss:.4f} where the last {_SPIKE_RECORDS} records had {usual:.4f} +- "
                    f"{spread:.4f}"
                )
        if math.isfinite(loss):
            self.losses.append(loss)
        return text
