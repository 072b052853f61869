"""Measuring one model outside a recipe, through the same stage and the same store."""

from __future__ import annotations

from posttrain.building import build_pipeline
from posttrain.errors import ModelError, UsageError
from posttrain.evaluate.results import EvaluationResults
from posttrain.execute import StageObserver, run_step
from posttrain.hardware import resolve_dtype
from posttrain.model_reference import resolve_model
from posttrain.recipe import EvaluateConfig, Recipe
from posttrain.recipe.evaluate import Samples
from posttrain.store import Artifact, Store


def evaluate_model(
    model: str,
    tasks: tuple[str, ...],
    *,
    offline_root: str | None,
    limit: int | None,
    store: Store,
    observer: StageObserver,
) -> tuple[EvaluationResults, Artifact]:
    """Results of a model on lm-eval tasks, from the store where they are there already.

    Raises:
        UsageError: no tasks, or the model reference means nothing.
        StageFailed: the evaluation failed.
    """
    if not tasks:
        raise UsageError("--tasks: name at least one task, such as mmlu")
    config = EvaluateConfig(
        tasks=tasks,
        offline_root=offline_root,
        limit=limit,
        samples=Samples(count=0),
        dtype=resolve_dtype("auto"),
    )
    try:
        reference = resolve_model(model, store.digests)
    except ModelError as error:
        raise UsageError(str(error)) from error
    recipe = Recipe(name="evaluate", model=model, stages=(config,))
    pipeline = build_pipeline(recipe, reference, {}, store.digests)
    done: dict[str, Artifact] = {}
    for step in pipeline.steps:
        done[step.name] = run_step(pipeline.bind(step, done), store, observer).artifact
    artifact = done[pipeline.steps[-1].name]
    return EvaluationResults.load(artifact.path), artifact
