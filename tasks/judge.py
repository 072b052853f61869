"""`judge`: blind comparison of two models' answers."""

from __future__ import annotations

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from posttrain.execute import Outcome
from posttrain.pipeline import Step
from posttrain.run import PipelineRun
from tasks.stage import run_stage


@task(name="judge", task_run_name="{step.name}", cache_policy=NO_CACHE, persist_result=False)
def judge(step: Step, inputs: list[Outcome], run: PipelineRun) -> State[Outcome]:
    """Ask whose answers are preferred, without saying whose they are."""
    return run_stage(step, inputs, run)
