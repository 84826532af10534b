"""Reference curves: the validation loss that runs of the same command have, whatever their seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import Settings
from reporting.run_curves import RunCurves, differences
from runtime.files import expanded, write_atomically
from runtime.setting_fields import UserError

# A loss that a run of the command has with another seed is within so many standard deviations: with
# three seeds and eight evaluations the t distribution has 16 degrees of freedom, and 5 is beyond
# its 99.98th percentile.
_DEVIATIONS = 5.0
# Settings that do not decide what is learned, or that the runs of a curve have of their own.
_FREE = (
    *("seed", "data_seed", "checkpoint_path", "log_dir", "cache_dir", "threads", "device"),
    *("check_reference", "sample_tokens", "sample_prompt", "train_data", "val_data", "train_npy"),
    *("val_npy", "timeout_seconds", "batch_size", "grad_accum_steps", "checkpoint_async"),
    *("save_steps", "save_minutes", "keep_every", "log_steps", "use_profiler", "use_tensorboard"),
    *("use_wandb", "wandb_project", "wandb_run_name", "wandb_group", "wandb_tags", "wandb_mode"),
)
_LEAST = 0.002  # of the loss: other machines and versions add up in another order


@dataclass(frozen=True)
class Reference:
    """A reference curve. losses: step to the mean validation loss of some seeds, nats per token;
    tolerance: the part of it by which a run may differ; about: command, machine, data, seeds.
    """

    losses: dict[int, float] = field(default_factory=dict)
    tolerance: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    def notes(self, run: dict[str, Any]) -> list[str]:
        """Lines for the log about what is not as in the runs of the curve. run: the first record of
        this run's metrics.
        """
        known, now = self.about.get("settings", {}), run.get("settings", {})
        other = [f"{k} {v} -> {now.get(k)}" for k, v in known.items() if now.get(k, v) != v]
        if not self.losses:
            return []
        notes = [
            f"reference curve: validation losses at {len(self.losses)} steps, {min(self.losses)} "
            f"to {max(self.losses)}; {self.tolerance:.2%} above or below are allowed"
        ]
        notes += [f"not as in the reference: {', '.join(other)}"] if other else []
        ours = run.get("val", {}).get("fingerprint")
        if self.about and self.about.get("val", {}).get("fingerprint") != ours:
            notes.append("the reference was validated on other data: losses may differ for that")
        return notes

    def distance(self, step: int, loss: float) -> float:
        """By how many nats a loss differs from the curve beyond the tolerance; 0.0 if it does not,
        or if the curve has no such step; inf for a loss that is not finite.
        """
        if step not in self.losses:
            return 0.0
        mean = self.losses[step]
        beyond = abs(loss - mean) - self.tolerance * mean
        return max(0.0, beyond) if math.isfinite(beyond) else math.inf

    def told(self, step: int, loss: float) -> str:
        """A line about a loss that leaves the curve, else ""."""
        if not self.distance(step, loss):
            return ""
        mean = self.losses[step]
        return (
            f"step {step}: validation loss {loss:.4f}, where the reference curve has {mean:.4f} +- "
            f"{self.tolerance * mean:.4f}: {self.distance(step, loss):.4f} too far"
        )

    def verdict(self, run: RunCurves) -> tuple[bool, str]:
        """Whether all evaluations of a run follow the curve, and a line that says so."""
        found = {
            int(step or 0): math.nan if loss is None else loss
            for step, loss in zip(run.evals["step"], run.evals["val_loss"], strict=True)
        }
        common = [step for step in found if step in self.losses]
        if not common:
            return False, "no evaluation was at a step of the reference curve"
        left = [step for step in common if self.distance(step, found[step])]
        worst = max(abs(found[s] / self.losses[s] - 1) for s in common)
        if not left:
            return True, (
                f"followed the reference curve at {len(common)} of its {len(self.losses)} steps: "
                f"within {worst:.2%}, where {self.tolerance:.2%} are allowed"
            )
        return False, (
            f"left the reference curve at {len(left)} of the {len(common)} steps where both have a "
            f"loss; {self.told(left[0], found[left[0]])}"
        )


def read_reference(name: str, args: Settings) -> Reference:
    """The reference curve of a file; one without losses if `name` is empty. Raises UserError if it
    cannot be read, or if the run is never evaluated at one of its steps.
    """
    if not name:
        return Reference()
    path = expanded(name, "--check-reference")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        losses = {int(step): float(loss) for step, loss in stored["val_loss"].items()}
        reference = Reference(losses, float(stored["tolerance"]), dict(stored["about"]))
    except OSError as reason:
        raise UserError(f"cannot read {path}: {reason.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is no reference curve; report.py --make-reference writes one"
        ) from None
    last = args.num_steps  # evaluated in any case
    if not any((0 < s < last and s % args.eval_steps == 0) or s == last for s in losses):
        some = ", ".join(str(s) for s in sorted(losses)[:4]) + (", ..." if len(losses) > 4 else "")
        raise UserError(
            f"{path} has losses at steps {some}, and this run is evaluated at none of its "
            "steps; give another --eval-steps"
        )
    return reference


def make_reference(runs: Sequence[RunCurves]) -> dict[str, Any]:
    """The reference curve of runs that differ in nothing but their seeds, as it is stored. Raises
    UserError if there are fewer than three, or if other settings differ.
    """
    if len(runs) < 3:
        raise UserError(f"a reference curve needs three runs with other seeds; {len(runs)} given")
    other = [name for name in differences(runs) if name not in _FREE]
    if other:
        raise UserError(f"the runs of a reference curve differ in {', '.join(other)}, too")
    curves = [
        {int(s or 0): x for s, x in zip(r.evals["step"], r.evals["val_loss"], strict=True)}
        for r in runs
    ]
    losses, spreads = {}, []
    for step in sorted(set.intersection(*(set(c) for c in curves)) - {0}):
        values = [c[step] for c in curves]
        finite = [x for x in values if x is not None]
        if len(finite) < len(values):
            raise UserError(f"step {step}: a loss is not finite")
        losses[str(step)] = statistics.fmean(finite)
        spreads.append(statistics.variance(finite) / losses[str(step)] ** 2)
    if not losses:
        raise UserError("the runs of a reference curve have no evaluation at a common step")
    deviation = math.sqrt(statistics.fmean(spreads))
    first = runs[0]
    about = {
        "seeds": [run.settings.get("seed") for run in runs],
        "relative_deviation": deviation,
        "settings": {k: v for k, v in first.settings.items() if k not in _FREE},
        "environment": first.about.get("environment", {}),
        "val": {k: v for k, v in first.about.get("val", {}).items() if k != "source"},
    }
    tolerance = max(_LEAST, _DEVIATIONS * deviation)
    return {"val_loss": losses, "tolerance": tolerance, "about": about}


def write_reference(runs: Sequence[RunCurves], path: Path) -> None:
    """Writes the reference curve of the runs. Raises OSError, and UserError as `make_reference`."""
    write_atomically(path, (json.dumps(make_reference(runs), indent=1) + "\n").encode())
