"""From raw records to canonical rows: one function a format.

| format              | columns                                              | family      |
|---------------------|------------------------------------------------------|-------------|
| `text`              | `text`                                               | documents   |
| `prompt_completion` | `prompt`, `completion`                               | chats       |
| `alpaca`            | `instruction`, `output`, maybe `input`, `system`     | chats       |
| `messages`          | `messages` (`role`, `content`)                       | chats       |
| `sharegpt`          | `conversations` (`from`, `value`), maybe `system`    | chats       |
| `preference`        | `chosen`, `rejected`, maybe `prompt`, `conversations`| preferences |
| `kto`               | `label` and `messages`, or `prompt`, `completion`    | kto         |

`prompt`, `completion`, `chosen` and `rejected` are strings, single messages or lists of messages.
Without a prompt, `chosen` and `rejected` are whole chats and the prompt is what both begin with.

Every format may have three more columns, which the row keeps:

| column     | holds                                                                              |
|------------|------------------------------------------------------------------------------------|
| `category` | a text, a whole number, or true or false: what classes can be balanced by          |
| `date`     | a text, a date, a date with a time, or a number: a year, a day as 20240501, or the |
|            | time since 1970 in seconds, milli-, micro- or nanoseconds                          |
| `score`    | a finite number, also as text; more is better                                      |

`preference` may have a fourth, `margin`: how much better `chosen` is, a number of at least 0, also
as text. A reward model is then asked for scores at least so far apart.

Null, a blank text and a column that is not there mean that it is not known. A text in `date` that
is no ISO 8601 date stays as it is. Other columns are ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypedDict

from posttrain.data.messages import (
    NotARow,
    check_chat,
    check_prompt,
    check_reply,
    parse_category,
    parse_date,
    parse_label,
    parse_margin,
    parse_messages,
    parse_optional_text,
    parse_prompt,
    parse_reply,
    parse_score,
    parse_text,
    shown,
)
from posttrain.data.records import BadRecord, RawRecord
from posttrain.data.rows import (
    Chat,
    Document,
    KtoExample,
    Message,
    Messages,
    Preference,
    Row,
    canonical_json,
    row_id,
)
from posttrain.data.sources import read_records
from posttrain.errors import DataError
from posttrain.recipe.base import RowFamily, RowFormat
from posttrain.recipe.datasets import DatasetSpec

FAMILIES: dict[RowFormat, RowFamily] = {
    "text": "documents",
    "prompt_completion": "chats",
    "alpaca": "chats",
    "messages": "chats",
    "sharegpt": "chats",
    "preference": "preferences",
    "kto": "kto",
}
"""What rows of each format become."""

_REQUIRED: dict[RowFormat, tuple[tuple[str, ...], ...]] = {
    "text": (("text",),),
    "prompt_completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"),),
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "preference": (("chosen", "rejected"),),
    "kto": (("messages", "label"), ("prompt", "completion", "label")),
}
"""Columns that make a format; each alternative is enough."""

_OPTIONAL = {"input", "system", "category", "date", "score", "margin"}

_COLUMNS_SHOWN = 30
"""Columns that an error message lists, and characters that it shows of each."""


def read_rows(spec: DatasetSpec) -> Iterator[Row | BadRecord]:
    """Rows of a dataset in source order; bad ones as `BadRecord` under `on_bad_row: skip`.

    Each file's format is detected from its first record unless `spec.format` names it. Under
    `skip` a record that fits no format is a bad one, and the next record is tried.

    Raises:
        DataError: a source cannot be read or holds no rows, the format is unclear, files of
            different families are mixed, or a row is bad and `spec.on_bad_row` is `error`.
    """
    _check_targets(spec.columns)
    formats: dict[str, RowFormat] = {}
    misfit: _NoFormatError | None = None
    record = None
    for record in read_records(spec):
        row: Row | BadRecord
        try:
            row = record if isinstance(record, BadRecord) else _to_row(record, spec, formats)
        except _NoFormatError as error:
            if spec.on_bad_row == "error":
                raise
            misfit = misfit or error
            row = error.record
        if isinstance(row, BadRecord) and spec.on_bad_row == "error":
            raise DataError(f"{row} (to leave such rows out, write `on_bad_row: skip`)")
        yield row
    if record is None:
        source = spec.source if isinstance(spec.source, str) else ", ".join(spec.source)
        raise DataError(f"{source}: holds no rows")
    if misfit and not formats:
        raise misfit


class _NoFormatError(DataError):
    """A record from which no format can be told."""

    def __init__(self, record: RawRecord, reason: str) -> None:
        self.record = BadRecord(record.file, record.row, reason)
        super().__init__(str(self.record))


def detect(record: RawRecord) -> RowFormat:
    """The format of a record, from its columns.

    Raises:
        DataError: no format or more than one fits; shows the columns and what would fit.
    """
    columns = set(record.fields)
    fits = [name for name, sets in _REQUIRED.items() if any(columns >= set(s) for s in sets)]
    if "kto" in fits and parse_label(record.fields["label"]) is not None:
        fits = [name for name in fits if name not in ("messages", "prompt_completion")]
    if "preference" in fits:
        fits = [name for name in fits if name != "sharegpt"]
    if len(fits) == 1:
        return fits[0]
    columns_shown = _listed(columns)
    if fits:
        raise DataError(
            f"{record.file}:{record.row}: more than one format fits the columns ({columns_shown}): "
            f"{', '.join(fits)}; write which, such as `format: {fits[0]}`"
        )
    raise _NoFormatError(
        record,
        f"no format fits the columns ({columns_shown}). {_formats_listed()}. Rename columns with "
        "`columns: {prompt: your_column}`",
    )


def convert(record: RawRecord, row_format: RowFormat) -> Row | BadRecord:
    """One record as a canonical row, or why it is none."""
    try:
        return _CONVERTERS[row_format](record)
    except NotARow as error:
        return BadRecord(record.file, record.row, str(error))


def _to_row(record: RawRecord, spec: DatasetSpec, formats: dict[str, RowFormat]) -> Row | BadRecord:
    row_format = formats.get(record.file)
    if row_format is None:
        _check_sources(record, spec.columns)
    renamed = _rename(record, spec.columns)
    if row_format is None:
        row_format = formats[record.file] = _format_of_file(renamed, spec, formats)
    return convert(renamed, row_format)


def _format_of_file(
    record: RawRecord, spec: DatasetSpec, formats: Mapping[str, RowFormat]
) -> RowFormat:
    """The format of the file whose first record this is; of one family with the files before."""
    row_format = spec.format if spec.format != "auto" else detect(record)
    for file, other in formats.items():
        if FAMILIES[other] != FAMILIES[row_format]:
            raise DataError(
                f"{record.file} holds {FAMILIES[row_format]} ({row_format}) but {file} holds "
                f"{FAMILIES[other]} ({other}); make them two datasets"
            )
    return row_format


def _check_targets(columns: Mapping[str, str]) -> None:
    known = sorted({c for sets in _REQUIRED.values() for s in sets for c in s} | _OPTIONAL)
    for column in columns:
        if column not in known:
            raise DataError(
                f"`columns` renames to `{column}`, which no format has{_close(column, known)}"
            )


def _check_sources(record: RawRecord, columns: Mapping[str, str]) -> None:
    for column, source in columns.items():
        if source not in record.fields:
            names = list(record.fields)
            raise _NoFormatError(
                record,
                f"`columns` reads `{column}` from `{source}`, but the columns are "
                f"{_listed(names)}{_close(source, names)}",
            )


def _rename(record: RawRecord, columns: Mapping[str, str]) -> RawRecord:
    """Apply a dataset's `columns`: `{prompt: question}` reads the prompt from `question`."""
    if not columns:
        return record
    fields = {key: value for key, value in record.fields.items() if key not in columns.values()}
    for column, source in columns.items():
        fields.pop(column, None)
        if source in record.fields:
            fields[column] = record.fields[source]
    return RawRecord(record.file, record.row, fields, record.subject)


