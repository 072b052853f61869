"""The pipeline: from a recipe to a model that may be shipped, or a reason why not."""

from __future__ import annotations

from pathlib import Path

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from posttrain.home import Home
from posttrain.opening import open_pipeline
from posttrain.repair.after_run import next_steps
from posttrain.run import PipelineRun, stage_table_markdown, verdict_of
from tasks import STAGE_TASKS
from tasks.stage import untracked


@flow(name="post-training", persist_result=False)
def post_training(
    recipe: str = "configs/quickstart.yaml",
    overrides: list[str] | None = None,
    from_stage: str | None = None,
) -> State[None]:
    """Run a recipe's stages in order, reusing what the store has, until done or a gate says no.

    Args:
        recipe: The recipe's file.
        overrides: Values to change, each as key=value, such as sft.epochs=2.
        from_stage: Run this stage and all that depends on it again, whatever the store holds.
    """
    home = Home.find()
    pipeline = open_pipeline(Path(recipe), overrides or [], home.store)
    with PipelineRun(home, pipeline, from_stage, flow_run.id) as run:
        for step in pipeline.steps:
            STAGE_TASKS[step.stage](step, run.inputs_of(step), untracked(run))
            if verdict_of(pipeline, run.artifacts) in ("fail", "not enough evidence"):
                break
        create_markdown_artifact(stage_table_markdown(pipeline, run.outcomes), key="stages")
    return _final_state(run, recipe)


def _final_state(run: PipelineRun, recipe: str) -> State[None]:
    """A gate that says no ends the run in a state of its own: nobody ships it by mistake."""
    verdict = verdict_of(run.pipeline, run.artifacts)
    if verdict in ("fail", "not enough evidence"):
        advice = next_steps(run.pipeline, run.artifacts, recipe)
        return Failed(name="Rejected", message="\n".join([f"The gate says: {verdict}.", *advice]))
    return Completed(message="The gate says: pass." if verdict == "pass" else None)
