"""`posttrain advise`: which method to train with, and a recipe to begin with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.advisor.drafting import Draft, Names
    from posttrain.advisor.engine import Advice
    from posttrain.advisor.reading import Found
    from posttrain.advisor.review import Remark
    from posttrain.advisor.situation import Situation
    from posttrain.recipe.recipe import Recipe

_USUAL_SIZE = 7.0
"""Billions of parameters assumed where nothing says how large the model is."""


def advise(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="Recipe to take data, model and goal from."),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=0, help="Labelled examples.")] = None,
    pairs: Annotated[int | None, typer.Option(min=0, help="Preference pairs.")] = None,
    thumbs: Annotated[
        int | None, typer.Option(min=0, help="Answers marked good or bad, one by one.")
    ] = None,
    documents: Annotated[int | None, typer.Option(min=0, help="Raw texts of the domain.")] = None,
    tokens: Annotated[int | None, typer.Option(min=0, help="Tokens of the raw texts.")] = None,
    goal: Annotated[
        list[str] | None,
        typer.Option(
            metavar="G",
            help="format, domain, instructions, alignment or knowledge. May be given several "
            "times.",
        ),
    ] = None,
    gpu_gb: Annotated[
        float | None,
        typer.Option(min=0, help="Memory of one GPU in GiB; 0 for none. Default: this machine's."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs that train together.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: Hub id, folder, gguf:FILE or package:NAME.")
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(metavar="B", help="Size of the model in billions of parameters.")
    ] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Tasks that it shall do.")] = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="Tasks are added, updated and served apart.")
    ] = False,
    structured: Annotated[
        bool, typer.Option("--structured", help="Answers have a complex structure.")
    ] = False,
    quality: Annotated[
        bool, typer.Option("--quality", help="The last points matter more than the cost.")
    ] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Every millisecond of an answer counts.")
    ] = False,
    one_run: Annotated[
        bool, typer.Option("--one-run", help="Learn examples and preferences in a single run.")
    ] = False,
    recipe_only: Annotated[
        bool, typer.Option("--recipe-only", help="Print the recipe alone, to be redirected.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Advise on a method and first settings, from data, goal and hardware, with reasons.

    Give a RECIPE, and it says where that differs from the advice; or give numbers.
    """
    from posttrain.advisor.drafting import draft
    from posttrain.advisor.engine import advise as ask
    from posttrain.advisor.review import review

    wishes = _Wishes(
        rows=rows,
        pairs=pairs,
        thumbs=thumbs,
        documents=documents,
        tokens=tokens,
        goals=tuple(goal or ()),
        gpu_gb=gpu_gb,
        gpus=gpus,
        model=model,
        parameters=parameters,
        tasks=tasks,
    )
    given, found = _read(recipe)
    situation, assumptions = _situation(wishes, found)
    flags = {
        "separate": separate,
        "structured": structured,
        "quality": quality,
        "latency": latency,
        "one_run": one_run,
    }
    situation = _with_flags(situation, flags)
    advice = ask(situation)
    drafted = draft(advice, _names(given, found, model))
    remarks = review(given, advice) if given is not None else ()
    if recipe_only:
        typer.echo(drafted.text, nl=False)
    elif as_json:
        typer.echo(json.dumps(_as_json(advice, drafted, remarks, assumptions), indent=2))
    else:
        _show(_console(), advice, drafted, remarks, assumptions)


@dataclass(frozen=True)
class _Wishes:
    """What stands on the command line."""

    rows: int | None
    pairs: int | None
    thumbs: int | None
    documents: int | None
    tokens: int | None
    goals: tuple[str, ...]
    gpu_gb: float | None
    gpus: int | None
    model: str | None
    parameters: float | None
    tasks: int | None


def _read(file: Path | None) -> tuple[Recipe | None, Found | None]:
    if file is None:
        return None, None
    from posttrain.advisor.reading import read_situation
    from posttrain.recipe.load import load_recipe

    recipe = load_recipe(file)
    return recipe, read_situation(recipe)


def _situation(wishes: _Wishes, found: Found | None) -> tuple[Situation, list[str]]:
    """The situation, and what had to be assumed of it."""
    import psutil

    from posttrain.advisor.situation import Goal, Situation

    assumptions = list(found.assumptions) if found is not None else []
    if wishes.goals:
        assumptions = [note for note in assumptions if "--goal" not in note]
    goals, rows, pairs = _goals(wishes, found, assumptions)
    gpu_gb, gpus = _hardware(wishes, assumptions)
    parameters = _parameters(wishes, found, assumptions)
    try:
        situation = Situation(
            goals=frozenset(cast(Goal, goal) for goal in goals),
            rows=rows,
            pairs=pairs,
            thumbs=wishes.thumbs if wishes.thumbs is not None else found.thumbs if found else 0,
            documents=wishes.documents
            if wishes.documents is not None
            else found.documents
            if found
            else 0,
            tokens=wishes.tokens if wishes.tokens is not None else found.tokens if found else None,
            parameters=parameters,
            gpu_gb=gpu_gb,
            gpus=gpus,
            ram_gb=round(psutil.virtual_memory().total / 2**30, 1),
            tasks=wishes.tasks or (found.tasks if found else 1),
        )
    except ValueError as error:
        from posttrain.errors import UsageError

        raise UsageError(str(error)) from None
    return situation, assumptions
