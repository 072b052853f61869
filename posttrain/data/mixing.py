"""Mixing prepared datasets: which rows, in which order, and what became of every one.

Each dataset is first read once for the hashes of its rows, 60 to 75 bytes a row. Then the rows that
were chosen are read and written. They are held in memory once, in Arrow's columns, because their
order is random; nothing is held as Python objects beyond a batch of a thousand rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.kernels import mix_array
from posttrain.data.mix_parts import (
    HELD_OUT,
    Part,
    Parts,
    assert_no_leak,
    choose_copies,
    keep_sides_apart,
    read_part,
    salt,
)
from posttrain.data.mix_report import MixReport, report_of
from posttrain.data.mix_shares import Member, held_out_sizes, members_of, training_sizes
from posttrain.data.operations.base import Side
from posttrain.data.prefix import prefixed
from posttrain.data.prepared import PreparedDataset, PreparedWriter, ledger_schema, read_batches
from posttrain.data.slabs import Slabs
from posttrain.data.split import SIDES
from posttrain.errors import DataError
from posttrain.recipe.base import RowFamily
from posttrain.recipe.mix import MixConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from posttrain.data.preparation import Events

_BLOCK = 10_000
"""Training rows that are put in order and written at a time."""
_LEDGER_BATCHES = 16
"""Batches of ledger lines that are written at a time."""
_COPY_STEP = np.uint64(0x9E3779B97F4A7C15)


def mix_datasets(
    config: MixConfig, folders: Mapping[str, Path], output: Path, events: Events
) -> MixReport:
    """Mix prepared datasets into one.

    A row is taken or left by a hash of its text and the seed, so the order of rows in their files
    does not matter, and a larger total takes the same rows and more. Rows keep their ids.

    Args:
        config: What to mix.
        folders: Folder of each prepared dataset, by name.
        output: Folder to write; see `posttrain.data.prepared`.
        events: Told of the progress, and of shares that could not be had.

    Raises:
        DataError: the datasets are of different families, or one has no row that can be used.
    """
    import pyarrow as pa

    datasets = [PreparedDataset.open(folders[name]) for name in config.datasets]
    family = _one_family(config, datasets)
    prefixes = [
        entry.prefix
        for entry in (*config.sources, config.replay, config.adversarial)
        if entry is not None
    ]
    parts: Parts = {side: [] for side in SIDES}
    for name, dataset, prefix in zip(config.datasets, datasets, prefixes, strict=True):
        events.phase(f"reading {name}")
        for side in SIDES:
            parts[side].append(read_part(dataset, side, prefix))
    keep_sides_apart(parts)
    _check_rows(config, parts)
    members = members_of(config, [len(part.free) for part in parts["train"]])
    wanted, warnings = _choose(config, members, parts)
    assert_no_leak(parts)
    events.phase("writing")
    with PreparedWriter(output, family) as writer:
        _write_train(config, members, datasets, parts["train"], writer)
        _write_held_out(members, datasets, parts, writer)
        for side in HELD_OUT:
            origins = _origins(parts[side], writer.sizes[side])
            writer.write_origins(side, [members[number].dataset for number in origins])
        lines = _ledger(members, datasets, parts)
        while group := list(itertools.islice(lines, _LEDGER_BATCHES)):
            writer.write_ledger(pa.concat_tables(group))
    for warning in warnings:
        events.warning(warning)
    return report_of(config, family, members, parts, wanted, warnings)


def _one_family(config: MixConfig, datasets: Sequence[PreparedDataset]) -> RowFamily:
    first = datasets[0]
    for name, dataset in zip(config.datasets, datasets, strict=True):
        if dataset.family != first.family:
            raise DataError(
                f"{config.name}: `{config.datasets[0]}` has {first.family} and `{name}` has "
                f"{dataset.family}; a mix is of one kind, so write a mix for each"
            )
    return first.family


def _check_rows(config: MixConfig, parts: Parts) -> None:
    for name, part in zip(config.datasets, parts["train"], strict=True):
        if len(part.free):
            continue
        numbers = np.unique(part.held_in).tolist()
        where = ", ".join(f"`{config.datasets[number]}`" for number in numbers)
        why = f": all of its {len(part):,} are held out in {where}" if len(part) else ""
        raise DataError(
            f"{config.name}: `{name}` has no training row to mix{why}; leave it out of the mix"
        )


def _choose(config: MixConfig, members: Sequence[Member], parts: Parts) -> tuple[int, list[str]]:
    """Decide how often each row is taken; returns the total wanted and what was not to be had."""
    counts = [len(part.free) for part in parts["train"]]
    training = training_sizes(members, counts, config.rows, config.max_repeats)
    warnings = list(training.warnings)
    sizes: dict[Side, list[int]] = {"train": training.taken}
    for side in HELD_OUT:
        rows = [len(part.free) for part in parts[side]]
        sizes[side] = held_out_sizes(members, rows, training.taken, counts)
        lacking = [str(member) for member, count in zip(members, rows, strict=True) if not count]
        if lacking and any(rows):
            warnings.append(
                f"{', '.join(lacking)}: no {side} row, so the mix's {side} rows do not measure it"
            )
    for side in SIDES:
        for part, size in zip(parts[side], sizes[side], strict=True):
            part.copies = choose_copies(part, size, config.seed)
    if not sum(sizes["train"]):
        raise DataError(f"{config.name}: no training row is left: {'; '.join(warnings)}")
    if not sum(sizes["validation"]):
        raise DataError(
            f"{config.name}: no validation row is left; prepare the sources with a larger "
            "`split: {validation: ...}`"
        )
    return training.wanted, warnings


def _write_train(
    config: MixConfig,
    members: Sequence[Member],
    datasets: Sequence[PreparedDataset],
    parts: Sequence[Part],
    writer: PreparedWriter,
) -> None:
    """Gather the training rows in their order, a block at a time."""
    rows = Slabs()
    entries, keys, ids = [], [], []
    for member, dataset, part in zip(members, datasets, parts, strict=True):
        chosen = np.flatnonzero(part.copies)
        of_row = np.repeat(np.arange(len(chosen)), part.copies[chosen])
        copy = np.arange(len(of_row)) - np.searchsorted(of_row, of_row)
        entries.append(len(rows) + of_row)
        hashes = mix_array(part.text[chosen] ^ salt("order", config.seed, member.dataset))
        keys.append(mix_array(hashes[of_row] + copy.astype(np.uint64) * _COPY_STEP))
        ids.append(part.ids[chosen][of_row])
        for _, table in _chosen(dataset, "train", member, part):
            rows.append(table)
    order = np.lexsort((np.concatenate(ids), np.concatenate(keys)))
    entry = np.concatenate(entries)
    for first in range(0, len(order), _BLOCK):
        writer.train(rows.take(entry[order[first : first + _BLOCK]]))
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    _set_places(parts, places)


def _write_held_out(
    members: Sequence[Member],
    datasets: Sequence[PreparedDataset],
    parts: Parts,
    writer: PreparedWriter,
) -> None:
    for side in HELD_OUT:
        for member, dataset, part in zip(members, datasets, parts[side], strict=True):
            for positions, table in _chosen(dataset, side, member, part):
                writer.hold(side, table, part.text[positions])
    for side, places in writer.finish().items():
        _set_places(parts[side], places)


def _origins(parts: Sequence[Part], size: int) -> np.ndarray:
    """Which part each row of a side comes from: int64 of shape (size,)."""
    origins = np.zeros(size, np.int64)
    for number, part in enumerate(parts):
        origins[part.places] = number
    return origins


def _set_places(parts: Sequence[Part], places: np.ndarray) -> None:
    """Give each part its stretch of `places`, those of each row ascending."""
    begin = 0
    for part in parts:
        own = places[begin : begin + part.taken]
        begin += part.taken
        of_row = np.repeat(np.arange(len(part)), part.copies)
        part.places = own[np.lexsort((own, of_row))]


def _chosen(
    dataset: PreparedDataset, side: Side, member: Member, part: Part
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """The rows that are taken, once each and with the prefix; with their positions."""
    first = 0
    for batch in dataset.batches(side):
        mine = np.flatnonzero(part.copies[first : first + len(batch)])
        if len(mine):
            chosen = batch.take(mine)
            table = prefixed(chosen, member.prefix)[0] if member.prefix else chosen.table
            yield first + mine, table
        first += len(batch)


def _ledger(
    members: Sequence[Member], datasets: Sequence[PreparedDataset], parts: Parts
) -> Iterator[pa.Table]:
    """One line an input row: dataset by dataset, in each training, validation, test."""
    for number, (member, dataset) in enumerate(zip(members, datasets, strict=True)):
        for side in SIDES:
            part, first = parts[side][number], 0
            offsets = np.concatenate([[0], np.cumsum(part.copies)])
            path = dataset.folder / f"{side}.parquet"
            for batch in read_batches(path, ["id", "file", "row"]):
                span = range(first, first + batch.num_rows)
                yield _lines(batch, members, member, side, part, offsets, span)
                first = span.stop


def _lines(
    batch: pa.RecordBatch,
    members: Sequence[Member],
    member: Member,
    side: Side,
    part: Part,
    offsets: np.ndarray,
    span: range,
) -> pa.Table:
    import pyarrow as pa

    verdicts, operations, reasons, details, outputs = [], [], [], [], []
    shown = f"prefix {json.dumps(member.prefix, ensure_ascii=False)}"
    for row in span:
        places = part.places[offsets[row] : offsets[row + 1]].tolist()
        edited = bool(places) and bool(part.prefixed[row])
        held_in = part.held_in[row]
        verdicts.append("edit" if edited else "keep" if places else "drop")
        operations.append("mix" if edited or not places else None)
        why = f"held out in {members[held_in].dataset}" if held_in >= 0 else "not sampled"
        reasons.append(None if places else why)
        said = [shown] if edited else []
        if len(places) > 1:
            said.append(f"{len(places)} times, also at {', '.join(map(str, places[1:]))}")
        details.append("; ".join(said) or None)
        outputs.append(places[0] if places else None)
    names = batch.column("file").to_pylist()
    columns = {
        "id": batch.column("id"),
        "file": [f"{member.dataset}/{name}" for name in names],
        "row": batch.column("row"),
        "verdict": verdicts,
        "operation": operations,
        "reason": reasons,
        "detail": details,
        "split": [None if output is None else side for output in outputs],
        "output": outputs,
        "kept_id": [None] * len(span),
    }
    schema = ledger_schema()
    return pa.table(
        [
            pa.array(columns[f.name], f.type)
            if isinstance(columns[f.name], list)
            else columns[f.name]
            for f in schema
        ],
        schema=schema,
    )
