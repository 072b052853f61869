"""Finding a stage's processes by a mark in their environment, when nobody else knows them."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "POSTTRAIN_STAGE"
"""Environment variable holding the work directory of the stage that a process belongs to."""

_SETTLE_S = 0.02


def kill_leftovers(stage_dir: Path) -> int:
    """Kill every process on this machine that still works for a stage; return how many.

    The reaper kills all descendants of a program, so this finds something only when the reaper
    itself was killed. Call it while holding the stage's lock: it cannot tell a leftover from the
    program of a run that is alive.
    """
    mark = mark_of(stage_dir)
    killed: set[int] = set()
    while marked := _marked(mark):
        for process in marked:
            with suppress(psutil.Error):
                process.kill()
                killed.add(process.pid)
        time.sleep(_SETTLE_S)
    return len(killed)


def mark_of(stage_dir: Path) -> str:
    """The mark's value for a stage: an absolute path, however the folder was named."""
    return str(stage_dir.resolve())


def _marked(mark: str) -> list[psutil.Process]:
    """Living processes with the mark. Those of other users cannot be read and are not ours."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found
