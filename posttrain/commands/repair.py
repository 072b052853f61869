"""`posttrain repair`: the next recipe, after a gate that said no."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.repair.session import Cost, Diagnosis, Option

_STYLES = {"fail": "bold red", "not enough evidence": "yellow", "pass": "bold green"}


def repair(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Recipe file whose last run did not pass.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="As given to `run`; written into the new recipe."
        ),
    ] = None,
    remedy: Annotated[
        int | None,
        typer.Option(metavar="N", help="Write the N-th remedy instead of the first one."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File to write. Default: RECIPE with .repair-1, or the next number.",
        ),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Only list what would help.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Propose what may turn the gate's verdict on RECIPE, and write the recipe that tries it.

    Runs nothing. In the new recipe every changed line says what it was and why; a run of it takes
    from the store all that the change does not touch.
    """
    from posttrain.home import Home
    from posttrain.repair.session import diagnose, write

    console = make_console(stderr=as_json)
    found = diagnose(recipe, overrides or [], Home.find().store)
    position = remedy - 1 if remedy is not None else found.first
    settled = found.verdict.verdict == "pass" or (found.passing is not None and remedy is None)
    written = None
    if not settled and not list_only and position is not None:
        written = write(found, position, out)
    if as_json:
        typer.echo(json.dumps(_as_json(found, written), ensure_ascii=False, indent=2))
    else:
        _show(console, found, position if written else None, written)
    if not settled and not list_only and written is None:
        raise typer.Exit(1)


def _show(console: Console, found: Diagnosis, position: int | None, written: Path | None) -> None:
    from rich.text import Text

    outcome = found.verdict.verdict
    console.print(Text(f"{found.gate}: {outcome}", style=_STYLES[outcome]))
    if outcome == "pass":
        console.print("There is nothing to repair.")
        return
    for reason in found.verdict.reasons:
        console.print(Text(f"  {reason}"), soft_wrap=True)
    for attempt in found.attempts:
        ended = attempt.verdict or "not run to its end yet"
        where = f" ({attempt.file})" if attempt.file else ""
        line = f"  tried already: {attempt.remedy}{where}: {ended}"
        console.print(Text(line, style="dim"), soft_wrap=True)
    console.print()
    for number, option in enumerate(found.options):
        _show_option(console, number, option, chosen=number == position)
    if not found.options:
        console.print("No remedy is known that was not tried.")
    if found.passing is not None and written is None:
        which = found.passing.file or found.passing.remedy
        console.print(Text(f"{which} passes: go on with that one.", style="bold"))
    if written is not None:
        console.print(Text(f"Written: {written}", style="bold"), soft_wrap=True)
        console.print(Text(f"  posttrain run {written}"), soft_wrap=True)


def _show_option(console: Console, number: int, option: Option, *, chosen: bool) -> None:
    from rich.padding import Padding
    from rich.text import Text

    remedy = option.remedy
    style = "bold green" if chosen else "bold" if option.cost else ""
    mark = " (written)" if chosen else ""
    console.print(Text(f"{number + 1}. {remedy.title}{mark}", style=style), soft_wrap=True)
    lines = [f"why: {remedy.why}"]
    if option.cost is not None:
        passes = ", and the gate passes it" if option.verdict == "pass" else ""
        lines.append(f"cost: {cost_in_words(option.cost)}{passes}")
    elif option.obstacle:
        lines.append(f"by hand: {option.obstacle}")
    if option.cost is not None and remedy.by_hand:
        lines.append(f"note: {remedy.by_hand}")
    lines.append(f"confidence: {remedy.confidence} ({'; '.join(remedy.sources)})")
    for line in lines:
        console.print(Padding(Text(line), (0, 0, 0, 3), expand=False))
    console.print()


def cost_in_words(cost: Cost) -> str:
    """Such as `merge, evaluate, gate run (about 48 s the last time); 6 stages are reused`."""
    if not cost.runs:
        return "nothing runs: every stage is in the store"
    took = f" (took {cost.seconds:,.0f} s the last time)" if cost.seconds is not None else ""
    runs = "runs" if len(cost.runs) == 1 else "run"
    stages = "stage is" if cost.reused == 1 else "stages are"
    return f"{', '.join(cost.runs)} {runs}{took}; {cost.reused} {stages} reused"


def _as_json(found: Diagnosis, written: Path | None) -> dict[str, object]:
    return {
        "recipe": str(found.file),
        "gate": found.gate,
        "verdict": found.verdict.verdict,
        "reasons": list(found.verdict.reasons),
        "attempts": [asdict(attempt) for attempt in found.attempts],
        "remedies": [
            {
                "id": option.remedy.id,
                "title": option.remedy.title,
                "why": option.remedy.why,
                "confidence": option.remedy.confidence,
                "sources": list(option.remedy.sources),
                "note": option.remedy.by_hand,
                "obstacle": option.obstacle,
                "verdict": option.verdict,
                "cost": asdict(option.cost) if option.cost else None,
            }
            for option in found.options
        ],
        "written": str(written) if written else None,
    }
