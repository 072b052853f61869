"""`posttrain compare`: two models on the same items, with the differences and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.comparing import Compared
    from posttrain.evaluate.page.differences import Difference, PerplexityDifference

_MODEL = "model folder, Hub id, gguf:FILE, package:NAME, or a model in the store: STAGE, digits."

_UNITS = {"token": "nats a token", "byte": "bits a byte"}


def compare(
    first: Annotated[str, typer.Argument(metavar="MODEL", help="To compare with: " + _MODEL)],
    second: Annotated[str, typer.Argument(metavar="MODEL", help="To be compared; as the first.")],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="A,B",
            help="lm-eval tasks to ask both, such as mmlu,hellaswag. Default: the newest "
            "evaluations in the store that both have in common.",
        ),
    ] = "",
    offline_root: Annotated[
        Path | None, typer.Option(help="Folder laid out like the Hub to read benchmarks from.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items a task, drawn with a fixed seed.")
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="Drop to be ruled out, as a share: the margin that is drawn.")
    ] = 0.02,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where report.html goes. Default: beside the store."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two models item by item: scores, differences with intervals, and report.html.

    No gate decides here; what both were asked before is not asked again.
    """
    from posttrain.comparing import compare_models
    from posttrain.console import observer
    from posttrain.home import Home

    home = Home.find()
    console = make_console(stderr=as_json)
    compared = compare_models(
        first,
        second,
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        offline_root=str(offline_root) if offline_root else None,
        limit=limit,
        max_drop=max_drop,
        store=home.store,
        observer=observer(console),
    )
    page = compared.write_report(out or home.root / "comparisons" / compared.name)
    if as_json:
        typer.echo(json.dumps(_summary(compared, page), indent=2))
    else:
        _show(console, compared, page)


def _summary(compared: Compared, page: Path) -> dict[str, object]:
    before, after = compared.measured
    return {
        "models": [before.label, after.label],
        "evaluations": [str(artifact.path) for artifact in compared.evaluations],
        "confidence": compared.against.confidence,
        "max_drop": compared.max_drop,
        "tasks": [
            {
                "task": one.task,
                "metric": one.metric,
                "items": one.n,
                "values": [before.tasks[one.task].value, after.tasks[one.task].value],
                "difference": one.mean,
                "low": one.low,
                "high": one.high,
                "mcnemar_p": one.mcnemar_p,
                "smallest_detectable_drop": one.detectable,
                "items_needed": one.items_needed,
            }
            for one in compared.against.differences
        ],
        "perplexity": [
            {
                "dataset": one.dataset,
                "group": one.group,
                "rows": one.rows,
                "values": [
                    model.perplexities[one.dataset, one.group].perplexity
                    for model in compared.measured
                ],
                "difference": one.mean,
                "low": one.low,
                "high": one.high,
                "unit": _UNITS[one.unit],
            }
            for one in compared.against.perplexities
        ],
        "report": str(page),
    }


def _show(console: Console, compared: Compared, page: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from posttrain.console import display_path

    before, after = compared.measured
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("measured", overflow="fold")
    for column in ("items", before.label, after.label):
        table.add_column(Text(column.replace("/", "/\n")), justify="right", overflow="fold")
    for column in ("difference", "95% interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in compared.against.differences:
        table.add_row(*_task_cells(compared, task))
    for rows in compared.against.perplexities:
        table.add_row(*_row_cells(compared, rows))
    console.print(table)
    said = f"Differences are {after.label} less {before.label}, so that + is better"
    units = {one.unit for one in compared.against.perplexities}
    named = [name for unit, name in _UNITS.items() if unit in units]
    if named:
        said += f"; those of perplexity in {' or '.join(named)}"
    console.print(Text(f"{said}.", style="dim"), soft_wrap=True)
    console.print(Text(f"Report: {display_path(page)}"), soft_wrap=True)


def _task_cells(compared: Compared, one: Difference) -> tuple[str, ...]:
    from posttrain.evaluate.page.text import bounds, signed

    values = [f"{model.tasks[one.task].value:.3f}" for model in compared.measured]
    interval = bounds(one.low, one.high).replace("[", r"\[")
    return (one.task, f"{one.n:,}", *values, signed(one.mean), interval)


def _row_cells(compared: Compared, one: PerplexityDifference) -> tuple[str, ...]:
    from posttrain.evaluate.page.text import bounds, signed
    from posttrain.evaluate.results import three_digits

    key = (one.dataset, one.group)
    values = [three_digits(model.perplexities[key].perplexity) for model in compared.measured]
    interval = bounds(one.low, one.high).replace("[", r"\[")
    name = " ".join(["perplexity", *filter(None, key)])
    return (name, f"{one.rows:,}", *values, signed(one.mean), interval)
