"""Garbage collection: what nothing needs any more goes, and nothing else."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from posttrain.store.locks import exclusive
from posttrain.store.manifest import Artifact, now
from posttrain.store.store import Store

CACHE_LOCK = "lock"
"""File in a folder of the cache: held by whoever writes or removes files beside it."""


@dataclass(frozen=True)
class Garbage:
    """A folder, or a file of the cache, that nothing needs, and the space it takes."""

    path: Path
    size: int
    """Bytes."""
    reason: str
    used: float | None = None
    """For a file of the cache: when it was last used, as it goes only if it has not been since."""


def find_garbage(
    store: Store, *, keep_runs: int = 10, keep_days: float = 7.0, needed: Iterable[str] = ()
) -> list[Garbage]:
    """What can go: artifacts, abandoned work, damaged leftovers and remembered answers.

    Kept are: what the last `keep_runs` runs of each recipe used, what was made (of the cache: used)
    within `keep_days`, what `needed` names (fingerprints behind registered models and aliases), all
    that those were made from, and whatever somebody is working on.
    """
    oldest = now() - timedelta(days=keep_days)
    artifacts = {artifact.fingerprint: artifact for artifact in store.artifacts()}
    young = {
        fingerprint
        for fingerprint, artifact in artifacts.items()
        if artifact.manifest.created >= oldest
    }
    kept = _with_ancestors(artifacts, young | set(needed) | _of_recent_runs(store, keep_runs))
    garbage = [
        Garbage(artifact.path, _folder_size(artifact.path), "no run or model needs it")
        for fingerprint, artifact in artifacts.items()
        if fingerprint not in kept and not store.is_locked(fingerprint)
    ]
    return garbage + _leftovers(store, oldest.timestamp()) + _unused(store, oldest.timestamp())


def collect(store: Store, garbage: Iterable[Garbage]) -> int:
    """Remove what `find_garbage` found; returns the bytes freed.

    Each folder is renamed first, so that a kill in between leaves no half artifact in place.
    """
    freed = 0
    for item in garbage:
        if item.used is not None:
            freed += _forget(item)
            continue
        with store.lock(item.path.name):
            if not item.path.exists():
                continue
            target = item.path
            if item.path.parent.name != "aside":
                target = store.set_aside(item.path)
            shutil.rmtree(target, ignore_errors=True)
            freed += item.size
    return freed


def _of_recent_runs(store: Store, keep_runs: int) -> set[str]:
    by_recipe: dict[str, list[tuple[str, list[str]]]] = {}
    for file in (store.root / "runs").glob("*.json"):
        try:
            record = json.loads(file.read_bytes())
            entry = (str(record["started"]), [str(item) for item in record["artifacts"].values()])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        by_recipe.setdefault(str(record.get("recipe")), []).append(entry)
    recent: set[str] = set()
    for runs in by_recipe.values():
        for _, fingerprints in sorted(runs, reverse=True)[:keep_runs]:
            recent.update(fingerprints)
    return recent


def _with_ancestors(artifacts: dict[str, Artifact], roots: set[str]) -> set[str]:
    """The roots and all that they were made from."""
    kept: set[str] = set()
    waiting = list(roots)
    while waiting:
        fingerprint = waiting.pop()
        if fingerprint in kept or fingerprint not in artifacts:
            continue
        kept.add(fingerprint)
        inputs = artifacts[fingerprint].manifest.inputs.values()
        waiting += [record.fingerprint for record in inputs if record.fingerprint]
    return kept


def _leftovers(store: Store, oldest: float) -> list[Garbage]:
    """Work that nobody resumed and damaged artifacts that nobody looked at."""
    found = []
    for name, reason in (("work", "abandoned work"), ("aside", "damaged or replaced artifact")):
        folder = store.root / name
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.stat().st_mtime < oldest and not store.is_locked(path.name):
                found.append(Garbage(path, _folder_size(path), reason))
    return found


def _unused(store: Store, oldest: float) -> list[Garbage]:
    """Files of the cache that nobody has read or written lately."""
    found = []
    for path in sorted(store.cache.rglob("*")):
        if path.name == CACHE_LOCK or not path.is_file():
            continue
        with contextlib.suppress(FileNotFoundError):  # somebody's temporary file
            status = path.stat()
            if status.st_mtime < oldest:
                reason = "remembered, and not used lately"
                found.append(Garbage(path, status.st_size, reason, used=status.st_mtime))
    return found


def _forget(item: Garbage) -> int:
    """Remove a file of the cache unless somebody has used it; returns the bytes freed."""
    with exclusive(item.path.parent / CACHE_LOCK):
        if not item.path.exists() or item.path.stat().st_mtime != item.used:
            return 0
        item.path.unlink()
    return item.size


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
