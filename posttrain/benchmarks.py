"""Which questions an evaluation asks, as a digest: edited questions are other questions."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from posttrain.evaluate.python_docs_task import TASKS
from posttrain.store.digests import DigestCache
from posttrain.store.fingerprint import combine, files_digest


@dataclass(frozen=True)
class Benchmarks:
    """Everything besides a model and a dataset that an evaluation's numbers depend on."""

    names: tuple[str, ...]
    digest: str


def identify_benchmarks(
    tasks: tuple[str, ...],
    task_folders: tuple[str, ...],
    offline_root: str | None,
    digests: DigestCache,
) -> Benchmarks:
    """Digest of lm-eval's version, of the user's task folders and of the offline root.

    Benchmarks read from the Hub are pinned by lm-eval's own task definitions, no closer: their
    repositories' commits are not in the digest.
    """
    parts = [metadata.version("lm-eval")]
    folders = [*task_folders, *([offline_root] if offline_root else [])]
    parts += [_folder_digest(Path(folder), digests) for folder in folders]
    if any(task in TASKS for task in tasks):
        from posttrain.data.python_docs import generator_digest

        parts += [generator_digest(), sys.version]
    return Benchmarks(tasks, combine(*parts))


def _folder_digest(folder: Path, digests: DigestCache) -> str:
    return files_digest(
        (path.relative_to(folder).as_posix(), digests.file_digest(path))
        for path in folder.rglob("*")
        if path.is_file()
    )
