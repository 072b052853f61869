"""Prompts to sample answers to: from a prepared dataset, from rows of any format, or alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from posttrain.data.formats import convert, detect, read_rows
from posttrain.data.prepared import PreparedDataset
from posttrain.data.records import BadRecord, RawRecord
from posttrain.data.rows import Chat, Messages, Row, canonical_json, row_id
from posttrain.data.sources import pin_revision, read_records
from posttrain.errors import DataError, UsageError
from posttrain.generation import read_prompts
from posttrain.lineage import Graph
from posttrain.recipe.datasets import DatasetSpec
from posttrain.store import Store


def read_prompt_rows(sources: Sequence[str], store: Store, limit: int | None) -> list[Row]:
    """Rows to take prompts from, in the order of the sources.

    Args:
        sources: Each a dataset in the store (fingerprint, STAGE, RECIPE/STAGE), a folder that
            `prepare` wrote, of both of which the train split is read, a `.txt` file with a prompt
            a line, a `.jsonl` file with prompts alone, or anything that a recipe's `source` may be.
        store: Where datasets are looked up.
        limit: The first of all these.

    Raises:
        DataError: a source cannot be read, or there is no prompt in it.
        UsageError: a name is neither a source nor a dataset in the store.
    """
    graph = Graph.read(store)
    rows = itertools.chain.from_iterable(_rows(source, graph) for source in sources)
    return list(itertools.islice(rows, limit))


def _rows(source: str, graph: Graph) -> Iterator[Row]:
    path = Path(source).expanduser()
    if (path / "dataset.json").is_file():
        return iter(PreparedDataset.open(path).rows("train"))
    if path.is_file() and path.suffix.lower() == ".txt":
        return _alone(path)
    if path.is_file() and not _has_format(path):
        return _alone(path)
    if path.exists() or ":" in source or "*" in source:
        return _of_dataset(source)
    artifact = graph.find(source)
    if artifact.kind != "dataset":
        raise UsageError(f"{source}: is a {artifact.kind}, and holds no prompts")
    return iter(PreparedDataset.open(artifact.path).rows("train"))


def _has_format(path: Path) -> bool:
    """Whether the first record is a row of some format; if not, it may still have a prompt."""
    first = next(iter(read_records(DatasetSpec(source=str(path), limit=1))), None)
    if not isinstance(first, RawRecord):
        return True  # reading it says what is wrong
    try:
        is_row = not isinstance(convert(first, detect(first)), BadRecord)
    except DataError:
        is_row = False
    return is_row or first.fields.keys().isdisjoint(("prompt", "messages"))


def _of_dataset(source: str) -> Iterator[Row]:
    for row in read_rows(pin_revision(DatasetSpec(source=source))):
        if not isinstance(row, BadRecord):  # by its default the spec lets none through
            yield row


def _alone(path: Path) -> Iterator[Row]:
    """Prompts without answers, as chats that the assistant has yet to answer."""
    for number, messages in enumerate(read_prompts(path), start=1):
        yield _unanswered(messages, path.name, number)


def _unanswered(messages: Messages, file: str, row: int) -> Chat:
    content = canonical_json({"messages": messages})
    return Chat(messages=messages, id=row_id(content, file, row), file=file, row=row)
