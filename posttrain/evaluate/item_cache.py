"""What a model answered to lm-eval, remembered answer by answer, so that nothing is asked twice.

Remembered is not an item's score but the model's raw answer to each of its requests: how likely a
choice is after a prompt, or the text that was written. lm-eval makes the requests and the scores
afresh every time. So a request is known by its content alone: whatever changes what the model reads
(examples, chat template, an edited task or row) makes it another request, and whatever changes only
how answers are scored, or which items are drawn, finds the answers there.

One Parquet file holds what one model answered to one leaf task. It carries a checksum of its
content; one that is damaged is asked again. Losing the folder costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.store.files import temporary_beside
from posttrain.store.gc import CACHE_LOCK
from posttrain.store.locks import exclusive

_FORMAT = 1
"""To be raised when what a file holds, or what an answer means, changes."""

_HEADER = b"posttrain"


@dataclass(frozen=True)
class Respondent:
    """Who answers, and how: all but the request that an answer depends on."""

    model: str
    """Digest of the weights and of everything beside them; of an adapter, with its base's."""
    backend: str
    dtype: str
    """Precision of the weights."""
    seed: int
    """For answers that are drawn at random."""
    lm_eval: str
    """Version of lm-eval, which tokenizes requests and cuts written answers."""


@dataclass(frozen=True)
class Answer:
    """What a model answered to one request."""

    log_likelihood: float | None = None
    """Of the text that was asked about, in nats; None for a written answer."""
    greedy: bool | None = None
    """Whether that text is what greedy decoding would write; None where nobody asked."""
    text: str | None = None
    """What was written; None where nothing was to be written."""


class AnswerCache:
    """The remembered answers of one model; safe for several processes."""

    def __init__(
        self, folder: Path, respondent: Respondent, warn: Callable[[str], None] | None = None
    ) -> None:
        """Look into `folder`, which is made when there is something to keep.

        Args:
            folder: Of files of all models.
            respondent: Whose answers these are.
            warn: Told of what is damaged or cannot be written.
        """
        self._folder = folder
        self._respondent = respondent
        self._warn = warn or (lambda message: None)
        self._warned: set[str] = set()

    def read(self, leaf: str) -> dict[str, Answer]:
        """Answers to a leaf task by request; none if there is no file or it is damaged."""
        path = self.path(leaf)
        answers = self._load(path, leaf)
        if answers:
            with contextlib.suppress(OSError):
                os.utime(path)  # garbage collection goes by the last use
        return answers

    def save(self, leaf: str, answers: Mapping[str, Answer]) -> None:
        """Add answers to those that are there.

        A kill leaves the old file or the new one. What another process has added in the meantime
        stays; of two answers to one request the first is kept, so that all later runs read the
        same. A folder that cannot be written is left as it is.
        """
        path = self.path(leaf)
        try:
            with exclusive(self._folder / CACHE_LOCK):
                _write(path, self._header(leaf), {**answers, **self._load(path, leaf)})
        # A ValueError is a text that is no Unicode.
        except (OSError, ValueError) as error:
            self._warn_once(f"{self._folder}: answers cannot be kept: {error}")

    def path(self, leaf: str) -> Path:
        """The file of a leaf task's answers."""
        digest = hashlib.sha256(self._header(leaf)).hexdigest()[:32]
        return self._folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', leaf)[:80]}-{digest}.parquet"

    def _header(self, leaf: str) -> bytes:
        """What a file is about; stands in it as well, so that no file passes for another."""
        about = {"format": _FORMAT, "leaf": leaf, **asdict(self._respondent)}
        return json.dumps(about, sort_keys=True).encode()

    def _load(self, path: Path, leaf: str) -> dict[str, Answer]:
        if not path.exists():
            return {}
        try:
            return _read(path, self._header(leaf))
        # The Parquet reader has many ways to fail on bytes that are no Parquet.
        except Exception as error:
            first = str(error).partition("\n")[0]
            self._warn_once(f"{path}: damaged, so its questions are asked again ({first})")
            return {}

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._warn(message)


def _write(path: Path, header: bytes, answers: Mapping[str, Answer]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    requests = sorted(answers)
    found = [answers[request] for request in requests]
    columns = (
        requests,
        [answer.log_likelihood for answer in found],
        [answer.greedy for answer in found],
        [answer.text for answer in found],
    )
    types = (pa.string(), pa.float64(), pa.bool_(), pa.string())
    names = ("request", "log_likelihood", "greedy", "text")
    table = pa.table([pa.array(*column) for column in zip(columns, types, strict=True)], names)
    table = table.replace_schema_metadata({_HEADER: header, b"sha256": _checksum(columns)})
    with temporary_beside(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _read(path: Path, header: bytes) -> dict[str, Answer]:
    """Raises: ValueError, or whatever the Parquet reader raises: the file is damaged."""
    import pyarrow.parquet as pq

    # Read as a whole: another process may put a new file in its place.
    table = pq.ParquetFile(path).read()
    metadata = table.schema.metadata or {}
    columns = tuple(column.to_pylist() for column in table.columns)
    if metadata.get(_HEADER) != header:
        raise ValueError("it is about something else")
    if metadata.get(b"sha256") != _checksum(columns):
        raise ValueError("its content is not what was written")
    return {request: Answer(*answer) for request, *answer in zip(*columns, strict=True)}


def _checksum(columns: Sequence[Sequence[object]]) -> bytes:
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest().encode()
