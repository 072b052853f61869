"""From a recipe's `source` to raw records, each with the file and the row it stands in.

A source is one of these, or a list of them:

- a file: `.jsonl` (the one for large data), `.json` (an array of objects, or JSON Lines), `.csv`,
  `.parquet`, `.md`, `.txt`; all but Parquet also with `.gz`
- a folder (every such file below it, sorted) or a glob (`data/**/*.jsonl`, sorted)
- `hub:OWNER/NAME`, read by the `datasets` library
- `builtin:python-docs/chats`, made from the documentation of the running Python

An `.md` file is one document. A `.txt` file is one document too, unless it is written as one
document a line, which is taken to be so if it has no blank line between its lines and they are
longer than text is ever wrapped at (over 200 characters on average).

Relative paths start at the working directory. `files.py` reads the files themselves.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from posttrain.data import python_docs
from posttrain.data.files import (
    RECORD_SUFFIXES,
    SUFFIXES,
    TEXT_SUFFIXES,
    kind_of,
    read_file,
    suffix_of,
)
from posttrain.data.records import RawRecord, Records
from posttrain.errors import DataError
from posttrain.recipe.datasets import DatasetSpec
from posttrain.store.files import file_sha256

HUB = "hub:"
BUILTIN = "builtin:"
_OTHER_PACKERS = (".bz2", ".xz", ".zip", ".zst")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class DigestCache(Protocol):
    """A small store of strings that the caller keeps between runs."""

    def get(self, key: str) -> str | None:
        """The value put under `key`, or None."""
        ...

    def put(self, key: str, value: str) -> None:
        """Keep `value` under `key`."""
        ...


def read_records(spec: DatasetSpec) -> Records:
    """Records in source order, at most `spec.limit` of them.

    A record that cannot be read, such as a torn JSON line, is a `BadRecord`; the caller decides
    whether that is an error.

    Raises:
        DataError: a source is missing, empty of files, or not what its name says.
    """
    records = itertools.chain.from_iterable(_read(part, spec) for part in _resolve(spec))
    return itertools.islice(records, spec.limit)


def source_digest(spec: DatasetSpec, cache: DigestCache | None = None) -> str:
    """SHA-256, as hex, over the content that `read_records` would read.

    Covers names and content of the files, not how `spec` reads them (format, columns, limit):
    that is config. For a Hub dataset the commit, subset and split stand for the content.

    Args:
        spec: The dataset; a Hub one pinned by `pin_revision` before.
        cache: Spares generating built-in rows again, which takes seconds.

    Raises:
        DataError: a source is missing, or a Hub dataset is not pinned.
    """
    digest = hashlib.sha256()
    for part in _resolve(spec):
        digest.update(f"{part.name}\0{_part_digest(part, spec, cache)}\n".encode())
    return digest.hexdigest()


def pin_revision(spec: DatasetSpec) -> DatasetSpec:
    """Replace branch or tag of a Hub dataset by the commit it points to now.

    Raises:
        DataError: the Hub cannot be reached, or knows no such dataset or revision.
    """
    hub = [source for source in _sources(spec) if source.startswith(HUB)]
    if not hub or (spec.revision and _COMMIT.fullmatch(spec.revision)):
        return spec
    if len(hub) > 1:
        raise DataError(
            f"several Hub datasets in one `source` ({', '.join(hub)}) cannot share one `revision`; "
            "download all but one and name their files"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    name = hub[0].removeprefix(HUB)
    try:
        commit = HfApi().dataset_info(name, revision=spec.revision, timeout=20).sha
    except OfflineModeIsEnabled as error:
        raise DataError(
            f"{hub[0]}: cannot be pinned to a commit while HF_HUB_OFFLINE is set; unset it, or "
            "write the 40-digit commit as `revision`"
        ) from error
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{hub[0]}: the Hub gave no commit for it ({reason}); check the name and the network, "
            "or write the 40-digit commit as `revision`"
        ) from error
    return spec.model_copy(update={"revision": commit})


@dataclass(frozen=True)
class _Part:
    """One file, Hub dataset or built-in source."""

    name: str
    """What rows, ledgers and errors call it; the same wherever the folder lies."""
    path: Path | None = None


def _resolve(spec: DatasetSpec) -> list[_Part]:
    """All parts in source order, none twice."""
    found = {source: _find_files(source) for source in _sources(spec) if not _is_named(source)}
    root = _common_folder([path for paths in found.values() for path in paths])
    parts: list[_Part] = []
    for source in _sources(spec):
        if source in found:
            parts.extend(_Part(path.relative_to(root).as_posix(), path) for path in found[source])
        else:
            parts.append(_named_part(source))
    return list(dict.fromkeys(parts))


def _sources(spec: DatasetSpec) -> tuple[str, ...]:
    return (spec.source,) if isinstance(spec.source, str) else spec.source


def _is_named(source: str) -> bool:
    return source.startswith((HUB, BUILTIN))


def _named_part(source: str) -> _Part:
    if source.startswith(BUILTIN):
        known = [f"{BUILTIN}python-docs/{name}" for name in python_docs.PARTS]
        if source not in known:
            raise DataError(f"{source}: there is no such built-in source; write {_or(known)}")
    elif not re.fullmatch(r"hub:[\w.-]+(/[\w.-]+)?", source):
        raise DataError(f"{source}: write a Hub dataset as `hub:OWNER/NAME`")
    elif Path(source.removeprefix(HUB)).is_dir():
        folder = source.removeprefix(HUB)
        raise DataError(
            f"{source}: `datasets` would read the folder `{folder}` here instead of the Hub; "
            f"write `source: {folder}` to read the folder, or run from elsewhere"
        )
    return _Part(source)


def _find_files(source: str) -> list[Path]:
    """The files a path, folder or glob stands for, absolute and sorted."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = _files_below(path, source)
    elif path.is_file():
        found = [path]
    elif path.exists():
        raise DataError(f"{source}: neither a file nor a folder")
    elif glob.has_magic(source):
        # Path.glob takes no absolute patterns.
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207
        found = [Path(match) for match in matches if Path(match).is_file()]
        if not found:
            raise DataError(f"{source}: no file matches; the working directory is {Path.cwd()}")
    else:
        raise DataError(f"{source}: no such file or folder{_suggest(path)}")
    for item in found:
        kind_of(item)  # refuses an unknown suffix
        if not _is_text(item.name):
            raise DataError(f"{str(item)!r}: the name is not valid UTF-8; rename it")
    return sorted(item.absolute() for item in found)


