"""Rows through the graph: what became of a row, and which models learned from it.

Ledgers say which rows a dataset holds and why others are missing; a training stage's row account
says which of its rows were read. A row's id is the same in all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from posttrain.data.operations.base import Side
from posttrain.data.prepared import LedgerLine, PreparedDataset
from posttrain.errors import UsageError
from posttrain.lineage.graph import SHORT, WEIGHTS, Graph, label, source_of
from posttrain.lineage.ledgers import (
    Searched,
    account_lines,
    file_matches,
    ledger_lines,
    lines_at,
    repeats_of,
    search,
)
from posttrain.store import Artifact

How = Literal["trained", "in the training set", "not read", "left out"]
"""What a training stage did with a row of its training set. `in the training set`: it is not
recorded whether training went on until the row was read."""

Alike = Literal["exact duplicate", "near duplicate", "repeats the test set"]

_REASONS = {
    "not read": "in the training set, but training ended, or the kept checkpoint was taken, "
    "before it was read",
    "left out": "in the training set, but no token of it is trained on (too long, or no answer)",
}
_ALIKE: dict[str, Alike] = {
    "exact_dedup": "exact duplicate",
    "near_dedup": "near duplicate",
    "split": "repeats the test set",
}


@dataclass(frozen=True)
class Node:
    """An artifact, as an answer names it."""

    fingerprint: str
    kind: str
    name: str
    """`recipe/stage`."""
    path: str
    mlflow_run_id: str | None

    @classmethod
    def of(cls, artifact: Artifact) -> Node:
        """What identifies an artifact."""
        manifest = artifact.manifest
        path = str(artifact.path)
        return cls(
            manifest.fingerprint, artifact.kind, label(artifact), path, manifest.mlflow_run_id
        )


@dataclass(frozen=True)
class Through:
    """The row whose words stand for those of a row that was dropped."""

    id: str
    alike: Alike
    """How close the two are; over several steps the loosest of them."""
    detail: str | None = None


@dataclass(frozen=True)
class Fate:
    """What became of a row in one dataset."""

    dataset: Node
    line: LedgerLine


@dataclass(frozen=True)
class Use:
    """A model that learned from a row."""

    model: Node
    how: How
    passes: int | None
    """How often the row was read on the way to the weights."""
    way: tuple[str, ...] = ()
    """The stages from the training on this row to the model; empty for that training itself."""
    edited: str | None = None
    """What had been changed in the row before."""
    through: Through | None = None


@dataclass(frozen=True)
class Unused:
    """A training stage whose training set has the row, and which learned nothing from it."""

    model: Node
    how: How
    reason: str


@dataclass(frozen=True)
class Measured:
    """Something that was chosen, checked or measured with a row held out of training."""

    by: Node
    side: str
    what: str
    through: Through | None = None


@dataclass(frozen=True)
class RowAnswer:
    """All that is known of one row."""

    id: str
    """Empty for a row that could not be read and so never got one."""
    file: str | None
    row: int | None
    sources: tuple[str, ...]
    fates: tuple[Fate, ...]
    trained: tuple[Use, ...]
    unused: tuple[Unused, ...]
    measured: tuple[Measured, ...]
    repeated_by: tuple[str, ...]
    """Ids of rows that were dropped because this one stays in their place."""


@dataclass
class _Facts:
    """What store and ledgers say of one id."""

    fates: list[tuple[Artifact, LedgerLine]] = field(default_factory=list)
    accounts: list[tuple[Artifact, How, int | None]] = field(default_factory=list)
    repeats: dict[str, None] = field(default_factory=dict)


class RowHistory:
    """Answers questions about rows from a store.

    Args:
        graph: The store's.
        scope: The artifacts to answer for; left out, all.
    """

    def __init__(self, graph: Graph, scope: Iterable[Artifact] | None = None) -> None:
        self._graph = graph
        everything = graph.artifacts.values()
        self._scope = {a.fingerprint: a for a in (everything if scope is None else scope)}
        self._facts: dict[str, _Facts] = {}

    @cached_property
    def datasets(self) -> list[Artifact]:
        """The datasets in scope."""
        return [artifact for artifact in self._scope.values() if artifact.kind == "dataset"]

    # Finding

    def find(self, reference: str) -> list[RowAnswer]:
        """The row of this id, or at this place (`FILE:ROW`) of a source; none if unknown.

        Raises:
            UsageError: different rows answer to it; the message lists them.
        """
        at = _place(reference)
        if at is None:
            answers = self.trace([reference.lower()])
            return [answer for answer in answers if answer.fates or _is_in_an_account(answer)]
        lines = self._lines_at(*at)
        ids = list(dict.fromkeys(line.id for _, line in lines if line.id))
        if len(ids) > 1:
            choices = "\n".join(
                f"  {line.id}  {line.file}:{line.row}  {line.verdict} in {label(dataset)} "
                f"{dataset.fingerprint[:SHORT]} (source {source_of(self._graph, dataset)})"
                for dataset, line in lines
                if line.id
            )
            raise UsageError(
                f"{reference}: different rows stand there; name one by its id\n{choices}"
            )
        bad = [(dataset, line) for dataset, line in lines if not line.id]
        if ids:
            return self.trace(ids, bad)
        return [self._answer("", _Facts(bad))] if bad else []

    def search(self, text: str, *, whole: bool = False) -> tuple[list[RowAnswer], Searched]:
        """Rows whose texts say something; see `posttrain.lineage.ledgers.search`."""
        ids, searched = search(self.datasets, text, whole=whole)
        return self.trace(ids), searched

    # Answering

    def trace(
        self, ids: Sequence[str], bad: Sequence[tuple[Artifact, LedgerLine]] = ()
    ) -> list[RowAnswer]:
        """What is known of each row.

        Args:
            ids: Ids of rows.
            bad: Lines of other runs in which the same place of the source could not be read.
        """
        self._collect(ids)
        answers = []
        for name in ids:
            facts = self._facts[name]
            answers.append(self._answer(name, replace(facts, fates=[*facts.fates, *bad])))
        return answers

    def _collect(self, ids: Sequence[str]) -> None:
        """Read all ledgers and accounts for these rows, and for those that stand for them."""
        wanted = [name for name in dict.fromkeys(ids) if name not in self._facts]
        first = True
        while wanted:
            self._facts |= {name: _Facts() for name in wanted}
            kept: dict[str, None] = {}
            for dataset in self.datasets:
                for line in ledger_lines(dataset, wanted):
                    self._facts[line.id].fates.append((dataset, line))
                    if line.kept_id:
                        kept[line.kept_id] = None
                for line in repeats_of(dataset, wanted) if first else ():
                    self._facts[str(line.kept_id)].repeats[line.id] = None
            for model in self._graph.trained:
                if model.fingerprint in self._scope:
                    self._read_account(model, wanted)
            wanted = [name for name in kept if name not in self._facts]
            first = False

    def _read_account(self, model: Artifact, wanted: Sequence[str]) -> None:
        table = account_lines(model, wanted)
        if table is None:
            held = {d.fingerprint for d in self._graph.training_data(model)}
            for name in wanted:
                fates = self._facts[name].fates
                sides = [line.split for d, line in fates if d.fingerprint in held]
                if "train" in sides:
                    self._facts[name].accounts.append((model, "in the training set", None))
            return
        lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in table.to_pylist():
            lines[record["id"]].append(record)
        for name, records in lines.items():
            self._facts[name].accounts.append((model, *_together(records)))

    def _answer(self, name: str, facts: _Facts) -> RowAnswer:
        lines = [line for _, line in sorted(facts.fates, key=lambda fate: not _reads(fate[0]))]
        first = lines[0] if lines else None
        uses: dict[str, Use] = {}
        found = self._uses(name, facts, None, frozenset())
        # A model may have learned from a row in several ways: the most direct one is told.
        for use in sorted(found, key=lambda use: (use.through is not None, len(use.way))):
            uses.setdefault(use.model.fingerprint, use)
        measured: dict[tuple[str, str], Measured] = {}
        for one in self._measured(name, facts, None, frozenset()):
            measured.setdefault((one.by.fingerprint, one.what), one)
        unused = [
            Unused(Node.of(model), how, _REASONS[how])
            for model, how, _ in facts.accounts
            if how in _REASONS
        ]
        sources = dict.fromkeys(
            source_of(self._graph, dataset) for dataset, _ in facts.fates if _reads(dataset)
        )
        return RowAnswer(
            id=name,
            file=first.file if first else None,
            row=first.row if first else None,
            sources=tuple(sources),
            fates=tuple(Fate(Node.of(dataset), line) for dataset, line in facts.fates),
            trained=tuple(sorted(uses.values(), key=self._age)),
            unused=tuple(unused),
            measured=tuple(measured.values()),
            repeated_by=tuple(facts.repeats),
        )

    def _age(self, use: Use) -> tuple[datetime, int]:
        """Sorts by the time at which models were made; it is known to the second."""
        return self._graph.artifacts[use.model.fingerprint].manifest.created, len(use.way)

    def _uses(
        self, name: str, facts: _Facts, through: Through | None, seen: frozenset[str]
    ) -> Iterator[Use]:
        """Models by this row's own words, then by those of the rows that stand for it."""
        edits = {d.fingerprint: line.detail for d, line in facts.fates if line.verdict == "edit"}
        for model, how, passes in facts.accounts:
            if how in _REASONS:
                continue
            data = self._graph.ancestors(model)
            edited = "; ".join(text for key, text in edits.items() if text and key in data) or None
            for made, way in self._graph.models_from(model):
                if made.fingerprint in self._scope:
                    yield Use(Node.of(made), how, passes, way, edited, through)
        for kept, link in self._stand_ins(name, facts, through, seen):
            yield from self._uses(kept, self._facts[kept], link, seen | {name})

    def _measured(
        self, name: str, facts: _Facts, through: Through | None, seen: frozenset[str]
    ) -> Iterator[Measured]:
        for dataset, line in facts.fates:
            if line.split in ("validation", "test"):
                for _, user in self._graph.users(dataset):
                    what = _looked_at(user, dataset, line)
                    if what and user.fingerprint in self._scope:
                        yield Measured(Node.of(user), line.split, what, through)
        for kept, link in self._stand_ins(name, facts, through, seen):
            yield from self._measured(kept, self._facts[kept], link, seen | {name})

    def _stand_ins(
        self, name: str, facts: _Facts, through: Through | None, seen: frozenset[str]
    ) -> Iterator[tuple[str, Through]]:
        """The rows that stay in this one's place, with how close they are."""
        for _, line in facts.fates:
            if line.kept_id and line.kept_id not in seen | {name} and line.kept_id in self._facts:
                alike = _ALIKE.get(line.operation or "", "near duplicate")
                if through is not None and alike == "exact duplicate":
                    alike = through.alike
                yield line.kept_id, Through(line.kept_id, alike, line.detail)

    def _lines_at(self, file: str, row: int) -> list[tuple[Artifact, LedgerLine]]:
        """Lines at a place of a source: of files called exactly so, or else that end so."""
        found = [
            (dataset, line)
            for dataset in self.datasets
            for line in lines_at(dataset, file, row)
            if file_matches(self._graph, dataset, line.file, file)
        ]
        read = [(d, line) for d, line in found if _reads(d)] or found
        exact = [(d, line) for d, line in read if line.file == file]
        return exact or read


