"""What the manifests in a store say of a model, in the order in which a card tells it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.data.prepared import Counts
from posttrain.evaluate.results import EvaluationResults
from posttrain.lineage import Graph
from posttrain.lineage.graph import WEIGHTS, name_of
from posttrain.plan import flatten
from posttrain.recipe import STAGES, DatasetSpec, TrainingConfig
from posttrain.registry.judged import Judged
from posttrain.registry.ways import way_to
from posttrain.store import Artifact
from posttrain.store.store import STAGE_FOLDER

NOT_STATED = "not stated"

_WEIGHT_INPUTS = ("model", "weights")
_HUB_SOURCE = "hub:"
_SECRET = re.compile(r"(^|[._])(token|secret|password|key|credentials?)$")


@dataclass(frozen=True)
class Dataset:
    """Rows that got into the model."""

    name: str
    source: str
    license: str
    counts: Counts | None
    """What became of its rows."""
    languages: tuple[str, ...]
    """Codes of the languages that were kept; empty where nobody looked."""


@dataclass(frozen=True)
class Facts:
    """All that a card is written from."""

    model: Artifact
    bases: tuple[str, ...]
    """Where the weights began: a Hub id with its commit, or the name of a file or folder."""
    steps: tuple[Artifact, ...]
    """All that got into the model, each after what it was made from."""
    datasets: tuple[Dataset, ...]
    judged: Judged | None
    results: EvaluationResults | None
    """Of the model; the judged ones, else the latest in the store."""
    chats: bool
    """Whether its tokenizer has a chat template."""

    @classmethod
    def collect(
        cls, graph: Graph, model: Artifact, judged: Judged | None, licenses: Mapping[str, str]
    ) -> Facts:
        """Read the store."""
        steps = way_to(graph, model)
        evaluation = judged.evaluation if judged else _latest_evaluation(graph, model)
        return cls(
            model=model,
            bases=tuple(dict.fromkeys(base for step in steps for base in _bases(step))),
            steps=steps,
            datasets=tuple(_dataset(one, licenses) for one in steps if _is_prepared(one)),
            judged=judged,
            results=EvaluationResults.load(evaluation.path) if evaluation else None,
            chats=(model.path / "chat_template.jinja").exists(),
        )

    @property
    def trainings(self) -> tuple[Artifact, ...]:
        """The stages that changed weights, first to last."""
        return tuple(
            one for one in self.steps if one.kind in WEIGHTS and one.manifest.stage != "convert"
        )

    @property
    def hub_bases(self) -> tuple[str, ...]:
        """Those of the bases that are on the Hub, without their commits."""
        return tuple(base.partition("@")[0] for base in self.bases if "/" in base)

    @property
    def hub_datasets(self) -> tuple[str, ...]:
        """The datasets that are on the Hub."""
        parts = [part for one in self.datasets for part in one.source.split(", ")]
        found = [part.removeprefix(_HUB_SOURCE) for part in parts if part.startswith(_HUB_SOURCE)]
        return tuple(dict.fromkeys(found))


def settings_of(step: Artifact) -> dict[str, Any]:
    """A stage's settings that were set, flat, without secrets and without paths of the machine.

    The learning rate is there also where the recipe left it to the default.
    """
    manifest = step.manifest
    if manifest.stage == "merge" and not manifest.config.get("method"):
        return {}  # folding an adapter has nothing to set
    found = {}
    for key, value in flatten(manifest.config).items():
        if key == "optimization.learning_rate" and value is None:
            value = _default_rate(step)
        if key == "stage" or value is None or value in ([], {}, ()) or _SECRET.search(key):
            continue
        found[key] = _public(value)
    return found


def _default_rate(step: Artifact) -> float | None:
    try:
        config = STAGES[step.manifest.stage].model_validate(step.manifest.config)
    except (KeyError, ValidationError):  # of another version of posttrain
        return None
    return config.learning_rate if isinstance(config, TrainingConfig) else None


def public_source(source: str) -> str:
    """Where something came from, as it may be published: of an absolute path the name alone."""
    parts = []
    for part in source.split(", "):
        of_this_machine = part.startswith("~") or Path(part).is_absolute()
        parts.append(Path(part).name if of_this_machine else part)
    return ", ".join(parts)


def _public(value: Any) -> Any:
    if isinstance(value, str):
        return public_source(value)
    if isinstance(value, list):
        return [_public(item) for item in value]
    return {key: _public(item) for key, item in value.items()} if isinstance(value, dict) else value


def _bases(step: Artifact) -> Iterator[str]:
    """Weights among a stage's inputs that posttrain did not make."""
    for name, record in sorted(step.manifest.inputs.items()):
        if name.partition(":")[0] in _WEIGHT_INPUTS and record.source and not record.fingerprint:
            yield public_source(record.source)


def _is_prepared(step: Artifact) -> bool:
    return step.kind == "dataset" and "rows" in step.manifest.inputs


def _dataset(prepared: Artifact, licenses: Mapping[str, str]) -> Dataset:
    manifest = prepared.manifest
    name, spec, counts = name_of(prepared), _spec(prepared), _counts(prepared)
    source = public_source(manifest.inputs["rows"].source or "unknown")
    language = manifest.config.get("language") or {}
    return Dataset(
        name=name,
        source=f"{source}@{spec.revision}" if spec and spec.revision else source,
        license=licenses.get(name) or (spec and spec.license) or NOT_STATED,
        counts=counts,
        languages=tuple(language.get("keep", ())),
    )


def _counts(prepared: Artifact) -> Counts | None:
    try:
        return Counts.model_validate(prepared.manifest.details)
    except ValidationError:
        return None


def _spec(prepared: Artifact) -> DatasetSpec | None:
    """The dataset as the recipe had it, from the job that prepared it."""
    try:
        job = json.loads((prepared.path / STAGE_FOLDER / "stage.json").read_bytes())
        return DatasetSpec.model_validate(job["inputs"]["rows"]["spec"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _latest_evaluation(graph: Graph, model: Artifact) -> Artifact | None:
    users = [user for name, user in graph.users(model) if name == "model"]
    found = [user for user in users if user.kind == "evaluation"]
    return max(found, key=lambda one: (one.manifest.created, one.fingerprint), default=None)
