from __future__ import annotations

import hashlib
import json
from collections import Counter
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.formats import convert, detect, read_rows
from posttrain.data.records import BadRecord, RawRecord
from posttrain.data.rows import (
    Chat,
    Document,
    KtoExample,
    Message,
    Messages,
    Preference,
    canonical_json,
    content_json,
)
from posttrain.errors import DataError
from posttrain.recipe import DatasetSpec, RowFormat

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
WORSE = {"role": "assistant", "content": "What?"}


def row(fields: dict[str, Any], row_format: RowFormat | None = None) -> Any:
    record = RawRecord("a.jsonl", 17, fields)
    return convert(record, row_format or detect(record))


def turns(*pairs: tuple[str, str]) -> Messages:
    return tuple(Message(role, content) for role, content in pairs)  # type: ignore[arg-type]


SIMPLE = turns(("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, SIMPLE),
        ({"prompt": [USER], "completion": [REPLY]}, SIMPLE),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, SIMPLE),
        ({"instruction": "Hi", "input": None, "output": "Hello"}, SIMPLE),
        (
            {"instruction": "Add", "input": "1, 2", "output": "3", "system": "Be brief."},
            turns(("system", "Be brief."), ("user", "Add\n\n1, 2"), ("assistant", "3")),
        ),
        ({"messages": [USER, REPLY], "id": 7}, SIMPLE),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, REPLY]},
            SIMPLE,
        ),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, USER, REPLY]},
            (*turns(("system", "Be brief.")), *SIMPLE),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "tool", "value": "{}"},
                    {"from": "gpt", "value": "Hello"},
                ],
                "system": "Be brief.",
            },
            turns(("system", "Be brief."), ("user", "Hi"), ("tool", "{}"), ("assistant", "Hello")),
        ),
    ],
)
def test_chats(fields: dict[str, Any], messages: Messages) -> None:
    assert row(fields).messages == messages


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [WORSE]},
        {"prompt": "Hi", "chosen": [USER, REPLY], "rejected": [USER, WORSE]},
        {"chosen": [USER, REPLY], "rejected": [USER, WORSE]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "What?"},
        },
    ],
)
def test_preferences(fields: dict[str, Any]) -> None:
    made = row(fields)
    assert isinstance(made, Preference)
    assert made.prompt == turns(("user", "Hi"))
    assert made.chosen == turns(("assistant", "Hello"))
    assert made.rejected == turns(("assistant", "What?"))


def test_implicit_prompt_ends_before_the_replies_differ() -> None:
    chat = [USER, REPLY, {"role": "user", "content": "More"}]
    made = row({"chosen": [*chat, REPLY], "rejected": [*chat, WORSE]})
    assert [message.content for message in made.prompt] == ["Hi", "Hello", "More"]


def test_implicit_prompt_never_ends_with_the_assistant() -> None:
    more, other = ({"role": "user", "content": content} for content in ("More", "Other"))
    made = row({"chosen": [USER, REPLY, more, REPLY], "rejected": [USER, REPLY, other, REPLY]})
    assert made.prompt == turns(("user", "Hi"))
    assert [message.content for message in made.chosen] == ["Hello", "More", "Hello"]


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"messages": [USER, REPLY], "label": True}, True),
        ({"prompt": "Hi", "completion": "Hello", "label": False}, False),
        ({"prompt": "Hi", "completion": "Hello", "label": "False"}, False),
    ],
)
def test_kto(fields: dict[str, Any], label: bool) -> None:
    made = row(fields)
    assert isinstance(made, KtoExample)
    assert (made.prompt, made.completion) == (SIMPLE[:1], SIMPLE[1:])
    assert made.label is label


