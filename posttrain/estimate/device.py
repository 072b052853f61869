"""What this machine computes on, and how much memory that has."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One GPU, or the CPU with the machine's memory."""

    kind: Literal["cuda", "cpu"]
    name: str
    memory: int
    """Bytes of one device: a GPU's own, or the machine's."""
    count: int = 1
    """Devices of this machine: GPUs, or 1 for the CPU, whose memory processes share."""
    host_memory: int = 0
    """Bytes of the machine's memory."""

    @property
    def gib(self) -> float:
        """Memory of one device in GiB."""
        return self.memory / GIB


@cache
def present_device() -> Device:
    """The GPUs that a program started here would see, else the CPU.

    With GPUs of different sizes the smallest counts: every process must fit.
    """
    host = _machine_memory()
    gpus = _gpus()
    if gpus:
        name, memory = min(gpus, key=lambda gpu: gpu[1])
        return Device("cuda", name, memory, len(gpus), host)
    return Device("cpu", cpu_name(), host, 1, host)


@cache
def cpu_name() -> str:
    """The processor as Linux names it; the machine's architecture elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _machine_memory() -> int:
    """Memory of the machine, or what a container may use of it (cgroup version 2)."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _gpus() -> list[tuple[str, int]]:
    """Name and bytes of each GPU, by nvidia-smi: torch would take seconds to import."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    if visible:
        command.append(f"--id={visible}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for line in done.stdout.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdigit():
            gpus.append((name.strip(), int(mebibytes) * 2**20))
    return gpus
