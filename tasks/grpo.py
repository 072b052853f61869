"""`grpo`: group relative policy optimization."""

from __future__ import annotations

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from posttrain.execute import Outcome
from posttrain.pipeline import Step
from posttrain.run import PipelineRun
from tasks.stage import run_stage


@task(name="grpo", task_run_name="{step.name}", cache_policy=NO_CACHE, persist_result=False)
def grpo(step: Step, inputs: list[Outcome], run: PipelineRun) -> State[Outcome]:
    """Learn from the rewards of several answers to each prompt, each measured by its group."""
    return run_stage(step, inputs, run)
