"""JSON Lines some megabytes at a time: parsed by Arrow, copied as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from posttrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK_BYTES = 8 * 2**20
_SAYS_WHICH = "`posttrain data prepare` says which"


@dataclass(frozen=True)
class Lines:
    """Whole lines, each a JSON object in braces and ended by a line feed."""

    name: str
    """What errors call the file."""
    data: bytes
    ends: np.ndarray
    """int64; where each line ends in `data`, its line feed included."""

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Iterator[Lines]:
        """All lines of all files in order; blank ones are left out.

        Raises:
            DataError: a file cannot be read, or a line is no JSON object.
        """
        for path in paths:
            try:
                with path.open("rb") as file:
                    while data := file.read(_CHUNK_BYTES):
                        lines = cls.of(str(path), data + file.readline())
                        if len(lines):
                            yield lines
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error

    @classmethod
    def of(cls, name: str, data: bytes) -> Lines:
        """Cut bytes into lines.

        Raises:
            DataError: a line is no JSON object in braces.
        """
        if not data.endswith(b"\n"):
            data += b"\n"
        lines = cls(name, data, _ends(data))
        if lines._in_braces():
            return lines
        # Blank lines, spaces around an object, carriage returns, or no object at all.
        parts = [line for line in data.split(b"\n") if line.strip()]
        if any(line.strip()[:1] + line.strip()[-1:] != b"{}" for line in parts):
            raise DataError(f"{name}: a line is no JSON object; {_SAYS_WHICH}")
        data = b"".join(line + b"\n" for line in parts)
        return cls(name, data, _ends(data))

    def texts(self, column: str) -> pa.Array:
        """The texts under `column`, one a line, as `large_string`.

        Raises:
            DataError: a line is not valid JSON, or has no text there.
        """
        import pyarrow as pa
        import pyarrow.json as pj

        schema = pa.schema([(column, pa.large_string())])
        try:
            table = pj.read_json(
                pa.BufferReader(self.data),
                read_options=pj.ReadOptions(use_threads=False, block_size=len(self.data) + 1),
                parse_options=pj.ParseOptions(
                    explicit_schema=schema, unexpected_field_behavior="ignore"
                ),
            )
        except pa.ArrowException as error:
            message = f"{self.name}: not JSON Lines with a text under `{column}`: {error}"
            raise DataError(message) from error
        texts = table.column(column).combine_chunks()
        if texts.null_count or len(texts) != len(self):
            raise DataError(f"{self.name}: a line has no text under `{column}`; {_SAYS_WHICH}")
        return texts

    def copy(self, file: BinaryIO, stays: np.ndarray) -> None:
        """Write the lines of a mask, each run of them at once."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], stays, [False]])))
        starts = np.concatenate([[0], self.ends])
        whole = memoryview(self.data)
        for first, last in edges.reshape(-1, 2):
            file.write(whole[starts[first] : starts[last]])

    def _in_braces(self) -> bool:
        data = np.frombuffer(self.data, np.uint8)
        starts = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])
        # A line of less than `{}` and a line feed is none; its end would be another line's.
        long = self.ends - starts >= 3
        braces = (data[starts] == ord("{")) & (data[np.maximum(self.ends - 2, 0)] == ord("}"))
        return bool((long & braces).all())


def _ends(data: bytes) -> np.ndarray:
    return np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
