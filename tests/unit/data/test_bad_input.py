"""Damaged files: each gives an error that names file and row, or a counted skip."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.data.formats import read_rows
from posttrain.data.records import BadRecord
from posttrain.data.rows import Chat, Document, Row
from posttrain.errors import DataError
from posttrain.recipe import DatasetSpec

WORD = "x" * 100_000
LONG, OTHER = "a" * 300, "b" * 300
BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Case:
    """A damaged file, the texts that are read from it and the rows that are not."""

    damage: str
    kind: str
    content: bytes
    good: tuple[str, ...] = ()
    bad: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}-{self.damage.replace(' ', '_')}"


@dataclass(frozen=True)
class Broken:
    """A file so damaged that it is an error even where bad rows are skipped."""

    damage: str
    kind: str
    content: bytes
    message: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.damage.replace(' ', '_')}"


def jsonl(*values: Any) -> bytes:
    return b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values)


NOT_UTF8 = "not valid UTF-8 at byte {} of the line (0xff)"
CASES = [
    Case("invalid UTF-8", ".jsonl", jsonl("x") + b'{"text": "\xff"}\n' + jsonl("y"), ("x", "y"),
         ((2, NOT_UTF8.format(11)),)),
    Case("invalid UTF-8", ".csv", b"text,n\nx,1\na\xff,2\ny,3\n", ("x", "y"),
         ((3, NOT_UTF8.format(2)),)),
    Case("invalid UTF-8 in a cell of two lines", ".csv", b'text\n"a\n\xff"\ny\n', ("y",),
         ((2, NOT_UTF8.format(1)),)),
    Case("invalid UTF-8", ".md", b"# A\n\xff", (), ((2, NOT_UTF8.format(1)),)),
    Case("invalid UTF-8", ".txt", b"Roses\nare \xff", (), ((2, NOT_UTF8.format(5)),)),
    Case("invalid UTF-8, a document a line", ".txt",
         f"{LONG}\n".encode() + b"\xff" * 300 + f"\n{OTHER}\n".encode(), (LONG, OTHER),
         ((2, NOT_UTF8.format(1)),)),
    Case("BOM and CRLF", ".jsonl", BOM + b'{"text": "a\\nb"}\r\n\r\n{"text": "y"}\r\n',
         ("a\nb", "y")),
    Case("BOM and CRLF", ".json", BOM + b'[{"text": "x"},\r\n{"text": "y"}]\r\n', ("x", "y")),
    Case("BOM and CRLF", ".csv", BOM + b'text\r\n"a\r\nb"\r\n\r\ny\r\n', ("a\nb", "y")),
    Case("BOM and CRLF", ".md", BOM + b"# A\r\n\r\nb\r\n", ("# A\n\nb\n",)),
    Case("BOM and CRLF", ".txt", BOM + b"Roses\r\nare red\r\n", ("Roses\nare red\n",)),
    Case("BOM and CRLF, a document a line", ".txt", BOM + f"{LONG}\r\n{OTHER}\r\n".encode(),
         (LONG, OTHER)),
    Case("BOM in the middle", ".jsonl", jsonl("x") + BOM + jsonl("y") + jsonl("z"), ("x", "z"),
         ((2, "not valid JSON at column 1: Unexpected UTF-8 BOM"),)),
    Case("blank lines", ".jsonl", b"\n  \n" + jsonl("x") + b"\t\n\n" + jsonl("y") + b"\n",
         ("x", "y")),
    Case("blank lines", ".csv", b"\n\ntext\n\nx\n  \n\ny\n\n", ("x", "y")),
    Case("blank lines around", ".txt", f"\n\n{LONG}\n{OTHER}\n \n".encode(), (LONG, OTHER)),
    *[Case("empty file", kind, b"", (), ((1, "the file is empty"),))
      for kind in (".jsonl", ".json", ".csv", ".txt", ".md")],
    *[Case("blank file", kind, BOM + b" \r\n\n" * 40_000, (), ((1, "the file is empty"),))
      for kind in (".jsonl", ".json", ".csv", ".txt", ".md")],
    Case("one long word", ".jsonl", jsonl(WORD, "y"), (WORD, "y")),
    Case("one long word", ".json", json.dumps([{"text": WORD}]).encode(), (WORD,)),
    Case("one long word", ".csv", f"text\n{WORD}\ny\n".encode(), (WORD, "y")),
    Case("one long word", ".txt", WORD.encode(), (WORD,)),
    Case("one long word", ".md", WORD.encode(), (WORD,)),
    Case("torn lines", ".jsonl", jsonl("x") + b'{"text": "to\n[1]\nnull\n{"text": }\n' + jsonl("y"),
         ("x", "y"),
         ((2, "not valid JSON at column 10: Unterminated"), (3, "not a JSON object but an array"),
          (4, "not a JSON object but null"), (5, "not valid JSON at column 10: Expecting value"))),
    Case("torn last line", ".jsonl", jsonl("x") + b'{"text": "y"', ("x",),
         ((2, "not valid JSON at column 13"),)),
    Case("endless nesting", ".jsonl", b"[" * 200_000 + b"\n" + jsonl("y"), ("y",),
         ((1, "not valid JSON"),)),
    Case("a number of 5,000 digits", ".jsonl", b'{"text": ' + b"9" * 5000 + b"}\n" + jsonl("y"),
         ("y",), ((1, "not valid JSON"),)),
    Case("NaN in another column", ".jsonl", b'{"text": "x", "n": NaN}\n', ("x",)),
    Case("half a surrogate pair", ".jsonl", b'{"text": "a\\ud800"}\n' + jsonl("y"), ("y",),
         ((1, "`text` has half a surrogate pair at character 2"),)),
    Case("mixed types", ".jsonl", jsonl("x", 3, None, ["a"], {"a": 1}, True, "y", " "), ("x", "y"),
         (*((row, f"`text` must be a text, not {kind}") for row, kind in
            enumerate(("int", "null", "list", "dict", "bool"), 2)), (8, "`text` is empty"))),
    Case("mixed types", ".json", b'[{"text": "x"}, null, 3, {"text": 1}, {}, {"text": "y"}]',
         ("x", "y"),
         ((2, "not a JSON object but null"), (3, "not a JSON object but a number"),
          (4, "`text` must be a text, not int"), (5, "`text` is missing"))),
    Case("first record fits no format", ".jsonl", b'{}\n{"a": 1}\n' + jsonl("x"), ("x",),
         ((1, "no format fits the columns (none)"), (2, "no format fits the columns (a)"))),
    Case("wrong number of cells", ".csv", b"text,n\nx,1\nlonely\na,b,c\ny,2\n", ("x", "y"),
         ((3, "1 cells where the header has 2"), (4, "3 cells where the header has 2"))),
    Case("empty cells", ".csv", b"text,n\n,\nx,1\n", ("x",), ((2, "`text` is empty"),)),
    Case("quote never closed", ".csv", b'text,n\nx,1\n"open,2\ny,3\n"z",4\n', ("x", "y", "z"),
         ((3, "not valid CSV"),)),
    Case("quote never closed at the end", ".csv", b'text\nx\n"open\ny\nz\n', ("x", "y", "z"),
         ((3, "not valid CSV: unexpected end of data"),)),
    Case("quotes not doubled", ".csv",
         b'text,n\n"say "hi"\nor\n""bye"", now",1\n"y\nz",2\n"w",3\n', ("y\nz", "w"),
         ((2, "not valid CSV"), (3, "1 cells where"), (4, "not valid CSV"))),
    Case("the rest of a broken record", ".csv", b'text,n\n"say "hi"\nor so",1\nx,2\n', ("x",),
         ((2, "not valid CSV"), (3, "the rest of a record that is not valid CSV"))),
]  # fmt: skip
BROKEN = [
    Broken("invalid UTF-8", ".json", b'[{"text": "x"},\n{"text": "\xff"}]',
           r":2: not valid UTF-8 at byte 11 of the line \(0xff\)"),
    Broken("torn array", ".json", b'[{"text": "x"},\n{"text": "y"', ":2: not valid JSON at column"),
    Broken("no array", ".json", b'"text"', "must hold an array of objects, not a string"),
    Broken("no rows", ".json", b"[]", "holds no rows"),
    Broken("header alone", ".csv", b"text\n", "holds no rows"),
    Broken("torn header", ".csv", b'text,"n\nx,1\n', r":1: not valid CSV.*this is the header"),
    Broken("header not UTF-8", ".csv", b"text,\xff\nx,1\n", r":1: not valid UTF-8.*the header"),
    Broken("two columns of a name", ".csv", b"text,text\nx,y\n", "two columns are called `text`"),
    Broken("no column fits", ".jsonl", b'{"a": 1}\n{"a": 2}\n', r":1: no format fits the columns"),
    *[Broken("UTF-16", kind, '{"text": "x"}'.encode("utf-16"), "is UTF-16; save it as UTF-8")
      for kind in (".jsonl", ".json", ".csv", ".txt", ".md")],
    *[Broken("gzip inside", kind, gzip.compress(b"x"), "is packed with gzip")
      for kind in (".jsonl", ".json", ".csv", ".txt", ".md")],
    Broken("Parquet inside", ".jsonl", b"PAR1....PAR1", "is a Parquet file; name it `.parquet`"),
]  # fmt: skip


def write(case: Case | Broken, packed: bool) -> str:
    name = f"a{case.kind}.gz" if packed else f"a{case.kind}"
    Path(name).write_bytes(gzip.compress(case.content) if packed else case.content)
    return name


def skipping(name: str, **options: Any) -> list[Row | BadRecord]:
    return list(read_rows(DatasetSpec(source=name, on_bad_row="skip", **options)))


def strictly(name: str, **options: Any) -> list[Row | BadRecord]:
    return list(read_rows(DatasetSpec(source=name, **options)))


def parted(rows: Iterable[Row | BadRecord]) -> tuple[tuple[str, ...], list[BadRecord]]:
    items = list(rows)
    good = tuple(row.text for row in items if isinstance(row, Document))
    bad = [row for row in items if isinstance(row, BadRecord)]
    assert len(good) + len(bad) == len(items)
    return good, bad


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_skipping_counts_every_bad_row_and_keeps_every_good_one(case: Case, packed: bool) -> None:
    name = write(case, packed)
    good, bad = parted(skipping(name))
    assert good == case.good
    assert [(row.file, row.row) for row in bad] == [(name, row) for row, _ in case.bad]
    for row, (_, reason) in zip(bad, case.bad, strict=True):
        assert row.reason.startswith(reason)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_skipping_the_first_bad_row_is_named(case: Case, packed: bool) -> None:
    name = write(case, packed)
    if not case.bad:
        assert parted(strictly(name)) == (case.good, [])
        return
    with pytest.raises(DataError) as error:
        strictly(name)
    row, reason = case.bad[0]
    assert str(error.value).startswith(f"{name}:{row}: {reason}")
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("read", [skipping, strictly])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_broken_files_are_errors_even_where_rows_are_skipped(
    broken: Broken, packed: bool, read: Any
) -> None:
    name = write(broken, packed)
    with pytest.raises(DataError, match=broken.message) as error:
        read(name)
    assert str(error.value).startswith(name)


def noise(rows: int) -> list[str]:
    rng = random.Random(7)
    return ["".join(rng.choices("abcdefghij", k=300)) for _ in range(rows)]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(
    ("kind", "content", "first"),
    [
        (".jsonl", jsonl(*noise(200)), 1),
        (".csv", "\n".join(["text", *noise(200)]).encode(), 2),
        (".json", json.dumps([{"text": text} for text in noise(200)]).encode(), None),
        (".txt", "\n".join(noise(200)).encode(), None),
        (".md", "\n".join(noise(200)).encode(), None),
    ],
)
def test_torn_gzip_gives_its_whole_rows_and_then_an_error(
    kind: str, content: bytes, first: int | None, on_bad_row: Any
) -> None:
    whole = gzip.compress(content)
    Path(f"a{kind}.gz").write_bytes(whole[: len(whole) // 2])
    read: list[Row | BadRecord] = []
    rows = read_rows(DatasetSpec(source=f"a{kind}.gz", on_bad_row=on_bad_row))
    with pytest.raises(DataError, match=rf"^a\{kind}\.gz: not a whole gzip file") as error:
        read.extend(rows)
    good, bad = parted(read)
    assert not bad
    if first is None:
        assert not good
        assert "No row of it was read" in str(error.value)
    else:
        assert good == tuple(noise(200)[: len(good)])
        assert len(good) > 50
        assert f"The last row read is {first + len(good) - 1};" in str(error.value)


@pytest.mark.parametrize("damage", ["checksum", "garbage behind", "no gzip"])
def test_damaged_gzip_is_an_error(damage: str) -> None:
    whole = gzip.compress(jsonl("x"))
    checksum = whole[:-8] + bytes(4) + whole[-4:]
    content = {"checksum": checksum, "garbage behind": whole + b"garbage", "no gzip": jsonl("x")}
    Path("a.jsonl.gz").write_bytes(content[damage])
    with pytest.raises(DataError, match="not a whole gzip file"):
        skipping("a.jsonl.gz")


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def parquet(name: str = "a.parquet", **columns: pa.Array) -> str:
    pq.write_table(pa.table(columns), name)
    return name


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["x", "y"], pa.large_string()),
        pa.array(["x", "y"], pa.string_view()),
        pa.array(["x", "y"]).dictionary_encode(),
    ],
    ids=["large_string", "string_view", "dictionary"],
)
def test_parquet_text_of_any_string_type_is_read(texts: pa.Array) -> None:
    assert parted(strictly(parquet(text=texts))) == (("x", "y"), [])


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([1]), "int"),
        (pa.array([1.5]), "float"),
        (pa.array([None], pa.null()), "null"),
        (pa.array([None], pa.string()), "null"),
        (pa.array([b"x"]), "bytes"),
        (pa.array([["x"]]), "list"),
        (pa.array([{"a": "x"}]), "dict"),
        (pa.array([datetime(2024, 5, 1, tzinfo=UTC)]), "datetime"),
        (pa.array([date(2024, 5, 1)]), "date"),
        (pa.array([Decimal("1.5")]), "Decimal"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "list"),
    ],
)
def test_parquet_column_of_another_type_is_named(values: pa.Array, kind: str) -> None:
    name = parquet(text=values)
    reason = f"a.parquet:1: `text` must be a text, not {kind}"
    with pytest.raises(DataError, match=reason):
        strictly(name)
    assert [str(row) for row in skipping(name)] == [reason]


def test_parquet_messages_with_nulls_at_every_depth_are_bad_rows() -> None:
    turn = {"role": "user", "content": "Hi"}
    values = [
        HI,
        None,
        [],
        [None],
        [turn, None],
        [{"role": None, "content": "Hi"}],
        [{"role": "user", "content": None}],
        HI,
    ]
    name = parquet(messages=pa.array(values, MESSAGES))
    rows = skipping(name)
    assert [type(row) for row in rows] == [Chat] + [BadRecord] * 6 + [Chat]
    assert [row.reason[:52] for row in rows if isinstance(row, BadRecord)] == [
        "`messages` must be a list of messages, not NoneType",
        "`messages` is empty",
        "`messages`[0] must be an object with `role` and `con",
        "`messages`[1] must be an object with `role` and `con",
        "`messages`[0]: unknown role None; the roles are syst",
        "`content` of `messages`[0] must be a text, not null",
    ]
    with pytest.raises(DataError, match=r"a\.parquet:2: `messages` must be a list"):
        strictly(name)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([["Hi", "Hello"]]),
        pa.array([{"role": "user", "content": "Hi"}]),
        pa.array([[{"role": 1, "content": "Hi"}]]),
        pa.array([[{"role": "user", "content": {"text": "Hi"}}]]),
        pa.array([[[{"role": "user", "content": "Hi"}]]]),
    ],
    ids=["texts", "one struct", "role is int", "content is struct", "a list too many"],
)
def test_parquet_messages_of_another_shape_are_named(values: pa.Array) -> None:
    (row,) = skipping(parquet(messages=values))
    assert isinstance(row, BadRecord)
    assert "`messages`" in row.reason


def test_parquet_turns_with_both_pairs_of_fields_use_the_one_that_is_not_null() -> None:
    empty = {"from": None, "value": None}
    (row,) = strictly(parquet(messages=pa.array([[{**turn, **empty} for turn in HI]])))
    assert isinstance(row, Chat)
    assert [turn.content for turn in row.messages] == ["Hi", "Hello"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (pa.array([1_714_564_800_123_456_789], pa.timestamp("ns")), "2024-05-01T12:00:00.123456"),
        (pa.array([1_714_564_800], pa.timestamp("s", tz="Europe/Paris")), "2024-05-01T12:00:00"),
        (pa.array([1_714_564_800], pa.timestamp("s", tz="No/Where")), "2024-05-01T12:00:00"),
        (pa.array([date(2024, 5, 1)]), "2024-05-01"),
        (pa.array([2024], pa.int32()), "2024"),
        (pa.array([None], pa.timestamp("ns")), None),
    ],
)
def test_parquet_dates_become_iso_text(values: pa.Array, shown: str | None) -> None:
    (row,) = strictly(parquet(text=pa.array(["x"]), date=values))
    assert isinstance(row, Document)
    assert row.date == shown


def test_parquet_values_that_python_cannot_hold_cost_their_row_alone() -> None:
    far = pa.array([0, 10**12, 0], pa.timestamp("s"))
    words = pa.StringArray.from_buffers(
        3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"xy\xff")
    )
    rows = skipping(parquet(text=words, date=far))
    assert [type(row) for row in rows] == [Document, BadRecord, BadRecord]
    assert "`date` cannot be read" in str(rows[1])
    assert "`text` cannot be read: 'utf-8' codec" in str(rows[2])


@pytest.mark.parametrize("read", [skipping, strictly])
def test_torn_parquet_is_an_error(here: Path, read: Any) -> None:
    whole = Path(parquet(text=pa.array(noise(2000)))).read_bytes()
    (here / "a.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"^a\.parquet: not a readable Parquet file"):
        read("a.parquet")
    middle = len(whole) // 2
    (here / "a.parquet").write_bytes(whole[:4] + bytes(middle) + whole[middle + 4 :])
    with pytest.raises(DataError, match=r"^a\.parquet: not a readable Parquet file"):
        read("a.parquet")


def test_parquet_without_rows_or_bytes_or_with_two_columns_of_a_name(here: Path) -> None:
    parquet(text=pa.array([], pa.string()))
    with pytest.raises(DataError, match=r"a\.parquet: holds no rows"):
        skipping("a.parquet")
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), here / "a.parquet")
    with pytest.raises(DataError, match="two columns are called `text`"):
        skipping("a.parquet")
    (here / "a.parquet").write_bytes(b"")
    assert [str(row) for row in skipping("a.parquet")] == ["a.parquet:1: the file is empty"]
    (here / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"unpack the `\.gz` around it"):
        skipping("a.parquet.gz")


def test_parquet_with_one_long_word() -> None:
    assert parted(strictly(parquet(text=pa.array([WORD, "y"])))) == ((WORD, "y"), [])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("null", "`messages` must be a list of messages"),
        ("[null]", "`messages`[0] must be an object"),
        ('[{"role": null, "content": "x"}]', "`messages`[0]: unknown role None"),
        ('[{"role": "user", "content": null}]', "`content` of `messages`[0] must be a text"),
        ('[{"role": "user", "content": [null]}]', "`messages`[0]: only text parts"),
        ('[{"role": "user", "content": [{"text": null}]}]', "`messages`[0]: only text parts"),
        ('[{"role": "\\ud800", "content": "x"}]', "`messages`[0]: unknown role '\\ud800'"),
        (json.dumps([{"role": WORD, "content": "x"}]), "`messages`[0]: unknown role 'xxx"),
    ],
)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_nested_nulls_are_bad_rows(here: Path, kind: str, messages: str, reason: str) -> None:
    good = json.dumps({"messages": HI})
    lines = [good, f'{{"messages": {messages}}}', good]
    text = "\n".join(lines) if kind == ".jsonl" else f"[{','.join(lines)}]"
    (here / f"a{kind}").write_text(text)
    first, bad, last = skipping(f"a{kind}")
    assert isinstance(first, Chat)
    assert isinstance(last, Chat)
    assert str(bad).startswith(f"a{kind}:2: {reason}")
    assert len(str(bad)) < 300
    str(bad).encode()
    with pytest.raises(DataError, match=rf"^a\{kind}:2:"):
        strictly(f"a{kind}")


def test_a_column_that_is_renamed_may_be_missing_in_the_first_record(here: Path) -> None:
    (here / "a.jsonl").write_text('{"a": 1}\n{"body": "x"}\n')
    bad, good = skipping("a.jsonl", columns={"text": "body"})
    assert isinstance(good, Document)
    assert str(bad) == "a.jsonl:1: `columns` reads `text` from `body`, but the columns are a"
    with pytest.raises(DataError, match=r"a\.jsonl:1: `columns` reads `text` from `bodi`"):
        skipping("a.jsonl", columns={"text": "bodi"})


def test_a_record_with_endless_columns_makes_a_short_message(here: Path) -> None:
    (here / "a.jsonl").write_text(json.dumps({f"{i}{WORD}\ud800": 1 for i in range(40)}))
    with pytest.raises(DataError, match="and 10 more") as error:
        skipping("a.jsonl")
    assert len(str(error.value)) < 2500
    str(error.value).encode()


def test_what_a_folder_holds_is_read_or_refused(here: Path) -> None:
    (here / "data").mkdir()
    (here / "data/A.JSONL").write_bytes(jsonl("x"))
    (here / "data/b.JSONL.GZ").write_bytes(gzip.compress(jsonl("y")))
    assert parted(strictly("data")) == (("x", "y"), [])
    (here / "data/c.jsonl.zst").write_bytes(b"")
    with pytest.raises(DataError, match=r"c\.jsonl\.zst: cannot read `\.zst`"):
        strictly("data")


def test_a_pipe_and_a_name_that_is_no_text_are_refused(here: Path) -> None:
    os.mkfifo(here / "pipe.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        strictly("pipe.jsonl")
    os.mkdir(here / "data")  # noqa: PTH102
    with open(b"data/\xff.jsonl", "wb") as file:  # noqa: PTH123
        file.write(jsonl("x"))
    with pytest.raises(DataError, match="the name is not valid UTF-8"):
        strictly("data")


LINES = st.one_of(
    st.binary(max_size=30),
    st.builds(lambda text: json.dumps({"text": text}).encode(), st.text(max_size=10)),
).map(lambda line: line.replace(b"\n", b" "))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=6))
def test_every_line_that_is_not_blank_is_a_row_or_a_bad_one(here: Path, lines: list[bytes]) -> None:
    # A good line first: the format is known and nothing marks the file as another type.
    content = jsonl("x") + b"\n".join(lines)
    (here / "a.jsonl").write_bytes(content)
    numbers = [n for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    assert [row.row for row in skipping("a.jsonl")] == numbers


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text(alphabet='a,"\n\r{}[]:1 \ufeff', max_size=60).map(str.encode),
    ),
    kind=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt", ".md", ".csv.gz"]),
)
def test_any_bytes_give_rows_or_a_data_error(here: Path, content: bytes, kind: str) -> None:
    (here / f"a{kind}").write_bytes(content)
    for row_format in ("auto", "text"):
        with suppress(DataError):
            assert skipping(f"a{kind}", format=row_format)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.text(alphabet='ab ,"\n', min_size=1, max_size=8), min_size=1, max_size=5),
    torn=st.integers(0, 5),
)
def test_a_torn_csv_record_loses_no_record_behind_it(
    here: Path, values: list[str], torn: int
) -> None:
    quoted = ['"' + value.replace('"', '""') + 'z",1' for value in values]
    quoted.insert(min(torn, len(values)), 'open "quote",1,"')
    (here / "a.csv").write_text("\n".join(["text,n", *quoted]) + "\n")
    good, bad = parted(skipping("a.csv"))
    assert good == tuple(f"{value}z" for value in values)
    assert len(bad) == 1


@pytest.mark.parametrize("line", ['x","y', '"a', 'x","y,"', '"",'])
def test_csv_with_quotes_missing_throughout_ends_in_time(here: Path, line: str) -> None:
    (here / "a.csv").write_text("text\n" + f"{line}\n" * 100_000)
    start = time.perf_counter()
    with suppress(DataError):
        skipping("a.csv")
    assert time.perf_counter() - start < 10


MEASURE = """
import re, sys, time
from pathlib import Path
from posttrain.data.formats import read_rows
from posttrain.recipe import DatasetSpec
import pyarrow.parquet, csv, gzip, orjson
def peak():
    # Not getrusage: its peak begins with that of the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
