"""`sft`: supervised fine-tuning."""

from __future__ import annotations

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from posttrain.execute import Outcome
from posttrain.pipeline import Step
from posttrain.run import PipelineRun
from tasks.stage import run_stage


@task(name="sft", task_run_name="{step.name}", cache_policy=NO_CACHE, persist_result=False)
def sft(step: Step, inputs: list[Outcome], run: PipelineRun) -> State[Outcome]:
    """Fine-tune on the assistant's turns of chats, by an adapter or over all weights."""
    return run_stage(step, inputs, run)
