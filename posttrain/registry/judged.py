"""What a gate said of one very model."""

from __future__ import annotations

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
    found: dict[str, Judged] = {}
    for gate in graph.artifacts.values():
        judged = judgement(graph, gate, model) if gate.kind == "verdict" else None
        if judged is not None:
            found[gate.fingerprint] = judged
    for run in reversed(graph.runs):
        # The last gate of the run: a dict keeps the order of its steps.
        for fingerprint in reversed(run.artifacts.values()):
            if fingerprint in found:
                return found[fingerprint]
    return list(found.values())[-1] if found else None


def judgement(graph: Graph, gate: Artifact, model: Artifact) -> Judged | None:
    """What a verdict in the store says of a model, or None where it is about others."""
    for name, evaluation in graph.inputs(gate):
        if name != "candidate" and not name.startswith(CANDIDATE):
            continue
        of = evaluation.manifest.inputs.get("model")
        if of is None or (of.kind, of.digest) != (model.kind, model.digest):
            continue
        verdict = Verdict.load(gate.path)
        if name != "candidate":
            verdict = verdict.candidates[name.removeprefix(CANDIDATE)]
        return Judged(verdict, gate, evaluation)
    return None
