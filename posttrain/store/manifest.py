"""What an artifact says of itself: how it was made, from what, and which bytes it is."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from posttrain import __version__
from posttrain.recipe.base import ArtifactKind
from posttrain.store.fingerprint import files_digest, stage_fingerprint

MANIFEST = "manifest.json"

_PACKAGES = (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "lm-eval", "mlflow", "numpy", "peft",
    "prefect", "pyarrow", "safetensors", "tokenizers", "torch", "transformers", "trl",
)  # fmt: skip
"""Packages whose versions can change a result."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Frozen):
    """One file of an artifact."""

    path: str
    """Relative to the artifact, with forward slashes."""
    size: int
    """Bytes."""
    sha256: str
    content: bool = True
    """Whether later stages depend on it; accounts and reports for people are none of theirs."""


class InputRecord(_Frozen):
    """One input of the stage that made an artifact."""

    kind: str
    digest: str
    fingerprint: str | None = None
    """Of the artifact, where posttrain made the input."""
    source: str | None = None
    """File, folder, Hub id or built-in source, where it did not."""


class Manifest(_Frozen):
    """Written last into an artifact's folder: without it there is no artifact."""

    schema_version: int = 1
    kind: ArtifactKind
    stage: str
    name: str
    """Name of the stage in the recipe that made it first."""
    recipe: str
    fingerprint: str
    content_digest: str
    code_version: int
    config: dict[str, Any]
    """The settings that can change the result."""
    inputs: dict[str, InputRecord]
    files: tuple[FileRecord, ...]
    metrics: dict[str, float] = {}
    headline: str = ""
    details: dict[str, Any] = {}
    created: datetime
    seconds: float
    """Wall-clock time of the program, start to end, summed over attempts that were seen."""
    packages: dict[str, str]
    hardware: dict[str, str | int | float]
    posttrain_version: str = __version__
    mlflow_run_id: str | None = None
    prefect_run_id: str | None = None

    def disagreement(self) -> str | None:
        """What contradicts itself in an edited manifest, or None."""
        digests = {name: record.digest for name, record in self.inputs.items()}
        if stage_fingerprint(self.stage, self.code_version, self.config, digests) != (
            self.fingerprint
        ):
            return "the manifest's config or inputs do not give its fingerprint"
        content = ((file.path, file.sha256) for file in self.files if file.content)
        if files_digest(content) != self.content_digest:
            return "the manifest's files do not give its content digest"
        return None


class Artifact(_Frozen):
    """A published result: a folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """What it was made from."""
        return self.manifest.fingerprint

    @property
    def digest(self) -> str:
        """What it is."""
        return self.manifest.content_digest

    @property
    def kind(self) -> ArtifactKind:
        """Kind of content."""
        return self.manifest.kind

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.manifest.files)


@cache
def package_versions() -> dict[str, str]:
    """Versions of the installed packages that can change a result."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> datetime:
    """The present moment, in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)
