"""`merge`: an adapter becomes part of its base."""

from __future__ import annotations

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from posttrain.execute import Outcome
from posttrain.pipeline import Step
from posttrain.run import PipelineRun
from tasks.stage import run_stage


@task(name="merge", task_run_name="{step.name}", cache_policy=NO_CACHE, persist_result=False)
def merge(step: Step, inputs: list[Outcome], run: PipelineRun) -> State[Outcome]:
    """Fold an adapter into its base and prove that the logits stay."""
    return run_stage(step, inputs, run)
