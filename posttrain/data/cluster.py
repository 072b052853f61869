"""Near-duplicate removal beyond one machine, on datatrove's executors.

The tasks themselves (`cluster_stages.py`) are functions of a job and a number, and know nothing
of what runs them. Which rows go does not depend on the number of workers, machines or partitions,
and equals what `posttrain.data.near_duplicates` does in one process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from posttrain.data import cluster_stages as stages
from posttrain.data import kernels
from posttrain.data.cluster_job import DedupJob
from posttrain.errors import DataError, UsageError

__all__ = ["DedupJob", "Stage", "Step", "Summary", "pipelines", "run_local", "run_slurm", "summary"]

_STAGES: dict[str, tuple[Callable[[DedupJob, int], None], str]] = {
    "sketch": (stages.sketch, "shards"),
    "join": (stages.join, "partitions"),
    "sets": (stages.sets, "shards"),
    "verify": (stages.verify, "partitions"),
    "resolve": (stages.resolve, "one"),
    "filter": (stages.filter_shard, "shards"),
}


@dataclass(frozen=True)
class Step:
    """One stage as a step of a datatrove pipeline, which takes any callable. Can be pickled."""

    job: DedupJob
    name: str

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Do one task.

        Args:
            data: What an earlier step yields; there is none.
            rank: Number of the task, from 0.
            world_size: Number of the stage's tasks.

        Raises:
            DataError: an input cannot be used, or an earlier stage has not finished.
        """
        tasks = _tasks(self.job, self.name)
        if data is not None or world_size != tasks:
            raise DataError(f"{self.name}: a pipeline of its own, of {tasks} tasks")
        _STAGES[self.name][0](self.job, rank)


@dataclass(frozen=True)
class Stage:
    """A pipeline of one step; a stage begins when the one before it has finished."""

    name: str
    step: Step
    tasks: int
    logs: Path
    """Folder for datatrove's logs and its marks of finished tasks."""

    @property
    def unfinished(self) -> list[int]:
        """Tasks without datatrove's mark."""
        marks = self.logs / "completions"
        return [task for task in range(self.tasks) if not (marks / f"{task:05d}").exists()]


@dataclass(frozen=True)
class Summary:
    """What became of the rows of all shards."""

    rows: int
    dropped: int
    similar_pairs: int
    uncompared: int
    """Rows that shared a key with so many unlike rows that not all were compared."""


def pipelines(job: DedupJob) -> list[Stage]:
    """The stages of a job, in order, for any of datatrove's executors.

    Takes possession of the work folder.

    Raises:
        DataError: the work folder holds another job's results, or an input cannot be read.
    """
    job.claim()
    return [
        Stage(name, Step(job, name), _tasks(job, name), job.work_folder / "logs" / name)
        for name in _STAGES
    ]


def run_local(job: DedupJob, workers: int = 1) -> Summary:
    """Run all tasks on this machine that no earlier run finished.

    Args:
        job: What to do.
        workers: Processes.

    Raises:
        DataError: an input or the work folder cannot be used.
    """
    import multiprocess
    from datatrove.executor.local import LocalPipelineExecutor

    # Every stage starts workers anew; importing these in each would take seconds a stage.
    preload = ["datatrove.executor.local", "posttrain.data.cluster", "pyarrow.json"]
    preload += ["posttrain.data.compiled"] if kernels.use_numba() else []
    multiprocess.get_context("forkserver").set_forkserver_preload(preload)
    for stage in pipelines(job):
        executor = LocalPipelineExecutor(
            pipeline=[stage.step],
            tasks=stage.tasks,
            workers=min(workers, stage.tasks),
            logging_dir=str(stage.logs),
        )
        with _main_unseen():
            executor.run()
    return summary(job)


def run_slurm(
    job: DedupJob,
    *,
    partition: str,
    time: str,
    workers: int = -1,
    memory_gb: int = 4,
    resolve_memory_gb: int | None = None,
    qos: str | None = None,
    env_command: str | None = None,
    sbatch_args: dict[str, str] | None = None,
) -> None:
    """Submit a chain of Slurm job arrays, of the tasks that no earlier run finished; do not wait.

    Args:
        job: What to do; its folders must be on a file system that all nodes share.
        partition: Slurm partition.
        time: Limit of a task, such as `04:00:00`.
        workers: Tasks of a stage that run at once; -1 for as many as Slurm gives.
        memory_gb: Of a task.
        resolve_memory_gb: Of the one task of `resolve`, which alone sees all similar pairs; as
            the others by default.
        qos: Slurm quality of service.
        env_command: Shell line that makes this environment's programs available, such as
            `source /shared/venv/bin/activate`.
        sbatch_args: Further options of sbatch, by long name.

    Raises:
        UsageError: Slurm cannot be used from here.
        DataError: an input or the work folder cannot be used.
    """
    from datatrove.executor.slurm import SlurmPipelineExecutor

    if shutil.which("sbatch") is None:
        raise UsageError("run_slurm: no `sbatch` here; call it on a login node, or use run_local")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UsageError("run_slurm: called within a Slurm job array; call it on a login node")
    # A failed task ends the stages after it; else they would stay queued for ever.
    options = {"kill-on-invalid-dep": "yes", **(sbatch_args or {})}
    memory = {"resolve": resolve_memory_gb or memory_gb}
    before = None
    for stage in pipelines(job):
        before = SlurmPipelineExecutor(
            pipeline=[stage.step],
            tasks=stage.tasks,
            workers=workers,
            time=time,
            partition=partition,
            mem_per_cpu_gb=memory.get(stage.name, memory_gb),
            qos=qos,
            env_command=env_command,
            sbatch_args=options,
            job_name=f"dedup-{stage.name}",
            logging_dir=str(stage.logs),
            depends=before,
        )
        before.run()


def summary(job: DedupJob) -> Summary:
    """What a finished job did.

    Raises:
        DataError: the job is not finished, or an output is gone.
    """
    for stage in pipelines(job):
        if stage.unfinished:
            tasks = ", ".join(map(str, stage.unfinished[:5]))
            more = " and more" if len(stage.unfinished) > 5 else ""
            logs = stage.logs / "logs"
            raise DataError(f"{stage.name}: not finished: task {tasks}{more}; logs: {logs}")
    for path in job.paths:
        out = job.out_folder / path.name
        if not out.exists():
            marks = job.work_folder / "logs" / "filter"
            raise DataError(f"{out}: gone; delete {marks} and run again to write it")
    return Summary(**json.loads(job.summary.read_text()))


@contextmanager
def _main_unseen() -> Iterator[None]:
    """Keep worker processes from importing the main script: they need nothing of it.

    Where it calls `run_local` outside of a `__main__` guard, each worker would fail as it imports
    it, and the pool would start another for ever.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _tasks(job: DedupJob, stage: str) -> int:
    sizes = {"shards": len(job.paths), "partitions": job.partitions, "one": 1}
    return sizes[_STAGES[stage][1]]
