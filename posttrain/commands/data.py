"""`posttrain data`: cleaning a dataset without a recipe."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.commands import preferences
from posttrain.terminal import make_console

if TYPE_CHECKING:
    from posttrain.data.preparation import Preparation, Sources
    from posttrain.data.report_data import ReportData
    from posttrain.recipe.datasets import DatasetSpec
    from posttrain.recipe.prepare import PrepareConfig

_RATE_FROM = 10_000
"""Rows from which a rate says more about the machine than about starting up."""

app = typer.Typer(
    help="Clean, deduplicate and split data without a recipe.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(preferences.app, name="preferences")


@app.callback()
def _group() -> None:
    """Keeps `prepare` a subcommand while it is the only one."""


@app.command()
def prepare(
    source: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Files, folders, globs or hub:OWNER/NAME."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")],
    row_format: Annotated[
        str, typer.Option("--format", metavar="F", help="Format of the rows; detected if left out.")
    ] = "auto",
    near_dedup: Annotated[
        float | None,
        typer.Option(metavar="J", help="Drop rows this similar to one that stays, such as 0.8."),
    ] = None,
    quality: Annotated[
        bool, typer.Option("--quality", help="Quality rules for documents, or for answers.")
    ] = False,
    language: Annotated[
        str | None, typer.Option(metavar="CODES", help="Languages to keep, such as en,de.")
    ] = None,
    pii: Annotated[
        str | None, typer.Option(metavar="replace|drop", help="Personal data and secrets.")
    ] = None,
    decontaminate: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Evaluation sets to keep out, such as mmlu,hellaswag."),
    ] = None,
    offline_root: Annotated[
        Path | None, typer.Option(help="Folder laid out like the Hub to read benchmarks from.")
    ] = None,
    validation: Annotated[float, typer.Option(help="Share of rows for validation.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of rows for the final test.")] = 0.0,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Count rows that cannot be read; go on.")
    ] = False,
    set_option: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any setting of `prepare` in a recipe, such as near_dedup.bands=16.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a prepared dataset at DIR.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(help="Worker processes; one a core if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Clean SOURCE and split it: DIR gets train, validation, a ledger of every row, a report."""
    given = {
        "split": {"validation": validation, "test": test},
        "near_dedup": {"threshold": near_dedup} if near_dedup is not None else None,
        "language": {"keep": language.split(",")} if language else None,
        "pii": {"action": pii} if pii else None,
        "decontaminate": {
            "benchmarks": decontaminate.split(","),
            "offline_root": str(offline_root) if offline_root else None,
        }
        if decontaminate
        else None,
    }
    spec, config = _settings(source, row_format, skip_bad_rows, quality, given, set_option or [])
    _check_target(out, overwrite)
    with _workshop(out) as (output, scratch):
        done, report = _prepare(source, spec, config, output, scratch, processes, quiet=as_json)
        _publish(output, out)
    if as_json:
        summary = {"path": str(out), **done.counts.model_dump(), "seconds": done.seconds}
        typer.echo(json.dumps({**summary, "rows_per_s": _rate(done)}, indent=2))
    else:
        _show(done, report, out)


def _settings(
    source: list[str],
    row_format: str,
    skip_bad_rows: bool,
    quality: bool,
    given: dict[str, Any],
    overrides: list[str],
) -> tuple[DatasetSpec, PrepareConfig]:
    """What the options say, validated as a recipe would be; all mistakes in one report."""
    from posttrain.data.check import check_dataset
    from posttrain.data.sources import pin_revision
    from posttrain.errors import RecipeError
    from posttrain.recipe.load import apply_override, validate_recipe

    dataset = {
        "source": source[0] if len(source) == 1 else source,
        "format": row_format,
        "on_bad_row": "skip" if skip_bad_rows else "error",
    }
    stage: dict[str, Any] = {"dataset": "data", **given}
    recipe: dict[str, Any] = {
        "name": "data",
        "model": "none",
        "datasets": {"data": dataset},
        "stages": [{"prepare": stage}],
    }
    spec = validate_recipe(recipe).datasets["data"]
    family, problems = check_dataset("data", spec, None)
    if problems:
        raise RecipeError(problems)
    if quality:
        stage["document_quality" if family == "documents" else "answer_quality"] = {}
    for override in overrides:
        apply_override(recipe, f"prepare.{override}")
    checked = validate_recipe(recipe)
    config: Any = checked.stages[0]
    return pin_revision(spec), config


def _check_target(out: Path, overwrite: bool) -> None:
    from posttrain.errors import UsageError

    if not out.exists():
        return
    if not (out / "dataset.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: exists and is no prepared dataset; name another folder")
    if (out / "dataset.json").exists() and not overwrite:
        raise UsageError(f"--out {out}: holds a prepared dataset; add --overwrite to replace it")


