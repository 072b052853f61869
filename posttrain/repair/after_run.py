"""What a person is told to do next, right after a gate said no."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.evaluate.results import Verdict
from posttrain.pipeline import Pipeline
from posttrain.repair.propose import hints, propose
from posttrain.store import Artifact


def next_steps(pipeline: Pipeline, artifacts: Mapping[str, Artifact], file: str) -> list[str]:
    """A few lines on what `posttrain repair` would do; empty where every gate passed.

    Args:
        pipeline: What was run.
        artifacts: By step, as far as the run came.
        file: The recipe's.
    """
    for step in pipeline.steps:
        if step.kind == "verdict" and step.name in artifacts:
            verdict = Verdict.load(artifacts[step.name].path)
            if verdict.verdict != "pass":
                return hints(propose(verdict, pipeline.recipe, gate=step.name), file)
    return []