@pytest.mark.parametrize(
    ("row_format", "fields", "reason"),
    [
        ("text", {"text": "  "}, "`text` is empty"),
        ("text", {"text": 3}, "`text` must be a text, not int"),
        ("text", {"other": "x"}, "`text` is missing"),
        ("text", {"text": "\ud800"}, "`text` has half a surrogate pair at character 1"),
        ("alpaca", {"instruction": "Hi", "output": ""}, "`output` is empty"),
        ("alpaca", {"instruction": None, "output": "x"}, "`instruction` must be a text, not null"),
        ("prompt_completion", {"prompt": "Hi"}, "`completion` is missing"),
        (
            "prompt_completion",
            {"prompt": "Hi", "completion": [USER]},
            "`completion` must be the assistant's turn, not the user's",
        ),
        ("messages", {"messages": []}, "`messages` is empty"),
        ("messages", {"messages": "Hi"}, "`messages` must be a list of messages, not str"),
        ("messages", {"messages": [USER]}, "`messages` has no assistant turn"),
        ("messages", {"messages": [REPLY]}, "`messages` has no turn before the assistant's"),
        (
            "messages",
            {"messages": [{"role": "bot", "content": "x"}]},
            "`messages`[0]: unknown role 'bot'; the roles are system, user, assistant, tool",
        ),
        ("messages", {"messages": [USER, {"role": "assistant"}]}, "`messages`[1] has no `content`"),
        (
            "messages",
            {"messages": [USER, {**REPLY, "tool_calls": [{}]}]},
            "`messages`[1]: `tool_calls` are not supported",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "system", "content": "x"}, REPLY]},
            "`messages`[1]: a system message may only stand first",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]},
            "`messages`[0]: only text parts are supported",
        ),
        (
            "preference",
            {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"},
            "`chosen` and `rejected` are the same",
        ),
        (
            "preference",
            {"chosen": "Hello", "rejected": "What?"},
            "there is no `prompt`, and `chosen` and `rejected` do not begin with the same turns",
        ),
        (
            "preference",
            {"prompt": [USER, REPLY], "chosen": "Hello", "rejected": "What?"},
            "`prompt` must end with the user's turn, not the assistant's",
        ),
        (
            "kto",
            {"messages": [USER, REPLY], "label": 1},
            "`label` must be true or false, not 1",
        ),
        (
            "kto",
            {"messages": [REPLY, USER], "label": True},
            "`messages` without its last turn must end with the user's turn",
        ),
        (
            "kto",
            {"messages": [USER], "label": True},
            "`messages` without its last turn is empty",
        ),
    ],
)
def test_bad_rows_say_which_field_and_why(
    row_format: RowFormat, fields: dict[str, Any], reason: str
) -> None:
    bad = row(fields, row_format)
    assert isinstance(bad, BadRecord)
    assert str(bad).startswith(f"a.jsonl:17: {reason}")


def test_detection_that_fails_shows_columns_and_formats() -> None:
    with pytest.raises(
        DataError, match=r"no format fits the columns \(answer, question\)"
    ) as error:
        detect(RawRecord("a.jsonl", 1, {"question": "x", "answer": "y"}))
    assert "alpaca (instruction + output)" in str(error.value)
    with pytest.raises(DataError, match=r"more than one format fits .*: text, messages;"):
        detect(RawRecord("a.jsonl", 1, {"text": "x", "messages": []}))
    with pytest.raises(DataError, match=r"more than one format fits .*: messages, kto;"):
        detect(RawRecord("a.jsonl", 1, {"messages": [], "label": "billing"}))


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def _write(*records: dict[str, Any], name: str = "a.jsonl", **options: Any) -> DatasetSpec:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return DatasetSpec.model_validate({"source": str(path), **options})

    return _write


