"""`prepare` killed at any moment: nothing half-done is left to be used, no process lives on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.data.test_near_dedup import edited, text


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Enough rows for several shards, each with work to do."""
    path = tmp_path / "rows.jsonl"
    lines = (json.dumps({"text": edited(text(n % 6_000), 4, n)}) + "\n" for n in range(10_500))
    path.write_text("".join(lines))
    return path


def prepare(rows: Path, out: Path, log: Path | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "posttrain", "data", "prepare", str(rows), "--out", str(out)]
    options = ["--near-dedup", "0.8", "--pii", "replace", "--processes", "2", "--overwrite"]
    with (log or Path(os.devnull)).open("wb") as said:
        return subprocess.Popen(command + options, stderr=said, stdout=subprocess.DEVNULL)


def wait_until(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def works(process: psutil.Process) -> bool:
    """Whether a process is more than an entry that nobody has collected."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def digest(folder: Path) -> dict[str, bytes]:
    names = ("train.parquet", "validation.parquet", "ledger.parquet", "dataset.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("moment", ["rows/000000.arrow", "pass-2"])
def test_a_kill_leaves_the_old_state_and_no_process(
    rows: Path, tmp_path: Path, moment: str
) -> None:
    out = tmp_path / "out"
    assert prepare(rows, out).wait() == 0
    before = digest(out)

    process = prepare(rows, out)
    partial = tmp_path / ".out.partial" / "scratch"
    wait_until((partial / moment).exists)
    workers: list[psutil.Process] = []
    if moment != "rows/000000.arrow":
        wait_until(lambda: len(psutil.Process(process.pid).children()) >= 2)
        workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(works, workers)), 20)
    assert digest(out) == before

    assert prepare(rows, out).wait() == 0
    assert digest(out) == before
    assert not (tmp_path / ".out.partial").exists()


def test_two_runs_of_one_target_take_turns(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    first, second = (prepare(rows, out, log) for log in logs)
    assert (first.wait(), second.wait()) == (0, 0)
    said = [log.read_text() for log in logs]
    assert sum("waiting for another run" in one for one in said) == 1
    assert (out / "dataset.json").exists()
