"""`posttrain advise`: which method to train with, and a recipe to begin with."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from posttrain.advisor.drafting import Draft, Names
    from posttrain.advisor.engine import Advice, Note
    from posttrain.advisor.reading import Found
    from posttrain.advisor.review import Remark
    from posttrain.recipe.recipe import Recipe
    from posttrain.recipe.training import TrainingConfig

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def advise(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="Recipe to take data, model and goal from."),
    ] = None,
    goal: Annotated[
        list[str] | None,
        typer.Option(
            metavar="G",
            help="format, domain, instructions, alignment or knowledge; may be given several "
            "times.",
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=0, help="Labelled examples.")] = None,
    pairs: Annotated[int | None, typer.Option(min=0, help="Preference pairs.")] = None,
    thumbs: Annotated[
        int | None, typer.Option(min=0, help="Answers marked good or bad, one by one.")
    ] = None,
    documents: Annotated[int | None, typer.Option(min=0, help="Raw texts of the domain.")] = None,
    tokens: Annotated[int | None, typer.Option(min=0, help="Tokens of the raw texts.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: Hub id, folder, gguf:FILE or package:NAME.")
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(metavar="B", help="Size of the model in billions of parameters.")
    ] = None,
    gpu_gb: Annotated[
        float | None,
        typer.Option(min=0, help="Memory of one GPU in GiB, 0 for none. Default: this machine's."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs that train together.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Different tasks to be learnt.")] = None,
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

    Give a RECIPE, and its differences from the advice are shown as well; or give numbers.
    """
    from posttrain.advisor.drafting import draft
    from posttrain.advisor.engine import advise as ask
    from posttrain.advisor.gather import Told, gather
    from posttrain.advisor.review import review

    given, found = _read(recipe)
    told = Told(
        goals=tuple(goal or ()),
        rows=rows,
        pairs=pairs,
        thumbs=thumbs,
        documents=documents,
        tokens=tokens,
        model=model,
        parameters=parameters,
        gpu_gb=gpu_gb,
        gpus=gpus,
        tasks=tasks,
        separate=separate,
        structured=structured,
        quality=quality,
        latency=latency,
        one_run=one_run,
    )
    gathered = gather(told, found)
    advice = ask(gathered.situation)
    drafted = draft(advice, _names(given, found, model))
    remarks = review(given, advice) if given is not None else ()
    if recipe_only:
        typer.echo(drafted.text, nl=False)
    elif as_json:
        answer = _as_json(advice, drafted, remarks, gathered.assumptions)
        typer.echo(json.dumps(answer, ensure_ascii=False, indent=2))
    else:
        _show(advice, drafted, remarks, gathered.assumptions)


def _read(file: Path | None) -> tuple[Recipe | None, Found | None]:
    if file is None:
        return None, None
    from posttrain.advisor.reading import read_situation
    from posttrain.recipe.load import load_recipe

    recipe = load_recipe(file)
    return recipe, read_situation(recipe)


def _names(recipe: Recipe | None, found: Found | None, model: str | None) -> Names:
    """What the printed recipe calls things: as the given one does."""
    from posttrain.advisor.drafting import MODEL, Names

    if recipe is None or found is None:
        return Names(model=model or MODEL)
    datasets = {
        role: (name, recipe.datasets[name].model_dump(mode="json", exclude_defaults=True))
        for role, name in found.roles.items()
    }
    return Names(f"{recipe.name}-advised", model or recipe.model, datasets)


def _as_json(
    advice: Advice, drafted: Draft, remarks: tuple[Remark, ...], assumptions: tuple[str, ...]
) -> dict[str, object]:
    situation = advice.situation
    facts = {
        field.name: getattr(situation, field.name)
        for field in fields(situation)
        if field.name != "model"
    }
    facts["goals"] = sorted(situation.goals)
    memory = {
        "device": situation.device.kind,
        "gib": situation.memory_gb,
        "needs_gib": {
            "full": round(situation.full_gb, 1),
            "lora": round(situation.lora_gb, 1),
            "qlora": round(situation.qlora_gb, 1),
        },
    }
    return {
        "method": advice.title,
        "stages": advice.stages,
        "weights": advice.weights,
        "pretrain_weights": advice.pretrain_weights,
        "instead": advice.instead,
        "why": [_note(note) for note in advice.reasons],
        "settings": {one.key: one.value for one in advice.settings},
        "watch": [_note(note) for note in advice.watch],
        "alternatives": [asdict(one) for one in advice.alternatives],
        "remarks": [asdict(remark) for remark in remarks],
        "situation": facts,
        "assumptions": assumptions,
        "memory": memory,
        "missing_stages": drafted.missing,
        "recipe": drafted.text,
    }


