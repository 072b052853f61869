"""The graph over the manifests of a store: what was made from what.

An edge is an input of a manifest. It leads to the artifact that the input's fingerprint names and
to any other of the same content: a stage that ran again and gave the same bytes lets everything
after it be reused (early cutoff), and then the manifests after it name the first run alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from posttrain.errors import UsageError
from posttrain.recipe.mix import MIXED
from posttrain.recipe.prepare import AGAINST
from posttrain.store import Artifact, InputRecord, Store
from posttrain.store.fingerprint import combine
from posttrain.store.manifest import MANIFEST
from posttrain.store.store import KINDS

WEIGHTS = ("model", "adapter", "reward")
"""Kinds of artifacts that training leaves."""

SHORT = 12
"""Digits of a fingerprint that are shown."""

_LEAST_DIGITS = 6
_ONLY_LOOKED_AT = {("merge", "prompts"), ("prepare", "model")}
"""Inputs, by stage, that a result is checked with or measured by: nothing of them gets into it."""


def gets_in(stage: str, name: str) -> bool:
    """Whether what an input holds gets into the stage's result. An unknown input does."""
    kind = name.partition(":")[0]  # `prompts:chats` is one of several `prompts`
    return not name.startswith(AGAINST) and (stage, kind) not in _ONLY_LOOKED_AT


def label(artifact: Artifact) -> str:
    """How an artifact is named to people: `recipe/stage`."""
    return f"{artifact.manifest.recipe}/{artifact.manifest.name}"


def _needs_base(artifact: Artifact) -> bool:
    """Whether it is an adapter, of a model or of one that scores answers."""
    scores = artifact.kind == "reward" and bool(artifact.manifest.config.get("adapter"))
    return artifact.kind == "adapter" or scores


@dataclass(frozen=True)
class Run:
    """One run of a recipe, as the store remembers it."""

    recipe: str
    started: str
    artifacts: dict[str, str]
    """Fingerprint by step."""


@dataclass(frozen=True)
class Gone:
    """An artifact that is named somewhere and not in the store any more."""

    fingerprint: str
    kind: str | None
    """Where a manifest says it; runs do not."""
    named_by: str


