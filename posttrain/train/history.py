"""What a training run's losses were, step by step: the part of a trainer's log that is exact."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    step: int
    loss: float
    """Nats a trained token, over the rows of the step."""
    learning_rate: float
    grad_norm: float
    """Before it was scaled down."""
    tokens: int
    """Tokens read, padding not counted."""
    trained_tokens: int
    values: Mapping[str, float] = field(default_factory=dict)
    """What else the method says of the step, by its own names."""


@dataclass(frozen=True)
class HeldOut:
    """One evaluation; step 0 is before training."""

    step: int
    loss: float
    """Nats a trained token, over all held-out rows used."""
    tasks: Mapping[str, float] = field(default_factory=dict)
    """The same for each dataset of a mix, by its name."""
    values: Mapping[str, float] = field(default_factory=dict)
    """What else the method says of the held-out rows, by its own names."""


_OF_A_STEP = {"loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "step"}
_OF_THE_MACHINE = {"epoch", "num_tokens", "runtime", "samples_per_second", "steps_per_second"}
"""Numbers that a resumed run or a faster machine would change, or that say nothing."""


def method_values(entry: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """The method's own numbers in an entry of a trainer's log, without the prefix `eval_`."""
    values = {}
    # A checkpoint's log has its keys in order, and so has that of a run which was resumed.
    for key, value in sorted(entry.items()):
        name = key.removeprefix(prefix)
        usual = name in _OF_A_STEP | _OF_THE_MACHINE or name.startswith("loss/")
        if usual or not key.startswith(prefix) or not isinstance(value, int | float):
            continue
        if math.isfinite(value):
            values[name] = float(value)
    return values


def task_losses(entry: Mapping[str, float]) -> dict[str, float]:
    """The held-out losses by task among the numbers of an evaluation."""
    begin = "eval_loss/"
    return {key.removeprefix(begin): entry[key] for key in entry if key.startswith(begin)}


@dataclass(frozen=True)
class History:
    """A whole run, resumed or not."""

    steps: tuple[Step, ...]
    held_out: tuple[HeldOut, ...]

    @classmethod
    def from_log(cls, log: Sequence[Mapping[str, float]]) -> History:
        """Read the log that transformers keeps in its trainer state and in every checkpoint."""
        steps = [
            Step(
                step=int(entry["step"]),
                loss=entry["loss"],
                learning_rate=entry["learning_rate"],
                grad_norm=entry["grad_norm"],
                tokens=int(entry["tokens"]),
                trained_tokens=int(entry["trained_tokens"]),
                values=method_values(entry),
            )
            for entry in log
            if "loss" in entry
        ]
        held_out = [
            HeldOut(
                step=int(entry["step"]),
                loss=entry["eval_loss"],
                tasks=task_losses(entry),
                values=method_values(entry, "eval_"),
            )
            for entry in log
            if "eval_loss" in entry
        ]
        return cls(tuple(steps), tuple(held_out))

    @classmethod
    def read(cls, folder: Path) -> History:
        """Read `training.json` of a trained artifact."""
        record = json.loads((folder / "training.json").read_bytes())
        return cls(
            steps=tuple(Step(**step) for step in record["steps"]),
            held_out=tuple(HeldOut(**evaluation) for evaluation in record["held_out"]),
        )

    @property
    def before(self) -> float:
        """Held-out loss before the first step."""
        return self.held_out[0].loss

    @property
    def best(self) -> HeldOut:
        """The evaluation after training began with the lowest loss, the earliest among equals."""
        return min(self.held_out[1:], key=lambda evaluation: evaluation.loss)

    @property
    def tokens(self) -> int:
        """Tokens read in the whole run."""
        return sum(step.tokens for step in self.steps)

    @property
    def trained_tokens(self) -> int:
        """Tokens that added to the loss in the whole run."""
        return sum(step.trained_tokens for step in self.steps)

    @property
    def train_loss(self) -> float:
        """Loss over the last tenth of the steps, weighted by trained tokens."""
        last = self.steps[-max(1, len(self.steps) // 10) :]
        tokens = sum(step.trained_tokens for step in last)
        return sum(step.loss * step.trained_tokens for step in last) / tokens


def loss_markdown(folder: Path) -> str:
    """The held-out losses of a trained artifact as a table, and where its plot is."""
    history = History.read(folder)
    tasks = list(history.held_out[0].tasks)
    lines = [
        "| step | held-out loss |" + "".join(f" {task} |" for task in tasks),
        "|---:|---:|" + "---:|" * len(tasks),
    ]
    for evaluation in history.held_out:
        kept = " (kept)" if evaluation.step == history.best.step else ""
        cells = "".join(f" {evaluation.tasks[task]:.4f} |" for task in tasks)
        lines.append(f"| {evaluation.step}{kept} | {evaluation.loss:.4f} |{cells}")
    return "\n".join(lines) + f"\n\nThe plot: `{folder / 'loss.html'}`"
