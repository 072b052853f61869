"""What a run would do, and why: which steps are in the store, which must run, what changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.pipeline import BoundStep, Pipeline, Step
from posttrain.recipe import result_config
from posttrain.store import Artifact, Manifest, Store
from posttrain.store.manifest import MANIFEST

Action = Literal["reuse", "resume", "run"]


@dataclass(frozen=True)
class PlannedStep:
    """One step and what would happen to it."""

    step: Step
    action: Action
    reason: str
    artifact: Artifact | None = None
    """What would be reused."""


@dataclass(frozen=True)
class Plan:
    """What a run of a pipeline would do now."""

    steps: tuple[PlannedStep, ...]

    @property
    def nothing_to_do(self) -> bool:
        """Whether every step is in the store."""
        return all(planned.action == "reuse" for planned in self.steps)

    def artifacts(self) -> dict[str, Artifact]:
        """The artifacts that are there, by step."""
        return {p.step.name: p.artifact for p in self.steps if p.artifact is not None}


def make_plan(pipeline: Pipeline, store: Store, from_step: str | None = None) -> Plan:
    """Look every step up in the store.

    Args:
        pipeline: the steps.
        store: where finished ones are.
        from_step: this step, and all that depends on it, run again whatever the store holds.
    """
    forced = forced_steps(pipeline, from_step)
    previous = _previous_manifests(store, pipeline.recipe.name)
    done: dict[str, Artifact] = {}
    planned: list[PlannedStep] = []
    for step in pipeline.steps:
        missing = step.waits_for() - set(done)
        if missing:
            reason = f"waits for {', '.join(sorted(missing))}"
            planned.append(PlannedStep(step, "run", reason))
            continue
        bound = pipeline.bind(step, done)
        artifact = None if step.name in forced else store.find(step.kind, bound.fingerprint)
        if artifact is not None:
            done[step.name] = artifact
            planned.append(PlannedStep(step, "reuse", artifact.manifest.headline, artifact))
        elif step.name in forced:
            planned.append(PlannedStep(step, "run", "asked for"))
        elif (store.root / "work" / bound.fingerprint / "checkpoints").exists():
            planned.append(PlannedStep(step, "resume", "was interrupted"))
        else:
            reason = why_it_runs(bound, previous.get(step.name))
            planned.append(PlannedStep(step, "run", reason))
    return Plan(tuple(planned))


def forced_steps(pipeline: Pipeline, from_step: str | None) -> frozenset[str]:
    """The named step and all that depends on it; empty for None."""
    if from_step is None:
        return frozenset()
    forced = {from_step}
    for step in pipeline.steps:
        if step.waits_for() & forced:
            forced.add(step.name)
    return frozenset(forced)


def why_it_runs(bound: BoundStep, previous: Manifest | None) -> str:
    """What differs from the last time this step of this recipe ran, in a few words."""
    if previous is None:
        return "first run"
    if previous.fingerprint == bound.fingerprint:
        return "its artifact is gone"
    if previous.code_version != bound.step.config.code_version:
        return "this version of posttrain does the stage differently"
    changes = [
        f"{key}: {before} -> {after}"
        for key, before, after in changed_keys(previous.config, result_config(bound.step.config))
    ]
    for name, record in bound.inputs.items():
        before = previous.inputs.get(name)
        if before is None or before.digest != record.digest:
            changes.append(f"{name} changed")
    return ", ".join(changes) or "first run"


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys (`a.b.c`) whose values differ, with both values."""
    old, new = flatten(before), flatten(after)
    return [
        (key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c` keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _previous_manifests(store: Store, recipe: str) -> dict[str, Manifest]:
    """The manifests of the last recorded run of this recipe, by step."""
    latest: tuple[str, dict[str, str]] = ("", {})
    for file in (store.root / "runs").glob("*.json"):
        try:
            record = json.loads(file.read_bytes())
            if record["recipe"] == recipe and record["started"] > latest[0]:
                latest = (record["started"], record["artifacts"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    found: dict[str, Manifest] = {}
    for name, fingerprint in latest[1].items():
        for path in store.root.glob(f"*/{fingerprint}/{MANIFEST}"):
            try:
                found[name] = Manifest.model_validate_json(path.read_bytes())
            except ValueError:
                continue
    return found
