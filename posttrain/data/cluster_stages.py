"""What the tasks of a spread near-duplicate removal do.

Six stages, each of independent tasks that read what the stages before wrote:

    sketch   a task a shard       band keys, sorted by partition; words and a hash of each row
    join     a task a partition   rows that share a key, as pairs and as crowded groups
    sets     a task a shard       shingle sets of the rows that joined
    verify   a task a partition   pairs whose exact similarity reaches the threshold
    resolve  one task             which rows go
    filter   a task a shard       the shard without them

Rows are numbered over all shards, in the order of the shards. Every decision is made by the
functions that deduplicate on one machine, on the same numbers; hence the same result.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np

from posttrain.data import kernels, minhash
from posttrain.data.cluster_job import DedupJob, load, load_raw, save
from posttrain.data.cluster_sets import ShardSets
from posttrain.data.cluster_shards import copy_rows, read_texts
from posttrain.data.similar import (
    Pairs,
    Texts,
    candidate_pairs,
    compare_crowd,
    components,
    keep_best,
    pack_pairs,
    unpack_pairs,
)
from posttrain.errors import DataError
from posttrain.store.files import temporary_beside, write_json

_PAIRS = 1_000_000
"""Similar pairs resolved at a time; `keep_best` takes about 1 kB a pair."""
KEY = np.dtype([("key", "<u8"), ("row", "<u4")])
"""A band key and the row of the shard that has it; 12 bytes."""


def sketch(job: DedupJob, shard: int) -> None:
    """Write a shard's band keys, band by band and within a band by partition.

    Memory: 8 bytes a row and band, and some megabytes of text.
    """
    parts = [minhash.sketch(texts, job.bands) for texts in read_texts(job.paths[shard], job.column)]
    index = np.zeros((job.bands, job.partitions + 1), np.int64)
    with (
        temporary_beside(job.file("sketch", shard, "keys.bin")) as temporary,
        temporary.open("wb") as file,
    ):
        for band in range(job.bands):
            keys = np.concatenate([np.zeros(0, np.uint64), *(part.keys[band] for part in parts)])
            partition = keys % np.uint64(job.partitions)
            order = np.argsort(partition, kind="stable")
            entries = np.empty(len(keys), KEY)
            entries["key"], entries["row"] = keys[order], order
            entries.tofile(file)
            index[band] = np.searchsorted(partition[order], np.arange(job.partitions + 1))
    save(job.file("sketch", shard, "index.npy"), index)
    words = np.concatenate([np.zeros(0, np.int64), *(part.words for part in parts)])
    texts = np.concatenate([np.zeros(0, np.uint64), *(part.ties for part in parts)])
    save(job.file("sketch", shard, "texts.npy"), texts)
    save(job.file("sketch", shard, "words.npy"), words)


def join(job: DedupJob, partition: int) -> None:
    """Write the rows that share a key of this partition: pairs, and groups too large for pairs.

    Memory: about 50 bytes for each of the partition's keys of one band, and 8 a pair.
    """
    found, crowds = np.zeros(0, np.uint64), dict[bytes, np.ndarray]()
    # Band by band, as on one machine: keys of two bands may be equal by chance.
    for keys, rows in _partition(job, partition):
        pairs, crowded = candidate_pairs([keys], rows)
        found = np.union1d(found, pairs)
        crowds |= {crowd.tobytes(): crowd for crowd in crowded}
    left, right = unpack_pairs(found)
    involved = np.unique(np.concatenate([left, right, *crowds.values()]))
    save(job.file("join", partition, "rows.npy"), involved)
    # All pairs with the same left row are compared by one task, which reads its set once.
    task = kernels.mix_array(left.astype(np.uint64)) % np.uint64(job.partitions)
    order = np.argsort(task, kind="stable")
    save(job.file("join", partition, "pairs.npy"), found[order])
    index = np.searchsorted(task[order], np.arange(job.partitions + 1))
    save(job.file("join", partition, "index.npy"), index)
    members = np.concatenate([np.zeros(0, np.int64), *crowds.values()])
    sizes = np.array([0, *(len(crowd) for crowd in crowds.values())], np.int64)
    names = b"".join(hashlib.blake2b(crowd, digest_size=16).digest() for crowd in crowds)
    save(job.file("join", partition, "crowd_rows.npy"), members)
    save(job.file("join", partition, "crowd_starts.npy"), np.cumsum(sizes))
    save(job.file("join", partition, "crowd_names.npy"), np.frombuffer(names, "<u8").reshape(-1, 2))


def sets(job: DedupJob, shard: int) -> None:
    """Write the shingle sets of those rows of a shard that share a key with another row.

    Memory: some megabytes of text, and 8 bytes for each such row.
    """
    first, last = job.first_rows[shard : shard + 2]
    rows = [np.zeros(0, np.int64)]
    for partition in range(job.partitions):
        involved = load(job.file("join", partition, "rows.npy"))
        rows.append(involved[slice(*np.searchsorted(involved, [first, last]))] - first)
    wanted = np.unique(np.concatenate(rows))
    sizes, begin = [np.zeros(1, np.int64)], 0
    path = job.file("sets", shard, "hashes.bin")
    with temporary_beside(path) as temporary, temporary.open("wb") as file:
        for texts in read_texts(job.paths[shard], job.column) if len(wanted) else ():
            a, b = np.searchsorted(wanted, [begin, begin + len(texts)])
            if a < b:
                found = minhash.shingle_sets(texts.take(wanted[a:b] - begin))
                found.hashes.astype("<u8").tofile(file)
                sizes.append(found.counts)
            begin += len(texts)
    save(job.file("sets", shard, "offsets.npy"), np.cumsum(np.concatenate(sizes)))
    save(job.file("sets", shard, "rows.npy"), wanted)


def verify(job: DedupJob, task: int) -> None:
    """Write this task's share of the pairs that are similar, and how similar they are.

    Memory: 24 bytes a pair, and about 200 MB of shingle sets at a time.
    """
    shares = [np.zeros(0, np.uint64)]
    for partition in range(job.partitions):
        begin, end = load(job.file("join", partition, "index.npy"))[task : task + 2]
        shares.append(load(job.file("join", partition, "pairs.npy"))[begin:end])
    texts = ShardSets(job)
    pairs = np.unique(np.concatenate(shares))
    similarity = texts.similarity(*unpack_pairs(pairs))
    similar = similarity >= job.threshold
    crowds = [_compare(job, crowd, texts) for crowd in _crowds(job, task)]
    packed = [pairs[similar], *(pack_pairs(crowd.left, crowd.right) for crowd in crowds)]
    similarities = [similarity[similar], *(crowd.similarity for crowd in crowds)]
    save(job.file("verify", task, "pairs.npy"), np.concatenate(packed))
    save(job.file("verify", task, "similarity.npy"), np.concatenate(similarities))
    uncompared = np.array(sum(crowd.uncompared for crowd in crowds), np.int64)
    save(job.file("verify", task, "uncompared.npy"), uncompared)


def resolve(job: DedupJob, _: int = 0) -> None:
    """Decide which rows go, and write for each shard which, and in whose favour.

    Memory: about 150 bytes a similar pair, and 1 GB.
    """
    tasks = range(job.partitions)
    packed, first = np.unique(
        np.concatenate([load(job.file("verify", task, "pairs.npy")) for task in tasks]),
        return_index=True,
    )
    similarity = np.concatenate([load(job.file("verify", t, "similarity.npy")) for t in tasks])
    left, right = unpack_pairs(packed)
    rows = np.unique(np.concatenate([left, right]))
    pairs = Pairs(np.searchsorted(rows, left), np.searchsorted(rows, right), similarity[first])
    dropped, kept, alike = _keep_best(pairs, _priority(job, rows))
    _write_drops(job, rows[dropped], rows[kept], alike)
    uncompared = [int(load(job.file("verify", task, "uncompared.npy"))) for task in tasks]
    counts = {
        "rows": int(job.first_rows[-1]),
        "dropped": len(dropped),
        "similar_pairs": len(pairs),
        "uncompared": sum(uncompared),
    }
    write_json(job.summary, counts)


def filter_shard(job: DedupJob, shard: int) -> None:
    """Write a shard without its dropped rows. Memory: some megabytes, or one Parquet row group."""
    import pyarrow.parquet as pq

    table = pq.read_table(job.file("resolve", shard, "drops.parquet"), columns=["row"])
    path = job.paths[shard]
    rows = copy_rows(path, job.out_folder / path.name, table.column("row").to_numpy())
    known = int(np.diff(job.first_rows)[shard])
    if rows != known:
        raise DataError(f"{path}: has {rows} rows and had {known}; it changed while the job ran")


def _partition(job: DedupJob, partition: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each band the keys of a partition, and the rows that have them, ascending."""
    shards = range(len(job.paths))
    entries = [load_raw(job.file("sketch", shard, "keys.bin"), KEY) for shard in shards]
    index = [load(job.file("sketch", shard, "index.npy")) for shard in shards]
    for band in range(job.bands):
        keys, rows = [], []
        for shard, first in enumerate(job.first_rows[:-1]):
            begin, end = index[shard][band, partition : partition + 2]
            skipped = band * (job.first_rows[shard + 1] - first)
            part = entries[shard][skipped + begin : skipped + end]
            keys.append(part["key"].astype(np.uint64))
            rows.append(part["row"] + first)
        yield np.concatenate(keys), np.concatenate(rows)


