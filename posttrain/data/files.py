"""Reading files: one function a file type, each giving records with their row number.

Text is UTF-8, with or without a byte order mark, with Unix or Windows line ends.

JSON Lines, CSV, Parquet and text with a document a line are read piece by piece, in the memory that
a few of their records take. A `.json` array is read whole, which takes several times its size:
large data belongs into JSON Lines.

What cannot be read is never left out silently:

- A record that cannot be read is a `BadRecord`, and reading goes on behind it. So is a file with
  nothing in it. Blank lines are no records.
- After damage that hides how many records are lost (a torn gzip or Parquet file, a JSON array that
  ends too early) there is nothing to count, so it is a `DataError`. What stands before the damage
  has been given out by then, and the message names the last row.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from posttrain.data.csv_records import csv_records
from posttrain.data.records import BadRecord, RawRecord, Records, not_utf8
from posttrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
TEXT_SUFFIXES = (".md", ".txt")
SUFFIXES = RECORD_SUFFIXES + TEXT_SUFFIXES

_BOM = b"\xef\xbb\xbf"
_WRAPPED = 200
"""Characters; prose is never wrapped at lines this long."""
_BATCH_BYTES = 8 * 2**20
"""Parquet rows are decoded this many bytes at a time, or one by one if they are larger. A page of
the file is unpacked whole; writers make pages of about 1 MB or 1,024 values."""
_NOT_TEXT = {
    b"\x1f\x8b": "packed with gzip, but its name does not end with `.gz`; rename it",
    b"PAR1": "a Parquet file; name it `.parquet`",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}
"""First bytes of files that are something else than their name says."""


def suffix_of(path: Path) -> str:
    """The suffix in lower case, `.gz` set aside."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def kind_of(path: Path) -> str:
    """The suffix that decides how a file is read, `.gz` set aside.

    Raises:
        DataError: no reader for it.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: cannot read `{suffix or 'a file without a suffix'}`; the file types are "
            f"{', '.join(SUFFIXES)}"
        )
    if suffix == ".parquet" and _is_packed(path):
        raise DataError(f"{path}: Parquet is packed inside already; unpack the `.gz` around it")
    return suffix


def read_file(path: Path, name: str) -> Records:
    """Records of one file.

    Args:
        path: The file.
        name: What its records say they come from.

    Raises:
        DataError: the file as a whole is not what its suffix says, or is torn.
    """
    read = 0
    try:
        start = _first_bytes(path)
        if not start:
            yield BadRecord(name, 1, "the file is empty")
            return
        kind = kind_of(path)
        _check_text(start, kind, name)
        for record in _READERS[kind](path, name):
            read = record.row
            yield record
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{name}: not a whole gzip file ({error}). {_up_to(read)}; nobody can tell how many "
            "are missing, so get the file again"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{name}: cannot be read: {reason}. {_up_to(read)}") from error


def _up_to(row: int) -> str:
    return f"The last row read is {row}" if row else "No row of it was read"


def _first_bytes(path: Path) -> bytes:
    """Where a file's content begins, behind byte order mark and white space; empty if nowhere."""
    with _open(path) as file:
        # read1 gives what there is; of a torn gzip file, read gives nothing.
        start = file.read1(2**16).removeprefix(_BOM).lstrip()
        while not start and (more := file.read1(2**16)):
            start = more.lstrip()
    return start


def _check_text(start: bytes, kind: str, name: str) -> None:
    for magic, what in _NOT_TEXT.items():
        if start.startswith(magic) and kind != ".parquet":
            raise DataError(f"{name}: is {what}")


def _read_json_lines(path: Path, name: str, hint: str = "") -> Records:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line and not line.isspace():
                yield _parse_line(line, name, number, hint)


def _parse_line(line: bytes, name: str, number: int, hint: str) -> RawRecord | BadRecord:
    try:
        value = _parse_json(line)
    except UnicodeDecodeError as error:
        return BadRecord(name, number, not_utf8(error))
    except json.JSONDecodeError as error:
        return BadRecord(name, number, f"not valid JSON at column {error.colno}: {error.msg}{hint}")
    except (ValueError, RecursionError) as error:  # a number of 4,300 digits, endless nesting
        return BadRecord(name, number, f"not valid JSON: {error}")
    if not isinstance(value, dict):
        return BadRecord(name, number, f"not a JSON object but {_type_name(value)}")
    return RawRecord(name, number, value)