def _text(record: RawRecord) -> Document:
    text = parse_text(record.fields, "text")
    return Document(text=text, **_origin(record, {"text": text}))


def _chat(record: RawRecord, messages: Messages) -> Chat:
    return Chat(messages=messages, **_origin(record, {"messages": messages}))


def _prompt_completion(record: RawRecord) -> Chat:
    prompt = parse_prompt(_field(record, "prompt"), "`prompt`")
    completion = parse_reply(_field(record, "completion"), "`completion`")
    return _chat(record, prompt + check_reply(completion, "`completion`"))


def _alpaca(record: RawRecord) -> Chat:
    system = parse_optional_text(record.fields, "system")
    instruction = parse_text(record.fields, "instruction")
    given = parse_optional_text(record.fields, "input")
    messages = (
        *_system(system),
        Message("user", f"{instruction}\n\n{given}" if given else instruction),
        Message("assistant", parse_text(record.fields, "output")),
    )
    return _chat(record, messages)


def _messages(record: RawRecord) -> Chat:
    messages = parse_messages(_field(record, "messages"), "`messages`")
    return _chat(record, check_chat(messages, "`messages`"))


def _sharegpt(record: RawRecord) -> Chat:
    return _chat(record, check_chat(_conversations(record), "`conversations`"))


