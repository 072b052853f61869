"""Which rows made a model: counts by dataset, and the whole list for a file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posttrain.errors import UsageError
from posttrain.lineage.graph import Graph, name_of, source_of
from posttrain.lineage.ledgers import account_lines, all_lines
from posttrain.lineage.rows import Node
from posttrain.store import Artifact
from posttrain.store.files import temporary_beside

if TYPE_CHECKING:
    import pyarrow as pa

_VERDICTS = ("left out", "not read", "trained")
"""Of a training stage's account; of a row that occurs several times, the last one here counts."""


@dataclass(frozen=True)
class Share:
    """What one dataset gave."""

    dataset: str
    source: str
    rows: dict[str, int]
    """Rows by what became of them: trained, in the training set (whether they were read is not
    recorded), not read, left out, validation, test, not taken, dropped, bad. Where it is asked
    about a dataset itself, `train` stands for the first four."""
    dropped: dict[str, int]
    """Dropped rows by operation and reason."""


@dataclass(frozen=True)
class TrainingSet:
    """The rows of one dataset, as one training stage used them."""

    model: Node | None
    """What was trained; None where it is asked about the dataset itself."""
    data: Node
    headline: str
    """What the training stage said of itself."""
    shares: tuple[Share, ...]


def training_sets(graph: Graph, artifact: Artifact) -> list[TrainingSet]:
    """Which rows made an artifact: one entry for each training on its way, oldest first."""
    found = []
    for model, dataset in _trainings(graph, artifact):
        table = used_lines(graph, model, dataset)
        node = Node.of(model) if model else None
        headline = model.manifest.headline if model else ""
        shares = _shares(graph, dataset, table)
        found.append(TrainingSet(node, Node.of(dataset), headline, shares))
    return found


def export_rows(graph: Graph, artifact: Artifact, target: Path) -> int:
    """Write every row that an artifact was made from, or might have been, and its verdict.

    Columns: stage, dataset, id, file, row, verdict, passes, operation, reason, detail, kept_id.

    Args:
        graph: The store's.
        artifact: What is asked about.
        target: A file `.parquet` or `.jsonl`.

    Returns:
        The number of rows written.

    Raises:
        UsageError: the file's name ends in neither.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if target.suffix not in (".parquet", ".jsonl"):
        raise UsageError(f"--out {target}: write a file name that ends in .parquet or .jsonl")
    tables = []
    for model, dataset in _trainings(graph, artifact):
        table = used_lines(graph, model, dataset)
        stage = (model or dataset).manifest.name
        table = table.append_column("stage", pa.array([stage] * len(table), pa.string()))
        columns = {name: table.column(name) for name in ("stage", "dataset", "id", "file", "row")}
        columns["verdict"] = table.column("used")
        for name in ("passes", "operation", "reason", "detail", "kept_id"):
            columns[name] = table.column(name)
        tables.append(pa.table(columns))
    if not tables:
        return 0
    whole = pa.concat_tables(tables)
    with temporary_beside(target) as temporary:
        if target.suffix == ".parquet":
            pq.write_table(whole, temporary, compression="zstd")
        else:
            _write_json_lines(temporary, whole)
    return len(whole)


def used_lines(graph: Graph, model: Artifact | None, dataset: Artifact) -> pa.Table:
    """All lines of a dataset with what a training stage did with them.

    Returns:
        The columns of `all_lines`, `used` (the keys of `Share.rows`) and `passes`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = all_lines(graph, dataset)
    verdict, split = (_objects(table.column(name)) for name in ("verdict", "split"))
    used = np.where(split == None, "dropped", split)  # noqa: E711  # element by element
    used[verdict == "drop"] = "dropped"
    used[verdict == "bad"] = "bad"
    trains = (split == "train") & (verdict != "drop")
    used[trains] = "in the training set" if model else "train"
    used[~table.column("own").to_numpy() & trains] = "not taken"
    passes = pa.nulls(len(table), pa.int64())
    account = account_lines(model) if model else None
    if account is not None:
        account = account.append_column(
            "rank", pc.index_in(account.column("verdict"), pa.array(_VERDICTS))
        )
        one = account.group_by("id").aggregate([("rank", "max"), ("passes", "sum")])
        place = pc.index_in(table.column("id"), one.column("id"))
        passes = one.column("passes_sum").take(place)
        rank = one.column("rank_max").take(place).fill_null(-1).to_numpy()
        known = (used == "in the training set") & (rank >= 0) & passes.is_valid().to_numpy()
        used[known] = np.array(_VERDICTS, object)[rank[known]]
        passes = pc.if_else(pa.array(known), passes, None)
    return table.append_column("used", pa.array(used, pa.string())).append_column("passes", passes)


def _trainings(graph: Graph, artifact: Artifact) -> list[tuple[Artifact | None, Artifact]]:
    """Training stages on the way to an artifact, each with its datasets; or the dataset itself."""
    if artifact.kind == "dataset":
        return [(None, artifact)]
    origins = graph.ancestors(artifact)
    trained = [model for model in graph.trained if model.fingerprint in origins]
    return [(model, dataset) for model in trained for dataset in graph.training_data(model)]


def _shares(graph: Graph, dataset: Artifact, table: pa.Table) -> tuple[Share, ...]:
    sources = _sources(graph, dataset)
    rows: defaultdict[str, Counter[str]] = defaultdict(Counter)
    dropped: defaultdict[str, Counter[str]] = defaultdict(Counter)
    groups = table.group_by(["dataset", "used", "operation", "reason"]).aggregate(
        [([], "count_all")]
    )
    for group in groups.to_pylist():
        name, count = group["dataset"], group["count_all"]
        rows[name][group["used"]] += count
        if group["used"] == "dropped":
            dropped[name][f"{group['operation']}: {group['reason']}"] += count
    return tuple(
        Share(name, sources.get(name, "unknown"), dict(rows[name]), dict(dropped[name]))
        for name in sorted(rows)
    )


def _sources(graph: Graph, dataset: Artifact) -> dict[str, str]:
    """Source by name of dataset, for all that it was mixed from."""
    found: dict[str, str] = {}
    waiting: Sequence[Artifact] = [dataset]
    while waiting:
        found |= {name_of(one): source_of(graph, one) for one in waiting}
        waiting = [made for one in waiting for made in graph.training_data(one)]
    return found


def _objects(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), object)


def _write_json_lines(path: Path, table: pa.Table) -> None:
    import orjson

    with path.open("wb") as file:
        for batch in table.to_batches(10_000):
            for record in batch.to_pylist():
                file.write(orjson.dumps(record) + b"\n")