def test_columns_rename(write: Any) -> None:
    spec = write(
        {"question": "Hi", "answer": "Hello", "prompt": "ignored"},
        {"question": "Hi", "completion": "ignored"},
        columns={"prompt": "question", "completion": "answer"},
        on_bad_row="skip",
    )
    good, bad = read_rows(spec)
    assert isinstance(good, Chat)
    assert good.messages == SIMPLE
    assert str(bad) == "a.jsonl:2: `completion` is missing"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "question"}, "no format has; did you mean `prompt`?"),
        ({"prompt": "questoin"}, "the columns are answer, question; did you mean `question`?"),
    ],
)
def test_misspelt_columns_are_named(write: Any, columns: dict[str, str], message: str) -> None:
    spec = write({"question": "Hi", "answer": "Hello"}, columns=columns)
    with pytest.raises(DataError) as error:
        list(read_rows(spec))
    assert message in str(error.value)


def test_bad_row_stops_or_is_skipped(write: Any) -> None:
    records = [{"text": "x"}, {"text": ""}, {"text": "y"}]
    with pytest.raises(DataError, match=r"a\.jsonl:2: `text` is empty .*on_bad_row: skip"):
        list(read_rows(write(*records)))
    rows = list(read_rows(write(*records, on_bad_row="skip")))
    assert [type(item) for item in rows] == [Document, BadRecord, Document]


def test_files_of_one_dataset_share_a_family_not_a_format(write: Any) -> None:
    one = write({"messages": [USER, REPLY]}, name="a.jsonl").source
    two = write({"prompt": "Hi", "completion": "Hello"}, name="b.jsonl").source
    three = write({"text": "x"}, name="c.jsonl").source
    rows = list(read_rows(DatasetSpec(source=(one, two))))
    assert [item.messages for item in rows if isinstance(item, Chat)] == [SIMPLE, SIMPLE]
    with pytest.raises(DataError, match=r"c\.jsonl holds documents .* make them two datasets"):
        list(read_rows(DatasetSpec(source=(one, three))))


def test_ids_depend_on_content_and_position_alone(write: Any, tmp_path: Path) -> None:
    spec = write({"text": "x"}, {"text": "x"}, {"text": "y"})
    ids = [item.id for item in read_rows(spec) if isinstance(item, Document)]
    assert len(set(ids)) == 3
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "moved/a.jsonl")
    moved = read_rows(DatasetSpec(source=str(tmp_path / "moved")))
    assert [item.id for item in moved if isinstance(item, Document)] == ids


ODD = 'a "q" \\ / \b\f\n\r\t \x00\x1b\x7f \u2028 é \U0001f600 </x>'
ODD_USER, ODD_REPLY = {**USER, "content": ODD}, {**REPLY, "content": "Hello " + ODD}


@pytest.mark.parametrize(
    ("fields", "identity"),
    [
        ({"text": ODD}, "96ac81c613b78024"),
        ({"prompt": ODD, "completion": "Hello"}, "0f952f60d9a86d4c"),
        ({"instruction": ODD, "input": "1", "output": "x", "system": "s"}, "b6b8d4678a03c3af"),
        ({"messages": [ODD_USER, ODD_REPLY]}, "8678d0f113f726ab"),
        (
            {"conversations": [{"from": "human", "value": ODD}, {"from": "gpt", "value": "y"}]},
            "5bd66b2a1d98e27e",
        ),
        ({"prompt": [ODD_USER], "chosen": [ODD_REPLY], "rejected": [WORSE]}, "58f7212329186834"),
        ({"messages": [ODD_USER, ODD_REPLY], "label": True}, "45a498bd083a304f"),
        ({"messages": [ODD_USER, ODD_REPLY], "label": False}, "d69cc43658922616"),
    ],
)
def test_ids_stay_what_they_always_were(fields: dict[str, Any], identity: str) -> None:
    # Ids stand in ledgers and in the lineage of models that exist.
    record = RawRecord("dir/ä.jsonl", 17, fields)
    made = convert(record, detect(record))
    assert not isinstance(made, BadRecord)
    assert made.id == identity
    extra = RawRecord(record.file, 17, {**fields, "category": "a", "date": 2024, "score": 1})
    assert row_of(extra).id == identity