def _parse_json(data: bytes) -> object:
    """A JSON value; of a key that stands twice, the last.

    The standard library reads again what orjson refuses: it takes the NaN that Python itself writes
    for missing numbers, and of invalid UTF-8 it knows the position.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        # The line end is not part of a torn line's last string.
        return json.loads(data.rstrip(b"\r\n").decode())


def _read_json(path: Path, name: str) -> Records:
    """An array of objects; a file that begins with `{` is read as JSON Lines."""
    if _first_bytes(path).startswith(b"{"):
        hint = "; a .json file is an array of objects `[{...}, ...]`, or one object a line"
        yield from _read_json_lines(path, name, hint)
        return
    for number, value in enumerate(_parse_array(path, name), start=1):
        if isinstance(value, dict):
            yield RawRecord(name, number, value)
        else:
            yield BadRecord(name, number, f"not a JSON object but {_type_name(value)}")


def _parse_array(path: Path, name: str) -> list[object]:
    with _open(path) as file:
        data = file.read().removeprefix(_BOM)
    try:
        values = _parse_json(data)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}:{_line_of(error)}: {not_utf8(error)}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(values, list):
        raise DataError(f"{name}: must hold an array of objects, not {_type_name(values)}")
    return values


def _read_csv(path: Path, name: str) -> Records:
    with _open(path) as file:
        yield from csv_records(_without_bom(file), name)


def _without_bom(file: Iterator[bytes]) -> Iterator[bytes]:
    yield next(file, b"").removeprefix(_BOM)
    yield from file


def _read_parquet(path: Path, name: str) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # A buffer, or a column's whole row group is held while it is decoded.
        with pq.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True) as file:
            _check_names(file.schema_arrow.names, name)
            for batch in file.iter_batches(_batch_size(file.metadata)):
                for fields in _python_rows(batch):
                    number += 1
                    if isinstance(fields, str):
                        yield BadRecord(name, number, fields)
                    else:
                        yield RawRecord(name, number, fields)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(
            f"{name}: not a readable Parquet file: {error}. {_up_to(number)}"
        ) from error


def _check_names(names: list[str], file: str) -> None:
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise DataError(f"{file}: two columns are called `{double}`; rename one")


def _batch_size(metadata: pq.FileMetaData) -> int:
    """Rows that make `_BATCH_BYTES`, by the row group with the largest ones."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
    return max(1, min(1024, int(_BATCH_BYTES / max(largest, 1))))


def _python_rows(batch: pa.RecordBatch) -> Iterator[dict[str, object] | str]:
    """Rows as plain values; the reason of one that has no Python value, such as the year 20,000."""
    import pyarrow as pa

    for index, field in enumerate(batch.schema):
        if pa.types.is_timestamp(field.type):  # Python knows no nanoseconds; time zones become UTC
            times = batch.column(index).cast(pa.timestamp("us"), safe=False)
            batch = batch.set_column(index, field.name, times)
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError, LookupError, pa.ArrowException):
        columns = list(zip(batch.schema.names, batch.columns, strict=True))
    for row in range(batch.num_rows):
        fields: dict[str, object] = {}
        try:
            for column, values in columns:
                fields[column] = values[row].as_py()
        except (ValueError, OverflowError, LookupError, pa.ArrowException) as error:
            yield f"`{column}` cannot be read: {error}"
        else:
            yield fields


def _read_markdown(path: Path, name: str) -> Records:
    yield _read_document(path, name)


def _read_plain_text(path: Path, name: str) -> Records:
    if not _has_document_a_line(path):
        yield _read_document(path, name)
        return
    with _open(path) as file:
        for number, line in enumerate(_without_bom(file), start=1):
            if not line.isspace():
                ending = b"\r\n" if line.endswith(b"\r\n") else b"\n"
                yield _document(line.removesuffix(ending), name, number)


def _has_document_a_line(path: Path) -> bool:
    """Several lines, none blank between them, longer on average than prose is wrapped at."""
    lines = characters = 0
    gap = False
    with _open(path) as file:
        for line in _without_bom(file):
            if line.isspace():
                gap = lines > 0
                continue
            if gap:
                return False
            lines += 1
            characters += len(line.decode(errors="replace"))
    return lines > 1 and characters > _WRAPPED * lines


def _read_document(path: Path, name: str) -> RawRecord | BadRecord:
    with _open(path) as file:
        return _document(file.read().removeprefix(_BOM), name, 1)


def _document(data: bytes, name: str, row: int) -> RawRecord | BadRecord:
    try:
        return RawRecord(name, row, {"text": data.decode().replace("\r\n", "\n")})
    except UnicodeDecodeError as error:
        return BadRecord(name, row + _line_of(error) - 1, not_utf8(error))


def _line_of(error: UnicodeDecodeError) -> int:
    return error.object.count(b"\n", 0, error.start) + 1


def _is_packed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if _is_packed(path) else path.open("rb")


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


_READERS: dict[str, Callable[[Path, str], Records]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".md": _read_markdown,
    ".txt": _read_plain_text,
}