def _reads(dataset: Artifact) -> bool:
    """Whether it was made from the user's files, and so knows rows by their files' names."""
    return "rows" in dataset.manifest.inputs


def _place(reference: str) -> tuple[str, int] | None:
    """File and row of a reference `FILE:ROW`; None for an id.

    Raises:
        UsageError: it is neither.
    """
    file, colon, row = reference.rpartition(":")
    if colon and file and row.isascii() and row.isdigit():
        return file, int(row)
    if len(reference) == 16 and all(digit in "0123456789abcdef" for digit in reference.lower()):
        return None
    raise UsageError(
        f"{reference}: write a row as its id (16 hex digits) or as FILE:ROW, such as chats.jsonl:17"
    )


def _is_in_an_account(answer: RowAnswer) -> bool:
    return bool(answer.trained or answer.unused)


def _together(records: Sequence[dict[str, Any]]) -> tuple[How, int | None]:
    """One verdict for all occurrences of a row in a training set."""
    verdicts = {str(record["verdict"]) for record in records}
    if "trained" in verdicts:
        passes = [record["passes"] for record in records if record["verdict"] == "trained"]
        if None in passes:
            return "in the training set", None
        return "trained", sum(passes)
    return ("not read", 0) if "not read" in verdicts else ("left out", 0)


