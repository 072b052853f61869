"""What a version carries: where its weights are, what made them, what the gate said."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.evaluate.results import Verdict
from posttrain.lineage import Graph
from posttrain.lineage.graph import SHORT, label
from posttrain.registry.judged import Judged
from posttrain.registry.ways import way_to
from posttrain.store import Artifact
from posttrain.tracking import PREFIX, mlflow_name

FINGERPRINT = f"{PREFIX}fingerprint"
DIGEST = f"{PREFIX}digest"
PATH = f"{PREFIX}path"
RECIPE = f"{PREFIX}recipe"
VERDICT = f"{PREFIX}verdict"
GATE = f"{PREFIX}verdict_fingerprint"
AGAINST = f"{PREFIX}compared_with"
METRIC = f"{PREFIX}metric."
DIFFERENCE = f"{PREFIX}difference."
OVERRIDE = f"{PREFIX}override"

NOT_JUDGED = "not judged"
"""In place of a verdict, where no gate has judged the model."""


@dataclass(frozen=True)
class Entry:
    """A model that is to be registered, and all that is known of it."""

    model: Artifact
    way: tuple[Artifact, ...]
    """What it was made from, first to last, itself included; datasets left out."""
    judged: Judged | None

    @classmethod
    def of(cls, graph: Graph, model: Artifact, judged: Judged | None) -> Entry:
        """Look up a model's history in the store."""
        way = tuple(one for one in way_to(graph, model) if one.kind != "dataset")
        return cls(model, way, judged)

    @property
    def verdict(self) -> str:
        """`pass`, `fail`, `not enough evidence` or `not judged`."""
        return self.judged.verdict.verdict if self.judged else NOT_JUDGED

    @property
    def passed(self) -> bool:
        """Whether it may take an alias."""
        return self.judged is not None and self.judged.passed

    def tags(self) -> dict[str, str]:
        """Of the version, in MLflow."""
        manifest = self.model.manifest
        tags = {
            FINGERPRINT: self.model.fingerprint,
            DIGEST: self.model.digest,
            PATH: str(self.model.path),
            RECIPE: manifest.recipe,
            f"{PREFIX}stage": manifest.name,
            f"{PREFIX}lineage": self._lineage(),
            VERDICT: self.verdict,
        }
        if self.judged is None:
            return tags
        tags[GATE] = self.judged.gate.fingerprint
        numbers = self.judged.evaluation.manifest.metrics
        tags |= {mlflow_name(METRIC + name): f"{value:.4g}" for name, value in numbers.items()}
        verdict = self.judged.verdict
        for check in verdict.checks:
            bounds = f"[{check.low:+.3f}, {check.high:+.3f}]"
            tags[mlflow_name(DIFFERENCE + check.task)] = f"{check.difference:+.3f} {bounds}"
        if verdict.champion is not None:
            tags[AGAINST] = verdict.champion.opponent
        return tags

    def description(self) -> str:
        """Markdown for the version's page in MLflow, which does not draw Mermaid."""
        manifest = self.model.manifest
        lines = [f"**Gate: {self.verdict}.** {_headline(self.judged)}".rstrip(), ""]
        if self.judged is not None:
            lines += [f"- {reason}" for reason in _reasons(self.judged.verdict)] + [""]
        lines += [
            f"Made by the recipe `{manifest.recipe}`: {self._lineage()}.",
            "",
            f"Rows behind it: `posttrain lineage rows {self.model.fingerprint[:SHORT]}`. "
            f"Model card: `posttrain registry card {self.model.fingerprint[:SHORT]}`.",
        ]
        return "\n".join(lines)

    def _lineage(self) -> str:
        return " > ".join(f"{label(one)} {one.fingerprint[:SHORT]}" for one in self.way)


def _headline(judged: Judged | None) -> str:
    return judged.evaluation.manifest.headline if judged else "Nobody measured it in this store."


def _reasons(verdict: Verdict) -> tuple[str, ...]:
    if verdict.champion is None:
        return verdict.reasons
    against = [f"{verdict.champion.opponent}: {text}" for text in verdict.champion.reasons]
    return (*verdict.reasons, *(text for text in against if text not in verdict.reasons))