for name in sys.argv[1:]:
    start, rows, bad = time.perf_counter(), 0, 0
    for row in read_rows(DatasetSpec(source=name, on_bad_row="skip")):
        rows += 1
        bad += type(row).__name__ == "BadRecord"
    print(rows, bad, peak() - before, time.perf_counter() - start)
"""


def measure(*names: str) -> list[tuple[int, int, float, float]]:
    """For each file rows, bad ones among them, MiB at the peak so far, and seconds."""
    command = [sys.executable, "-c", MEASURE, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    figures = [line.split() for line in done.stdout.splitlines()]
    return [(int(rows), int(bad), float(peak), float(time)) for rows, bad, peak, time in figures]


BIG_LINES = [
    ("a.md", b"", b"", (1, 0)),
    ("a.txt", b"", b"", (1, 0)),
    ("a.jsonl", b'{"text": "', b'"}\n{"text": "y"}\n', (2, 0)),
    ("packed.jsonl.gz", b'{"text": "', b'"}\n{"text": "y"}\n', (2, 0)),
    ("torn.jsonl", b'{"text": "', b'\n{"text": "y"}\n{"text": "z"}\n', (3, 1)),
    ("a.json", b'[{"text": "', b'"}, {"text": "y"}]', (2, 0)),
    ("a.csv", b"text\n", b"\ny\n", (2, 0)),
    ("torn.csv", b'text\n"', b"\ny\nz\n", (3, 1)),
]


def test_a_line_of_50_megabytes_takes_seconds_and_a_few_times_its_memory(here: Path) -> None:
    for name, head, tail, _ in BIG_LINES:
        content = head + b"x" * 50 * 2**20 + tail
        (here / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    measured = measure(*(name for name, *_ in BIG_LINES))
    for (name, *_, counts), (rows, bad, mebibytes, seconds) in zip(
        BIG_LINES, measured, strict=True
    ):
        assert (rows, bad) == counts, name
        assert seconds < 10, name
        # The csv module holds a cell at four bytes a character, in a buffer that doubles.
        assert mebibytes < (12 if name.endswith(".csv") else 7) * 50, name


def test_reading_holds_a_few_records_not_the_file(here: Path) -> None:
    lines = [f"{text * 10},1\n" for text in noise(1000)] * 10  # 30 MB
    (here / "a.csv").write_text("".join(["text,n\n", *lines]))
    (here / "a.txt").write_text("".join(lines))
    texts = [f"{row}".ljust(10, ".") * 100_000 for row in range(128)]  # 128 MB, one row group
    pq.write_table(pa.table({"text": texts}), "a.parquet", write_batch_size=1)
    csv, txt, parquet = measure("a.csv", "a.txt", "a.parquet")
    assert (csv[0], txt[0], parquet[0]) == (10_000, 10_000, 128)
    assert csv[2] < 10
    assert txt[2] < 10
    assert parquet[2] < 80
