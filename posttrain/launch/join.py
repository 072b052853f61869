"""Taking part in a program that another machine started: `python -m posttrain.launch.join DIR`.

The first machine runs the stage as always, and waits for the others at `launch.rendezvous`. Each of
them runs this on the same folder of the shared store. It starts that machine's ranks, and ends with
the run. Results, events and the end of the stage are the first machine's business; what this
machine's ranks print stays here.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from posttrain.errors import PosttrainError, UsageError
from posttrain.hardware import allocator_settings
from posttrain.launch.base import Program
from posttrain.launch.local import start_reaper
from posttrain.launch.outcome import Ending, check_ending
from posttrain.launch.reaper import read_status
from posttrain.recipe.training import Launch
from posttrain.stages.program import StageJob

_POLL_S = 0.5


def main() -> NoReturn:
    """Join the program of the folder on the command line; exit 0, or 1 with a message."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m posttrain.launch.join STAGE_DIR")
    try:
        join(Path(sys.argv[1]))
    except PosttrainError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    sys.exit(0)


def join(stage_dir: Path) -> None:
    """Start this machine's ranks of a stage and wait for their end.

    Args:
        stage_dir: The stage's work directory, on a file system that all machines share.

    Raises:
        UsageError: no stage waits there, or it wants no other machine.
        StageFailed: the ranks of this machine ended with an error; their log is kept.
        StageInterrupted: the run was stopped.
    """
    take_part(program_to_join(stage_dir))


def take_part(program: Program) -> None:
    """Run this machine's ranks of a program that another machine runs, too.

    When the run is over there, what still works here after the grace period is killed: a rank that
    waits for one that is gone may wait for hours.
    """
    folder = Path(tempfile.mkdtemp(prefix="posttrain-join-"))
    # A pair of sockets is a pipe whose ends close themselves on any way out of this block.
    alive, watched = socket.socketpair()
    with alive, watched:
        reaper = start_reaper(program, watched.fileno(), folder)
        try:
            _wait_for_end(reaper, program)
        finally:
            alive.close()
            reaper.wait()
    ending = Ending(read_status(folder), reaper.returncode, errors=(), log_offset=0)
    check_ending(program, ending, folder / program.log.name, done=True)
    shutil.rmtree(folder)


def program_to_join(stage_dir: Path) -> Program:
    """The program that the first machine runs, as this machine has to run it.

    Raises:
        UsageError: no stage waits there, or it wants no other machine.
    """
    path = stage_dir / "stage.json"
    try:
        job = StageJob.model_validate_json(path.read_bytes())
        launch = Launch.model_validate(job.config.get("launch", {}))
    except (OSError, ValidationError) as error:
        raise UsageError(
            f"{stage_dir}: no stage waits here; the machine that runs the recipe names the folder "
            f"as soon as its stage has started ({error})"
        ) from error
    if launch.nodes == 1:
        raise UsageError(f"{stage_dir}: `{job.name}` runs on one machine (`launch.nodes` is 1)")
    return Program(
        module=f"posttrain.stages.{job.stage}",
        stage_dir=stage_dir,
        num_processes=launch.num_processes,
        nodes=launch.nodes,
        rendezvous=launch.rendezvous,
        torchrun=True,
        env={k: v for k, v in allocator_settings().items() if k not in os.environ},
        name=job.name,
    )


def _wait_for_end(reaper: subprocess.Popen[bytes], program: Program) -> None:
    """Return when the ranks here have ended, or a while after those of the first machine."""
    deadline = float("inf")
    while time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            reaper.wait(_POLL_S)
            return
        # The folder goes away when its stage is published.
        over = not program.stage_dir.exists() or read_status(program.stage_dir) is not None
        if over and deadline == float("inf"):
            deadline = time.monotonic() + program.grace_s


if __name__ == "__main__":
    main()
