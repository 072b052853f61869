"""Finding the models and adapters that a person names, and which adapter goes on which model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError, StoreError, UsageError
from posttrain.execute import StageObserver, run_step
from posttrain.lineage import Graph
from posttrain.lineage.graph import SHORT, label
from posttrain.model_reference import ModelReference, resolve_model
from posttrain.pipeline import Pipeline, Step
from posttrain.recipe import ConvertConfig, Recipe
from posttrain.store import Artifact, InputRecord, Store

BASE = "base"
"""Name of the model without any adapter, where adapters are named."""

CONFIG = "adapter_config.json"
"""What peft writes beside an adapter's weights; a folder with it is an adapter."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOVES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations of LoRA by which peft changes the base's weights when it loads an adapter."""


@dataclass(frozen=True)
class Base:
    """Complete weights on this machine."""

    name: str
    """As the person called it."""
    path: Path
    digest: str
    """Of its content; adapters name their base by it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that goes on the base in question."""

    name: str
    """As the person called it."""
    path: Path
    doubt: str | None = None
    """Why nobody can tell whether it was trained on this base."""


@dataclass(frozen=True)
class AdapterFacts:
    """What a list says of an adapter in the store."""

    name: str
    recipe: str
    fingerprint: str
    type: str
    """As a recipe writes it."""
    rank: int | None
    """Of a bottleneck its width, of a prefix or prompt its virtual tokens."""
    trained_parameters: int | None
    base: str
    base_digest: str
    held_out_loss: float | None
    """Nats a token, of the checkpoint that was kept."""
    held_out_loss_before: float | None
    made: str
    """Date and time in UTC, ISO 8601."""
    size: int
    """Bytes."""
    path: str


def find_model(reference: str, store: Store, observer: StageObserver | None = None) -> Base:
    """The complete weights that a person means.

    Args:
        reference: What `model` of a recipe may be, or a model in the store: a path, a
            fingerprint's first digits, STAGE or RECIPE/STAGE.
        store: Also keeps what a GGUF file becomes.
        observer: Told of a GGUF file's conversion. Without one nothing is converted.

    Raises:
        UsageError: nothing is called so, it is no model, or it would have to be converted.
        ModelError: a model of the Hub cannot be fetched.
    """
    graph = Graph.read(store)
    try:
        artifact = None if _is_gguf(reference) else graph.find(reference)
    except UsageError as not_there:
        return _outside(reference, store, observer, not_there)
    if artifact is None:
        return _outside(reference, store, observer)
    if artifact.kind == "adapter":
        raise UsageError(
            f"{reference}: {label(artifact)} is an adapter; write its base first: "
            f"posttrain generate {_base_reference(graph, artifact)} --adapter {reference}"
        )
    if artifact.kind != "model":
        raise UsageError(f"{reference}: {label(artifact)} is a {artifact.kind}, and not a model")
    return Base(reference, _undamaged(store, artifact).path, artifact.digest)


def find_start(reference: str, store: Store) -> Artifact:
    """The model in the store that a recipe starts from.

    Args:
        reference: A path, a fingerprint's first digits, STAGE or RECIPE/STAGE.
        store: Where it is.

    Raises:
        UsageError: nothing is called so, or it is no complete model.
    """
    graph = Graph.read(store)
    artifact = graph.find(reference)
    if artifact.kind == "model":
        return _undamaged(store, artifact)
    message = f"{reference}: {label(artifact)} is a {artifact.kind}, and a start is a model"
    if artifact.kind == "adapter":
        merged = [user for name, user in graph.users(artifact) if user.kind == "model"]
        made = [f"artifact:{user.fingerprint[:SHORT]} ({label(user)})" for user in merged]
        fix = f"write what it was merged into: {', '.join(made)}" if made else "merge it first"
        message = f"{reference}: {label(artifact)} is an adapter; {fix}"
    raise UsageError(message)


def find_adapters(names: Sequence[str], base: Base, store: Store) -> list[Adapter | None]:
    """The adapters that a person means, each once; None for `base`.

    Args:
        names: Folders, or adapters in the store by a fingerprint's first digits, STAGE or
            RECIPE/STAGE; `base` is the model without any.
        base: What they are to be put on.
        store: Where adapters by name are looked up.

    Raises:
        UsageError: nothing is called so, it is no adapter, or it was trained on another base.
        ModelError: an adapter's config cannot be read.
    """
    graph = Graph.read(store)
    wanted = dict.fromkeys(names)
    found = [None if name == BASE else _find_adapter(name, base, graph, store) for name in wanted]
    for adapter in found:
        moves = adapter is not None and str(_config(adapter.path).get("init_lora_weights"))
        if adapter and moves and moves.startswith(_MOVES_THE_BASE) and len(found) > 1:
            raise UsageError(
                f"{adapter.name}: peft changes the base's weights to load it (`init_lora_weights: "
                f"{moves}`), so nothing else can be asked beside it; ask it alone"
            )
    return found


def list_adapters(store: Store, base: Base | None = None) -> list[AdapterFacts]:
    """Adapters in the store, oldest first; with a base, those that go on it."""
    graph = Graph.read(store)
    return [
        _facts(artifact, graph)
        for artifact in graph.artifacts.values()
        if artifact.kind == "adapter"
        and (base is None or _base_record(artifact).digest == base.digest)
    ]


def _outside(
    reference: str,
    store: Store,
    observer: StageObserver | None,
    not_there: UsageError | None = None,
) -> Base:
    """A model that is no artifact, as a recipe names it."""
    try:
        model = resolve_model(reference, store.digests)
    except ModelError as error:
        also = f"\nand as a model in the store: {not_there}" if not_there else ""
        raise UsageError(f"{error}{also}") from None
    if model.kind != "gguf":
        return Base(reference, model.fetch(), model.digest)
    artifact = _converted(model, store, observer)
    if artifact is None:
        raise UsageError(f"{reference}: was never converted here, so nothing was trained on it")
    return Base(reference, artifact.path, artifact.digest)


def _converted(
    model: ModelReference, store: Store, observer: StageObserver | None
) -> Artifact | None:
    """The folder that the `convert` stage makes, or made, of a GGUF file."""
    config = ConvertConfig()
    step = Step("convert", config, {"weights": model}, config.produces)
    # Of no recipe that has stages; the artifact is the one that a recipe's `convert` leaves.
    recipe = Recipe.model_construct(name="generate", model=model.location, stages=())
    bound = Pipeline(recipe, (step,)).bind(step, {})
    there = store.find(config.produces, bound.fingerprint)
    if there is not None or observer is None:
        return there
    return run_step(bound, store, observer).artifact


def _find_adapter(name: str, base: Base, graph: Graph, store: Store) -> Adapter:
    folder = Path(name).expanduser()
    try:
        artifact = graph.find(name)
    except UsageError:
        if not (folder / CONFIG).is_file():
            if folder.is_dir():
                raise UsageError(f"{name}: no {CONFIG}, so this is no adapter's folder") from None
            raise
        return Adapter(name, folder.resolve(), _check_folder(name, folder, base, graph, store))
    if artifact.kind != "adapter":
        what = "complete weights, no adapter" if artifact.kind == "model" else f"a {artifact.kind}"
        raise UsageError(f"{name}: {label(artifact)} is {what}")
    _check_base(name, _base_record(artifact), base, graph)
    return Adapter(name, _undamaged(store, artifact).path)


def _check_folder(name: str, folder: Path, base: Base, graph: Graph, store: Store) -> str | None:
    """Compare an adapter's folder with the base; returns why that is not possible."""
    trained_on = str(_config(folder).get("base_model_name_or_path") or "")
    if not _DIGEST.fullmatch(trained_on):
        if not Path(trained_on).is_dir():
            known = f"names its base `{trained_on}`" if trained_on else "does not name its base"
            return f"{name} {known}; nobody can tell whether that is {base.name}"
        trained_on = resolve_model(trained_on, store.digests).digest
    _check_base(name, InputRecord(kind="model", digest=trained_on), base, graph)
    return None


