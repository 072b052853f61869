"""Checkpoints that a killed run goes on from: only those that are wholly on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from posttrain.store.files import sync_tree, write_bytes

_MARKER = "COMPLETE"
_PREFIX = "checkpoint-"


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint complete, once all of its bytes are on disk."""
    sync_tree(checkpoint)
    write_bytes(checkpoint / _MARKER, b"")


def leave_checkpoint(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Write the checkpoint of a step, whole or not at all.

    Args:
        folder: Of all checkpoints.
        step: Optimizer steps, or updates, that were done.
        write: Fills the folder that it is given.
    """
    checkpoint = folder / f"{_PREFIX}{step}"
    temporary = folder / f".{checkpoint.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    sync_tree(temporary)
    shutil.rmtree(checkpoint, ignore_errors=True)
    temporary.rename(checkpoint)
    mark_complete(checkpoint)


def drop_all_but(folder: Path, newest: int, best: int | None) -> None:
    """Delete checkpoints, except so many of the newest and that of the best step."""
    found = sorted(_checkpoints(folder), key=_step)
    for path in found[:-newest]:
        if _step(path) != best:
            shutil.rmtree(path)


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint of the latest step, if there is one."""
    complete = [path for path in _checkpoints(folder) if (path / _MARKER).exists()]
    return max(complete, key=_step, default=None)


def remove_incomplete(folder: Path) -> list[str]:
    """Delete checkpoints that a kill left half written; returns their names."""
    torn = [path for path in _checkpoints(folder) if not (path / _MARKER).exists()]
    for path in torn:
        shutil.rmtree(path)
    return sorted(path.name for path in torn)


def is_last(checkpoint: Path) -> bool:
    """Whether training had ended, by its steps or early, when this checkpoint was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    control = state["stateful_callbacks"]["TrainerControl"]
    return bool(control["args"]["should_training_stop"])


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[len(_PREFIX) :])
