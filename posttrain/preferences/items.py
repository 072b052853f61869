"""What people are to rate: the pairs of a preference dataset, or two answers of several."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.data.formats import convert, detect
from posttrain.data.messages import NotARow, parse_prompt, parse_reply
from posttrain.data.records import BadRecord, RawRecord
from posttrain.data.rows import Messages, Preference
from posttrain.data.sources import read_records
from posttrain.errors import DataError
from posttrain.preferences.blinding import draw_orders
from posttrain.preferences.key import Item, turns_of
from posttrain.recipe.datasets import DatasetSpec

DATASET = "dataset"
"""Who proposed a pair whose row does not name a reward."""


@dataclass(frozen=True)
class _Pair:
    """Two answers, the better first where anybody said so."""

    prompt: Messages
    answers: tuple[Messages, Messages]
    source: str
    proposed_by: str | None = None
    model: str | None = None
    scores: tuple[float, float] | None = None


def read_items(source: str, limit: int | None, seed: int) -> tuple[list[Item], int]:
    """The items of a file of pairs or answers, each in an order that says nothing.

    Args:
        source: Rows with `chosen` and `rejected`, or with a `prompt` and several `answers`, of
            which two unlike ones are drawn.
        limit: Read this many records.
        seed: Of what is drawn.

    Returns:
        The items, and how many records have no two unlike answers and are left out.

    Raises:
        DataError: it cannot be read, or a record is neither.
    """
    draw = random.Random(f"items:{seed}")
    pairs = []
    records = 0
    for record in read_records(DatasetSpec(source=source, limit=limit)):
        if isinstance(record, BadRecord):
            raise DataError(str(record))
        records += 1
        pair = _pair(record, draw)
        if pair is not None:
            pairs.append(pair)
    if not pairs:
        raise DataError(f"{source}: there is no pair of unlike answers in it")
    orders = draw_orders(len(pairs), draw)
    items = [_item(pair, order == "BA") for pair, order in zip(pairs, orders, strict=True)]
    return items, records - len(pairs)


def _pair(record: RawRecord, draw: random.Random) -> _Pair | None:
    if "answers" in record.fields and "chosen" not in record.fields:
        return _of_answers(record, draw)
    row = convert(record, detect(record))
    if isinstance(row, BadRecord):
        raise DataError(str(row))
    if not isinstance(row, Preference):
        raise DataError(
            f"{record.file}:{record.row}: has no two answers; a sheet is made of rows with "
            "`chosen` and `rejected`, or with a `prompt` and `answers`"
        )
    return _Pair(
        prompt=row.prompt,
        answers=(row.chosen, row.rejected),
        source=f"{record.file}:{record.row}",
        proposed_by=_text(record, "reward") or DATASET,
        model=_text(record, "model"),
        scores=_scores(record),
    )


def _of_answers(record: RawRecord, draw: random.Random) -> _Pair | None:
    """Two unlike answers of a record, or None if there are none."""
    where = f"{record.file}:{record.row}"
    try:
        prompt = parse_prompt(record.fields.get("prompt"), "`prompt`")
        answers = _answers(record.fields["answers"])
    except NotARow as error:
        raise DataError(f"{where}: {error}") from error
    unlike = list(dict.fromkeys(answers))
    if len(unlike) < 2:
        return None
    one, other = draw.sample(unlike, 2)
    return _Pair(prompt, (one, other), where, model=_text(record, "model"))


def _answers(value: object) -> list[Messages]:
    """Texts, messages, or objects with a `text` as `sample` writes them; blank ones left out."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise NotARow("`answers` must be a list")
    texts = [item["text"] if isinstance(item, dict) and "text" in item else item for item in value]
    return [
        parse_reply(text, f"`answers[{number}]`")
        for number, text in enumerate(texts)
        if not isinstance(text, str) or text.strip()
    ]


def _item(pair: _Pair, turned: bool) -> Item:
    one, other = (turns_of(answer) for answer in pair.answers)
    first, second = (other, one) if turned else (one, other)
    proposed = None if pair.proposed_by is None else "second" if turned else "first"
    return Item(
        prompt=turns_of(pair.prompt),
        first=first,
        second=second,
        source=pair.source,
        proposed=proposed,
        proposed_by=pair.proposed_by,
        model=pair.model,
        scores=pair.scores and (pair.scores[turned], pair.scores[not turned]),
    )


def _text(record: RawRecord, column: str) -> str | None:
    value = record.fields.get(column)
    return value if isinstance(value, str) and value else None


def _scores(record: RawRecord) -> tuple[float, float] | None:
    """The scores of chosen and rejected, as `sample` writes them."""
    value = record.fields.get("scores")
    if not isinstance(value, list) or len(value) != 2:
        return None
    if not all(isinstance(score, int | float) for score in value):
        return None
    return float(value[0]), float(value[1])