def _check_base(name: str, trained_on: InputRecord, base: Base, graph: Graph) -> None:
    """Raises: UsageError: the adapter's base is another one."""
    if trained_on.digest == base.digest:
        return
    there = _of_content(graph, trained_on)
    digits = there.fingerprint[:SHORT] if there else ""
    fix = f"; write `posttrain generate {digits} --adapter {name}`" if there else ""
    raise UsageError(
        f"{name}: trained on {_base_name(graph, trained_on)}, and {base.name} is another model "
        f"(its content is {base.digest[:SHORT]}){fix}"
    )


def _base_record(adapter: Artifact) -> InputRecord:
    """What an adapter was trained on."""
    return adapter.manifest.inputs["model"]


def _base_reference(graph: Graph, adapter: Artifact) -> str:
    """How its base is named on the command line."""
    record = _base_record(adapter)
    there = _of_content(graph, record)
    return there.fingerprint[:SHORT] if there else record.source or "MODEL"


def _base_name(graph: Graph, record: InputRecord) -> str:
    """A base as people know it: a GGUF file, a Hub id, a folder, or the stage that made it."""
    artifact = _of_content(graph, record)
    if artifact is None:
        return record.source or f"a model of content {record.digest[:SHORT]}"
    weights = artifact.manifest.inputs.get("weights")
    if artifact.manifest.stage == "convert" and weights is not None and weights.source:
        return Path(weights.source).name
    return label(artifact)


def _of_content(graph: Graph, record: InputRecord) -> Artifact | None:
    artifacts = graph.artifacts.values()
    return next((a for a in artifacts if a.kind == "model" and a.digest == record.digest), None)


def _undamaged(store: Store, artifact: Artifact) -> Artifact:
    found = store.find(artifact.kind, artifact.fingerprint)
    if found is None:
        raise StoreError(f"{label(artifact)} was damaged and is set aside; run its recipe again")
    return found


def _is_gguf(reference: str) -> bool:
    return reference.startswith(("package:", "gguf:")) or reference.endswith(".gguf")


def _config(folder: Path) -> dict[str, Any]:
    """An adapter's config as peft wrote it."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG}: cannot be read: {error}") from error
    return config


def _facts(artifact: Artifact, graph: Graph) -> AdapterFacts:
    manifest, config = artifact.manifest, _config(artifact.path)
    written = (manifest.config.get("adapter") or {}).get("type")
    sizes = ("target_r", "r", "bottleneck_size", "num_virtual_tokens")
    rank = next((int(config[key]) for key in sizes if config.get(key)), None)
    trained = manifest.metrics.get("trainable_parameters")
    return AdapterFacts(
        name=manifest.name,
        recipe=manifest.recipe,
        fingerprint=artifact.fingerprint,
        type=str(written or config.get("peft_type", "")).lower(),
        rank=rank,
        trained_parameters=None if trained is None else int(trained),
        base=_base_name(graph, _base_record(artifact)),
        base_digest=_base_record(artifact).digest,
        held_out_loss=manifest.metrics.get("held_out_loss"),
        held_out_loss_before=manifest.metrics.get("held_out_loss_before"),
        made=manifest.created.isoformat(),
        size=artifact.size,
        path=str(artifact.path),
    )