def _looked_at(user: Artifact, dataset: Artifact, line: LedgerLine) -> str | None:
    """What a stage did with a row held out of training; None if it did not look at it."""
    config, stage = user.manifest.config, user.manifest.stage
    side, what, limit = "validation", "chose the checkpoint by the loss on it", None
    match stage:
        case "mix" | "prepare":
            return None
        case "merge":
            what, limit = "checked that merging changes nothing", config.get("check_prompts")
        case "evaluate":
            side, what = _unseen(dataset.path), "measured the model"
            limits = (config.get("max_perplexity_rows"), config.get("samples", {}).get("count"))
            limit = max((number for number in limits if number is not None), default=None)
        case _ if user.kind in WEIGHTS:
            limit = config.get("validation", {}).get("max_rows")
        case _:
            return f"an input of {stage}"
    # Held-out rows are used in their order, the first so many of them.
    within = limit is None or line.output is None or line.output < limit
    return what if line.split == side and within else None


@cache
def _unseen(dataset: Path) -> Side:
    """The side that finished models are measured on; see `PreparedDataset.unseen`."""
    return "test" if PreparedDataset.open(dataset).sizes["test"] else "validation"


def scope_of(graph: Graph, artifact: Artifact) -> dict[str, Artifact]:
    """What an answer about an artifact's rows is about: its origins, and a dataset's users."""
    scope = graph.ancestors(artifact)
    waiting = [artifact] if artifact.kind == "dataset" else []
    while waiting:
        for _, user in graph.users(waiting.pop()):
            if user.fingerprint not in scope:
                scope[user.fingerprint] = user
                waiting.append(user)
    return scope
