"""Writing files so that a kill at any moment leaves the old state or the new."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, sync, and rename over it."""
    with temporary_beside(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """An empty file to write; synced and renamed to `path` at the end, removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync_folder(temporary)  # fsync takes any descriptor, a file's as well
        # mkstemp makes files for their owner alone; a shared store needs the usual mode.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, atomically."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below `folder`, itself included."""
    for path in folder.rglob("*"):
        if (path.is_file() and not path.is_symlink()) or path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
