"""Ledgers and row accounts in the store, read in columns: the material of row lineage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from posttrain.data.prepared import LedgerLine
from posttrain.data.split import SIDES
from posttrain.errors import StoreError
from posttrain.lineage.graph import Graph, gets_in, name_of, source_of
from posttrain.recipe.mix import MIXED
from posttrain.store import Artifact
from posttrain.train.rows import ROW_ACCOUNT

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

_COLUMNS = tuple(field.name for field in fields(LedgerLine))
_NUMBERS = {"row", "output", "passes"}


@dataclass(frozen=True)
class Searched:
    """What a search in texts looked at, and could not look at."""

    rows: int
    """Rows whose texts were searched."""
    edited: int
    """Of these, rows that were searched as they were edited, not as they came."""
    dropped: int
    """Rows whose texts are not in the store."""


def ledger_lines(
    dataset: Artifact, ids: Sequence[str] | None = None, where: pc.Expression | None = None
) -> list[LedgerLine]:
    """The lines of a dataset's ledger with these ids, or for which `where` holds."""
    import pyarrow.compute as pc

    wanted = pc.field("id").isin(list(ids)) if ids is not None else where
    table = _read(dataset.path / "ledger.parquet", _COLUMNS, wanted)
    return [LedgerLine(**record) for record in table.to_pylist()]


def repeats_of(dataset: Artifact, kept: Sequence[str]) -> list[LedgerLine]:
    """The lines of rows that were dropped because one of these stays in their place."""
    import pyarrow.compute as pc

    return ledger_lines(dataset, where=pc.field("kept_id").isin(list(kept)))


def lines_at(dataset: Artifact, file: str, row: int) -> list[LedgerLine]:
    """The lines of a row of the source; the end of the file's path is enough."""
    import pyarrow.compute as pc

    name = PurePosixPath(file).name or file
    at = (pc.field("row") == row) & pc.ends_with(pc.field("file"), name)
    return ledger_lines(dataset, where=at)


def account_lines(trained: Artifact, ids: Sequence[str] | None = None) -> pa.Table | None:
    """What a training stage says of its training rows: id, verdict, passes; None without."""
    import pyarrow.compute as pc

    path = trained.path / ROW_ACCOUNT
    if not path.exists():
        return None
    wanted = pc.field("id").isin(list(ids)) if ids is not None else None
    return _read(path, ("id", "verdict", "passes"), wanted)


def search(
    datasets: Iterable[Artifact], text: str, *, whole: bool = False
) -> tuple[list[str], Searched]:
    """Ids of the rows that say something, in the order of the datasets' files.

    Args:
        datasets: Where to look; one content is searched once.
        text: What to look for.
        whole: Upper and lower case count, and one of the row's texts (a turn, a document) must
            say nothing else; kinds of white space do not count. Otherwise it may stand anywhere,
            in any case, but white space counts.
    """
    import pyarrow as pa

    found: dict[str, None] = {}
    rows = edited = dropped = 0
    distinct = {dataset.digest: dataset for dataset in datasets}
    for dataset in distinct.values():
        for side in SIDES:
            for batch in _texts(dataset.path / f"{side}.parquet"):
                rows += batch.num_rows
                said = _rows_that_say(batch, text, whole)
                found |= dict.fromkeys(
                    batch.column("id").take(pa.array(said, pa.int64())).to_pylist()
                )
        if "rows" not in dataset.manifest.inputs:
            continue  # a mix: what it left out is in the datasets that it was mixed from
        verdicts = _read(dataset.path / "ledger.parquet", ("verdict",)).column("verdict")
        counts = {item["values"]: item["counts"] for item in verdicts.value_counts().to_pylist()}
        edited += counts.get("edit", 0)
        dropped += counts.get("drop", 0) + counts.get("bad", 0)
    return list(found), Searched(rows, edited, dropped)


