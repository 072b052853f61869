from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.data import cluster_sets, cluster_stages, lines
from posttrain.data.cluster import DedupJob, pipelines, run_local, run_slurm, summary
from posttrain.data.near_duplicates import deduplicate_jsonl
from posttrain.errors import DataError, UsageError

WORDS = [f"word{number}" for number in range(400)]


@pytest.fixture(autouse=True)
def _without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the kernels takes each process seconds; the results are the same."""
    monkeypatch.setenv("POSTTRAIN_NUMBA", "0")


def text(generator: random.Random, words: int = 60) -> str:
    return " ".join(generator.choices(WORDS, k=words))


def changed(generator: random.Random, original: str, words: int) -> str:
    parts = original.split(" ")
    for _ in range(words):
        parts[generator.randrange(len(parts))] = generator.choice(WORDS)
    parts += generator.choices(WORDS, k=generator.randrange(3))
    return " ".join(parts)


def corpus(seed: int = 0) -> list[str]:
    """Texts with near copies, exact copies, short and empty ones, and groups over 64 rows."""
    generator = random.Random(seed)
    texts = [text(generator, generator.randint(8, 80)) for _ in range(150)]
    texts += [changed(generator, generator.choice(texts), 1) for _ in range(100)]
    texts += [generator.choice(texts) for _ in range(20)]
    texts += ["", " \n", "ok", "OK!", "你好吗", "你好吗"]
    boilerplate = text(generator, 120)
    texts += [boilerplate] * 40
    texts += [changed(generator, boilerplate, 1) for _ in range(60)]
    generator.shuffle(texts)
    return texts


def write(folder: Path, shards: Sequence[Sequence[str]]) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, texts in enumerate(shards):
        path = folder / f"part-{number}.jsonl"
        path.write_text(
            "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts))
        )
        paths.append(path)
    return tuple(paths)


def in_three(folder: Path, texts: Sequence[str]) -> tuple[Path, ...]:
    return write(folder, [texts[:120], texts[120:121], texts[121:]])


def job_of(folder: Path, paths: tuple[Path, ...], partitions: int = 3) -> DedupJob:
    return DedupJob(paths, folder / "work", folder / "out", partitions=partitions)


def run_tasks(job: DedupJob, *, backwards: bool = False) -> None:
    """All tasks one after the other, without an executor."""
    for stage in pipelines(job):
        for rank in sorted(range(stage.tasks), reverse=backwards):
            stage.step(None, rank, stage.tasks)


def outputs(job: DedupJob) -> list[bytes]:
    return [(job.out_folder / path.name).read_bytes() for path in job.paths]


def drops(job: DedupJob) -> dict[int, tuple[int, float]]:
    """Dropped row, kept row and similarity, with rows counted over all shards."""
    first = {path.name: int(row) for path, row in zip(job.paths, job.first_rows, strict=False)}
    found = {}
    for shard, path in enumerate(job.paths):
        for drop in pq.read_table(job.file("resolve", shard, "drops.parquet")).to_pylist():
            kept = first[drop["kept_file"]] + drop["kept_row"]
            found[first[path.name] + drop["row"]] = (kept, drop["similarity"])
    return found


def one_process(paths: Sequence[Path], out: Path) -> tuple[bytes, dict[int, tuple[int, float]]]:
    stats = deduplicate_jsonl(paths, out, processes=1)
    kept = zip(stats.kept.tolist(), stats.similarity.tolist(), strict=True)
    return out.read_bytes(), dict(zip(stats.dropped.tolist(), kept, strict=True))


@pytest.mark.parametrize("partitions", [1, 5])
def test_drops_and_bytes_are_those_of_one_process(tmp_path: Path, partitions: int) -> None:
    paths = in_three(tmp_path / "in", corpus())
    job = job_of(tmp_path, paths, partitions)
    run_tasks(job, backwards=True)
    data, expected = one_process(paths, tmp_path / "one.jsonl")
    assert len(expected) > 150
    assert drops(job) == expected
    assert b"".join(outputs(job)) == data


def test_what_is_held_at_a_time_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = in_three(tmp_path / "in", corpus(6))
    job = job_of(tmp_path, paths, partitions=2)
    with monkeypatch.context() as limits:
        limits.setattr(cluster_sets, "_SHINGLES", 300)
        limits.setattr(cluster_stages, "_PAIRS", 10)
        limits.setattr(lines, "_CHUNK_BYTES", 1000)
        run_tasks(job)
    data, expected = one_process(paths, tmp_path / "one.jsonl")
    assert drops(job) == expected
    assert b"".join(outputs(job)) == data


def test_two_worker_processes_write_the_same_as_one(tmp_path: Path) -> None:
    paths = in_three(tmp_path / "in", corpus(1))
    one, two = job_of(tmp_path / "1", paths), job_of(tmp_path / "2", paths)
    counts = run_local(one, workers=1)
    # A script without a `__main__` guard: importing it in the workers would start workers.
    script = tmp_path / "script.py"
    script.write_text(
        "import pickle, sys\n"
        "from posttrain.data.cluster import run_local\n"
        "print(run_local(pickle.load(sys.stdin.buffer), workers=2))\n"
    )
    run = subprocess.run(
        [sys.executable, script], input=pickle.dumps(two), capture_output=True, timeout=120
    )
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode().strip() == str(counts)
    assert b"3/3 tasks completed" in run.stderr  # said by a pool's worker
    data, expected = one_process(paths, tmp_path / "one.jsonl")
    assert outputs(one) == outputs(two)
    assert b"".join(outputs(two)) == data
    assert drops(one) == drops(two) == expected
    assert (counts.rows, counts.dropped) == (376, len(expected))


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_cut_into_shards_and_partitions_gives_the_same_drops(data: st.DataObject) -> None:
    numbers = st.integers(0, 2**32)
    generator = random.Random(data.draw(numbers))
    texts = [text(generator, generator.randint(0, 30)) for _ in range(8)]
    texts += [changed(generator, generator.choice(texts), 1) for _ in range(12)]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(texts)), max_size=2)))
    bounds = [0, *cuts, len(texts)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = [texts[a:b] for a, b in itertools.pairwise(bounds)]
        paths = write(folder / "in", shards)
        job = job_of(folder, paths, data.draw(st.integers(1, 4)))
        run_tasks(job)
        whole, expected = one_process(paths, folder / "one.jsonl")
        assert drops(job) == expected
        assert b"".join(outputs(job)) == whole


def forget(job: DedupJob, stage: str, task: int) -> None:
    (job.work_folder / f"logs/{stage}/completions/{task:05d}").unlink()


def test_a_run_whose_join_task_was_lost_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    paths = in_three(tmp_path / "in", corpus(2))
    whole, broken = job_of(tmp_path / "1", paths), job_of(tmp_path / "2", paths)
    run_tasks(whole)
    kept = whole.file("sketch", 0, "keys.bin")
    run_local(broken)
    # As after a kill in `join`: one task has neither files nor mark, nothing later has begun.
    for path in (broken.work_folder / "join").glob("00001.*"):
        path.unlink()
    forget(broken, "join", 1)
    for stage in ("sets", "verify", "resolve", "filter"):
        shutil.rmtree(broken.work_folder / "logs" / stage)
        shutil.rmtree(broken.work_folder / stage, ignore_errors=True)
    shutil.rmtree(broken.out_folder)
    sketched = broken.file("sketch", 0, "keys.bin").stat().st_mtime_ns
    run_local(broken)
    assert outputs(broken) == outputs(whole)
    assert drops(broken) == drops(whole)
    assert broken.file("sketch", 0, "keys.bin").stat().st_mtime_ns == sketched
    assert broken.file("sketch", 0, "keys.bin").read_bytes() == kept.read_bytes()


def test_a_mark_alone_that_is_missing_changes_nothing(tmp_path: Path) -> None:
    job = job_of(tmp_path, in_three(tmp_path / "in", corpus(3)))
    first = run_local(job)
    before = outputs(job)
    forget(job, "join", 0)
    with pytest.raises(DataError, match="join: not finished: task 0;"):
        summary(job)
    assert run_local(job) == first
    assert outputs(job) == before


def test_an_output_that_was_deleted_is_missed(tmp_path: Path) -> None:
    job = job_of(tmp_path, write(tmp_path / "in", [["a b c d e f"], ["a b c d e f"]]))
    run_local(job)
    (job.out_folder / "part-1.jsonl").unlink()
    with pytest.raises(DataError, match=r"part-1\.jsonl: gone; delete .*logs/filter"):
        run_local(job)


def test_a_stage_before_its_turn_says_which_one_is_missing(tmp_path: Path) -> None:
    job = job_of(tmp_path, write(tmp_path / "in", [["a b c d e f"]]))
    with pytest.raises(DataError, match="the stage `sketch` has not finished"):
        pipelines(job)[1].step(None, 0, 3)


def test_a_work_folder_serves_one_job(tmp_path: Path) -> None:
    paths = write(tmp_path / "in", [["a b c d e f"]])
    job = job_of(tmp_path, paths)
    pipelines(job)
    pipelines(job)
    with pytest.raises(DataError, match="other partitions, threshold"):
        pipelines(dataclasses.replace(job, threshold=0.7, partitions=9))
    paths[0].write_text('{"text": "something else"}\n')
    with pytest.raises(DataError, match="other paths"):
        pipelines(job)


def test_a_shard_that_grew_while_the_job_ran_is_an_error(tmp_path: Path) -> None:
    paths = write(tmp_path / "in", [["a b c d e f"]])
    job = job_of(tmp_path, paths)
    *before, last = pipelines(job)
    for stage in before:
        for rank in range(stage.tasks):
            stage.step(None, rank, stage.tasks)
    with paths[0].open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match="has 2 rows and had 1"):
        last.step(None, 0, 1)


Change = Callable[[DedupJob], DedupJob]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job: dataclasses.replace(job, threshold=0), "threshold: 0 is not in"),
        (lambda job: dataclasses.replace(job, bands=20), "write 16 or 32"),
        (lambda job: dataclasses.replace(job, partitions=0), "write 1 or more"),
        (lambda job: dataclasses.replace(job, paths=()), "name at least one shard"),
        (lambda job: dataclasses.replace(job, paths=("a.csv",)), "convert or unpack"),
        (lambda job: dataclasses.replace(job, paths=("a/x.jsonl", "b/x.jsonl")), "one name"),
        (lambda job: dataclasses.replace(job, out_folder=job.paths[0].parent), "overwritten"),
    ],
)
def test_a_job_that_cannot_be_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    job = job_of(tmp_path, (tmp_path / "in" / "part-0.jsonl",))
    with pytest.raises(DataError, match=message):
        change(job)


def test_parquet_keeps_rows_columns_and_compression(tmp_path: Path) -> None:
    texts = corpus(4)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "part.parquet"
    table = pa.table({"n": np.arange(len(texts)), "content": texts})
    pq.write_table(table, path, compression="zstd", row_group_size=100)
    job = DedupJob((path,), tmp_path / "work", tmp_path / "out", partitions=2, column="content")
    run_tasks(job)
    _, expected = one_process(write(tmp_path / "lines", [texts]), tmp_path / "one.jsonl")
    assert drops(job) == expected
    with pq.ParquetFile(job.out_folder / "part.parquet") as out:
        assert out.read().equals(table.filter(pa.array(~np.isin(table["n"], list(expected)))))
        assert out.schema_arrow == table.schema
        assert out.metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_parquet_file_without_the_text_column_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"n": [1], "body": ["a"]}), path)
    job = job_of(tmp_path, (path,))
    with pytest.raises(DataError, match="no text column `text`; its columns: n, body"):
        pipelines(job)[0].step(None, 0, 1)


def test_empty_shards_are_copied_empty(tmp_path: Path) -> None:
    job = job_of(tmp_path, write(tmp_path / "in", [[], ["a b c d e f"] * 2, []]))
    run_tasks(job)
    assert [len(data.splitlines()) for data in outputs(job)] == [0, 1, 0]
    assert json.loads(job.summary.read_text())["rows"] == 2


def test_slurm_is_refused_where_it_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path, write(tmp_path / "in", [["a b c d e f"]]))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no `sbatch` here"):
        run_slurm(job, partition="any", time="00:10:00")
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(UsageError, match="within a Slurm job array"):
        run_slurm(job, partition="any", time="00:10:00")


SBATCH = """#!/bin/sh
for script; do :; done
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for SLURM_ARRAY_TASK_ID in $(seq 0 "$tasks"); do
    SLURM_NODELIST=here RUN_OFFSET=0; export SLURM_ARRAY_TASK_ID SLURM_NODELIST RUN_OFFSET
    sh "$script" >>"$SBATCH_LOG" 2>&1 || exit 1
done
echo Submitted batch job 7
"""


@pytest.mark.slow
def test_slurm_job_arrays_do_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but Slurm: stand-ins for its programs run each array when it is submitted."""
    programs = {"sbatch": SBATCH, "srun": '#!/bin/sh\nshift 3\nexec "$@"\n'}
    programs["scontrol"] = "#!/bin/sh\necho here\n"
    for name, script in programs.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "sbatch.log"))
    paths = in_three(tmp_path / "in", corpus(5))
    job = job_of(tmp_path, paths, partitions=2)
    run_slurm(job, partition="any", time="00:10:00")
    assert summary(job).rows == 376, (tmp_path / "sbatch.log").read_text()
    assert b"".join(outputs(job)) == one_process(paths, tmp_path / "one.jsonl")[0]
    assert not (Path.cwd() / "slurm_logs").exists()