def _preference(record: RawRecord) -> Preference:
    chosen = parse_reply(_field(record, "chosen"), "`chosen`")
    rejected = parse_reply(_field(record, "rejected"), "`rejected`")
    if chosen == rejected:
        raise NotARow("`chosen` and `rejected` are the same")
    if "prompt" in record.fields:
        prompt = parse_prompt(record.fields["prompt"], "`prompt`")
    elif "conversations" in record.fields:
        prompt = check_prompt(_conversations(record), "`conversations`")
    else:
        prompt = _shared_start(chosen, rejected)
    # Many sets repeat the prompt at the head of both chats.
    if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    check_reply(chosen, "`chosen`")
    check_reply(rejected, "`rejected`")
    origin = _origin(record, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    margin = parse_margin(record.fields.get("margin"))
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin, **origin)


def _kto(record: RawRecord) -> KtoExample:
    label = parse_label(_field(record, "label"))
    if label is None:
        raise NotARow(f"`label` must be true or false, not {shown(record.fields['label'])}")
    if "messages" in record.fields:
        messages = parse_messages(record.fields["messages"], "`messages`")
        prompt = check_prompt(messages[:-1], "`messages` without its last turn")
        completion = check_reply(messages[-1:], "the last of `messages`")
    else:
        prompt = parse_prompt(_field(record, "prompt"), "`prompt`")
        completion = parse_reply(_field(record, "completion"), "`completion`")
    check_reply(completion, "`completion`")
    origin = _origin(record, {"prompt": prompt, "completion": completion, "label": label})
    return KtoExample(prompt=prompt, completion=completion, label=label, **origin)


def _conversations(record: RawRecord) -> Messages:
    """ShareGPT's turns, with the system prompt that stands in a column of its own."""
    system = parse_optional_text(record.fields, "system")
    turns = parse_messages(_field(record, "conversations"), "`conversations`")
    if system and turns[0].role == "system":
        raise NotARow("the system prompt stands in `system` and in `conversations`")
    return _system(system) + turns


def _system(content: str) -> Messages:
    return (Message("system", content),) if content else ()


def _shared_start(chosen: Messages, rejected: Messages) -> Messages:
    """The turns both chats begin with, as TRL's implicit prompt; the reply is never in it."""
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared += 1
    while shared and chosen[shared - 1].role == "assistant":
        shared -= 1
    if not shared:
        raise NotARow(
            "there is no `prompt`, and `chosen` and `rejected` do not begin with the same turns"
        )
    return chosen[:shared]


def _field(record: RawRecord, column: str) -> object:
    if column not in record.fields:
        raise NotARow(f"`{column}` is missing")
    return record.fields[column]


class _Origin(TypedDict):
    id: str
    file: str
    row: int
    subject: str | None
    category: str | None
    date: str | None
    score: float | None


def _origin(record: RawRecord, content: Mapping[str, str | bool | Messages]) -> _Origin:
    """What a row has besides `content`, from which its id is made."""
    fields = record.fields
    return {
        "id": row_id(canonical_json(content), record.file, record.row),
        "file": record.file,
        "row": record.row,
        "subject": record.subject,
        "category": parse_category(fields["category"]) if "category" in fields else None,
        "date": parse_date(fields["date"]) if "date" in fields else None,
        "score": parse_score(fields["score"]) if "score" in fields else None,
    }


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _listed(columns: Iterable[str]) -> str:
    """Columns for an error message; a broken file can have any number of them, of any length."""
    names = sorted(columns)
    cut = [name[:_COLUMNS_SHOWN].encode(errors="replace").decode() for name in names]
    more = len(cut) - _COLUMNS_SHOWN
    return ", ".join(cut[:_COLUMNS_SHOWN]) + (f" and {more} more" if more > 0 else "") or "none"


def _formats_listed() -> str:
    """Every format with its columns, for an error message."""
    listed = [
        f"{name} ({' or '.join(' + '.join(columns) for columns in sets)})"
        for name, sets in _REQUIRED.items()
    ]
    return f"The formats are {', '.join(listed)}"


_CONVERTERS: dict[RowFormat, Callable[[RawRecord], Row]] = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "kto": _kto,
}
