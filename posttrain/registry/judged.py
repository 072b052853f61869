"""What a gate said of one very model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from posttrain.evaluate.results import Verdict
from posttrain.lineage import Graph
from posttrain.recipe.gate import CANDIDATE
from posttrain.store import Artifact


@dataclass(frozen=True)
class Judged:
    """A gate's verdict on a model, and the numbers it is about."""

    verdict: Verdict
    """Of several candidates: this one's own."""
    gate: Artifact
    """The verdict in the store."""
    evaluation: Artifact
    """Of the model."""

    @property
    def passed(self) -> bool:
        """Whether the model may take an alias."""
        return self.verdict.verdict == "pass"


def judged_by(graph: Graph, model: Artifact) -> Judged | None:
    """The verdict on a model: of the latest run that has one, else the latest in the store."""
    found = {judged.gate.fingerprint: judged for judged in _judgements(graph, model)}
    for run in reversed(graph.runs):
        # The last gate of the run: a dict keeps the order of its steps.
        for fingerprint in reversed(run.artifacts.values()):
            if fingerprint in found:
                return found[fingerprint]
    return max(found.values(), key=lambda judged: judged.gate.manifest.created, default=None)


def judgement(graph: Graph, gate: Artifact, model: Artifact) -> Judged | None:
    """What a verdict in the store says of a model, or None where it is about others."""
    found = (one for one in _judgements(graph, model) if one.gate.fingerprint == gate.fingerprint)
    return next(found, None)


def _judgements(graph: Graph, model: Artifact) -> Iterator[Judged]:
    for name, evaluation in graph.users(model):
        if (name, evaluation.kind) != ("model", "evaluation"):
            continue
        for candidate, gate in graph.users(evaluation):
            if gate.kind != "verdict":
                continue
            if candidate == "candidate":
                yield Judged(Verdict.load(gate.path), gate, evaluation)
            elif candidate.startswith(CANDIDATE):
                of_all = Verdict.load(gate.path).candidates
                yield Judged(of_all[candidate.removeprefix(CANDIDATE)], gate, evaluation)
