"""`posttrain registry`: which model is champion, and who made it so."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from posttrain.terminal import make_console

if TYPE_CHECKING:
    from rich.table import Table

    from posttrain.home import Home
    from posttrain.lineage import Graph
    from posttrain.registry import Change, Moved, Registered, Version
    from posttrain.store import Artifact

app = typer.Typer(
    help="Registered models: promote, roll back, and see who decided.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the registered model.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Path, first digits of a fingerprint, STAGE or RECIPE/STAGE of the latest run.",
    ),
]
Override = Annotated[
    str | None,
    typer.Option(
        metavar="REASON", help="Take a model that the gate did not pass; REASON is recorded."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("ls")
def ls(as_json: AsJson = False) -> None:
    """List registered models."""
    from posttrain.home import Home
    from posttrain.registry import Registry

    models = Registry(Home.find()).models()
    if as_json:
        _print_json({"models": [asdict(model) for model in models]})
    elif models:
        make_console().print(_model_table(models))
    else:
        make_console().print("Nothing is registered yet.")


@app.command("show")
def show(name: Name, as_json: AsJson = False) -> None:
    """Show the versions of NAME, and who gave which of them an alias."""
    from posttrain.home import Home
    from posttrain.registry import Registry

    registry = Registry(Home.find())
    versions, history = registry.versions(name), registry.history(name)
    if as_json:
        changes = [change.model_dump(mode="json") for change in history]
        _print_json(
            {"name": name, "versions": [asdict(one) for one in versions], "history": changes}
        )
        return
    console = make_console()
    console.print(_version_table(versions))
    console.print("\nHistory", style="bold")
    for change in history:
        console.print(f"  {_said(change)}", soft_wrap=True)


@app.command("add")
def add(
    model: Model,
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the registered model.")],
    override: Override = None,
    as_json: AsJson = False,
) -> None:
    """Register MODEL from the store as challenger, with what the latest gate said of it."""
    from posttrain.home import Home
    from posttrain.registry import Entry, Registry, judged_by

    home = Home.find()
    graph, found = _find(home, model)
    entry = Entry.of(graph, found, judged_by(graph, found))
    done = Registry(home).register(name, entry, override=override)
    if as_json:
        _print_json(done.model_dump(mode="json"))
        return
    was = "unchanged" if done.before == done.version else _was(done.before)
    typer.echo(f"{done.alias} of {name}: v{done.version} ({was}); gate: {done.verdict}")


@app.command("promote")
def promote(
    name: Name,
    version: Annotated[
        str, typer.Argument(metavar="[VERSION]", help="Number of a version, or `challenger`.")
    ] = "challenger",
    override: Override = None,
    as_json: AsJson = False,
) -> None:
    """Make a version of NAME the champion; the gate must have passed it."""
    from posttrain.home import Home
    from posttrain.registry import Registry

    moved = Registry(Home.find()).promote(name, _which(version), override=override)
    _show_moved(moved, as_json)


@app.command("rollback")
def rollback(name: Name, as_json: AsJson = False) -> None:
    """Make the previous champion of NAME the champion again."""
    from posttrain.home import Home
    from posttrain.registry import Registry

    _show_moved(Registry(Home.find()).rollback(name), as_json)


@app.command("card")
def card(
    model: Model,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there, such as README.md.")
    ] = None,
) -> None:
    """Print the model card of MODEL, made from the manifests of all that it comes from."""
    from posttrain.home import Home
    from posttrain.model_card import write_card
    from posttrain.recipe import RegisterConfig
    from posttrain.registry import judged_by
    from posttrain.store.files import write_bytes

    graph, found = _find(Home.find(), model)
    stated = [
        user.manifest
        for _, user in graph.users(found)
        if user.kind == "registration" and user.manifest.details["digest"] == found.digest
    ]
    config = RegisterConfig.model_validate(stated[-1].config) if stated else None
    text = write_card(
        graph,
        found,
        name=config.name if config else None,
        judged=judged_by(graph, found),
        license=config.license if config else None,
        licenses=config.licenses if config else None,
    )
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_bytes(out, text.encode())
        typer.echo(f"written to {out}")


def _find(home: Home, reference: str) -> tuple[Graph, Artifact]:
    """A model in the store.

    Raises:
        UsageError: nothing is called so, or it is no model.
    """
    from posttrain.errors import UsageError
    from posttrain.lineage import Graph
    from posttrain.lineage.graph import label

    graph = Graph.read(home.store)
    found = graph.find(reference)
    if found.kind != "model":
        what = "an adapter; merge it first" if found.kind == "adapter" else f"a {found.kind}"
        raise UsageError(f"{reference}: {label(found)} is {what}, and complete weights are needed")
    return graph, found


def _which(version: str) -> int | Literal["challenger"]:
    from posttrain.errors import UsageError

    if version == "challenger":
        return "challenger"
    digits = version.removeprefix("v")
    if not digits.isdecimal():
        raise UsageError(f"{version}: write the number of a version, such as 3, or `challenger`")
    return int(digits)


def _show_moved(moved: Moved, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(moved))
        return
    typer.echo(moved.sentence)
    if moved.note:
        typer.echo(f"note: {moved.note}", err=True)


def _model_table(models: list[Registered]) -> Table:
    table = _table("name", "champion", "challenger", "previous champion", "versions")
    for model in models:
        aliases = (model.champion, model.challenger, model.previous_champion)
        numbers = ["" if number is None else f"v{number}" for number in aliases]
        table.add_row(model.name, *numbers, str(model.versions))
    return table


def _version_table(versions: list[Version]) -> Table:
    table = _table("version", "alias", "gate", "model", "recipe", "numbers")
    for one in versions:
        gate = f"{one.verdict}, overridden: {one.override}" if one.override else one.verdict
        numbers = ", ".join(
            f"{name} {value}" + (f" ({one.differences[name]})" if name in one.differences else "")
            for name, value in one.metrics.items()
        )
        model = (one.fingerprint or "")[:12]
        table.add_row(f"v{one.number}", ", ".join(one.aliases), gate, model, one.recipe, numbers)
    return table


def _said(change: Change) -> str:
    """Such as `2026-01-31 14:05 ada: champion v3 (was v2), promote`."""
    why = f"; override: {change.override}" if change.override else ""
    return (
        f"{change.at:%Y-%m-%d %H:%M} {change.who}: {change.alias} v{change.after} "
        f"({_was(change.before)}), {change.action}{why}"
    )


def _was(before: int | None) -> str:
    return "there was none" if before is None else f"was v{before}"


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))
