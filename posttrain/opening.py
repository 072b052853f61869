"""Opening a recipe: everything that can be wrong is found before the first stage starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import DataError, ModelError, Problem, RecipeError
from posttrain.evaluate.python_docs_task import TASKS
from posttrain.model_reference import ModelReference, resolve_model
from posttrain.models import has_chat_template
from posttrain.pipeline import Pipeline, Rows, build_pipeline
from posttrain.recipe import EvaluateConfig, Recipe, RowFamily, SftConfig
from posttrain.recipe.load import load_recipe
from posttrain.store import Store


def open_pipeline(file: Path, overrides: Sequence[str], store: Store) -> Pipeline:
    """Read a recipe, open its datasets, find its model, and lay out its steps.

    Raises:
        RecipeError: with all mistakes of the recipe, of its datasets and of its stages' order.
    """
    recipe = load_recipe(file, overrides)
    problems: list[Problem] = []
    model = _open_model(recipe, store, problems)
    rows = _open_datasets(recipe, store, problems)
    problems += _benchmark_problems(recipe)
    try:
        pipeline = build_pipeline(recipe, model, rows, store.digests, str(file))
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems, file)
    return pipeline


def _open_model(recipe: Recipe, store: Store, problems: list[Problem]) -> ModelReference:
    try:
        model = resolve_model(recipe.model, store.digests)
    except ModelError as error:
        problems.append(Problem("model", str(error)))
        return ModelReference("folder", recipe.model, "")
    chats = any(isinstance(stage, SftConfig) for stage in recipe.stages)
    if chats and model.kind == "folder" and not has_chat_template(Path(model.location)):
        message = f"{model.location} has no chat template, so chats cannot be rendered for it"
        fix = "start from an instruction-tuned model, or add a chat_template.jinja to the folder"
        problems.append(Problem("model", message, fix))
    return model


def _open_datasets(recipe: Recipe, store: Store, problems: list[Problem]) -> dict[str, Rows]:
    """Every dataset with the digest of its content.

    One that cannot be opened is there as well, with an empty digest: the order of the stages is
    checked all the same, and the problem found here keeps the pipeline from running.
    """
    from posttrain.data.check import check_dataset
    from posttrain.data.sources import pin_revision, source_digest

    rows: dict[str, Rows] = {}
    for name, spec in recipe.datasets.items():
        rows[name] = Rows(name, spec, digest="")
        _, found = check_dataset(name, spec, _wanted_family(recipe, name))
        problems += found
        if found:
            continue
        try:
            pinned = pin_revision(spec)
            rows[name] = Rows(name, pinned, source_digest(pinned, store.digests))
        except DataError as error:
            problems.append(Problem(f"datasets.{name}.source", str(error)))
    return rows


def _wanted_family(recipe: Recipe, dataset: str) -> RowFamily | None:
    """What the stages that use a dataset need of it."""
    for stage in recipe.stages:
        if isinstance(stage, SftConfig) and stage.dataset == dataset:
            return "chats"
    return None


def _benchmark_problems(recipe: Recipe) -> list[Problem]:
    """Our own tasks ask about the objects of a built-in dataset, so they need one."""
    problems = []
    built_in = {
        name
        for name, spec in recipe.datasets.items()
        if isinstance(spec.source, str) and spec.source.startswith("builtin:python-docs/")
    }
    trained = [stage.dataset for stage in recipe.stages if isinstance(stage, SftConfig)]
    for position, stage in enumerate(recipe.stages):
        if not isinstance(stage, EvaluateConfig):
            continue
        ours = [task for task in stage.tasks if task in TASKS]
        dataset = stage.dataset or (trained[-1] if trained else None)
        if ours and dataset not in built_in:
            problems.append(
                Problem(
                    f"stages[{position}].evaluate.tasks",
                    f"`{ours[0]}` asks about Python objects, and `{dataset}` has none",
                    "use it with a dataset of source builtin:python-docs/chats",
                )
            )
        for folder in (*stage.task_folders, stage.offline_root):
            if folder is not None and not Path(folder).is_dir():
                where = f"stages[{position}].evaluate"
                problems.append(Problem(where, f"there is no folder `{folder}`"))
    return problems
