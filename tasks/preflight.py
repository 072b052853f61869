"""`preflight`: what can be known before the first long step."""

from __future__ import annotations

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from posttrain.execute import Outcome
from posttrain.pipeline import Step
from posttrain.run import PipelineRun
from tasks.stage import run_stage


@task(name="preflight", task_run_name="{step.name}", cache_policy=NO_CACHE, persist_result=False)
def preflight(step: Step, inputs: list[Outcome], run: PipelineRun) -> State[Outcome]:
    """Check on a sample of rows that training will have something to learn."""
    return run_stage(step, inputs, run)