def _files_below(folder: Path, source: str) -> list[Path]:
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (suffix_of(path) in SUFFIXES or _is_packed_otherwise(path))
    ]
    if not found:
        raise DataError(f"{source}: no {_or(SUFFIXES)} file in this folder")
    records = [path for path in found if suffix_of(path) in RECORD_SUFFIXES]
    texts = [path for path in found if suffix_of(path) in TEXT_SUFFIXES]
    if records and texts:
        raise DataError(
            f"{source}: holds both records ({records[0].name}) and texts ({texts[0].name}); name "
            f"one kind with a glob, such as `{source.rstrip('/')}/**/*{records[0].suffix}`"
        )
    return found


def _is_packed_otherwise(path: Path) -> bool:
    """Rows that would be left out without a word; better refused."""
    return path.suffix in _OTHER_PACKERS and suffix_of(path.with_suffix("")) in SUFFIXES


def _is_text(name: str) -> bool:
    """Whether a file's name can be written down: Linux allows any bytes in it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _suggest(path: Path) -> str:
    """Close names for a path that does not exist, or how far it does exist."""
    parent = path.parent
    if not parent.is_dir():
        return f"; there is no folder {parent} (working directory: {Path.cwd()})"
    names = sorted(item.name for item in parent.iterdir() if not item.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {_or([str(parent / name) for name in close])}?"
    return f"; {parent if str(parent) != '.' else Path.cwd()} holds nothing of a similar name"


def _common_folder(paths: list[Path]) -> Path:
    """The deepest folder that holds all files: names relative to it survive a move."""
    if not paths:
        return Path("/")
    return Path(os.path.commonpath([path.parent for path in paths]))


def _read(part: _Part, spec: DatasetSpec) -> Records:
    if part.path is not None:
        return read_file(part.path, part.name)
    if part.name.startswith(BUILTIN):
        return python_docs.records(part.name.rpartition("/")[2])
    return _read_hub(part.name.removeprefix(HUB), spec)


def _read_hub(name: str, spec: DatasetSpec) -> Iterator[RawRecord]:
    import datasets

    try:
        rows = datasets.load_dataset(name, spec.subset, split=spec.split, revision=spec.revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"hub:{name}: cannot be loaded: {reason}; check `subset` (now {spec.subset}), `split` "
            f"(now {spec.split}) and the network"
        ) from error
    label = f"hub:{name}/{spec.subset}/{spec.split}" if spec.subset else f"hub:{name}/{spec.split}"
    for number, fields in enumerate(rows, start=1):
        yield RawRecord(label, number, fields)


def _part_digest(part: _Part, spec: DatasetSpec, cache: DigestCache | None) -> str:
    if part.path is not None:
        try:
            return file_sha256(part.path)
        except OSError as error:
            raise DataError(f"{part.path}: cannot be read: {error.strerror}") from error
    if part.name.startswith(BUILTIN):
        return _builtin_digest(part.name, cache)
    if not (spec.revision and _COMMIT.fullmatch(spec.revision)):
        raise DataError(f"{part.name}: not pinned to a commit; write the commit as `revision`")
    return f"{spec.revision}/{spec.subset}/{spec.split}"


def _builtin_digest(source: str, cache: DigestCache | None) -> str:
    key = f"{source} {sys.version} {python_docs.generator_digest()}"
    known = cache.get(key) if cache else None
    if known is None:
        known = python_docs.digest(source.rpartition("/")[2])
        if cache:
            cache.put(key, known)
    return known


def _or(names: tuple[str, ...] | list[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
