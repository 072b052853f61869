"""Estimates for the training stages of a plan, from what is known before anything has run."""

from __future__ import annotations

import glob
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from posttrain.errors import DataError, ModelError
from posttrain.estimate.architecture import Architecture, read_architecture
from posttrain.estimate.device import Device, present_device
from posttrain.estimate.rows import (
    RowLengths,
    lengths_of_dataset,
    lengths_of_files,
    unknown_lengths,
)
from posttrain.estimate.stage import StageEstimate, estimate_stage
from posttrain.model_reference import ModelReference
from posttrain.pipeline import Output, Rows, Step
from posttrain.plan import Plan
from posttrain.recipe.training import TrainingConfig
from posttrain.store import Artifact
from posttrain.store.files import write_bytes

_ARCHITECTURE = TypeAdapter(Architecture)


def estimate_plan(
    plan: Plan, cache: Path, device: Device | None = None
) -> dict[str, StageEstimate | str]:
    """Memory and time of every training stage, by step; where there is no estimate, why not.

    Args:
        plan: What would run.
        cache: Folder that keeps the sizes of GGUF models, whose headers take seconds to read.
        device: Where it would run; by default what this machine has.
    """
    device = device or present_device()
    estimates: dict[str, StageEstimate | str] = {}
    for planned in plan.steps:
        config = planned.step.config
        if not isinstance(config, TrainingConfig):
            continue
        try:
            sizes = _architecture(plan, planned.step, cache)
            lengths = _lengths(plan, planned.step, config)
        except (ModelError, DataError) as error:
            estimates[planned.step.name] = str(error)
            continue
        estimates[planned.step.name] = estimate_stage(sizes, config, lengths, device)
    return estimates


def describe_estimate(estimate: StageEstimate | str | None) -> dict[str, object] | None:
    """An estimate as plain JSON; None for a stage that does not train."""
    if estimate is None:
        return None
    if isinstance(estimate, str):
        return {"unknown": estimate}
    return {
        "memory_gib": estimate.memory.in_gib(),
        "moment": estimate.memory.moment,
        "device": estimate.device.name,
        "device_memory_gib": round(estimate.device.gib, 2),
        "fits": estimate.fits,
        "trainable_parameters": estimate.trainable,
        "parameters": estimate.parameters,
        "steps": estimate.steps,
        "tokens": estimate.tokens,
        "seconds": None if estimate.seconds is None else round(estimate.seconds, 1),
        "assumed_utilisation": estimate.utilisation,
        "rows": estimate.basis,
        "advice": [
            {"write": change.write, "memory_gib": round(change.memory.gib, 3), "fits": change.fits}
            for change in estimate.advice
        ],
    }


def _architecture(plan: Plan, step: Step, cache: Path) -> Architecture:
    """The sizes of what a stage starts from: training and merging change none of them."""
    source = step.inputs["model"]
    artifacts, steps = plan.artifacts(), {planned.step.name: planned.step for planned in plan.steps}
    while isinstance(source, Output):
        artifact = artifacts.get(source.step)
        if artifact is not None and artifact.kind == "model":
            return read_architecture(artifact.path)
        inputs = steps[source.step].inputs
        models = [value for value in inputs.values() if _holds_weights(value)]
        if not models:
            raise ModelError(f"{step.name}: the model that it starts from is not known yet")
        source = models[0]
    if isinstance(source, Artifact):
        return read_architecture(source.path)
    if not isinstance(source, ModelReference):
        raise ModelError(f"{step.name}: the model that it starts from is not known yet")
    return _cached(source, cache) if source.kind == "gguf" else read_architecture(source)


def _holds_weights(value: object) -> bool:
    weights = isinstance(value, Output) and value.kind in ("model", "adapter")
    return weights or isinstance(value, Artifact | ModelReference)


def _cached(model: ModelReference, cache: Path) -> Architecture:
    path = cache / f"{model.digest[:32]}.json"
    try:
        return _ARCHITECTURE.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        sizes = read_architecture(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, _ARCHITECTURE.dump_json(sizes))
    return sizes


def _lengths(plan: Plan, step: Step, config: TrainingConfig) -> RowLengths:
    """From the prepared dataset where it is there, else from the files it will be made from."""
    source = step.inputs["dataset"]
    artifacts = plan.artifacts()
    if isinstance(source, Output) and source.step in artifacts:
        return lengths_of_dataset(artifacts[source.step].path, _tokenizer(artifacts, step))
    rows = _sources(plan, step)
    files = [file for spec in rows for file in _files(spec)]
    if not files:
        return unknown_lengths(config.batching.max_length)
    limits = [spec.spec.limit for spec in rows]
    return lengths_of_files(files, None if None in limits else sum(filter(None, limits)))


def _tokenizer(artifacts: dict[str, Artifact], step: Step) -> Path | None:
    source = step.inputs["model"]
    if isinstance(source, Output):
        return artifacts[source.step].path if source.step in artifacts else None
    if isinstance(source, Artifact):
        return source.path
    if isinstance(source, ModelReference) and source.kind == "folder":
        return Path(source.location)
    return None


def _sources(plan: Plan, step: Step) -> list[Rows]:
    """The datasets, as the user has them, behind a step's dataset."""
    steps = {planned.step.name: planned.step for planned in plan.steps}
    waiting, found = [step.inputs["dataset"]], []
    while waiting:
        source = waiting.pop()
        if isinstance(source, Rows):
            found.append(source)
        elif isinstance(source, Output) and source.kind == "dataset":
            waiting += steps[source.step].inputs.values()
    return found


def _files(rows: Rows) -> list[Path]:
    """Files of a source; none of one on the Hub or built in, whose size is not known."""
    sources = rows.spec.source
    found: list[Path] = []
    for name in (sources,) if isinstance(sources, str) else sources:
        path = Path(name).expanduser()
        if path.is_dir():
            found += [file for file in path.rglob("*") if file.is_file()]
        elif path.is_file():
            found.append(path)
        elif not name.startswith(("hub:", "builtin:")):
            # Path.glob takes no absolute patterns.
            found += [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    return [file for file in found if file.is_file()]
