"""Reading files: one function a file type, each giving records with their row number.

Text is UTF-8, with or without a byte order mark, with Unix or Windows line ends.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from posttrain.data.records import BadRecord, RawRecord
from posttrain.errors import DataError

Records = Iterator[RawRecord | BadRecord]

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
TEXT_SUFFIXES = (".md", ".txt")
SUFFIXES = RECORD_SUFFIXES + TEXT_SUFFIXES

_BOM = b"\xef\xbb\xbf"
_WRAPPED = 200
"""Characters; prose is never wrapped at lines this long."""


def kind_of(path: Path) -> str:
    """The suffix that decides how a file is read, `.gz` set aside.

    Raises:
        DataError: no reader for it.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: cannot read `{suffix or 'a file without a suffix'}`; the file types are "
            f"{', '.join(SUFFIXES)}"
        )
    return suffix


def read_file(path: Path, name: str) -> Records:
    """Records of one file.

    Args:
        path: The file.
        name: What its records say they come from.

    Raises:
        DataError: the file as a whole is not what its suffix says, or not UTF-8.
    """
    try:
        yield from _READERS[kind_of(path)](path, name)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _read_json_lines(path: Path, name: str, hint: str = "") -> Records:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _parse_line(line, name, number, hint)


def _parse_line(line: bytes, name: str, number: int, hint: str) -> RawRecord | BadRecord:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(name, number, f"not valid UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRecord(name, number, f"not valid JSON at column {error.colno}: {error.msg}{hint}")
    except (ValueError, RecursionError) as error:  # a number of 4,300 digits, endless nesting
        return BadRecord(name, number, f"not valid JSON: {error}")
    if not isinstance(value, dict):
        return BadRecord(name, number, f"not a JSON object but {_type_name(value)}")
    return RawRecord(name, number, value)


def _read_json(path: Path, name: str) -> Records:
    """An array of objects; a file that begins with `{` is read as JSON Lines."""
    with _open(path) as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()[:1]
    if start == b"{":
        hint = "; a .json file is an array of objects `[{...}, ...]`, or one object a line"
        yield from _read_json_lines(path, name, hint)
        return
    try:
        values = json.loads(_read_text(path, name))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(values, list):
        raise DataError(f"{name}: must hold an array of objects, not {_type_name(values)}")
    for number, value in enumerate(values, start=1):
        if isinstance(value, dict):
            yield RawRecord(name, number, value)
        else:
            yield BadRecord(name, number, f"not a JSON object but {_type_name(value)}")


def _read_csv(path: Path, name: str) -> Records:
    """A header line, then a record a line; `row` is the line at which the record begins."""
    # Answers are longer than the csv module's default bound on a field of 128 KiB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(_read_text(path, name)), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield RawRecord(name, start, dict(zip(header, cells, strict=True)))
            elif cells:
                reason = f"{len(cells)} cells where the header has {len(header)}"
                yield BadRecord(name, start, reason)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: not valid CSV: {error}") from error


def _read_parquet(path: Path, name: str) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield RawRecord(name, number, fields)
    except pa.ArrowException as error:
        raise DataError(f"{name}: not a readable Parquet file: {error}") from error


def _read_markdown(path: Path, name: str) -> Records:
    yield RawRecord(name, 1, {"text": _read_text(path, name)})


def _read_plain_text(path: Path, name: str) -> Records:
    text = _read_text(path, name)
    lines = text.strip("\r\n").split("\n")
    if len(lines) > 1 and all(line.strip() for line in lines) and len(text) > _WRAPPED * len(lines):
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield RawRecord(name, number, {"text": line})
    else:
        yield RawRecord(name, 1, {"text": text})


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def _read_text(path: Path, name: str) -> str:
    """A whole file as text with Unix line ends."""
    with _open(path) as file:
        data = file.read().removeprefix(_BOM)
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line}: not valid UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8"
        ) from error


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
