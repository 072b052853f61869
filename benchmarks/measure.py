"""Runs a program and says what it cost: wall and CPU time, and the memory of all its processes."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_EVERY_S = 0.2


@dataclass(frozen=True)
class Cost:
    """What one run of a program took."""

    wall_s: float
    """From its start to its end: interpreter, imports and all."""
    cpu_s: float
    """User and system time of it and of all processes that it waited for."""
    peak_bytes: int
    """Highest sum of PSS (proportional set size) over its processes; 0 where not sampled."""
    peak_anonymous_bytes: int
    """Highest sum without pages of mapped files, which the kernel can take back."""
    stdout: str


def run(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    sample_memory: bool = False,
) -> Cost:
    """Run a program to its end; exit with its last words if it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        cpu_before = cpu_of_children()
        begin = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=out, stderr=err
        )
        peak = sampled_peak(process) if sample_memory else (0, 0)
        process.wait()
        wall_s = time.perf_counter() - begin
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{out.read()[-2000:]}\n{err.read()[-4000:]}")
        return Cost(wall_s, cpu_of_children() - cpu_before, *peak, out.read())


def cpu_of_children() -> float:
    """Seconds of user and system time of all ended children and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def sampled_peak(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Highest sums of PSS and of anonymous PSS over a process and its descendants."""
    root = psutil.Process(process.pid)
    peak = peak_anonymous = 0
    while process.poll() is None:
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        sizes = [proportional_set_size(member.pid) for member in family]
        peak = max(peak, sum(size for size, _ in sizes))
        peak_anonymous = max(peak_anonymous, sum(size for _, size in sizes))
        time.sleep(SAMPLE_EVERY_S)
    return peak, peak_anonymous


def proportional_set_size(pid: int) -> tuple[int, int]:
    """PSS of a process in bytes, and the part of it that is backed by no file."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0, 0
    kibibytes = {name: int(value) for name, value, *_ in map(str.split, lines)}
    return kibibytes.get("Pss:", 0) * 1024, kibibytes.get("Pss_Anon:", 0) * 1024


def use_cores(count: int) -> None:
    """Keep this process and what it starts to so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }
