"""What the end of a program means: a result, a failure with a cause, or an interruption."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import StageFailed, StageInterrupted
from posttrain.events import Failure
from posttrain.launch.base import Program
from posttrain.launch.reaper import Status
from posttrain.stages.program import StageResult, read_result

_TAIL_LINES = 12
_TAIL_BYTES = 64 * 1024
_STOPPED = {code for sig in (signal.SIGTERM, signal.SIGINT) for code in (-sig, 128 + sig)}
_HINTS = {
    signal.SIGKILL: "; out of memory?",
    signal.SIGSEGV: "; a crash in native code",
    signal.SIGABRT: "; a crash in native code",
    signal.SIGBUS: "; a crash in native code, or no space left in /dev/shm",
    signal.SIGILL: "; a library was built for another CPU",
}

# torchrun always ends with 1; only its log tells of "... failed (exitcode: -9) local_rank: 1
# (pid: 4711) of binary: ..." or "...SignalException: Process 4710 got signal: 15".
_RANK_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) ")
_TORCHRUN_SIGNALLED = re.compile(r"SignalException: Process \d+ got signal: (\d+)$")
_TORCHRUN_LINE = re.compile(r"^[IWE]\d{4} .*torch/distributed/")


@dataclass(frozen=True)
class Ending:
    """Everything known about how an attempt ended."""

    status: Status | None
    """What the reaper reported; None when it was killed."""
    reaper_returncode: int
    errors: tuple[Failure, ...]
    """The attempt's `error` events, of all ranks."""
    log_offset: int
    """Bytes of the log that earlier attempts wrote."""


def result_or_error(program: Program, ending: Ending) -> StageResult:
    """The program's result.

    Raises:
        StageFailed: with the program's last words, or what exit code and log tell instead.
        StageInterrupted: somebody sent TERM or INT.
    """
    result = read_result(program.stage_dir)
    check_ending(program, ending, program.log, done=result is not None)
    assert result is not None, "check_ending has looked"
    return result


def check_ending(program: Program, ending: Ending, log: Path, *, done: bool) -> None:
    """Return if the program did its part.

    Args:
        program: What was run.
        ending: How it ended.
        log: Everything it printed.
        done: Whether it left what it was to leave.

    Raises:
        StageFailed: with the program's last words, or what exit code and log tell instead.
        StageInterrupted: somebody sent TERM or INT.
    """
    code = ending.reaper_returncode if ending.status is None else ending.status.returncode
    lines = _log_lines(log, ending.log_offset)
    rank = None
    if program.has_ranks and code != 0:
        code, rank, lines = _under_torchrun(code, lines)

    if code == 0 and done:
        return
    if code in _STOPPED or (ending.status is not None and ending.status.stopped):
        raise StageInterrupted(
            f"{program.stage}: stopped from outside; its checkpoints are kept and the next run "
            f"goes on from them\n  log: {log}"
        )
    if ending.errors:
        raise StageFailed(program.stage, _first_error(ending.errors).message, log)
    cause = _cause(code)
    if ending.status is None:
        cause = f"the process that watches over the program (posttrain.launch.reaper) {cause}"
    elif rank is not None:
        cause = f"rank {rank} {cause}"
    raise StageFailed(program.stage, cause + _quoted(lines), log)


def _first_error(errors: tuple[Failure, ...]) -> Failure:
    """The last error of the rank that failed first: the others fail because of it."""
    last_of_rank = {error.rank: error for error in errors}
    return min(last_of_rank.values(), key=lambda error: (error.time, error.rank))


def _cause(code: int) -> str:
    if code == 0:
        return "ended without an error and without a result (it never called `finish`)"
    if code > 0:
        return f"ended with exit code {code} before it could say why"
    try:
        killer = signal.Signals(-code)
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"
    return f"was killed by signal {-code} ({killer.name}){_HINTS.get(killer, '')}"


def _under_torchrun(code: int, lines: list[str]) -> tuple[int, int | None, list[str]]:
    """Exit code and number of the rank that failed first, and the log up to then.

    What follows in the log is torchrun's report of some forty lines, which would push the
    program's own out of sight.
    """
    for number, line in enumerate(lines):
        if failed := _RANK_FAILED.search(line):
            before = [line for line in lines[:number] if not _TORCHRUN_LINE.match(line)]
            return int(failed[1]), int(failed[2]), before
        if signalled := _TORCHRUN_SIGNALLED.search(line):
            return -int(signalled[1]), None, lines
    return code, None, lines


def _log_lines(log: Path, offset: int) -> list[str]:
    """The last lines of this attempt that are not blank."""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(offset, size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _quoted(lines: list[str]) -> str:
    if not lines:
        return "; the log is empty"
    return "\n  last lines of the log:" + "".join(f"\n    {line}" for line in lines[-_TAIL_LINES:])
