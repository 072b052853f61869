"""The store: artifacts by fingerprint, work in progress, and who is working on what.

STORE/<kind>/<fingerprint>/     an artifact: its files and manifest.json
.stage/                     how it was made: stage.json, events.jsonl, log.txt
STORE/work/<fingerprint>/       a stage that runs, or was killed and will be resumed
STORE/locks/<fingerprint>.lock  held by whoever works on it
STORE/aside/                    artifacts that were found damaged
STORE/cache/                    what stages remember beside their artifacts, such as single answers
STORE/runs/                     which artifacts each run of a recipe used
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from posttrain.errors import CorruptArtifact, StoreError
from posttrain.recipe.base import ArtifactKind
from posttrain.store import locks
from posttrain.store.digests import DigestCache
from posttrain.store.files import file_sha256, sync_folder, sync_tree, write_json
from posttrain.store.fingerprint import files_digest
from posttrain.store.manifest import MANIFEST, Artifact, FileRecord, Manifest, now

log = logging.getLogger(__name__)

STAGE_FOLDER = ".stage"
"""Where an artifact keeps how it was made. Not part of its content."""

KINDS: tuple[ArtifactKind, ...] = get_args(ArtifactKind)


@dataclass(frozen=True)
class Damage:
    """An artifact whose files are not what its manifest says."""

    path: Path
    reason: str


class Store:
    """A folder of artifacts; on a cluster, a folder on the shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.digests = DigestCache(self.root / "digests.sqlite")

    @property
    def cache(self) -> Path:
        """Folder of what stages remember beside their artifacts; losing it costs time alone."""
        return self.root / "cache"

    # Looking things up

    def find(self, kind: ArtifactKind, fingerprint: str) -> Artifact | None:
        """The artifact, if it is there and undamaged.

        A damaged one is set aside, so that the caller rebuilds it. Files are compared by size
        and by digest, the digest of an unchanged file coming from the cache.
        """
        path = self.path_of(kind, fingerprint)
        if not path.exists():
            return None
        try:
            artifact = self._read(path)
            self._check(artifact, self.digests.file_digest)
        except CorruptArtifact as error:
            log.warning("%s; moved to %s and made again", error, self.set_aside(path))
            return None
        return artifact

    def artifacts(self) -> Iterator[Artifact]:
        """All artifacts with a readable manifest, oldest first."""
        found = []
        for folder in self._folders():
            try:
                found.append(self._read(folder))
            except CorruptArtifact:
                continue
        yield from sorted(found, key=lambda artifact: artifact.manifest.created)

    def verify(self) -> Iterator[tuple[Path, Damage | None]]:
        """Hash every file of every artifact again; yields (path, damage or None)."""
        for folder in self._folders():
            try:
                self._check(self._read(folder), file_sha256)
            except CorruptArtifact as error:
                yield folder, Damage(folder, str(error))
            else:
                yield folder, None

    def path_of(self, kind: ArtifactKind, fingerprint: str) -> Path:
        """Where the artifact is or would be."""
        return self.root / kind / fingerprint

    # Working

    def lock(
        self, fingerprint: str, on_wait: Callable[[], None] | None = None
    ) -> AbstractContextManager[int]:
        """Hold the right to work on a fingerprint; yields the lock's file descriptor."""
        return locks.exclusive(self._lock_path(fingerprint), on_wait)

    def work_folder(self, fingerprint: str) -> Path:
        """The folder a stage works in, with whatever a killed attempt left."""
        folder = self.root / "work" / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def record_files(
        self, output: Path, accounts: Container[str] = frozenset()
    ) -> tuple[FileRecord, ...]:
        """Size and SHA-256 of each file below `output`.

        Args:
            output: a stage's output folder.
            accounts: files that no later stage reads; they stay out of the content digest.

        Raises:
            StoreError: there are none, or one is a link that leads out of the folder.
        """
        records = []
        for path in sorted(output.rglob("*")):
            relative = path.relative_to(output)
            if relative.parts[0] == STAGE_FOLDER or path.is_dir():
                continue
            if path.is_symlink():
                raise StoreError(f"{path}: an artifact holds files, not links")
            name = relative.as_posix()
            records.append(
                FileRecord(
                    path=name,
                    size=path.stat().st_size,
                    sha256=file_sha256(path),
                    content=name not in accounts,
                )
            )
        if not records:
            raise StoreError(f"{output}: the stage wrote nothing")
        return tuple(records)

    def publish(self, work: Path, manifest: Manifest, *, replace: bool = False) -> Artifact:
        """Turn `work/output` into the artifact `manifest` describes; `work` goes away.

        Killed before the rename, the work folder is still there and the artifact is not; killed
        after it, the artifact is there and the leftover work folder is garbage.

        Args:
            work: the stage's work folder.
            manifest: complete, `files` taken from `record_files`.
            replace: put it in the place of an artifact of the same fingerprint.
        """
        output = work / "output"
        _keep_history(work, output / STAGE_FOLDER)
        sync_tree(output)
        write_json(output / MANIFEST, manifest.model_dump(mode="json"))
        target = self.path_of(manifest.kind, manifest.fingerprint)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and replace:
            self.set_aside(target)
        try:
            output.rename(target)
        except OSError as error:
            raise StoreError(f"{target}: cannot be published: {error}") from error
        sync_folder(target.parent)
        for record in manifest.files:
            self.digests.remember(target / record.path, record.sha256)
        shutil.rmtree(work, ignore_errors=True)
        return Artifact(path=target, manifest=manifest)

    def set_aside(self, path: Path) -> Path:
        """Move a damaged artifact out of the way, for a person to look at."""
        aside = self.root / "aside"
        aside.mkdir(parents=True, exist_ok=True)
        stamp = now().strftime("%Y%m%dT%H%M%S")
        target = aside / f"{path.parent.name}-{path.name[:16]}-{stamp}-{os.getpid()}"
        path.rename(target)
        return target

    def record_run(self, run_id: str, record: dict[str, Any]) -> None:
        """Remember which artifacts a run of a recipe used; garbage collection asks."""
        write_json(self.root / "runs" / f"{run_id}.json", record)

    # Inside

    def _folders(self) -> Iterator[Path]:
        for kind in KINDS:
            folder = self.root / kind
            if folder.is_dir():
                yield from sorted(path for path in folder.iterdir() if path.is_dir())

    def _lock_path(self, fingerprint: str) -> Path:
        return self.root / "locks" / f"{fingerprint}.lock"

    def is_locked(self, fingerprint: str) -> bool:
        """Whether somebody works on this fingerprint now."""
        return locks.is_held(self._lock_path(fingerprint))

    def _read(self, path: Path) -> Artifact:
        try:
            manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise CorruptArtifact(f"{path}: {MANIFEST} is missing") from None
        except (OSError, ValidationError, ValueError) as error:
            raise CorruptArtifact(f"{path}: {MANIFEST} cannot be read: {error}") from error
        if (manifest.kind, manifest.fingerprint) != (path.parent.name, path.name):
            raise CorruptArtifact(f"{path}: {MANIFEST} belongs to another artifact")
        contradiction = manifest.disagreement()
        if contradiction:
            raise CorruptArtifact(f"{path}: {contradiction}")
        return Artifact(path=path, manifest=manifest)

    @staticmethod
    def _check(artifact: Artifact, digest: Callable[[Path], str]) -> None:
        for record in artifact.manifest.files:
            path = artifact.path / record.path
            try:
                size = path.stat().st_size
                if size != record.size:
                    raise CorruptArtifact(f"{path}: {size} bytes, not the recorded {record.size}")
                if digest(path) != record.sha256:
                    raise CorruptArtifact(f"{path}: the content changed since it was published")
            except OSError as error:
                raise CorruptArtifact(f"{path}: {error.strerror}") from error


def content_digest(files: tuple[FileRecord, ...]) -> str:
    """The digest of an artifact's content."""
    return files_digest((file.path, file.sha256) for file in files if file.content)


def _keep_history(work: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("stage.json", "events.jsonl", "log.txt"):
        if (work / name).exists():
            shutil.copyfile(work / name, folder / name)