def all_lines(graph: Graph, dataset: Artifact) -> pa.Table:
    """The ledger of a dataset, and for a mix also what happened to rows before they came to it.

    Returns:
        The columns of a ledger; `dataset`, the name of the dataset as the recipe has it; and
        `own`, whether the line is the dataset's own and not of one that it was mixed from. The
        lines of a mix have file and row of their source.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    own = _read(dataset.path / "ledger.parquet", tuple(dict.fromkeys((*_COLUMNS, "dataset"))))
    own = own.append_column("own", pa.array([True] * own.num_rows, pa.bool_()))
    stage = dataset.manifest.stage
    sources = [
        (name, made)
        for name, made in graph.inputs(dataset)
        if made.kind == "dataset" and gets_in(stage, name)
    ]
    if not sources:
        name = pa.array([name_of(dataset)] * own.num_rows, pa.string())
        return _with(own, {"dataset": name})
    tables = []
    for name, source in sources:
        before = all_lines(graph, source)
        mine = own
        if name.startswith(MIXED):  # lines of a mix name their file as DATASET/FILE
            prefix = f"{name.removeprefix(MIXED)}/"
            mine = own.filter(pc.starts_with(own.column("file"), prefix))
        place = pc.index_in(mine.column("id"), before.column("id"))
        mine, place = mine.filter(place.is_valid()), place.drop_null()
        there = {key: before.column(key).take(place) for key in ("file", "row", "dataset")}
        elsewhere = before.filter(pc.invert(pc.is_in(before.column("id"), mine.column("id"))))
        no = pa.array([False] * elsewhere.num_rows, pa.bool_())
        tables += [_with(mine, there), _with(elsewhere, {"own": no})]
    return pa.concat_tables(tables)


def _with(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def file_matches(graph: Graph, dataset: Artifact, file: str, wanted: str) -> bool:
    """Whether `wanted` names a file of a ledger.

    It may be the end of the file's path, with or without the dataset's name before it, or lead
    to the file through the source's folder.
    """
    source = source_of(graph, dataset)
    if _ends(f"{name_of(dataset)}/{file}", wanted):
        return True
    if PurePosixPath(source).name == file:
        return _ends(source, wanted) or _ends(wanted, source)
    several = ", " in source or re.search(r"[*?\[]", source)
    whole = f"{source.rstrip('/')}/{file}"
    return _ends(wanted, file if several else whole) or _ends(whole, wanted)


def _ends(path: str, end: str) -> bool:
    path, end = path.removeprefix("./"), end.removeprefix("./")
    return path == end or (not end.startswith("/") and path.endswith(f"/{end}"))


def _read(path: Path, columns: Sequence[str], where: pc.Expression | None = None) -> pa.Table:
    """Some columns of a Parquet file; one that an earlier version did not write is null."""
    import pyarrow as pa
    import pyarrow.dataset as pd

    try:
        there = pd.dataset(path, format="parquet").schema
        lacking = [
            (name, pa.int64() if name in _NUMBERS else pa.string())
            for name in columns
            if name not in there.names
        ]
        found = pd.dataset(path, format="parquet", schema=pa.schema([*there, *lacking]))
        return found.to_table(columns=list(columns), filter=where)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"{path}: cannot be read, so no full answer can be given: {error}; "
            "`posttrain store verify` finds what is damaged"
        ) from error


def _texts(path: Path) -> Iterator[pa.RecordBatch]:
    """Ids and texts of one side, batch by batch."""
    import pyarrow as pa
    import pyarrow.dataset as pd

    try:
        found = pd.dataset(path, format="parquet")
        content = [field.name for field in found.schema if _holds_text(field)]
        yield from found.to_batches(columns=["id", *content])
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path}: cannot be read, so it cannot be searched: {error}") from error


def _holds_text(field: pa.Field) -> bool:
    import pyarrow as pa

    return field.name == "text" or bool(pa.types.is_list(field.type))


def _rows_that_say(batch: pa.RecordBatch, text: str, whole: bool) -> list[int]:
    """Positions in the batch, ascending."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows: set[int] = set()
    for name in batch.schema.names[1:]:
        column = batch.column(name)
        nested = pa.types.is_list(column.type)
        said = column.flatten().field("content") if nested else column
        if whole:
            spaced = pc.replace_substring_regex(said, r"\s+", " ")
            says = pc.equal(pc.utf8_trim_whitespace(spaced), " ".join(text.split()))
        else:
            says = pc.match_substring(said, text, ignore_case=True)
        if not pc.any(says).as_py():
            continue
        places = pc.indices_nonzero(says)
        if nested:
            places = pc.list_parent_indices(column).take(places)
        rows.update(places.to_pylist())
    return sorted(rows)