@contextmanager
def _workshop(out: Path) -> Iterator[tuple[Path, Path]]:
    """A folder beside the target to write to, and one for intermediate files; gone in the end.

    It has one name, so that the next run clears away what a killed one left; two runs of one
    target wait for each other.
    """
    from posttrain.store.locks import exclusive

    folder = out.parent / f".{out.name}.partial"
    # A lock file stays for good, and nobody wants one beside the data.
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"posttrain-{name}.lock"
    with exclusive(lock, lambda: typer.echo("waiting for another run ...", err=True)):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "scratch").mkdir(parents=True)
        try:
            yield folder / "output", folder / "scratch"
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _publish(output: Path, out: Path) -> None:
    """Put the finished folder in its place; an old one goes only then."""
    from posttrain.store.files import sync_folder, sync_tree

    sync_tree(output)
    if out.exists():
        out.rename(output.parent / "old")
    output.rename(out)
    sync_folder(out.parent)


def _prepare(
    source: list[str],
    spec: DatasetSpec,
    config: PrepareConfig,
    output: Path,
    scratch: Path,
    processes: int | None,
    quiet: bool,
) -> tuple[Preparation, ReportData]:
    from posttrain.data.preparation import Sources, prepare_dataset
    from posttrain.data.report import write_report
    from posttrain.data.reporting import report_of
    from posttrain.store.files import write_json

    events = _Events(quiet)
    index = _contamination(config, quiet)
    shown = ", ".join(source)
    name = Path(source[0]).name
    sources: Sources = Sources(name=name, rows=spec, shown=shown, contamination=index)
    done = prepare_dataset(sources, config, output, scratch, events, processes)
    report = report_of(done)
    write_json(output / "report.json", report.model_dump(mode="json"))
    write_report(output / "report.html", report)
    return done, report


def _contamination(config: PrepareConfig, quiet: bool) -> Path | None:
    """The index of the benchmarks' items, from the store where it is there already."""
    if config.decontaminate is None or not config.decontaminate.benchmarks:
        return None
    from posttrain.building import contamination_step
    from posttrain.console import observer
    from posttrain.execute import StageObserver, run_step
    from posttrain.home import Home
    from posttrain.pipeline import Pipeline
    from posttrain.recipe import ContaminationConfig, Recipe

    store = Home.find().store
    step = contamination_step(ContaminationConfig.of(config.decontaminate), store.digests)
    recipe = Recipe(name="data", model="none", stages=(config,))
    watch = StageObserver() if quiet else observer(make_console(stderr=True))
    bound = Pipeline(recipe, (step,)).bind(step, {})
    return run_step(bound, store, watch).artifact.path


class _Events:
    """Says on the terminal what is being done."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def phase(self, message: str) -> None:
        """A line a phase."""
        if not self._quiet:
            typer.echo(f"{message} ...", err=True)

    def warning(self, message: str) -> None:
        """Always shown."""
        typer.echo(f"warning: {message}", err=True)


def _show(done: Preparation, report: ReportData, out: Path) -> None:
    from rich.table import Table

    from posttrain.data.preparation import headline

    console = make_console()
    table = Table("operation", box=None, pad_edge=False, header_style="bold")
    table.add_column("rows", justify="right")
    table.add_column("dropped", justify="right")
    table.add_column("edited", justify="right")
    table.add_column("reasons")
    for step in report.funnel:
        reasons = sorted(step.dropped.items(), key=lambda item: -item[1])
        dropped = sum(step.dropped.values())
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons[:4])
        more = f", {len(reasons) - 4} more reasons" if len(reasons) > 4 else ""
        table.add_row(
            step.operation,
            f"{step.rows:,}",
            f"{dropped:,}" if dropped else "",
            f"{step.edited:,}" if step.edited else "",
            listed + more,
        )
    console.print(table)
    console.print(f"\n{headline(done.counts)}", style="bold")
    console.print(report.leak_check, style="dim")
    for advice in report.advice:
        style = {"warning": "yellow", "good": "green"}.get(advice.level, "")
        console.print(f"{advice.level}: {advice.text}", style=style)
    seconds = f"{sum(done.seconds.values()):.1f} s"
    rate = f", {_rate(done):,.0f} rows/s" if done.counts.rows_in >= _RATE_FROM else ""
    console.print(f"\n{seconds}{rate}. Look at {out / 'report.html'} before training.")


def _rate(done: Preparation) -> float:
    """Rows a second over all phases."""
    return round(done.counts.rows_in / max(sum(done.seconds.values()), 1e-9), 1)
