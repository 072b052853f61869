"""A near-duplicate removal that is spread over tasks: its settings, and where its files lie.

Tasks share nothing but folders. Every file has one writer, appears under its name when it is
complete, and depends on the job's settings and inputs alone: a task that runs again writes the
same bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

import posttrain
from posttrain.errors import DataError
from posttrain.store.files import temporary_beside, write_json

SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class DedupJob:
    """Which files to rid of near duplicates, how, and where to write.

    Raises:
        DataError: a setting is out of range, or a path cannot be an input.
    """

    paths: tuple[Path, ...]
    """Shards: JSON Lines or Parquet, each with a name of its own; one task a shard. Their order
    breaks ties between equal texts."""
    work_folder: Path
    """For intermediate files, logs and marks of finished tasks; every machine must see it."""
    out_folder: Path
    """For the shards without duplicates, each under its input's name."""
    threshold: float = 0.8
    """Jaccard similarity of word 5-grams from which two texts count as the same, in (0, 1]."""
    bands: Literal[16, 32] = 32
    """Of the 128 MinHash values; see `posttrain.data.minhash`."""
    partitions: int = 16
    """Tasks that join band keys, and tasks that compare pairs. The result does not depend on it."""
    column: str = "text"
    """Key or column of the text."""

    def __post_init__(self) -> None:
        # A task may start in another folder.
        for name in ("work_folder", "out_folder"):
            object.__setattr__(self, name, Path(getattr(self, name)).absolute())
        object.__setattr__(self, "paths", tuple(Path(path).absolute() for path in self.paths))
        if not 0 < self.threshold <= 1:
            raise DataError(f"threshold: {self.threshold} is not in (0, 1]; 0.8 is usual")
        if self.bands not in (16, 32):
            raise DataError(f"bands: {self.bands}; write 16 or 32")
        if self.partitions < 1:
            raise DataError(f"partitions: {self.partitions}; write 1 or more")
        self._check_paths()

    def _check_paths(self) -> None:
        if not self.paths:
            raise DataError("paths: no files; name at least one shard")
        names: dict[str, Path] = {}
        for path in self.paths:
            if path.suffix not in SUFFIXES:
                raise DataError(f"{path}: neither .jsonl nor .parquet; convert or unpack it first")
            if path.name in names:
                both = f"{names[path.name]} and {path}"
                raise DataError(f"{both} have one name and would become one file; rename one")
            names[path.name] = path
            if path.parent.resolve() == self.out_folder.resolve():
                raise DataError(f"out_folder: {path} lies in it and would be overwritten")

    def file(self, stage: str, task: int, name: str) -> Path:
        """Where task number `task` of a stage writes what is called `name`."""
        return self.work_folder / stage / f"{task:05d}.{name}"

    @property
    def summary(self) -> Path:
        """The job's last word: counts over all shards."""
        return self.work_folder / "summary.json"

    @cached_property
    def first_rows(self) -> np.ndarray:
        """int64, the number of rows before each shard, and of all; known after `sketch`."""
        shards = range(len(self.paths))
        rows = [load(self.file("sketch", shard, "words.npy")).shape[0] for shard in shards]
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows, dtype=np.int64)])
        if total[-1] > 2**32:
            raise DataError(f"{total[-1]} rows; 2**32 are possible: deduplicate parts of them")
        return total

    def by_shard(self, rows: np.ndarray) -> list[tuple[int, slice]]:
        """The shards that ascending row numbers fall into, and which of the numbers those are."""
        bounds = np.searchsorted(rows, self.first_rows)
        pairs = itertools.pairwise(bounds)
        return [(shard, slice(a, b)) for shard, (a, b) in enumerate(pairs) if a < b]

    def claim(self) -> None:
        """Write the job into its work folder, or see that the folder is this job's.

        Raises:
            DataError: the folder holds results of other settings or other inputs, or an input
                cannot be read.
        """
        path = self.work_folder / "job.json"
        ours = self._identity()
        if not path.exists():
            write_json(path, ours)
            return
        theirs = json.loads(path.read_text())
        changed = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if changed:
            raise DataError(
                f"{self.work_folder}: holds the results of a job with other {', '.join(changed)}; "
                "name another work_folder, or delete this one"
            )

    def _identity(self) -> dict[str, object]:
        """All that the results depend on, as plain JSON."""
        inputs = []
        for path in self.paths:
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error
            inputs.append([str(path), status.st_size, status.st_mtime_ns])
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {key: str(v) if isinstance(v, Path) else v for key, v in fields.items()}
        return plain | {"paths": inputs, "posttrain": posttrain.__version__}


def save(path: Path, array: np.ndarray) -> None:
    """Write an array, complete or not at all."""
    with temporary_beside(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def load(path: Path) -> np.ndarray:
    """Map an array into memory; only what is looked at is read."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise _missing(path) from error
    return array


def load_raw(path: Path, dtype: np.dtype) -> np.ndarray:
    """Map a file without a header, such as one written piece by piece."""
    try:
        empty = path.stat().st_size == 0
    except FileNotFoundError as error:
        raise _missing(path) from error
    return np.zeros(0, dtype) if empty else np.memmap(path, dtype, mode="r")


def _missing(path: Path) -> DataError:
    return DataError(f"{path}: missing; the stage `{path.parent.name}` has not finished")
