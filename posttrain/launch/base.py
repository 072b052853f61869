"""What is started, and what anything that starts it must do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from posttrain.events import Event
from posttrain.stages.program import StageResult


@dataclass(frozen=True)
class Program:
    """A stage's program and how it is to be run."""

    module: str
    """Module run as `python -m MODULE STAGE_DIR`."""
    stage_dir: Path
    """The stage's work directory; see `posttrain.stages.program` for what it holds."""
    num_processes: int = 1
    """Ranks on this machine; torchrun starts them when there is more than one."""
    nodes: int = 1
    """Machines, with as many ranks on each."""
    rendezvous: str | None = None
    """`HOST:PORT` where several machines meet; needed when there are several."""
    torchrun: bool = False
    """Whether torchrun starts even a single rank, which DeepSpeed and FSDP need."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables on top of this process's own."""
    grace_s: float = 30.0
    """Seconds between TERM and KILL, for writing a checkpoint."""
    keep_fds: tuple[int, ...] = ()
    """Descriptors kept open until no process of the program is left, such as a stage's `flock`."""
    name: str = ""
    """What errors call the stage. Default: the last part of the module's name."""

    @property
    def stage(self) -> str:
        """The stage's name, for messages."""
        return self.name or self.module.rpartition(".")[2]

    @property
    def has_ranks(self) -> bool:
        """Whether torchrun stands between the launcher and the program."""
        return self.torchrun or self.num_processes * self.nodes > 1

    @property
    def log(self) -> Path:
        """Everything the program prints."""
        return self.stage_dir / "log.txt"


class Launcher(Protocol):
    """Runs a program to its end, here or elsewhere."""

    def run(self, program: Program, on_event: Callable[[Event], None]) -> StageResult:
        """Run a program and pass on its events while it works.

        Whatever ends this call, an exception of the caller's own included, no process of the
        program is left when it returns.

        Raises:
            StageFailed: the program ended with an error.
            StageInterrupted: somebody else stopped the program.
        """
        ...
