"""Model references: what is accepted, what is refused, and to what bytes they are pinned."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from posttrain.errors import ModelError
from posttrain.model_reference import resolve_model
from posttrain.store.digests import DigestCache


@pytest.fixture
def digests(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "digests.sqlite")


def test_a_folder_is_known_by_its_content(
    tiny_model: Path, tmp_path: Path, digests: DigestCache
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    original = resolve_model(str(tiny_model), digests)
    assert original.kind == "folder"
    assert resolve_model(str(copy), digests).digest == original.digest
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert resolve_model(str(copy), digests).digest != original.digest


def test_notes_beside_the_weights_change_nothing(
    tiny_model: Path, tmp_path: Path, digests: DigestCache
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (copy / "NOTES.md").write_text("mine")
    assert resolve_model(str(copy), digests).digest == (
        resolve_model(str(tiny_model), digests).digest
    )


def test_pickled_weights_are_refused(
    tiny_model: Path, tmp_path: Path, digests: DigestCache
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        resolve_model(str(copy), digests)


def test_a_gguf_file_by_path_by_scheme_and_by_package(
    tmp_path: Path, digests: DigestCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").touch()
    file = package / "weights.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    references = [
        str(file),
        f"gguf:{file}",
        "package:some-model",
        "package:some_model/weights.gguf",
    ]
    found = {resolve_model(reference, digests) for reference in references}
    assert [(item.kind, item.location) for item in found] == [("gguf", str(file))]
    assert "some_model" not in sys.modules  # finding a file runs none of the package's code


def test_a_hub_model_is_pinned_to_what_the_cache_holds_when_offline(
    tmp_path: Path, digests: DigestCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    pinned = resolve_model("owner/name", digests)
    assert (pinned.kind, pinned.revision) == ("hub", "a" * 40)
    assert resolve_model(f"owner/name@{'a' * 40}", digests) == pinned
    with pytest.raises(ModelError, match="the Hub cannot be reached"):
        resolve_model("owner/other", digests)


@pytest.mark.parametrize(
    "reference", ["nothing", "./missing", "gguf:missing.gguf", "package:no_such"]
)
def test_a_reference_to_nothing_says_what_to_write(reference: str, digests: DigestCache) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(reference, digests)
    assert (
        "missing" in str(caught.value)
        or "folder" in str(caught.value)
        or ("pip install" in str(caught.value))
    )