@dataclass(frozen=True)
class Graph:
    """All artifacts of a store and how they depend on each other."""

    artifacts: dict[str, Artifact]
    """By fingerprint, oldest first."""
    runs: tuple[Run, ...] = ()
    """Oldest first."""
    unreadable: int = 0
    """Folders in the store whose manifest cannot be read."""
    _users: dict[str, list[tuple[str, Artifact]]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, store: Store) -> Graph:
        """The graph of what is in the store now."""
        artifacts = {artifact.fingerprint: artifact for artifact in store.artifacts()}
        folders = sum(path.is_dir() for kind in KINDS for path in (store.root / kind).glob("*"))
        graph = cls(artifacts, tuple(_runs(store.root / "runs")), folders - len(artifacts))
        for artifact in artifacts.values():
            for name, record in artifact.manifest.inputs.items():
                for made in graph._makers(record):
                    graph._users.setdefault(made.fingerprint, []).append((name, artifact))
        return graph

    @cached_property
    def datasets(self) -> tuple[Artifact, ...]:
        """All datasets."""
        return tuple(a for a in self.artifacts.values() if a.kind == "dataset")

    @cached_property
    def trained(self) -> tuple[Artifact, ...]:
        """All models and adapters that were trained on a dataset."""
        return tuple(a for a in self.artifacts.values() if self._trains(a))

    @cached_property
    def gone(self) -> tuple[Gone, ...]:
        """What manifests or runs name and the store does not have, in any form of it."""
        found: dict[str, Gone] = {}
        for artifact in self.artifacts.values():
            for record in artifact.manifest.inputs.values():
                if record.fingerprint and not self._makers(record):
                    gone = Gone(record.fingerprint, record.kind, label(artifact))
                    found.setdefault(record.fingerprint, gone)
        for run in self.runs:
            for step, fingerprint in run.artifacts.items():
                if fingerprint not in self.artifacts:
                    gone = Gone(fingerprint, None, f"a run of {run.recipe} (as {step})")
                    found.setdefault(fingerprint, gone)
        return tuple(found.values())

    # Walking

    def inputs(self, artifact: Artifact) -> list[tuple[str, Artifact]]:
        """The artifacts it was made from, by input; of several with one content the named one."""
        found = []
        for name, record in artifact.manifest.inputs.items():
            makers = self._makers(record)
            if makers:
                named = self.artifacts.get(record.fingerprint or "")
                found.append((name, named or makers[0]))
        return found

    def users(self, artifact: Artifact) -> list[tuple[str, Artifact]]:
        """What was made from it or looked at it, each with the name of the input."""
        return self._users.get(artifact.fingerprint, [])

    def ancestors(self, artifact: Artifact) -> dict[str, Artifact]:
        """All whose content got into it, itself included, by fingerprint."""
        found: dict[str, Artifact] = {}
        waiting = [artifact]
        while waiting:
            one = waiting.pop()
            if one.fingerprint not in found:
                found[one.fingerprint] = one
                stage = one.manifest.stage
                waiting += [made for name, made in self.inputs(one) if gets_in(stage, name)]
        return found

    def models_from(self, model: Artifact) -> Iterator[tuple[Artifact, tuple[str, ...]]]:
        """A model and all that its weights got into, each with the stages on the way to it."""
        seen = {model.fingerprint}
        waiting: list[tuple[Artifact, tuple[str, ...]]] = [(model, ())]
        while waiting:
            one, way = waiting.pop(0)
            if one.kind in WEIGHTS:
                yield one, way
            for name, user in self.users(one):
                made = user.kind in (*WEIGHTS, "dataset") and gets_in(user.manifest.stage, name)
                if made and user.fingerprint not in seen:
                    seen.add(user.fingerprint)
                    waiting.append((user, (*way, label(one))))

    def training_data(self, artifact: Artifact) -> list[Artifact]:
        """The datasets among its inputs whose rows get into it."""
        stage = artifact.manifest.stage
        inputs = self.inputs(artifact)
        return [made for name, made in inputs if made.kind == "dataset" and gets_in(stage, name)]

    # Finding

    def find(self, reference: str) -> Artifact:
        """The artifact that a person means.

        Args:
            reference: A path, a fingerprint's first digits (6 at least), the name of a stage, or
                RECIPE/STAGE. A stage's name stands for what the recipe's latest run used.

        Raises:
            UsageError: nothing is called so, or several are; the message lists them.
        """
        path = Path(reference).expanduser().resolve()
        here = [a for a in self.artifacts.values() if path in (a.path, a.path / MANIFEST)]
        found = here or self._by_stage(reference) or self._by_digits(reference)
        if len(found) == 1:
            return found[0]
        if found:
            choices = "\n".join(
                f"  {a.fingerprint[:SHORT]}  {label(a)}  {a.manifest.created:%Y-%m-%d %H:%M}"
                for a in sorted(found, key=label)
            )
            raise UsageError(f"{reference}: several are called so; write one of\n{choices}")
        gone = [g for g in self.gone if g.fingerprint.startswith(reference)]
        if gone and len(reference) >= _LEAST_DIGITS:
            raise UsageError(
                f"{reference}: no longer in the store; it was named by {gone[0].named_by}"
            )
        raise UsageError(
            f"{reference}: there is no such artifact; write a path, the first {_LEAST_DIGITS} or "
            "more digits of a fingerprint, or a stage's name, as `posttrain store ls` shows them"
        )

    def _by_stage(self, reference: str) -> list[Artifact]:
        """What the latest run of each recipe used under this name."""
        latest: dict[str, Artifact] = {}
        for artifact in self.artifacts.values():
            if reference in (artifact.manifest.name, label(artifact)):
                latest[artifact.manifest.recipe] = artifact
        for run in self.runs:
            for step, fingerprint in run.artifacts.items():
                if reference in (step, f"{run.recipe}/{step}"):
                    # Gone since: an older one in its place would be the answer to another question.
                    latest.pop(run.recipe, None)
                    if fingerprint in self.artifacts:
                        latest[run.recipe] = self.artifacts[fingerprint]
        return list({a.fingerprint: a for a in latest.values()}.values())

    def _by_digits(self, reference: str) -> list[Artifact]:
        if len(reference) < _LEAST_DIGITS:
            return []
        return [a for f, a in self.artifacts.items() if f.startswith(reference.lower())]

    # Inside

    def _trains(self, artifact: Artifact) -> bool:
        inputs = artifact.manifest.inputs.items()
        stage = artifact.manifest.stage
        return artifact.kind in WEIGHTS and any(
            record.kind == "dataset" and gets_in(stage, name) for name, record in inputs
        )

    @cached_property
    def _by_content(self) -> dict[tuple[str, str], list[Artifact]]:
        found: dict[tuple[str, str], list[Artifact]] = {}
        for artifact in self.artifacts.values():
            digest = artifact.digest
            base = artifact.manifest.inputs.get("model")
            if _needs_base(artifact) and base is not None:
                digest = combine(digest, base.digest)  # as `Pipeline.bind` names adapters
            found.setdefault((artifact.kind, digest), []).append(artifact)
        return found

    def _makers(self, record: InputRecord) -> list[Artifact]:
        """The artifacts in the store that an input may have come from."""
        if record.fingerprint is None:
            return []
        equal = self._by_content.get((record.kind, record.digest), [])
        named = self.artifacts.get(record.fingerprint)
        others = [artifact for artifact in equal if artifact is not named]
        return others if named is None else [named, *others]


