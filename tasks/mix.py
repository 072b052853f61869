"""`mix`: prepared datasets in, one dataset out."""

from __future__ import annotations

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from posttrain.execute import Outcome
from posttrain.pipeline import Step
from posttrain.run import PipelineRun
from tasks.stage import run_stage


@task(name="mix", task_run_name="{step.name}", cache_policy=NO_CACHE, persist_result=False)
def mix(step: Step, inputs: list[Outcome], run: PipelineRun) -> State[Outcome]:
    """Mix prepared datasets by their shares, with a ledger of every row."""
    return run_stage(step, inputs, run)
