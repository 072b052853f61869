"""The process between a stage's program and whoever runs the stage.

    flow ── pipe ──▶ reaper (a session of its own, child subreaper)
                       └── program, or torchrun
                             └── ranks, each in a session of its own
                                   └── data loader workers, background processes, ...

The flow may be killed at any moment, ranks leave torchrun's process group, and a program may start
processes that outlive it. Linux gives one hold on all of them: a process that has declared itself a
*child subreaper* (prctl(2)) becomes the parent of every descendant whose own parent dies, in
whatever session. So the reaper can always see, and kill, everything that the program started.

It stops the program when the pipe to the flow closes, when the flow is no longer its parent, or on
TERM: TERM to the program, a grace period for a checkpoint, KILL to all that is left. When the
program ends by itself, what it left running is killed at once. Last it writes `status.json`; until
then it keeps every descriptor that it inherited open, among them the stage's lock.

Runs as `python -m posttrain.launch.reaper`; starts in a tenth of a second, so only the standard
library and psutil are imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from posttrain.launch.leftovers import MARK, mark_of
from posttrain.launch.parent import end_with_parent, prctl

_POLL_S = 0.05
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Status:
    """How a program ended, as `status.json` holds it."""

    returncode: int
    """Exit code; -N when signal N killed the program."""
    signal: int | None
    """The signal that killed the program."""
    stopped: bool
    """Whether the reaper was asked to stop the program."""
    killed: int
    """Processes that had to be killed, the program itself included."""


def main() -> None:
    """Run the command to its end and leave none of its processes behind."""
    options = _parse_options()
    # In place before the program exists: from here on no signal or death goes unnoticed.
    stop = _StopRequest(options.alive_fd, options.parent_pid)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    family = _Family(options.command, options.stage_dir, has_ranks=options.has_ranks)

    stopped = _wait_for_end_or_request(family, stop)
    if stopped:
        family.terminate(options.grace_s)
    killed = family.kill()
    code = family.returncode
    assert code is not None, "kill() returns when every process has been waited for"
    status = Status(code, -code if code < 0 else None, stopped, killed)
    _write_status(options.stage_dir, status)


def read_status(stage_dir: Path) -> Status | None:
    """The status that the reaper left, or None when it could not."""
    path = _status_path(stage_dir)
    return Status(**json.loads(path.read_bytes())) if path.exists() else None


def clear_status(stage_dir: Path) -> None:
    """Remove the status of an earlier attempt."""
    _status_path(stage_dir).unlink(missing_ok=True)


class _StopRequest:
    """Whether the program has to end: its run is gone, or somebody asked."""

    def __init__(self, alive_fd: int, parent_pid: int) -> None:
        self._alive_fd = alive_fd
        self._parent_pid = parent_pid
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def came_within(self, seconds: float) -> bool:
        """Wait for a request, but no longer than `seconds`."""
        # Nothing is ever written into the pipe: it becomes readable when its other end closes.
        closed, _, _ = select.select([self._alive_fd], [], [], seconds)
        # A child that the parent forked without exec holds a copy of the other end and keeps it
        # open after the parent's death; the new parent gives that away.
        return self._signalled or bool(closed) or os.getppid() != self._parent_pid

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True


class _Family:
    """The program and every process that descends from it."""

    def __init__(self, command: list[str], stage_dir: Path, *, has_ranks: bool) -> None:
        self._has_ranks = has_ranks
        reaper_pid = os.getpid()
        self._program = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            # The reaper goes unmarked: killing what is marked must not kill who reports it.
            env={**os.environ, MARK: mark_of(stage_dir)},
            preexec_fn=lambda: end_with_parent(reaper_pid),
        )

    @property
    def returncode(self) -> int | None:
        """The program's exit code, -N after signal N, None while it runs."""
        self._reap()
        return self._program.returncode

    def terminate(self, grace_s: float) -> None:
        """Ask the program to end, and give it `grace_s` seconds to write a checkpoint."""
        for process in self._addressees():
            with suppress(psutil.Error):
                process.terminate()
        deadline = time.monotonic() + grace_s
        while self.returncode is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def kill(self) -> int:
        """Kill all that is left until nothing is; return how many processes that took."""
        reaper = psutil.Process()
        killed: set[int] = set()
        while True:
            self._reap()
            # New ones may appear while these die; those whose parent died are ours next time.
            descendants = reaper.children(recursive=True)
            if not descendants:
                return len(killed)
            for process in descendants:
                with suppress(psutil.Error):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        process.kill()
                        killed.add(process.pid)
            time.sleep(_POLL_S / 5)

    def _addressees(self) -> list[psutil.Process]:
        """Who is told to end: the program alone, never its data loader workers.

        A loader whose workers die raises in the middle of the checkpoint. That is what happens if
        torchrun is told: it signals each rank's whole process group. Told directly, the ranks
        write their checkpoint and end, and torchrun follows.
        """
        with suppress(psutil.Error):
            program = psutil.Process(self._program.pid)
            ranks = program.children() if self._has_ranks else []
            return ranks or [program]
        return []

    def _reap(self) -> None:
        """Collect the exit codes of dead children, adopted orphans among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._program.pid:
                self._program.returncode = os.waitstatus_to_exitcode(status)


def _wait_for_end_or_request(family: _Family, stop: _StopRequest) -> bool:
    """Whether a request came before the program ended by itself."""
    while family.returncode is None:
        if stop.came_within(_POLL_S):
            return True
    return False


def _write_status(stage_dir: Path, status: Status) -> None:
    # posttrain.store.files does this with a sync, but importing the store takes half a second;
    # a status lost in a power cut is missed by nobody.
    path = _status_path(stage_dir)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(asdict(status)) + "\n", encoding="utf-8")
    draft.replace(path)


def _status_path(stage_dir: Path) -> Path:
    return stage_dir / "status.json"


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="posttrain.launch.reaper", description=__doc__)
    parser.add_argument("--stage-dir", type=Path, required=True)
    parser.add_argument("--alive-fd", type=int, required=True, help="read end of the pipe")
    parser.add_argument("--parent-pid", type=int, required=True, help="who runs the stage")
    parser.add_argument("--grace-s", type=float, required=True, help="seconds from TERM to KILL")
    parser.add_argument("--has-ranks", action="store_true", help="the command is torchrun")
    parser.add_argument("command", nargs="+", help="the program, after --")
    return parser.parse_args()


if __name__ == "__main__":
    main()