def source_of(graph: Graph, dataset: Artifact) -> str:
    """Where a dataset's rows came from, in a few words."""
    record = dataset.manifest.inputs.get("rows")
    if record is not None and record.source:
        test = dataset.manifest.inputs.get("test")
        return f"{record.source}, test set {test.source}" if test else record.source
    names = [
        name.removeprefix(MIXED) for name, made in graph.inputs(dataset) if made.kind == "dataset"
    ]
    return f"a mix of {', '.join(names)}" if names else "unknown"


def name_of(dataset: Artifact) -> str:
    """What the recipe calls a prepared dataset or a mix."""
    return str(dataset.manifest.config.get("dataset") or dataset.manifest.name)


def gaps(graph: Graph, within: Iterable[Artifact] | None = None) -> list[str]:
    """What cannot be answered for, a sentence each.

    Args:
        graph: The store's.
        within: Only what these were made from; left out, all that was ever named.
    """
    gone: Sequence[Gone] = graph.gone
    if within is not None:
        named = {
            record.fingerprint
            for artifact in within
            for name, record in artifact.manifest.inputs.items()
            if gets_in(artifact.manifest.stage, name)
        }
        gone = [one for one in gone if one.fingerprint in named]
    said = []
    if gone:
        noun = "artifact is" if len(gone) == 1 else "artifacts are"
        listed = ", ".join(f"{g.fingerprint[:SHORT]} ({g.kind or g.named_by})" for g in gone[:5])
        more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
        said.append(
            f"{len(gone):,} {noun} named by manifests or runs but no longer in the store: "
            f"{listed}{more}. What they held or were trained on cannot be told."
        )
    if graph.unreadable and within is None:
        noun = "artifact has a manifest" if graph.unreadable == 1 else "artifacts have manifests"
        said.append(
            f"{graph.unreadable:,} {noun} that cannot be read; "
            "`posttrain store verify` names them. They are not part of this answer."
        )
    return said


def _runs(folder: Path) -> list[Run]:
    found = []
    for file in folder.glob("*.json"):
        try:
            record = json.loads(file.read_bytes())
            artifacts = {str(step): str(value) for step, value in record["artifacts"].items()}
            found.append(Run(str(record["recipe"]), str(record["started"]), artifacts))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return sorted(found, key=lambda run: run.started)
