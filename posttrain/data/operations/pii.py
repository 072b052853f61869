"""Personal data and secrets: found by form and check digit, then replaced or the row dropped.

Names and postal addresses are not looked for: that takes a language model for each language
(docs/decisions/0008-pii.md).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Decisions, Drop, Edit
from posttrain.data.operations.pii_network import emails, ip_addresses
from posttrain.data.operations.pii_numbers import credit_cards, ibans, phones
from posttrain.data.operations.pii_secrets import secrets
from posttrain.data.operations.pii_spans import Span
from posttrain.data.rows import (
    Chat,
    Document,
    KtoExample,
    Message,
    Messages,
    Preference,
    Row,
    from_record,
)
from posttrain.recipe.base import RowFamily
from posttrain.recipe.prepare import Pii, PiiKind

PLACEHOLDERS: dict[PiiKind, str] = {
    "secret": "<SECRET>",
    "iban": "<IBAN>",
    "credit_card": "<CREDIT_CARD>",
    "email": "<EMAIL>",
    "ip_address": "<IP_ADDRESS>",
    "phone": "<PHONE>",
}
"""What stands in place of a finding. Where findings overlap, the kind named first here wins: the
more a form tells by itself, the earlier it comes."""

Finders: TypeAlias = Mapping[PiiKind, Callable[[str], list[Span]]]
"""For each wanted kind, in the order of `PLACEHOLDERS`, what finds it in a text."""

_MESSAGE_COLUMNS: dict[RowFamily, tuple[str, ...]] = {
    "chats": ("messages",),
    "preferences": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "completion"),
}


@dataclass(frozen=True)
class PiiFilter:
    """Replaces personal data and secrets by typed placeholders, or drops the rows that hold any.

    Every text of a row is searched: prompts and system prompts as well as answers, and both
    continuations of a preference. `Decisions.found` counts findings by kind. All but the findings
    stays as it was. The result holds no further finding, so applying this twice changes nothing.
    """

    config: Pii

    @property
    def name(self) -> str:
        """Key in the recipe."""
        return "pii"

    def apply(self, batch: RowBatch) -> Decisions:
        """Find what each row of the batch holds, then replace it or drop the row."""
        finders = finders_of(self.config)
        decisions = Decisions()
        for position in _rows_with_findings(batch, finders):
            record = batch.table.slice(position, 1).to_pylist()[0]
            row, found = _scrub_row(from_record(batch.family, record), finders)
            decisions.found.update(found)
            detail = ", ".join(f"{found[kind]} {kind}" for kind in PLACEHOLDERS if found[kind])
            if self.config.action == "drop":
                decisions.drops[position] = Drop("pii", detail)
            else:
                decisions.edits[position] = Edit(row, detail)
        return decisions


def finders_of(config: Pii) -> Finders:
    """What finds the kinds that the settings name."""
    finders: Finders = {
        "secret": secrets,
        "iban": ibans,
        "credit_card": credit_cards,
        "email": emails,
        "ip_address": ip_addresses,
        "phone": partial(phones, region=config.phone_region),
    }
    return {kind: finders[kind] for kind in PLACEHOLDERS if kind in config.kinds}


def scrub(text: str, finders: Finders) -> tuple[str, Counter[PiiKind]]:
    """The text with placeholders for what is found in it, and the number of findings by kind."""
    found: Counter[PiiKind] = Counter()
    # What a finding's neighbours ruled out may be ruled in once the finding is gone, so look again
    # until nothing is left. Placeholders are never found: each round leaves less to find.
    while findings := find(text, finders):
        parts: list[str] = []
        done = 0
        for start, end, kind in findings:
            parts += [text[done:start], PLACEHOLDERS[kind]]
            done = end
            found[kind] += 1
        text = "".join([*parts, text[done:]])
    return text, found


def find(text: str, finders: Finders) -> list[tuple[int, int, PiiKind]]:
    """Findings that do not overlap, in order of their place: start, end and kind.

    Of two that overlap, the one of the more certain kind stays; of one kind, the longer one.
    """
    findings: list[tuple[int, int, PiiKind]] = []
    for kind, spans_of in finders.items():
        for start, end in sorted(spans_of(text), key=lambda span: (span[0] - span[1], span)):
            if all(end <= other or start >= stop for other, stop, _ in findings):
                findings.append((start, end, kind))
    return sorted(findings)


def _rows_with_findings(batch: RowBatch, finders: Finders) -> list[int]:
    searches = tuple(finders.values())
    rows = dict.fromkeys(
        position for position, text in _texts(batch) if any(search(text) for search in searches)
    )
    return sorted(rows)


def _texts(batch: RowBatch) -> Iterator[tuple[int, str]]:
    """Every text of the batch with its row's position; column by column, without building rows."""
    if batch.family == "documents":
        yield from enumerate(batch.texts)
        return
    for column in _MESSAGE_COLUMNS[batch.family]:
        for position, messages in enumerate(batch.table.column(column).to_pylist()):
            for message in messages:
                yield position, message["content"]


def _scrub_row(row: Row, finders: Finders) -> tuple[Row, Counter[PiiKind]]:
    found: Counter[PiiKind] = Counter()

    def text_of(text: str) -> str:
        scrubbed, here = scrub(text, finders)
        found.update(here)
        return scrubbed

    def turns(messages: Messages) -> Messages:
        return tuple(Message(message.role, text_of(message.content)) for message in messages)

    replace = dataclasses.replace
    match row:
        case Document():
            return replace(row, text=text_of(row.text)), found
        case Chat():
            return replace(row, messages=turns(row.messages)), found
        case Preference():
            prompt, chosen = turns(row.prompt), turns(row.chosen)
            edited = replace(row, prompt=prompt, chosen=chosen, rejected=turns(row.rejected))
            return edited, found
        case KtoExample():
            return replace(row, prompt=turns(row.prompt), completion=turns(row.completion)), found
