"""Contestants in turns: programs and stages that are run and timed, and ratios of their speeds."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Cost, run

from posttrain.events import EventReader, Progress
from posttrain.hardware import allocator_settings
from posttrain.stages.program import StageInput, StageJob

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """One run of a contestant."""

    done: int
    """Answers or tokens of the steps that are timed."""
    seconds: float
    """Of these steps."""
    whole_s: float
    """Of the process."""
    cpu_s: float
    """Processor time of the process, which other work on the machine hardly changes."""

    @property
    def speed(self) -> float:
        """Answers or tokens a second."""
        return self.done / self.seconds


def rounds(
    contestants: Mapping[str, Callable[[], Run]], count: int, unit: str
) -> dict[str, list[Run]]:
    """All contestants in turns, `count` times."""
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(count):
        for name, contestant in contestants.items():
            runs[name].append(contestant())
            last = runs[name][-1]
            said = f"{name}: {last.speed:,.1f} {unit}, the whole process {last.whole_s:.1f} s"
            print(said, file=sys.stderr, flush=True)
    return runs


def paired(runs: Mapping[str, Sequence[Run]], one: str, other: str) -> list[tuple[Run, Run]]:
    """Two contestants' runs, round by round."""
    return list(zip(runs[one], runs[other], strict=True))


def middle(ratios: Sequence[float]) -> float:
    """The median."""
    return round(statistics.median(ratios), 3)


def spread(ratios: Sequence[float]) -> dict[str, object]:
    """The ratio of every round, and the least, the middle and the greatest."""
    return {
        "least": round(min(ratios), 3),
        "median": middle(ratios),
        "greatest": round(max(ratios), 3),
        "rounds": [round(ratio, 3) for ratio in ratios],
    }


def as_json(runs: Mapping[str, Sequence[Run]], speed: str) -> dict[str, object]:
    """Every run in figures."""
    return {
        name: {
            speed: [round(one.speed, 2) for one in own],
            "counted": [one.done for one in own],
            "seconds": [round(one.seconds, 2) for one in own],
            "whole_process_s": [round(one.whole_s, 1) for one in own],
            "whole_process_cpu_s": [round(one.cpu_s, 1) for one in own],
        }
        for name, own in runs.items()
    }


def stage(
    stage_dir: Path, name: str, config: Mapping[str, object], inputs: Mapping[str, StageInput]
) -> Cost:
    """Run a stage's program as a recipe would have it run."""
    stage_dir.mkdir(exist_ok=True)
    job = StageJob(stage=name, name=name, config={"stage": name, **config}, inputs=dict(inputs))
    (stage_dir / "stage.json").write_text(job.model_dump_json())
    return program([sys.executable, "-m", f"posttrain.stages.{name}", str(stage_dir)])


def program(command: Sequence[str | Path]) -> Cost:
    """Run to the end, in the environment that posttrain gives its programs."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    return run(command, environment={**os.environ, **allocator_settings(), **quiet, **threads})


def events(stage_dir: Path) -> list[Any]:
    """What a program said."""
    return list(EventReader(stage_dir / "events.jsonl").read())


def progress(stage_dir: Path) -> list[Progress]:
    """The ends of its steps or updates."""
    return [event for event in events(stage_dir) if isinstance(event, Progress)]