def row_of(record: RawRecord) -> Any:
    return convert(record, detect(record))


@given(text=st.text(), others=st.lists(st.text(), max_size=3), label=st.booleans())
def test_canonical_json_is_sorted_and_escapes_as_little_as_json_allows(
    text: str, others: list[str], label: bool
) -> None:
    turns = [Message("user", other) for other in others]
    content: dict[str, Any] = {"z": text, "a": label, "messages": tuple(turns)}
    plain = {**content, "messages": [{"role": "user", "content": other} for other in others]}
    assert canonical_json(content) == json.dumps(
        plain, ensure_ascii=False, sort_keys=True, separators=(",", ":")
    )
    document = Document(id="", file="a", row=1, text=text, category="x")
    assert json.loads(content_json(document)) == {"text": text}


EVERY_FORMAT = [
    {"text": "x"},
    {"prompt": "Hi", "completion": "Hello"},
    {"instruction": "Hi", "output": "Hello"},
    {"messages": [USER, REPLY]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"},
    {"prompt": "Hi", "completion": "Hello", "label": True},
]


@pytest.mark.parametrize("fields", EVERY_FORMAT)
def test_category_date_and_score_are_kept_in_every_format(fields: dict[str, Any]) -> None:
    bare = row(fields)
    assert (bare.category, bare.date, bare.score) == (None, None, None)
    made = row({**fields, "category": "law", "date": "2024-05-01", "score": 3})
    assert (made.category, made.date, made.score) == ("law", "2024-05-01", 3.0)
    assert isinstance(made.score, float)


NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("column", "value", "kept"),
    [
        ("category", None, None),
        ("category", " ", None),
        ("category", " law ", "law"),
        ("category", 3, "3"),
        ("category", True, "true"),
        ("score", None, None),
        ("score", "", None),
        ("score", 0, 0.0),
        ("score", " -1.5e3 ", -1500.0),
        ("score", Decimal("0.25"), 0.25),
        ("date", None, None),
        ("date", "  ", None),
        ("date", "May 2024", "May 2024"),
        ("date", " 2024-05-01 ", "2024-05-01"),
        ("date", "2024-05-01T14:00:00+02:00", "2024-05-01T12:00:00"),
        ("date", "2024-05-01 12:00:00Z", "2024-05-01T12:00:00"),
        ("date", NOON, "2024-05-01T12:00:00"),
        ("date", NOON.astimezone(timezone(timedelta(hours=2))), "2024-05-01T12:00:00"),
        ("date", NOON.replace(tzinfo=None), "2024-05-01T12:00:00"),
        ("date", date(2024, 5, 1), "2024-05-01"),
        ("date", 2024, "2024"),
        ("date", 2024.0, "2024"),
        ("date", 2024_05_01, "2024-05-01"),
        ("date", 1_714_564_800, "2024-05-01T12:00:00"),
        ("date", 1_714_564_800_500, "2024-05-01T12:00:00.500000"),
        ("date", 1_714_564_800_000_000, "2024-05-01T12:00:00"),
        ("date", 1_714_564_800_000_000_000, "2024-05-01T12:00:00"),
    ],
)
def test_values_of_category_date_and_score(column: str, value: object, kept: object) -> None:
    assert getattr(row({"text": "x", column: value}), column) == kept


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("category", 1.5, "`category` must be a text or a whole number, not 1.5"),
        ("category", ["a"], "`category` must be a text or a whole number, not ['a']"),
        ("category", "\ud800", "`category` has half a surrogate pair"),
        ("score", "high", "`score` must be a number, not 'high'"),
        ("score", True, "`score` must be a number, not True"),
        ("score", float("nan"), "`score` must be a number, not nan"),
        ("score", "inf", "`score` must be a number, not 'inf'"),
        ("score", 10**400, "`score` must be a number, not 1000"),
        ("score", {"a": 1}, "`score` must be a number, not {'a': 1}"),
        ("score", "x" * 10_000, "`score` must be a number, not 'xxx"),
        ("date", 2024_13_01, "`date` must be a date as text, such as 2024-05-01, not 20241301"),
        ("date", 0, "`date` must be a date"),
        ("date", -5, "`date` must be a date"),
        ("date", 12_345, "`date` must be a date"),
        ("date", 10**30, "`date` must be a date"),
        ("date", 1.5, "`date` must be a date"),
        ("date", True, "`date` must be a date"),
        ("date", ["2024"], "`date` must be a date"),
        ("date", "\ud800", "`date` has half a surrogate pair"),
    ],
)
def test_bad_category_date_and_score_name_column_and_value(
    column: str, value: object, reason: str
) -> None:
    bad = row({"text": "x", column: value})
    assert isinstance(bad, BadRecord)
    assert bad.reason.startswith(reason)
    assert len(bad.reason) < 200


