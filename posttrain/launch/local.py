"""Runs a stage's program on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.events import Event, EventReader, EventWriter, Failure
from posttrain.launch.base import Program
from posttrain.launch.leftovers import kill_leftovers
from posttrain.launch.outcome import Ending, result_or_error
from posttrain.launch.reaper import clear_status, read_status
from posttrain.launch.torchrun import command_of, environment_of, how_to_join
from posttrain.stages.program import StageResult

_MARGIN_S = 5.0
"""Beyond the grace period, for the reaper to kill what is left and to report."""


@dataclass(frozen=True)
class LocalLauncher:
    """Runs programs on this machine, as the first of several where a program wants more."""

    poll_s: float = 0.2
    """Seconds between two looks at the events."""

    def run(self, program: Program, on_event: Callable[[Event], None]) -> StageResult:
        """See `run_to_end`."""
        return run_to_end(program, on_event, self.poll_s)


def run_to_end(
    program: Program, on_event: Callable[[Event], None], poll_s: float = 0.2
) -> StageResult:
    """Run a program, pass on its events while it works, and return its result.

    Only one run of a stage at a time: hold the stage's lock, and name its descriptor in
    `program.keep_fds` so that a killed run does not free it before its program is gone.

    Args:
        program: What to run. Its log and its events are appended to those of earlier attempts.
        on_event: Called with every event of this attempt, of all ranks, in this thread.
        poll_s: Seconds between two looks at the events.

    Raises:
        StageFailed: the program ended with an error. The message is the program's own, or what
            its exit code and log tell.
        StageInterrupted: somebody else stopped the program.
        BaseException: whatever was raised here meanwhile (Ctrl-C, a cancelled flow, an error in
            `on_event`), once the program has been stopped.
    """
    kill_leftovers(program.stage_dir)
    attempt = _begin_attempt(program)
    if program.nodes > 1:
        EventWriter(program.stage_dir / "events.jsonl").phase(how_to_join(program))
    # A pair of sockets is a pipe whose ends close themselves on any way out of this block.
    alive, watched = socket.socketpair()
    with alive, watched:
        reaper = start_reaper(program, watched.fileno())
        try:
            errors = _follow(reaper, attempt.events, on_event, poll_s)
        except BaseException:
            alive.close()
            # A second Ctrl-C raises in here and so ends the grace period.
            _has_ended(reaper, program.grace_s + _MARGIN_S)
            raise
        finally:
            _kill_what_is_left(reaper, program)
    return result_or_error(
        program,
        Ending(
            status=read_status(program.stage_dir),
            reaper_returncode=reaper.returncode,
            errors=tuple(errors),
            log_offset=attempt.log_offset,
        ),
    )


@dataclass(frozen=True)
class _Attempt:
    """Where this attempt begins in files that earlier attempts wrote, too."""

    events: EventReader
    log_offset: int


def _begin_attempt(program: Program) -> _Attempt:
    clear_status(program.stage_dir)
    (program.stage_dir / "result.json").unlink(missing_ok=True)
    events = program.stage_dir / "events.jsonl"
    _finish_last_line(events)
    return _Attempt(EventReader(events, offset=_size(events)), log_offset=_size(program.log))


def start_reaper(
    program: Program, alive_fd: int, folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start the process that runs the program and cleans up behind it.

    Args:
        program: What it runs.
        alive_fd: One end of a pipe; the program is stopped when the other end closes.
        folder: Where it leaves log and status. Default: the stage's work directory.
    """
    folder = folder or program.stage_dir
    command = [sys.executable, "-m", "posttrain.launch.reaper"]
    command += ["--stage-dir", str(folder.resolve())]
    command += ["--alive-fd", str(alive_fd), "--parent-pid", str(os.getpid())]
    command += ["--grace-s", str(program.grace_s)]
    command += ["--has-ranks"] if program.has_ranks else []
    with (folder / program.log.name).open("ab") as log:
        return subprocess.Popen(
            [*command, "--", *command_of(program)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment_of(program),
            pass_fds=(alive_fd, *program.keep_fds),
            # Ctrl-C in a terminal reaches the whole group: only this process is to have it.
            start_new_session=True,
        )


def _follow(
    reaper: subprocess.Popen[bytes],
    events: EventReader,
    on_event: Callable[[Event], None],
    poll_s: float,
) -> list[Failure]:
    """Pass events on until the reaper has ended; return the errors among them."""
    errors: list[Failure] = []
    ended = False
    while not ended:
        ended = _has_ended(reaper, poll_s)
        # Read after looking: what was written before the end is then never missed.
        for event in events.read():
            if isinstance(event, Failure):
                errors.append(event)
            on_event(event)
    return errors


def _has_ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill_what_is_left(reaper: subprocess.Popen[bytes], program: Program) -> None:
    """See to the end of a program whose reaper was killed or is late; else nothing is left."""
    kill_leftovers(program.stage_dir)
    if not _has_ended(reaper, _MARGIN_S):
        reaper.kill()
        reaper.wait()


def _finish_last_line(path: Path) -> None:
    """End a line that a killed attempt left half written, or the next event would continue it."""
    if _size(path) == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