def _crowds(job: DedupJob, task: int) -> list[np.ndarray]:
    """The distinct crowded groups that this task compares, by name."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for partition in range(job.partitions):
        names = load(job.file("join", partition, "crowd_names.npy"))
        rows = load(job.file("join", partition, "crowd_rows.npy"))
        starts = load(job.file("join", partition, "crowd_starts.npy"))
        for number in np.flatnonzero(names[:, 0] % np.uint64(job.partitions) == task):
            name = (int(names[number, 0]), int(names[number, 1]))
            found[name] = rows[starts[number] : starts[number + 1]]
    return [found[name] for name in sorted(found)]


def _compare(job: DedupJob, crowd: np.ndarray, texts: ShardSets) -> Pairs:
    places = np.arange(len(crowd))
    chosen: Texts = texts.of(crowd)
    pairs = compare_crowd(places, chosen, job.threshold, _priority(job, crowd))
    return Pairs(crowd[pairs.left], crowd[pairs.right], pairs.similarity, pairs.uncompared)


def _priority(job: DedupJob, rows: np.ndarray) -> np.ndarray:
    """For each of these ascending rows its place among them; the longest text comes first."""
    words, texts = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.uint64)
    for shard, part in job.by_shard(rows):
        own = rows[part] - job.first_rows[shard]
        words[part] = load(job.file("sketch", shard, "words.npy"))[own]
        texts[part] = load(job.file("sketch", shard, "texts.npy"))[own]
    places = np.empty(len(rows), np.int64)
    places[np.lexsort((rows, texts, -words))] = np.arange(len(rows))
    return places


def _keep_best(pairs: Pairs, priority: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`keep_best` for some whole clusters at a time: they have no bearing on each other."""
    cluster = components(pairs, len(priority))[pairs.left]
    order = np.argsort(cluster, kind="stable")
    begins = np.searchsorted(cluster[order], cluster[order])
    bounds = np.append(np.flatnonzero(np.diff(begins // _PAIRS, prepend=-1)), len(order))
    parts = [keep_best(pairs, priority)] if not len(pairs) else []
    for first, last in itertools.pairwise(bounds):
        part = order[first:last]
        some = Pairs(pairs.left[part], pairs.right[part], pairs.similarity[part])
        parts.append(keep_best(some, priority))
    dropped, kept, similarity = (np.concatenate(column) for column in zip(*parts, strict=True))
    ascending = np.argsort(dropped)
    return dropped[ascending], kept[ascending], similarity[ascending]


def _write_drops(
    job: DedupJob, dropped: np.ndarray, kept: np.ndarray, similarity: np.ndarray
) -> None:
    """A table a shard; rows are counted from 0 within their shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard_of = np.searchsorted(job.first_rows, kept, "right") - 1
    names = np.array([path.name for path in job.paths])
    parts = dict(job.by_shard(dropped))
    for shard in range(len(job.paths)):
        part = parts.get(shard, slice(0, 0))
        table = pa.table(
            {
                "row": dropped[part] - job.first_rows[shard],
                "kept_file": pa.array(names[shard_of[part]].tolist(), pa.string()),
                "kept_row": kept[part] - job.first_rows[shard_of[part]],
                "similarity": similarity[part],
            }
        )
        with temporary_beside(job.file("resolve", shard, "drops.parquet")) as temporary:
            pq.write_table(table, temporary)