@given(st.datetimes(timezones=st.just(UTC)), st.datetimes(timezones=st.just(UTC)))
def test_dates_sort_as_text_as_they_do_in_time(one: datetime, other: datetime) -> None:
    shown = [row({"text": "x", "date": time}).date for time in (one, other)]
    assert (shown[0] < shown[1]) == (one < other)


def test_score_may_be_renamed_and_kto_keeps_its_label(write: Any) -> None:
    record = {"prompt": "Hi", "completion": "Hello", "label": False, "rating": "4.5", "topic": 7}
    (made,) = read_rows(write(record, columns={"score": "rating", "category": "topic"}))
    assert isinstance(made, KtoExample)
    assert (made.label, made.score, made.category) == (False, 4.5, "7")


PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}


@pytest.mark.parametrize(
    ("value", "kept"), [(None, None), (" ", None), (0, 0.0), ("1.5", 1.5), (Decimal(2), 2.0)]
)
def test_a_pair_keeps_its_margin(value: object, kept: float | None) -> None:
    assert row(PAIR).margin is None
    made = row({**PAIR, "margin": value})
    assert made.margin == kept
    assert made.id == row(PAIR).id
    assert content_json(made) == content_json(row(PAIR)), "two margins make no two pairs"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (-1, "`margin` must be at least 0, not -1: it is how much better `chosen` is"),
        ("big", "`margin` must be a number, not 'big'"),
        (True, "`margin` must be a number, not True"),
    ],
)
def test_a_margin_that_is_none_names_the_value(value: object, reason: str) -> None:
    bad = row({**PAIR, "margin": value})
    assert isinstance(bad, BadRecord)
    assert bad.reason == reason


def test_a_margin_may_be_renamed(write: Any) -> None:
    (made,) = read_rows(write({**PAIR, "gap": 2}, columns={"margin": "gap"}))
    assert isinstance(made, Preference)
    assert made.margin == 2.0


@pytest.mark.parametrize(
    ("name", "row_type", "count", "ids"),
    [
        ("alpaca_en_demo.json", Chat, 999, "b970d84f416126ce"),
        ("dpo_en_demo.json", Preference, 300, "29f1af6a85977a97"),
        ("kto_en_demo.json", KtoExample, 300, "bc44300f7ee80c01"),
        ("c4_demo.jsonl", Document, 300, "ea277260bbbb265f"),
        ("wiki_demo.txt", Document, 30, "0a206be83fe7c392"),
    ],
)
def test_real_files_are_read_whole(
    real_data: Path, name: str, row_type: type, count: int, ids: str
) -> None:
    rows = list(read_rows(DatasetSpec(source=str(real_data / name))))
    assert Counter(type(item) for item in rows) == {row_type: count}
    joined = "".join(item.id for item in rows if not isinstance(item, BadRecord))
    assert hashlib.sha256(joined.encode()).hexdigest().startswith(ids)
