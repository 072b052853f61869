"""How a sweep is shown: one HTML file that needs no other, and Markdown for Prefect and MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template

from posttrain.sweeping.charts import curve_chart, key_chart
from posttrain.sweeping.record import SweepRecord, Trial
from posttrain.sweeping.space import label, short_keys, show_value

PAGE = "sweep.html"

Row = tuple[str, ...]


def page_html(record: SweepRecord) -> str:
    """The page as text: the choice, the charts, the table, how to read it."""
    known = any(trial.value is not None for trial in record.trials)
    return _template().render(
        record=record,
        keys=list(short_keys(record.keys).values()),
        rows=[(marks(record, trial), trial, table_row(record, trial)) for trial in record.trials],
        head=table_head(record)[len(record.keys) :],
        charts=[key_chart(record, key) for key in record.keys] if known else [],
        curves=curve_chart(record),
        chosen=label(record.choice.values) if record.choice else None,
        headline=headline(record),
        ended=len(record.trials),
        state=state_line(record),
    )


def table_markdown(record: SweepRecord) -> str:
    """The choice and the table, for pages that take Markdown."""
    lines = [f"**{_cell(headline(record))}**", "", state_line(record), ""]
    head = ["", *table_head(record)]
    lines += [f"| {' | '.join(head)} |"]
    lines += ["|---|" + "---|" * len(record.keys) + "---:|" * len(_HEAD) + "---|"]
    for trial in record.trials:
        cells = [marks(record, trial), *table_row(record, trial)]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    lines += [f"\n{note}" for note in record.notes]
    if record.choice is not None:
        lines += ["", f"Chosen: {_cell(record.choice.reason)}.", "", f"    {record.choice.command}"]
    return "\n".join(lines) + "\n"


_HEAD = ("worse by", "standard error", "seconds", "ended")


def table_row(record: SweepRecord, trial: Trial) -> Row:
    """A trial's values and numbers, as they are shown."""
    error = trial.standard_error
    best = record.choice is not None and trial.number == record.choice.best
    return (
        *(show_value(trial.values[key]) for key in record.keys),
        f"{trial.value:.4f}" if trial.value is not None else "",
        f"{trial.difference:.4f}" if trial.difference is not None and not best else "",
        f"{error:.4f}" if error is not None and not best else "",
        f"{trial.seconds:.1f}",
        ending(trial),
    )


def table_head(record: SweepRecord) -> Row:
    """Names of the columns of `table_row`."""
    metric = record.objective.partition(".")[2]
    return (*short_keys(record.keys).values(), metric, *_HEAD)


def marks(record: SweepRecord, trial: Trial) -> str:
    """`chosen`, `best`, both or neither."""
    if record.choice is None:
        return ""
    words = {"chosen": record.choice.number, "best": record.choice.best}
    return ", ".join(word for word, number in words.items() if number == trial.number)


def ending(trial: Trial) -> str:
    """How a trial ended, in a few words."""
    if trial.status == "complete":
        gate = {None: "", "pass": "passes, "}.get(trial.verdict, f"gate: {trial.verdict}, ")
        return gate + ("reused" if trial.reused else "complete")
    first = trial.message.splitlines()[0] if trial.message else ""
    return f"{trial.status}: {first}" if first else trial.status


def headline(record: SweepRecord) -> str:
    """The one thing a person wants to know."""
    if record.choice is None and any(trial.value is not None for trial in record.trials):
        return "None of the trials passes the gate."
    if record.choice is None:
        return "No trial has come to its end yet."
    return f"Take {label(record.choice.values)}: {record.choice.reason}."


def state_line(record: SweepRecord) -> str:
    """How many trials ended, and how."""
    counts = {
        "complete": _count(record.trials, "complete"),
        "not passed by the gate": sum(
            trial.verdict not in (None, "pass") for trial in record.trials
        ),
        "given up early": _count(record.trials, "pruned"),
        "failed": _count(record.trials, "failed"),
    }
    ended = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    seeds = f", {record.seeds} seeds each" if record.seeds > 1 else ""
    gate = f" among those that pass {record.gate}" if record.gate else ""
    once = f" Run once for all: {', '.join(record.shared)}." if record.shared else ""
    return (
        f"{len(record.trials)} of {record.planned} trials{seeds}: {ended or 'none yet'}. "
        f"{'Highest' if record.maximize else 'Lowest'} {record.objective} is best{gate}.{once}"
    )


def _count(trials: Sequence[Trial], status: str) -> int:
    return sum(trial.status == status for trial in trials)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("posttrain.sweeping").joinpath("sweep.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)
