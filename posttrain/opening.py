"""Opening a recipe: everything that can be wrong is found before the first stage starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.building import build_pipeline
from posttrain.data.formats import FAMILIES
from posttrain.errors import (
    DataError,
    ModelError,
    PosttrainError,
    Problem,
    RecipeError,
    StoreError,
    UsageError,
)
from posttrain.evaluate.python_docs_task import TASKS
from posttrain.finding import find_start
from posttrain.home import Home
from posttrain.model_reference import ARTIFACT, ModelReference, resolve_model
from posttrain.models import has_chat_template
from posttrain.pipeline import Pipeline, Rows
from posttrain.recipe import (
    EvaluateConfig,
    GateConfig,
    JudgeConfig,
    MixConfig,
    PrepareConfig,
    PretrainConfig,
    Recipe,
    RegisterConfig,
    RowFamily,
    StageConfig,
    TrainingConfig,
)
from posttrain.recipe.load import load_recipe
from posttrain.store import Artifact, Store
from posttrain.train.sharding import config_problems

if TYPE_CHECKING:
    from posttrain.registry import Champion


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
    problems += _sharding_problems(recipe)
    champions = _champions(recipe, problems)
    try:
        pipeline = build_pipeline(recipe, model, rows, store.digests, str(file), champions)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems, file)
    return pipeline


def _open_model(recipe: Recipe, store: Store, problems: list[Problem]) -> ModelReference | Artifact:
    try:
        if recipe.model.startswith(ARTIFACT):
            return find_start(recipe.model.removeprefix(ARTIFACT), store)
        model = resolve_model(recipe.model, store.digests)
    except (ModelError, UsageError, StoreError) as error:
        problems.append(Problem("model", str(error)))
        return ModelReference("folder", recipe.model, "")
    chats = any(_writes_chats(stage) for stage in recipe.stages)
    if chats and model.kind == "folder" and not has_chat_template(Path(model.location)):
        message = f"{model.location} has no chat template, so chats cannot be rendered for it"
        fix = "start from an instruction-tuned model, or add a chat_template.jinja to the folder"
        problems.append(Problem("model", message, fix))
    return model


def _champions(recipe: Recipe, problems: list[Problem]) -> dict[str, Champion]:
    """The present champions of the registered models that the gates look at."""
    gates = [stage for stage in recipe.stages if isinstance(stage, GateConfig)]
    registers = [stage.name for stage in recipe.stages if isinstance(stage, RegisterConfig)]
    names = dict.fromkeys([*(gate.champion for gate in gates if gate.champion), *registers])
    if not names or all(gate.against_champion == "ignore" for gate in gates):
        return {}
    from posttrain.registry import find_champion

    champions: dict[str, Champion] = {}
    for name in names:
        try:
            champion = find_champion(name, Home.find())
        except PosttrainError as error:
            problems.append(Problem("gate.champion", str(error)))
            continue
        if champion is not None:
            champions[name] = champion
    return champions


def _writes_chats(stage: StageConfig) -> bool:
    """Whether a stage reads rows that the model's chat template has to write.

    A stage that asks prompts may be given documents, which are prompts as they are: then its
    preflight finds out.
    """
    return isinstance(stage, TrainingConfig) and not {stage.family, *stage.also_reads} & {
        "documents"
    }


def _open_datasets(recipe: Recipe, store: Store, problems: list[Problem]) -> dict[str, Rows]:
    """Every dataset with the digest of its content.

    One that cannot be opened is there as well, with an empty digest: the order of the stages is
    checked all the same, and the problem found here keeps the pipeline from running.
    """
    from posttrain.data.check import check_dataset
    from posttrain.data.sources import pin_revision, source_digest

    rows: dict[str, Rows] = {}
    families: dict[str, RowFamily | None] = {}
    for name, spec in recipe.datasets.items():
        rows[name] = Rows(name, spec, digest="")
        family, found = check_dataset(name, spec, None)
        families[name] = family
        found += _family_problems(recipe, name, family)
        problems += found + _cleaning_problems(recipe, name, family)
        if found:
            continue
        try:
            pinned = pin_revision(spec)
            rows[name] = Rows(name, pinned, source_digest(pinned, store.digests))
        except DataError as error:
            problems.append(Problem(f"datasets.{name}.source", str(error)))
    problems += _mix_problems(recipe, families)
    problems += _test_set_problems(recipe, families)
    problems += _judge_problems(recipe, families)
    return rows


def _family_problems(recipe: Recipe, dataset: str, family: RowFamily | None) -> list[Problem]:
    """Rows that a stage cannot read; one problem for all stages that need the same."""
    problems: list[Problem] = []
    for stage in recipe.stages:
        if not isinstance(stage, TrainingConfig) or dataset not in _rows_of(recipe, stage):
            continue
        wanted = (stage.family, *sorted(stage.also_reads))
        if family is None or family in wanted:
            continue
        formats = ", ".join(name for name, of in FAMILIES.items() if of in wanted)
        problem = Problem(
            f"datasets.{dataset}.format",
            f"its rows are {family}, but the stage that uses it needs {' or '.join(wanted)}",
            f"use a dataset in one of these formats: {formats}",
        )
        if problem not in problems:
            problems.append(problem)
    return problems


def _rows_of(recipe: Recipe, stage: TrainingConfig) -> tuple[str, ...]:
    """Names under `datasets` of all that a stage trains on."""
    names = recipe.made_of(stage.dataset)
    if isinstance(stage, PretrainConfig) and stage.replay is not None:
        names += recipe.made_of(stage.replay.dataset)
    return names


def _cleaning_problems(recipe: Recipe, dataset: str, family: RowFamily | None) -> list[Problem]:
    """Quality rules are for one kind of rows and would throw away half of another."""
    problems = []
    for position, stage in enumerate(recipe.stages):
        if not isinstance(stage, PrepareConfig) or stage.dataset != dataset or family is None:
            continue
        where = f"stages[{position}].prepare"
        if stage.document_quality is not None and family != "documents":
            message = f"these rules are for documents, and `{dataset}` holds {family}"
            problems.append(Problem(f"{where}.document_quality", message, "use `answer_quality`"))
        if stage.answer_quality is not None and family == "documents":
            message = f"these rules are for answers, and `{dataset}` holds documents"
            problems.append(Problem(f"{where}.answer_quality", message, "use `document_quality`"))
    return problems


def _mix_problems(recipe: Recipe, families: Mapping[str, RowFamily | None]) -> list[Problem]:
    """A mix is of one kind of rows. What is not known yet (a Hub dataset's) is checked later."""
    problems = []
    for position, stage in enumerate(recipe.stages):
        if not isinstance(stage, MixConfig):
            continue
        known = [(name, families.get(name)) for name in recipe.made_of(stage.name)]
        found = [(name, family) for name, family in known if family is not None]
        for name, family in found[1:]:
            if family != found[0][1]:
                message = f"`{found[0][0]}` holds {found[0][1]} and `{name}` holds {family}"
                fix = "mix datasets of one kind, and write a mix for each kind"
                problems.append(Problem(f"stages[{position}].mix", message, fix))
                break
    return problems


def _test_set_problems(recipe: Recipe, families: Mapping[str, RowFamily | None]) -> list[Problem]:
    """A test set needs prompts with reference answers."""
    return [
        Problem(
            f"stages[{position}].evaluate.test_sets[{number}].dataset",
            f"`{tests.dataset}` holds {families[tests.dataset]}, and a test set needs chats: "
            "prompts with reference answers",
            "use rows of prompt and completion, Alpaca, ShareGPT or messages",
        )
        for position, stage in enumerate(recipe.stages)
        if isinstance(stage, EvaluateConfig)
        for number, tests in enumerate(stage.test_sets)
        if families.get(tests.dataset) not in (None, "chats")
    ]


def _judge_problems(recipe: Recipe, families: Mapping[str, RowFamily | None]) -> list[Problem]:
    """A judge needs prompts, and an endpoint its key."""
    problems = []
    for position, stage in enumerate(recipe.stages):
        if not isinstance(stage, JudgeConfig):
            continue
        where = f"stages[{position}].judge"
        if stage.dataset is not None and families.get(stage.dataset) == "documents":
            message = f"`{stage.dataset}` holds documents, which are no prompts"
            problems.append(Problem(f"{where}.dataset", message, "name a dataset of chats"))
        key = stage.by.endpoint.api_key_env if stage.by.endpoint else None
        if key is not None and not os.environ.get(key):
            message = f"the environment variable {key} is not set"
            fix = "set it to the endpoint's key, or write `api_key_env: null` where none is needed"
            problems.append(Problem(f"{where}.by.endpoint.api_key_env", message, fix))
    return problems


def _benchmark_problems(recipe: Recipe) -> list[Problem]:
    """Our own tasks ask about the objects of a built-in dataset, so they need one."""
    problems = []
    built_in = {
        name
        for name, spec in recipe.datasets.items()
        if isinstance(spec.source, str) and spec.source.startswith("builtin:python-docs/")
    }
    trained = [stage.dataset for stage in recipe.stages if isinstance(stage, TrainingConfig)]
    for position, stage in enumerate(recipe.stages):
        if not isinstance(stage, EvaluateConfig):
            continue
        ours = [task for task in stage.tasks if task in TASKS]
        dataset = stage.dataset or (trained[-1] if trained else None)
        if ours and (dataset is None or built_in.isdisjoint(recipe.made_of(dataset))):
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


def _sharding_problems(recipe: Recipe) -> list[Problem]:
    """DeepSpeed files are read before the first stage starts."""
    return [
        problem
        for position, stage in enumerate(recipe.stages)
        if isinstance(stage, TrainingConfig) and stage.launch.sharding is not None
        for problem in config_problems(
            stage.launch.sharding, f"stages[{position}].{stage.stage}.launch.sharding"
        )
    ]
