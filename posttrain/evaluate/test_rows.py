"""The rows of test sets: read, freed of what was trained on, drawn, and checked."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from posttrain.data.rows import (
    Chat,
    Document,
    KtoExample,
    Messages,
    Preference,
    Row,
    content_digest,
)
from posttrain.errors import DataError
from posttrain.evaluate.metrics import Metric, make_metric
from posttrain.events import EventWriter
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.recipe.test_sets import TESTS, MetricConfig, TestSet
from posttrain.stages.program import StageContext, StageInput

if TYPE_CHECKING:
    from posttrain.data.prepared import PreparedDataset

_Words: TypeAlias = tuple[tuple[str, str], ...]
"""Role and text of each turn."""


@dataclass(frozen=True)
class Question:
    """One row of a test set."""

    position: int
    """Among all rows of the test set, from 0."""
    chat: Chat
    """Up to the reference, which is its last turn."""
    digest: str
    """SHA-256 (hex) of prompt and reference."""

    @property
    def prompt(self) -> Messages:
        """The turns that an answer follows."""
        return self.chat.messages[:-1]

    @property
    def reference(self) -> str:
        """The answer that the row has."""
        return self.chat.messages[-1].content


@dataclass(frozen=True)
class LoadedTestSet:
    """A test set whose rows have been read and checked."""

    config: TestSet
    questions: tuple[Question, ...]
    """Those that are asked."""
    metrics: tuple[tuple[MetricConfig, Metric], ...]


def load_test_sets(context: StageContext[EvaluateConfig]) -> tuple[LoadedTestSet, ...]:
    """Read the rows and try the metrics; takes no model, so that mistakes show at once.

    Rows whose prompt stands in the training rows word for word are left out, with a warning.

    Raises:
        DataError: rows that cannot be read or are no chats, a reference that a metric cannot use,
            nothing left to ask, or two tasks of one name.
        SandboxError: code would have to be run, and this system does not allow that safely.
    """
    names = [
        f"{tests.dataset}:{metric.title}"
        for tests in context.config.test_sets
        for metric in tests.metrics
    ]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"evaluate.test_sets: `{repeated[0]}` is asked for twice; give one metric a `name`"
        )
    return tuple(_load(context, tests) for tests in context.config.test_sets)


def _load(context: StageContext[EvaluateConfig], tests: TestSet) -> LoadedTestSet:
    context.events.phase(f"reading the test set {tests.dataset}")
    source = context.input(f"{TESTS}{tests.dataset}")
    prepared = _prepared(source) if source.spec is None else None
    rows = prepared.unseen() if prepared else _raw_rows(context.events, tests.dataset, source)
    questions = _questions(tests.dataset, rows)
    trained_on = {source.path: prepared} if prepared else {}
    if "dataset" in context.job.inputs:
        trained = context.input("dataset")
        trained_on[trained.path] = _prepared(trained)
    questions = _without_trained(
        context.events, tests.dataset, questions, list(trained_on.values())
    )
    questions = _draw(questions, tests.limit, context.config.seed)
    metrics = tuple((config, make_metric(config)) for config in tests.metrics)
    for config, metric in metrics:
        _check_references(tests, questions, config, metric)
    return LoadedTestSet(tests, tuple(questions), metrics)


def _prepared(source: StageInput) -> PreparedDataset:
    from posttrain.data.prepared import PreparedDataset

    return PreparedDataset.open(Path(source.path))


def _raw_rows(events: EventWriter, name: str, source: StageInput) -> list[Row]:
    """The rows of files, which must be those that the run was planned with."""
    from posttrain.data.formats import read_rows
    from posttrain.data.records import BadRecord
    from posttrain.data.sources import source_digest

    spec = DatasetSpec.model_validate(source.spec)
    if source_digest(spec) != source.digest:
        raise DataError(f"{source.path}: changed since the run was planned; run it again")
    found = list(read_rows(spec))
    rows = [row for row in found if not isinstance(row, BadRecord)]
    if len(rows) < len(found):
        events.warning(f"{name}: {len(found) - len(rows):,} rows cannot be read and are left out")
    return rows


def _questions(name: str, rows: Sequence[Row]) -> list[Question]:
    if not rows:
        raise DataError(f"the test set `{name}` has no rows to ask")
    return [_question(name, position, row) for position, row in enumerate(rows)]


def _question(name: str, position: int, row: Row) -> Question:
    if not isinstance(row, Chat):
        kind = {Document: "documents", Preference: "preference pairs"}.get(type(row), "KTO rows")
        raise DataError(
            f"the test set `{name}` holds {kind}, which have no prompt with one right answer; a "
            "test set takes rows with a prompt and a reference, such as `prompt` and `completion`"
        )
    last = max(i for i, message in enumerate(row.messages) if message.role == "assistant")
    if last == 0:
        raise DataError(f"{row.file}:{row.row}: nothing stands before the answer: it has no prompt")
    chat = Chat(id=row.id, file=row.file, row=row.row, messages=row.messages[: last + 1])
    return Question(position, chat, content_digest(chat))


def _without_trained(
    events: EventWriter,
    name: str,
    questions: list[Question],
    datasets: Sequence[PreparedDataset],
) -> list[Question]:
    """Leave out what the model has been shown the answer to: it would be a test of memory."""
    asked = {_words(question.prompt) for question in questions}
    trained: set[_Words] = set()
    for dataset in datasets:
        trained |= _prompts_among(asked, dataset)
    left = [question for question in questions if _words(question.prompt) not in trained]
    if not left:
        raise DataError(
            f"all {len(questions):,} rows of the test set `{name}` were trained on, so they show "
            "what the model remembers and not what it can do; write `split` in `prepare` to keep "
            "rows away from training, or give other rows"
        )
    if len(left) < len(questions):
        events.warning(
            f"{name}: {len(questions) - len(left):,} of {len(questions):,} test rows were trained "
            "on and are left out"
        )
    return left


def _prompts_among(asked: set[_Words], dataset: PreparedDataset) -> set[_Words]:
    """Those that stand in a dataset's training rows, followed by an answer."""
    found = set()
    for batch in dataset.batches("train"):
        for row in batch.rows:
            found |= {_words(prompt) for prompt in _trained_prompts(row)} & asked
    return found


def _trained_prompts(row: Row) -> Iterator[Messages]:
    match row:
        case Chat():
            for turn, message in enumerate(row.messages):
                if message.role == "assistant":
                    yield row.messages[:turn]
        case Preference() | KtoExample():
            yield row.prompt


def _words(messages: Messages) -> _Words:
    """Turns in NFC with runs of white space as one, as exact deduplication has it.

    Without the system's: another one makes no other question.
    """
    said = [message for message in messages if message.role != "system"]
    return tuple(
        (message.role, " ".join(unicodedata.normalize("NFC", message.content).split()))
        for message in said or messages
    )


def _draw(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """`limit` questions by seed and content, so that the order of the rows changes nothing."""
    if limit is None or len(questions) <= limit:
        return questions

    def lot(question: Question) -> tuple[str, int]:
        drawn = hashlib.sha256(f"{seed}:{question.digest}".encode()).hexdigest()
        return drawn, question.position

    return sorted(sorted(questions, key=lot)[:limit], key=lambda question: question.position)


def _check_references(
    tests: TestSet, questions: Sequence[Question], config: MetricConfig, metric: Metric
) -> None:
    for question in questions:
        why = metric.refuse(question.reference)
        if why:
            row = question.chat
            raise DataError(
                f"{row.file}:{row.row}: the reference {why} (test set `{tests.dataset}`, metric "
                f"`{config.title}`)"
            )
