"""From a recipe to a sequence of steps, each with its settings and its inputs resolved.

A recipe says what a person means; a pipeline says all that will happen: the conversion of a GGUF
file, the preparation of a dataset that nobody asked for, the evaluation of the base beside the
candidate. Steps refer to each other by name; `bind` turns a step whose inputs are known into a
job with a fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.benchmarks import Benchmarks
from posttrain.model_reference import ModelReference
from posttrain.recipe import (
    DatasetSpec,
    Recipe,
    StageConfig,
    TrainingConfig,
    result_config,
)
from posttrain.recipe.base import ArtifactKind
from posttrain.stages.program import StageInput, StageJob
from posttrain.store import Artifact, InputRecord
from posttrain.store.fingerprint import canonical_json, combine, stage_fingerprint


@dataclass(frozen=True)
class Rows:
    """A dataset as the user has it."""

    name: str
    spec: DatasetSpec
    digest: str
    """Of the bytes of its files, or of its pinned revision."""

    @property
    def reading_digest(self) -> str:
        """Of the bytes and of all that decides how they are read: format, columns, limit."""
        settings = {k: v for k, v in result_config(self.spec).items() if k != "source"}
        return combine(self.digest, canonical_json(settings).decode())


@dataclass(frozen=True)
class Output:
    """What an earlier step leaves."""

    step: str
    kind: ArtifactKind


@dataclass(frozen=True)
class Code:
    """A file of the user's that a stage runs."""

    path: str
    digest: str
    """Of its bytes. What it imports is not in it."""


Source = Artifact | ModelReference | Rows | Benchmarks | Code
"""What an input turns out to be."""

Input = Artifact | ModelReference | Rows | Benchmarks | Code | Output


@dataclass(frozen=True)
class Step:
    """One stage to be run or reused."""

    name: str
    config: StageConfig
    inputs: dict[str, Input]
    kind: ArtifactKind

    @property
    def stage(self) -> str:
        """The kind of stage: its program, its task, its recipe key."""
        return self.config.stage

    @property
    def output(self) -> Output:
        """A reference to what this step leaves, for later steps."""
        return Output(self.name, self.kind)

    def waits_for(self) -> set[str]:
        """Names of the steps whose outputs this one needs."""
        return {value.step for value in self.inputs.values() if isinstance(value, Output)}


@dataclass(frozen=True)
class BoundStep:
    """A step whose inputs are all known: it can be looked up in the store, or run."""

    step: Step
    recipe: str
    fingerprint: str
    inputs: dict[str, InputRecord]
    sources: dict[str, Source]
    bases: dict[str, Artifact | ModelReference]
    """For each input that is an adapter: the model it was trained on."""

    def job(self, log_level: str, cache: Path | None = None) -> StageJob:
        """What the stage's program is told; fetches models from the Hub where needed."""
        inputs = {name: self._stage_input(name) for name in self.inputs}
        return StageJob(
            stage=self.step.stage,
            name=self.step.name,
            config=self.step.config.model_dump(mode="json"),
            inputs=inputs,
            log_level=log_level,
            cache=str(cache) if cache else None,
        )

    def _stage_input(self, name: str) -> StageInput:
        record, source = self.inputs[name], self.sources[name]
        base = self.bases.get(name)
        spec, digest = None, record.digest
        if isinstance(source, Rows):
            # The program checks that it reads the very bytes that were planned for.
            spec, digest = source.spec.model_dump(mode="json"), source.digest
        return StageInput(
            kind=record.kind,
            path=_path(source),
            digest=digest,
            base=_path(base) if base else None,
            spec=spec,
        )


@dataclass(frozen=True)
class Pipeline:
    """All steps of a recipe, in an order in which they can run."""

    recipe: Recipe
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)

    def bind(self, step: Step, done: Mapping[str, Artifact]) -> BoundStep:
        """Compute a step's fingerprint from the contents of its inputs.

        Args:
            step: one of this pipeline's.
            done: artifacts by step name; must hold all that the step waits for.
        """
        records: dict[str, InputRecord] = {}
        sources: dict[str, Source] = {}
        bases: dict[str, Artifact | ModelReference] = {}
        for name, value in step.inputs.items():
            sources[name] = done[value.step] if isinstance(value, Output) else value
            record = _record(sources[name])
            if isinstance(value, Output) and _needs_base(self.step(value.step)):
                base = self.step(value.step).inputs["model"]
                bases[name] = done[base.step] if isinstance(base, Output) else _model(base)
                # The same adapter on another base is another model.
                digest = combine(record.digest, _record(bases[name]).digest)
                record = record.model_copy(update={"digest": digest})
            records[name] = record
        fingerprint = stage_fingerprint(
            step.stage,
            step.config.code_version,
            result_config(step.config),
            {name: record.digest for name, record in records.items()},
        )
        return BoundStep(step, self.recipe.name, fingerprint, records, sources, bases)


def _needs_base(step: Step) -> bool:
    """Whether what a step leaves is an adapter, of a model or of one that scores answers."""
    trained = step.config.adapter if isinstance(step.config, TrainingConfig) else None
    return step.kind == "adapter" or (step.kind == "reward" and trained is not None)


def _record(source: Source) -> InputRecord:
    match source:
        case Artifact():
            return InputRecord(
                kind=source.kind, digest=source.digest, fingerprint=source.fingerprint
            )
        case ModelReference():
            kind = "source" if source.kind == "gguf" else "model"
            where = f"{source.location}@{source.revision}" if source.revision else source.location
            return InputRecord(kind=kind, digest=source.digest, source=where)
        case Rows():
            return InputRecord(
                kind="source", digest=source.reading_digest, source=_rows_source(source)
            )
        case Benchmarks():
            return InputRecord(kind="source", digest=source.digest, source=", ".join(source.names))
        case Code():
            return InputRecord(kind="source", digest=source.digest, source=source.path)


def _rows_source(rows: Rows) -> str:
    source = rows.spec.source
    return source if isinstance(source, str) else ", ".join(source)


def _model(value: Input) -> Artifact | ModelReference:
    if not isinstance(value, Artifact | ModelReference):
        raise TypeError(f"not a model: {value}")
    return value


def _path(source: Source) -> str:
    match source:
        case Artifact():
            return str(source.path)
        case ModelReference():
            return str(source.fetch())
        case Benchmarks():
            return ", ".join(source.names)
        case Code():
            return str(Path(source.path).resolve())
        case Rows():
            return _rows_source(source)
