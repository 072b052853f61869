"""What a person names on the command line: the model that answers, and the reward that scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import UsageError
from posttrain.finding import find_adapters, find_model
from posttrain.lineage import Graph
from posttrain.lineage.graph import SHORT, label
from posttrain.recipe.online import RewardTerm
from posttrain.stages.program import StageInput
from posttrain.store import Artifact, Store
from posttrain.store.files import file_sha256
from posttrain.store.fingerprint import combine, files_digest

if TYPE_CHECKING:
    from posttrain.execute import StageObserver


@dataclass(frozen=True)
class Source:
    """A model or a reward, by what it is called and what it is."""

    name: str
    """Without the folders before it."""
    digest: str
    """SHA-256 (hex) of its content."""
    input: StageInput
    function: RewardTerm | None = None
    """For a judge function: how to call it."""
    doubt: str | None = None
    """Why nobody can tell whether an adapter goes on its base."""

    @property
    def label(self) -> str:
        """As a row names it."""
        return f"{self.name}@{self.digest[:SHORT]}"


def find_policy(
    reference: str, adapter: str | None, store: Store, observer: StageObserver | None
) -> Source:
    """The model that answers.

    Args:
        reference: As for `posttrain generate`; or an adapter in the store, which brings its base.
        adapter: An adapter to put on the model.
        store: Where names and fingerprints are looked up.
        observer: Told of a GGUF file's conversion.

    Raises:
        UsageError: nothing is called so, or the adapter is of another base.
        ModelError: a model cannot be fetched, or an adapter's config not be read.
    """
    named = _adapter_in_store(reference, store) if adapter is None else None
    if named is not None:
        base_record = named.manifest.inputs["model"]
        base = find_model(base_record.fingerprint or base_record.source or "", store, observer)
        adapter = named.fingerprint
    else:
        base = find_model(reference, store, observer)
    if adapter is None:
        weights = StageInput(kind="model", path=str(base.path), digest=base.digest)
        return Source(short_name(reference), base.digest, weights)
    [found] = find_adapters([adapter], base, store)
    if found is None:
        raise UsageError("--adapter base: leave the option out to ask the model alone")
    digest = combine(_folder_digest(found.path), base.digest)
    both = StageInput(kind="adapter", path=str(found.path), digest=digest, base=str(base.path))
    name = label(named) if named is not None else f"{short_name(reference)}+{short_name(adapter)}"
    return Source(name, digest, both, doubt=found.doubt)


def find_reward(reference: str, store: Store) -> Source:
    """What scores answers.

    Args:
        reference: `FILE.py:NAME`, a reward model in the store by fingerprint, STAGE or
            RECIPE/STAGE, or a folder with one.
        store: Where names and fingerprints are looked up.

    Raises:
        UsageError: nothing is called so, or it is no reward model.
    """
    if ".py:" in reference:
        return _function(reference)
    graph = Graph.read(store)
    try:
        artifact = graph.find(reference)
    except UsageError as error:
        folder = Path(reference).expanduser()
        if not folder.is_dir():
            raise UsageError(f"{error}; or FILE.py:NAME, a function that scores") from None
        return _reward_folder(folder)
    if artifact.kind != "reward":
        raise UsageError(f"{reference}: {label(artifact)} is a {artifact.kind}, and scores nothing")
    return _reward_artifact(artifact, store)


def short_name(reference: str) -> str:
    """A path's last part; other names as they are. Results carry no paths of this machine."""
    path = Path(reference).expanduser()
    return path.resolve().name if path.exists() else reference


def _function(reference: str) -> Source:
    path, _, name = reference.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"--reward {reference}: there is no file {path}")
    digest = file_sha256(file)
    source = StageInput(kind="source", path=str(file), digest=digest)
    return Source(f"{file.name}:{name}", digest, source, RewardTerm(function=reference))


def _reward_folder(folder: Path) -> Source:
    if not (folder / "reward.json").is_file():
        raise UsageError(
            f"--reward {folder}: no reward.json, so this is not what a `reward` stage leaves"
        )
    digest = _folder_digest(folder)
    weights = StageInput(kind="reward", path=str(folder.resolve()), digest=digest)
    return Source(folder.resolve().name, digest, weights)


def _reward_artifact(artifact: Artifact, store: Store) -> Source:
    """A reward model in the store; one trained as an adapter comes with its base."""
    base = artifact.manifest.inputs.get("model")
    needs_base = bool(artifact.manifest.config.get("adapter")) and base is not None
    path, digest, below = str(artifact.path), artifact.digest, None
    if needs_base and base is not None:
        below = str(find_model(base.fingerprint or base.source or "", store).path)
        digest = combine(digest, base.digest)
    weights = StageInput(kind="reward", path=path, digest=digest, base=below)
    return Source(label(artifact), digest, weights)


def _adapter_in_store(reference: str, store: Store) -> Artifact | None:
    try:
        artifact = Graph.read(store).find(reference)
    except UsageError:
        return None  # a folder or a Hub id, or `find_model` says what is wrong
    return artifact if artifact.kind == "adapter" else None


def _folder_digest(folder: Path) -> str:
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return files_digest((path.name, file_sha256(path)) for path in files)