def _note(note: Note) -> dict[str, object]:
    return {"rule": note.rule, "text": note.text, "sources": [str(one) for one in note.sources]}


def _show(
    advice: Advice, drafted: Draft, remarks: tuple[Remark, ...], assumptions: tuple[str, ...]
) -> None:
    """Method, remarks, reasons, settings, what to watch, runners-up, recipe."""
    from rich.text import Text

    console = make_console(width=100)
    console.print(Text(advice.title, style="bold green"))
    for assumption in assumptions:
        console.print(Text(assumption, style="dim"))
    if remarks:
        _heading(console, "Where the recipe differs")
        for remark in remarks:
            label = Text(f"{remark.severity}: ", style=_STYLES[remark.severity])
            _item(console, label.append(f"{remark.where}: {remark.message}", style="default"))
            _item(console, Text(remark.instead, style="dim"), mark="  ")
    _heading(console, "Why")
    _notes(console, advice.reasons)
    if advice.stages:
        _heading(console, "Settings to begin with")
        console.print(_settings(advice, drafted))
    if advice.watch:
        _heading(console, "Watch out for")
        _notes(console, advice.watch)
    if advice.alternatives:
        _heading(console, "Alternatives")
        for other in advice.alternatives:
            _item(
                console, Text(other.name, style="bold").append(f", if {other.right_if}", "default")
            )
    _heading(console, "Recipe")
    # Unwrapped, so that it can be copied as it stands.
    console.print(Text(drafted.text), soft_wrap=True)


def _heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold")


def _notes(console: Console, notes: tuple[Note, ...]) -> None:
    from rich.text import Text

    for note in notes:
        sources = "; ".join(str(source) for source in note.sources)
        _item(console, Text(f"{note.text} ").append(f"({sources})", style="dim"))


def _item(console: Console, text: object, mark: str = "- ") -> None:
    """A paragraph with a hanging indent."""
    from rich.table import Table

    grid = Table.grid(padding=0)
    grid.add_column(width=len(mark))
    grid.add_column(overflow="fold")
    grid.add_row(mark, text)  # type: ignore[arg-type]  # a renderable
    console.print(grid)


def _settings(advice: Advice, drafted: Draft) -> Table:
    """What each training stage begins with, defaults included; of missing stages what is known."""
    from rich.table import Table

    from posttrain.recipe.training import TrainingConfig

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for stage in drafted.recipe.stages:
        if isinstance(stage, TrainingConfig):
            table.add_row(stage.stage, ", ".join(_resolved(stage)))
    for missing in drafted.missing:
        known = [f"{one.name} {one.value}" for one in advice.settings]
        mine = [
            text for text, one in zip(known, advice.settings, strict=True) if one.stage == missing
        ]
        table.add_row(missing, ", ".join(mine))
    return table


def _resolved(stage: TrainingConfig) -> list[str]:
    """The settings that matter, as the stage will have them."""
    from posttrain.recipe.adapters import LoraConfig

    parts = ["all weights"] if stage.adapter is None else []
    if isinstance(stage.adapter, LoraConfig):
        adapter = stage.adapter
        parts.append(
            f"rank {adapter.rank}, alpha {adapter.scale_alpha:g}, dropout {adapter.input_dropout:g}"
        )
    if stage.quantization is not None:
        parts.append(f"base in {stage.quantization.type.upper()}")
    rate, optimization = stage.learning_rate, stage.optimization
    parts += [
        f"learning rate {rate:g} ({optimization.scheduler}, warmup {optimization.warmup:g})",
        "1 epoch" if stage.epochs == 1 else f"{stage.epochs:g} epochs",
        f"batch of {stage.batching.batch_size}",
        f"rows up to {stage.batching.max_length} tokens",
    ]
    if stage.validation.patience is not None:
        parts.append(f"stop after {stage.validation.patience} evaluations without improvement")
    return parts
