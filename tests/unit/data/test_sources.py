from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.data import sources
from posttrain.data.records import BadRecord, RawRecord
from posttrain.data.sources import pin_revision, read_records, source_digest
from posttrain.errors import DataError
from posttrain.recipe import DatasetSpec


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(source: str | tuple[str, ...], **options: object) -> list[RawRecord | BadRecord]:
    return list(read_records(DatasetSpec.model_validate({"source": source, **options})))


def texts(records: list[RawRecord | BadRecord]) -> list[object]:
    assert all(isinstance(record, RawRecord) for record in records)
    return [record.fields["text"] for record in records if isinstance(record, RawRecord)]


def write_jsonl(path: Path, *values: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))


def test_jsonl_knows_its_lines_and_skips_blank_ones(here: Path) -> None:
    (here / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}')
    assert read("a.jsonl") == [
        RawRecord("a.jsonl", 1, {"text": "x"}),
        RawRecord("a.jsonl", 3, {"text": "y"}),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "na\xc3\xafve\xe2\x80\xa8x"}\r\n{"text": "y"}\r\n'),
        ("a.json", b'\xef\xbb\xbf[{"text": "na\xc3\xafve\xe2\x80\xa8x"},\r\n{"text": "y"}]'),
        ("a.json", b' \n{"text": "na\xc3\xafve\xe2\x80\xa8x"}\n{"text": "y"}\n'),
        ("a.csv", b"\xef\xbb\xbftext\r\nna\xc3\xafve\xe2\x80\xa8x\r\ny\r\n"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bom_windows_line_ends_and_gzip(
    here: Path, name: str, content: bytes, packed: bool
) -> None:
    if packed:
        name, content = f"{name}.gz", gzip.compress(content)
    (here / name).write_bytes(content)
    assert texts(read(name)) == ["naïve\u2028x", "y"]


def test_csv_row_is_the_line_where_the_record_begins(here: Path) -> None:
    (here / "a.csv").write_text('text,n\n"two\nlines",1\nz,2\nlonely\n')
    assert read("a.csv") == [
        RawRecord("a.csv", 2, {"text": "two\nlines", "n": "1"}),
        RawRecord("a.csv", 4, {"text": "z", "n": "2"}),
        BadRecord("a.csv", 5, "1 cells where the header has 2"),
    ]


def test_csv_takes_long_cells(here: Path) -> None:
    (here / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert texts(read("a.csv")) == ["x" * 200_000]


def test_parquet(here: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x", "y"]}), here / "a.parquet")
    assert read("a.parquet")[1] == RawRecord("a.parquet", 2, {"text": "y"})


def test_markdown_and_wrapped_text_are_one_document(here: Path) -> None:
    (here / "a.md").write_bytes(b"# Title\r\n\r\nText\r\n")
    (here / "poem.txt").write_text("Roses are red\nViolets are blue\n")
    (here / "long.txt").write_text(f"{'a' * 300}\n\n{'b' * 300}\n")
    assert texts(read(("a.md", "poem.txt", "long.txt"))) == [
        "# Title\n\nText\n",
        "Roses are red\nViolets are blue\n",
        f"{'a' * 300}\n\n{'b' * 300}\n",
    ]


def test_text_with_a_document_a_line(here: Path) -> None:
    (here / "a.txt").write_text(f"{'a' * 300}\n{'b' * 300}\n")
    assert texts(read("a.txt")) == ["a" * 300, "b" * 300]


def test_folder_glob_and_list_are_sorted_and_read_once(here: Path) -> None:
    for name in ("data/b.jsonl", "data/a.jsonl", "data/sub/c.jsonl", "data/.hidden.jsonl"):
        write_jsonl(here / name, name)
    (here / "data/picture.png").write_bytes(b"\x89PNG")
    everything = ["data/a.jsonl", "data/b.jsonl", "data/sub/c.jsonl"]
    assert texts(read("data")) == everything
    assert texts(read("data/**/*.jsonl")) == everything
    assert texts(read(("data/b.jsonl", "data"))) == [everything[1], everything[0], everything[2]]
    assert [record.file for record in read("data")] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert texts(read("data", limit=2)) == everything[:2]


def test_torn_lines_are_bad_records_with_a_column(here: Path) -> None:
    lines = [b'{"text": "x"}', b'{"text": }', b"[1]", b'{"text": "\xff"}', b"[" * 100_000]
    (here / "a.jsonl").write_bytes(b"\n".join(lines))
    records = read("a.jsonl")
    assert [type(record) for record in records] == [RawRecord] + [BadRecord] * 4
    shown = [str(record) for record in records[1:]]
    assert shown[0] == "a.jsonl:2: not valid JSON at column 10: Expecting value"
    assert shown[1] == "a.jsonl:3: not a JSON object but an array"
    assert shown[2].startswith("a.jsonl:4: not valid UTF-8 at byte 11 of the line (0xff)")
    assert shown[3].startswith("a.jsonl:5: not valid JSON")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"},\n{"text" "y"}]', r"a\.json:2: not valid JSON at column 9"),
        ("a.json", b'"text"', "must hold an array of objects, not a string"),
        ("a.csv", b'text,"open', r"a\.csv:1: not valid CSV"),
        ("a.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
        ("a.docx", b"", r"cannot read `\.docx`; the file types are \.jsonl"),
    ],
)
def test_broken_files_are_named(here: Path, name: str, content: bytes, message: str) -> None:
    (here / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(name)


def test_pretty_printed_object_says_what_a_json_file_is(here: Path) -> None:
    (here / "a.json").write_text('{\n  "text": "x"\n}')
    assert "is an array of objects" in str(read("a.json")[0])


def test_missing_file_suggests_close_names(here: Path) -> None:
    write_jsonl(here / "data/tickets.jsonl", "x")
    with pytest.raises(DataError, match=r"did you mean `data/tickets\.jsonl`\?"):
        read("data/ticket.jsonl")
    with pytest.raises(DataError, match="no folder dta"):
        read("dta/tickets.jsonl")
    with pytest.raises(DataError, match="no file matches"):
        read("data/*.csv")


def test_folder_of_records_and_texts_is_refused(here: Path) -> None:
    write_jsonl(here / "data/a.jsonl", "x")
    (here / "data/README.md").write_text("About")
    with pytest.raises(
        DataError, match=r"name one kind with a glob, such as `data/\*\*/\*\.jsonl`"
    ):
        read("data")


def test_named_sources_are_checked(here: Path) -> None:
    with pytest.raises(DataError, match="write `builtin:python-docs/documents`"):
        read("builtin:python-docs/chat")
    with pytest.raises(DataError, match="write a Hub dataset as `hub:OWNER/NAME`"):
        read("hub:a/b/c")
    (here / "owner/name").mkdir(parents=True)
    with pytest.raises(DataError, match="would read the folder `owner/name`"):
        read("hub:owner/name")


def test_digest_follows_content_and_names_not_place(here: Path) -> None:
    spec = DatasetSpec(source="one")
    write_jsonl(here / "one/a.jsonl", "x")
    write_jsonl(here / "one/b.jsonl", "y")
    before = source_digest(spec)
    assert source_digest(spec) == before
    (here / "one").rename(here / "two")
    assert source_digest(DatasetSpec(source=str(here / "two"))) == before
    write_jsonl(here / "two/b.jsonl", "z")
    changed = source_digest(DatasetSpec(source="two"))
    (here / "two/b.jsonl").rename(here / "two/c.jsonl")
    assert len({before, changed, source_digest(DatasetSpec(source="two"))}) == 3


def test_digest_of_a_big_file_is_quick(here: Path) -> None:
    (here / "big.jsonl").write_bytes(b"x" * 50_000_000)
    start = time.perf_counter()
    source_digest(DatasetSpec(source="big.jsonl"))
    assert time.perf_counter() - start < 1


def test_builtin_digest_is_kept_in_the_cache() -> None:
    kept: dict[str, str] = {}

    class Cache:
        def get(self, key: str) -> str | None:
            return kept.get(key)

        def put(self, key: str, value: str) -> None:
            kept[key] = value

    spec = DatasetSpec(source="builtin:python-docs/chats")
    digest = source_digest(spec, Cache())
    assert source_digest(spec) == digest
    (key,) = kept
    assert sys.version in key
    kept[key] = "from the cache"
    assert source_digest(spec, Cache()) != digest


def test_hub_digest_needs_a_commit_and_covers_subset_and_split() -> None:
    spec = DatasetSpec(source="hub:owner/name")
    with pytest.raises(DataError, match="not pinned to a commit"):
        source_digest(spec)
    pinned = spec.model_copy(update={"revision": "0" * 40})
    assert pin_revision(pinned) is pinned
    others = [{"revision": "1" * 40}, {"subset": "en"}, {"split": "test"}]
    digests = {source_digest(pinned.model_copy(update=other)) for other in others}
    assert len(digests | {source_digest(pinned)}) == 4


def test_pinning_offline_says_what_to_do() -> None:
    with pytest.raises(DataError, match="write the 40-digit commit as `revision`"):
        pin_revision(DatasetSpec(source="hub:owner/name", revision="main"))
    assert pin_revision(DatasetSpec(source="a.jsonl")) == DatasetSpec(source="a.jsonl")


def test_hub_rows_are_read_by_the_datasets_library(real_data: Path) -> None:
    spec = DatasetSpec(source="hub:Rowan/hellaswag", split="validation")
    record = next(sources._read_hub(str(real_data / "hub/Rowan/hellaswag"), spec))
    assert record.row == 1
    assert "endings" in record.fields


def test_hub_names_the_split_that_is_not_there(real_data: Path) -> None:
    spec = DatasetSpec(source="hub:Rowan/hellaswag", split="nope")
    with pytest.raises(DataError, match=r"check `subset` \(now None\), `split` \(now nope\)"):
        next(sources._read_hub(str(real_data / "hub/Rowan/hellaswag"), spec))


def test_reading_files_imports_nothing_heavy(here: Path) -> None:
    write_jsonl(here / "a.jsonl", "x")
    code = (
        "import sys\n"
        "from posttrain.data.check import check_dataset\n"
        "from posttrain.data.sources import source_digest\n"
        "from posttrain.recipe import DatasetSpec\n"
        "spec = DatasetSpec(source='a.jsonl')\n"
        "source_digest(spec), check_dataset('a', spec, 'documents')\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'huggingface_hub'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
