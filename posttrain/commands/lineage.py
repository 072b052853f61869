"""`posttrain lineage`: which rows made a model, and which models a row made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from posttrain.lineage import Graph
    from posttrain.lineage.ledgers import Searched
    from posttrain.lineage.rows import Fate, Node, RowAnswer, RowHistory, Through, Use
    from posttrain.lineage.summary import Share, TrainingSet
    from posttrain.store import Artifact

app = typer.Typer(
    help="Ask which rows made a model, and which models learned from a row.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_MEANINGS = {
    "train": "training rows",
    "trained": "trained on",
    "in the training set": "in the training set; whether they were read is not recorded",
    "not read": "not read: training ended, or the kept checkpoint was taken, before",
    "left out": "left out: no token to train on",
    "validation": "validation",
    "test": "test",
    "not taken": "not taken into the mix",
    "dropped": "dropped",
    "bad": "could not be read",
}
"""What became of a row, in the order in which it is shown."""

Grep = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Rows in which this text stands, in any case."),
]
Text = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Rows of which one turn, or the document, is this text."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Limit = Annotated[int, typer.Option(min=1, help="Rows to show; --json has them all.")]


@app.command("rows")
def rows(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT",
            help="Path, first digits of a fingerprint, STAGE or RECIPE/STAGE of the latest run.",
        ),
    ],
    row: Annotated[
        str | None,
        typer.Option("--id", metavar="ROW", help="A row: its id, or FILE:ROW."),
    ] = None,
    grep: Grep = None,
    text: Text = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all rows to FILE.parquet or FILE.jsonl."),
    ] = None,
    limit: Limit = 10,
    as_json: AsJson = False,
) -> None:
    """Which rows made ARTIFACT; with --id or --grep: was this row used, and if not, why."""
    from posttrain.errors import UsageError
    from posttrain.home import Home
    from posttrain.lineage import Graph
    from posttrain.lineage.graph import gaps, label
    from posttrain.lineage.rows import RowHistory, scope_of

    graph = Graph.read(Home.find().store)
    found = graph.find(artifact)
    missing = gaps(graph, graph.ancestors(found).values())
    asked = [value for value in (row, grep, text) if value is not None]
    if not asked:
        _summary(graph, found, out, missing, as_json)
        return
    if len(asked) > 1 or out is not None:
        raise UsageError("write one of --id, --grep, --text and --out")
    history = RowHistory(graph, scope_of(graph, found).values())
    answers, searched = _ask(history, row, grep, text)
    if not answers and row is not None and (elsewhere := RowHistory(graph).find(row)):
        known = ", ".join(dict.fromkeys(fate.dataset.name for fate in elsewhere[0].fates))
        missing = [
            f"No dataset that {label(found)} was made from has this row; it is known from {known}.",
            *missing,
        ]
        answers = [replace(elsewhere[0], fates=(), trained=(), unused=(), measured=())]
    _check_found(answers, row or grep or text or "", searched, missing)
    _show(answers, searched, missing, limit, as_json, found)


@app.command("models-with")
def models_with(
    row: Annotated[
        str | None,
        typer.Argument(metavar="ROW", help="A row: its id (16 hex digits), or FILE:ROW."),
    ] = None,
    grep: Grep = None,
    text: Text = None,
    limit: Limit = 10,
    as_json: AsJson = False,
) -> None:
    """Which models learned from ROW, directly or from a model that did."""
    from posttrain.errors import UsageError
    from posttrain.home import Home
    from posttrain.lineage import Graph
    from posttrain.lineage.graph import gaps
    from posttrain.lineage.rows import RowHistory

    if sum(value is not None for value in (row, grep, text)) != 1:
        raise UsageError("name a row by ROW, or say what stands in it by --grep or --text")
    graph = Graph.read(Home.find().store)
    missing = gaps(graph)
    answers, searched = _ask(RowHistory(graph), row, grep, text)
    _check_found(answers, row or grep or text or "", searched, missing)
    _show(answers, searched, missing, limit, as_json)


def _ask(
    history: RowHistory, row: str | None, grep: str | None, text: str | None
) -> tuple[list[RowAnswer], Searched | None]:
    if row is not None:
        return history.find(row), None
    return history.search(grep or text or "", whole=text is not None)


def _check_found(
    answers: Sequence[RowAnswer], asked: str, searched: Searched | None, missing: Sequence[str]
) -> None:
    """Say what was looked at in vain.

    Raises:
        DataError: there is no answer.
    """
    from posttrain.errors import DataError

    if answers:
        return
    if searched is None:
        said = f"{asked}: no dataset in question has such a row"
    else:
        said = f"no row says {asked!r}\n{_what_was_searched(searched)}"
    raise DataError("\n".join([said, *missing]))


def _what_was_searched(searched: Searched) -> str:
    """What the search could see: nobody should take silence for absence."""
    said = f"Searched were the texts of {searched.rows:,} rows"
    if searched.edited:
        said += f", {searched.edited:,} of them as they were edited, not as they came"
    if searched.dropped:
        said += (
            f". The texts of {searched.dropped:,} rows that were dropped or could not be read are "
            "not in the store: look for them in the source, and ask by FILE:ROW"
        )
    return f"{said}."


# One or more rows


def _show(
    answers: Sequence[RowAnswer],
    searched: Searched | None,
    missing: Sequence[str],
    limit: int,
    as_json: bool,
    about: Artifact | None = None,
) -> None:
    """Print answers; in those about one artifact, say first what became of the row there."""
    if as_json:
        models = {use.model.fingerprint: asdict(use.model) for a in answers for use in a.trained}
        _print_json(
            {
                "rows": [asdict(answer) for answer in answers],
                "models": list(models.values()),
                "searched": asdict(searched) if searched else None,
                "not_answered": list(missing),
            }
        )
        return
    console = make_console()
    for answer in answers[:limit]:
        _show_row(console, answer, about)
    if len(answers) > 1:
        _show_union(console, answers, limit)
    if searched is not None:
        console.print(_what_was_searched(searched), style="dim")
    for line in missing:
        console.print(f"Note: {line}", style="yellow")


def _show_row(console: Console, answer: RowAnswer, about: Artifact | None) -> None:
    at = f"{answer.file}:{answer.row}" if answer.file else "place unknown: its dataset is gone"
    sources = f"  (source: {'; '.join(answer.sources)})" if answer.sources else ""
    console.print(f"{answer.id or 'row without id'}  {at}{sources}", style="bold", soft_wrap=True)
    for fate in answer.fates:
        console.print(f"  {_node(fate.dataset)}  {_fate(fate)}", soft_wrap=True)
    if answer.repeated_by:
        listed = ", ".join(answer.repeated_by[:5])
        more = f" and {len(answer.repeated_by) - 5:,} more" if len(answer.repeated_by) > 5 else ""
        console.print(f"  Dropped because they repeat it: {listed}{more}", soft_wrap=True)
    console.print(_verdict(answer, about), style="bold", soft_wrap=True)
    by_words: dict[Through | None, list[Use]] = {}
    for use in answer.trained:
        by_words.setdefault(use.through, []).append(use)
    for through in sorted(by_words, key=lambda through: through is not None):
        if through is not None:
            console.print(f"{_through(through).capitalize()}:", soft_wrap=True)
        console.print(_use_table(by_words[through]))
    for unused in answer.unused:
        console.print(f"  Not by {_node(unused.model)}: {unused.reason}", soft_wrap=True)
    if answer.measured:
        console.print("Measured with it, not trained on it:")
    for one in answer.measured:
        via = f", {_through(one.through)}" if one.through else ""
        console.print(f"  {_node(one.by)}  {one.side} row; {one.what}{via}", soft_wrap=True)
    console.print()


def _verdict(answer: RowAnswer, about: Artifact | None) -> str:
    """The answer in a sentence."""
    from posttrain.lineage.graph import WEIGHTS, label

    trained = answer.trained
    if about is not None and about.kind in WEIGHTS:
        trained = tuple(use for use in trained if use.model.fingerprint == about.fingerprint)
        nobody = somebody = label(about)
        nobody = f"{nobody} did not learn"
    else:
        nobody = "No model learned"
        somebody = _count(sum(use.through is None for use in trained), "model")
    own = [use for use in trained if use.through is None]
    others = len(trained) - len(own)
    alike = "that says the same or nearly so"
    if own:
        learned = "learned" if any(use.how == "trained" for use in own) else "may have learned"
        also = f", and {others:,} more from one {alike}" if others else ""
        return f"{somebody} {learned} from this row{also}."
    if others:
        who = "it did" if about is not None and about.kind in WEIGHTS else f"{others:,} did"
        return f"{nobody} from this row itself, but {who} from one {alike}."
    return f"{nobody} from this row."


def _fate(fate: Fate) -> str:
    """What became of a row in one dataset."""
    line = fate.line
    said = f" ({line.detail})" if line.detail else ""
    if line.verdict == "bad":
        return f"could not be read{said}"
    if line.verdict == "drop":
        instead = f"; {line.kept_id} stays" if line.kept_id else ""
        return f"dropped by {line.operation}: {line.reason}{said}{instead}"
    at = f"{line.split} row {line.output:,}" if line.output is not None else f"{line.split} row"
    return f"{at}, edited by {line.operation}{said}" if line.verdict == "edit" else f"{at}{said}"


def _use_table(uses: Sequence[Use]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    tracked = any(use.model.mlflow_run_id for use in uses)
    for column in ("  model", "fingerprint", "kind", "how", *(["MLflow run"] if tracked else [])):
        table.add_column(column, no_wrap=column == "fingerprint", overflow="fold")
    for use in uses:
        model = use.model
        cells = [f"  {model.name}", model.fingerprint[:12], model.kind, _how(use)]
        cells += [model.mlflow_run_id or ""] if tracked else []
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _how(use: Use) -> str:
    if use.way:
        said = f"made from {' > '.join(use.way)}"
    elif use.how == "trained":
        said = "trained on it" + (f", {_count(use.passes, 'pass')}" if use.passes else "")
    else:
        said = "in its training set; whether it was read is not recorded"
    return f"{said}; as edited ({use.edited})" if use.edited else said


def _through(through: Through) -> str:
    detail = f" ({through.detail})" if through.detail else ""
    if through.alike == "repeats the test set":
        return f"through {through.id} of the test set, which it repeats{detail}"
    return f"through its {through.alike} {through.id}{detail}"


def _show_union(console: Console, answers: Sequence[RowAnswer], limit: int) -> None:
    if len(answers) > limit:
        more = len(answers) - limit
        console.print(f"... and {more:,} more rows; --limit shows more, --json all of them.")
    by_model: dict[str, list[Use]] = {}
    for answer in answers:
        for use in answer.trained:
            by_model.setdefault(use.model.fingerprint, []).append(use)
    console.print(f"{len(answers):,} rows in all. Models that learned from any:", style="bold")
    for uses in by_model.values():
        through = sum(use.through is not None for use in uses)
        also = f", {through:,} of them through duplicates" if through else ""
        console.print(f"  {_node(uses[0].model)}  {_count(len(uses), 'row')}{also}", soft_wrap=True)
    if not by_model:
        console.print("  none")


# All rows of an artifact


def _summary(
    graph: Graph, artifact: Artifact, out: Path | None, missing: Sequence[str], as_json: bool
) -> None:
    from posttrain.errors import DataError
    from posttrain.lineage.rows import Node
    from posttrain.lineage.summary import export_rows, training_sets

    sets = training_sets(graph, artifact)
    node = Node.of(artifact)
    if not sets:
        said = f"{node.name}: no training in the store led to it, so no rows of a dataset made it"
        raise DataError("\n".join([said, *missing]))
    written = export_rows(graph, artifact, out) if out else None
    if as_json:
        _print_json(
            {
                "artifact": asdict(node),
                "training_sets": [asdict(one) for one in sets],
                "written": {"path": str(out), "rows": written} if out else None,
                "not_answered": list(missing),
            }
        )
        return
    console = make_console()
    run = f"  MLflow run {node.mlflow_run_id}" if node.mlflow_run_id else ""
    console.print(f"{_node(node)}{run}", style="bold", soft_wrap=True)
    for one in sets:
        _show_training_set(console, one)
    if out is not None:
        console.print(f"\n{_count(written or 0, 'row')} written to {out}", soft_wrap=True)
    for line in missing:
        console.print(f"Note: {line}", style="yellow")


def _show_training_set(console: Console, one: TrainingSet) -> None:
    if one.model is not None:
        console.print(f"\n{_node(one.model)}  {one.headline}", soft_wrap=True)
        console.print(f"trained on {_node(one.data)}", soft_wrap=True)
    for share in one.shares:
        console.print(f"{share.dataset}: {share.source}", soft_wrap=True)
        console.print(_share_table(share))


def _share_table(share: Share) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for verdict, meaning in _MEANINGS.items():
        if verdict in share.rows:
            table.add_row(f"  {share.rows[verdict]:,}", meaning)
        if verdict == "dropped":
            for reason, number in sorted(share.dropped.items(), key=lambda item: -item[1]):
                table.add_row("", f"  {number:,} by {reason}")
    return table


def _node(node: Node) -> str:
    return f"{node.name} {node.fingerprint[:12]} ({node.kind})"


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))
