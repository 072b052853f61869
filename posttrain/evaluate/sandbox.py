"""Runs code that a model wrote, with its tests, where it can do no harm; Linux only.

Each program gets a process of its own with

- no network: a network namespace without any interface, not even loopback;
- no files but Python's standard library and the system's libraries, both read-only, four devices,
  and an empty folder in memory, which is gone afterwards;
- no environment, no open descriptors, nothing on stdin; its output is thrown away;
- no privileges, and no way to gain one; it sees none of the system's other processes;
- limits on computing time, time by the clock, memory, processes, open files and written bytes;
  when time is up everything that it started is killed with it.

Where the system does not allow all of this, nothing is run. `confine.py` is the inside of it.
This is no virtual machine: the program still talks to this system's kernel, and a flaw of the
kernel's is a way out.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import PosttrainError

_CLOCK = 3
"""Time by the clock for each second of computing time: other work on the machine must not make a
right answer wrong."""

_SPARE_S = 10.0
"""After which the one inside is not trusted to keep time."""


class SandboxError(PosttrainError):
    """This system does not allow code to be run safely, so it is not run."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_s: float = 5.0
    """Computing time in seconds; three times as long by the clock."""
    memory_mb: int = 512
    """Address space of each of its processes."""
    processes: int = 8
    """Processes and threads at one time."""
    disk_mb: int = 16
    """Files in its folder, all together; they lie in memory."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    kind: Literal["passed", "failed", "timeout"]
    """`passed` where all of it ran to its end without an exception."""
    message: str
    """Such as `tests.py, line 2: AssertionError: `; empty where it passed."""


def run_program(parts: dict[str, str], limits: Limits) -> Outcome:
    """Run pieces of Python source, one after the other, as one module.

    Args:
        parts: Source by the name that it has in messages, such as `answer.py`. The module's
            `__name__` is `answer`, so that what is meant for the command line does not run.
        limits: What it may use.

    Raises:
        SandboxError: the system does not allow it to be confined.
    """
    with tempfile.TemporaryDirectory(prefix="posttrain-sandbox-") as scratch:
        number = secrets.randbelow(1 << 30)
        job = {
            "scratch": scratch,
            "parts": parts,
            "token": secrets.token_hex(16),
            "number": number,
            "cpu_s": limits.cpu_s,
            "wall_s": limits.cpu_s * _CLOCK,
            "memory_mb": limits.memory_mb,
            "processes": limits.processes,
            "disk_mb": limits.disk_mb,
        }
        said = _start(json.dumps(job), limits.cpu_s * _CLOCK + _SPARE_S)
    if said is None:
        return Outcome("timeout", "did not end in time")
    if "error" in said:
        raise SandboxError(_refusal(said["error"]))
    return Outcome(said["outcome"], said["message"])  # type: ignore[arg-type]


def run_programs(
    programs: Sequence[dict[str, str]],
    limits: Limits,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Outcome]:
    """Run several programs, as many at a time as there are processors for.

    Args:
        programs: As `run_program` takes them.
        limits: Of each.
        tell: Told how many have ended, of how many.

    Raises:
        SandboxError: the system does not allow them to be confined.
    """
    workers = max(1, min(len(os.sched_getaffinity(0)), len(programs)))
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(workers) as pool:
        for outcome in pool.map(lambda parts: run_program(parts, limits), programs):
            outcomes.append(outcome)
            tell(len(outcomes), len(programs))
    return outcomes


def check_sandbox() -> None:
    """Try every wall from the inside, before a night's answers depend on them.

    Raises:
        SandboxError: code cannot be confined here, or one of the walls has a hole.
    """
    if sys.platform != "linux":
        raise SandboxError(_refusal(f"this is {sys.platform}, and namespaces are Linux's"))
    outcome = run_program({"probe.py": _PROBE}, Limits(cpu_s=10))
    if outcome.kind != "passed":
        raise SandboxError(_refusal(f"a wall has a hole: {outcome.message}"))


_PROBE = """
import ctypes, os, socket

def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return
    raise AssertionError(f'{getattr(action, "__name__", action)}{arguments} went through')

refused(socket.create_connection, ('127.0.0.1', 9), 1)
assert [name for _, name in socket.if_nameindex()] in ([], ['lo']), 'there is a network'
refused(open, '/etc/passwd')
refused(open, os.__file__, 'a')
refused(open, '/new', 'w')
refused(os.kill, 1, 15) if os.getuid() else None
assert set(os.environ) == {'HOME', 'TMPDIR'}, 'the environment is not empty'
assert os.listdir('.') == [], 'the folder is not empty'
assert ctypes.CDLL(None).unshare(0x10000000) != 0, 'privileges can be gained in a user namespace'
open('file', 'w').write('written')

def fork_often():
    for _ in range(64):
        if os.fork() == 0:
            import time
            time.sleep(60)

refused(fork_often)
"""


def _start(job: str, patience_s: float) -> dict[str, str] | None:
    """What the confined process says; None where it had to be killed from outside."""
    # The interpreter below the environment: its packages are neither needed nor shown. Hashes of
    # strings are the same every time, and so is the order of sets.
    process = subprocess.Popen(
        [_interpreter(), "-P", "-s", "-S", "-B", str(Path(__file__).with_name("confine.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONHASHSEED": "0"},
        cwd="/",
        start_new_session=True,
        text=True,
    )
    try:
        output, errors = process.communicate(job, timeout=patience_s)
    except subprocess.TimeoutExpired:
        output = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if output is None:
        return None
    try:
        said: dict[str, str] = json.loads(output)
    except ValueError:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"the confined process broke off: {last}"}
    return said


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _refusal(reason: str) -> str:
    return (
        f"code is not run on this machine: {reason}. Code that a model wrote is only run cut off "
        "from network and files, which takes Linux 5.12 and the right to make namespaces: root, "
        "or unprivileged user namespaces. Docker withholds both; Ubuntu 24.04 does unless "
        "kernel.apparmor_restrict_unprivileged_userns is 0. Or remove the metric `code`"
    )
