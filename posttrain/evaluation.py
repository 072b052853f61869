"""Measuring one model outside a recipe, through the same stage and the same store."""

from __future__ import annotations

from posttrain.building import build_pipeline
from posttrain.errors import ModelError, UsageError
from posttrain.evaluate.language_models import Backend
from posttrain.evaluate.results import EvaluationResults
from posttrain.execute import StageObserver, run_step
from posttrain.finding import find_start
from posttrain.hardware import resolve_dtype
from posttrain.lineage import Graph
from posttrain.model_reference import ARTIFACT, ModelReference, resolve_model
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
    num_fewshot: int | None = None,
    chat_template: bool = False,
    backend: Backend = "shared_prefixes",
    batch_size: int = 16,
    task_folders: tuple[str, ...] = (),
) -> tuple[EvaluationResults, Artifact]:
    """Results of a model on lm-eval tasks, from the store where they are there already.

    What the model has been asked before, under other tasks or a smaller limit, is not asked again.

    Args:
        model: What `model` of a recipe may be, or a model in the store: a path, a fingerprint's
            first digits, STAGE or RECIPE/STAGE.
        tasks: Names of lm-eval tasks.
        offline_root: Folder laid out like the Hub to read benchmarks from instead of it.
        limit: Items a task; None asks all.
        store: Where models are looked up, and results kept.
        observer: Told of all that happens.
        num_fewshot: Examples before each question; None leaves it to the task.
        chat_template: Wrap questions in the model's chat template.
        backend: Who answers.
        batch_size: Sequences a forward pass.
        task_folders: Folders with further lm-eval task YAMLs.

    Raises:
        UsageError: no tasks, or the model reference means nothing.
        StageFailed: the evaluation failed.
    """
    if not tasks:
        raise UsageError("--tasks: name at least one task, such as mmlu")
    config = EvaluateConfig(
        tasks=tasks,
        task_folders=task_folders,
        offline_root=offline_root,
        limit=limit,
        num_fewshot=num_fewshot,
        chat_template=chat_template,
        backend=backend,
        batch_size=batch_size,
        samples=Samples(count=0),
        dtype=resolve_dtype("auto"),
    )
    recipe = Recipe(name="evaluate", model=model, stages=(config,))
    pipeline = build_pipeline(recipe, _find(model, store), {}, store.digests)
    done: dict[str, Artifact] = {}
    for step in pipeline.steps:
        done[step.name] = run_step(pipeline.bind(step, done), store, observer).artifact
    artifact = done[pipeline.steps[-1].name]
    return EvaluationResults.load(artifact.path), artifact


def _find(reference: str, store: Store) -> ModelReference | Artifact:
    """A model in the store, else one that posttrain did not make."""
    name = reference.removeprefix(ARTIFACT)
    try:
        Graph.read(store).find(name)
    except UsageError as not_there:
        if name != reference:
            raise
        try:
            return resolve_model(reference, store.digests)
        except ModelError as error:
            raise UsageError(f"{error}\nand as a model in the store: {not_there}") from error
    return find_start(name, store)
