"""A sweep against the gate: the largest improvement among the values whose gate passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from posttrain.errors import PosttrainError, UsageError
from posttrain.evaluate.results import Check, Outcome, Verdict
from posttrain.pipeline import Pipeline
from posttrain.store import Artifact

IMPROVEMENT = "improvement"
"""What a sweep by the gate itself goes by: no metric of the stage but read from its verdict."""


class NothingPasses(PosttrainError):
    """Every trial came to its end, and none passes the gate."""

    exit_code: ClassVar[int] = 3


@dataclass(frozen=True)
class Improvement:
    """By how much a candidate is better than what the gate compares it with."""

    value: float
    what: str
    """What is counted, in words."""


@dataclass(frozen=True)
class Measured:
    """What a trial's artifacts say."""

    value: float
    verdict: Outcome | None
    """Of the gate that the trial has to pass; None without one."""
    what: str
    """What `value` is, in words; empty for a stage's own metric."""


def gate_on(pipeline: Pipeline, step: str) -> str | None:
    """The last gate that decides on a step's numbers, if there is one.

    It knows what was trained as well, for its report's curves, and does not decide on that.
    """
    if pipeline.step(step).stage not in ("evaluate", "judge"):
        return None
    gates = [one.name for one in pipeline.steps if one.stage == "gate" and step in one.waits_for()]
    return gates[-1] if gates else None


def last_gate(pipeline: Pipeline) -> str | None:
    """The last gate of a recipe, if it has one."""
    gates = [one.name for one in pipeline.steps if one.stage == "gate"]
    return gates[-1] if gates else None


def measure(
    step: str, metric: str, gate: str | None, artifacts: Mapping[str, Artifact]
) -> Measured:
    """A trial's objective and what its gate says.

    Args:
        step: Whose metric decides.
        metric: `improvement` of a gate, or a metric of the step's artifact.
        gate: The gate that has to be passed, or None.
        artifacts: The trial's, by step.

    Raises:
        UsageError: the step has no such metric.
        DataError: the gate left no verdict that can be read.
    """
    verdict = Verdict.load(artifacts[gate].path) if gate else None
    outcome = verdict.verdict if verdict else None
    if verdict is not None and step == gate and metric == IMPROVEMENT:
        found = improvement(verdict)
        return Measured(found.value, outcome, found.what)
    metrics = artifacts[step].manifest.metrics
    if metric not in metrics:
        known = ", ".join(metrics) or "none"
        raise UsageError(f"--metric {step}.{metric}: `{step}` has no such metric; it has: {known}")
    return Measured(metrics[metric], outcome, "")


def improvement(verdict: Verdict) -> Improvement:
    """What a verdict says was gained: the first of these that it has.

    The mean gain on what had to improve; held-out perplexity; the share of prompts won; the mean
    difference over all benchmarks.

    Raises:
        UsageError: the verdict compares nothing.
    """
    wanted = [check for check in verdict.checks if check.requirement == "must_improve"]
    if wanted:
        return _mean_gain(wanted)
    if verdict.perplexity is not None:
        check = verdict.perplexity
        return Improvement(check.difference, f"nats a {check.unit} saved on held-out rows")
    if verdict.win_rate is not None and verdict.win_rate.win_rate is not None:
        won = verdict.win_rate
        return Improvement(won.win_rate or 0.0, f"share of prompts won against {won.opponent}")
    if not verdict.checks:
        raise UsageError("--metric: the gate compares nothing that could improve")
    return _mean_gain(verdict.checks)


def _mean_gain(checks: Sequence[Check]) -> Improvement:
    names = ", ".join(check.task for check in checks)
    value = math.fsum(check.difference for check in checks) / len(checks)
    return Improvement(value, f"mean gain on {names}")
