"""A training run that was killed or stopped must end as if nothing had happened."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from posttrain.events import EventReader, Warn
from posttrain.stages.program import read_result
from posttrain.train.checkpoints import newest_complete
from tests.unit.train.programs import (
    digests_of,
    history_of,
    make_dataset,
    progress_of,
    run,
    sft_stage_dir,
    start,
)
from tests.unit.train.test_methods import METHODS
from tests.unit.train.test_pretrain import make_documents, pretrain_stage_dir

# 60 steps of about 20 ms and a checkpoint every fourth, so that a kill falls between two.
LONG = {"epochs": 20, "validation": {"every_steps": 4, "patience": None}}


@pytest.fixture
def start_sft() -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Starts programs, and leaves none behind when the test fails."""
    programs: list[subprocess.Popen[bytes]] = []

    def start_and_remember(stage_dir: Path) -> subprocess.Popen[bytes]:
        programs.append(start("sft", stage_dir))
        return programs[-1]

    yield start_and_remember
    for program in programs:
        program.kill()
        program.wait()


def wait_for_step(program: subprocess.Popen[bytes], stage_dir: Path, step: int) -> None:
    """Return as soon as a progress event of `step` is there."""
    deadline = time.monotonic() + 90
    while not any(event.done >= step for event in progress_of(stage_dir)):
        assert program.poll() is None, (stage_dir / "log.txt").read_text()
        assert time.monotonic() < deadline, f"no step {step} in 90 s"
        time.sleep(0.005)


def test_a_run_killed_and_later_stopped_ends_in_the_bytes_of_an_uninterrupted_one(
    tiny_model: Path, tmp_path: Path, start_sft: Callable[[Path], subprocess.Popen[bytes]]
) -> None:
    dataset = make_dataset(tmp_path / "data")
    whole = sft_stage_dir(tmp_path / "whole", tiny_model, dataset, **LONG)
    broken = sft_stage_dir(tmp_path / "broken", tiny_model, dataset, **LONG)
    uninterrupted = start_sft(whole)

    first = start_sft(broken)
    wait_for_step(first, broken, 10)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert read_result(broken) is None
    reached = max(event.done for event in progress_of(broken))

    second = start_sft(broken)
    wait_for_step(second, broken, reached + 10)
    second.terminate()
    assert second.wait(timeout=60) == 143
    assert read_result(broken) is None
    (warning,) = [
        event for event in EventReader(broken / "events.jsonl").read() if isinstance(event, Warn)
    ]
    stopped_at = int(warning.message.split("stopped at step ")[1].split(";")[0])
    saved = newest_complete(broken / "checkpoints")
    assert saved is not None
    assert saved.name == f"checkpoint-{stopped_at}"

    before = len(progress_of(broken))
    result = run("sft", broken)
    assert progress_of(broken)[before].done == stopped_at + 1
    assert uninterrupted.wait(timeout=120) == 0
    assert history_of(broken) == history_of(whole)
    assert digests_of(broken / "output") == digests_of(whole / "output")
    expected = read_result(whole)
    assert expected is not None
    same = set(expected.metrics) - {"tokens_per_second", "memory_peak_gib"}
    assert {key: result.metrics[key] for key in same} == {
        key: expected.metrics[key] for key in same
    }


@pytest.fixture
def finished(tiny_model: Path, tmp_path: Path) -> Path:
    stage_dir = sft_stage_dir(tmp_path / "sft", tiny_model, make_dataset(tmp_path / "data"))
    run("sft", stage_dir)
    return stage_dir


@pytest.mark.parametrize(
    "method",
    [
        "documents in blocks",
        "adalora",
        pytest.param("pissa", marks=pytest.mark.slow),
        pytest.param("pfeiffer", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_of_any_method_ends_in_the_bytes_of_an_uninterrupted_one(
    method: str, tiny_model: Path, tmp_path: Path
) -> None:
    def prepared(name: str) -> tuple[str, Path]:
        if method == "documents in blocks":
            dataset = make_documents(tmp_path / name / "data")
            settings = {"validation": {"every_steps": 4, "patience": None}}
            stage_dir = tmp_path / name / "run"
            return "pretrain", pretrain_stage_dir(stage_dir, tiny_model, dataset, **settings)
        dataset = make_dataset(tmp_path / name / "data")
        adapter = METHODS[method]["adapter"]
        stage_dir = tmp_path / name / "run"
        return "sft", sft_stage_dir(stage_dir, tiny_model, dataset, adapter=adapter, **LONG)

    stage, whole = prepared("whole")
    _, broken = prepared("broken")
    first = start(stage, broken)
    try:
        wait_for_step(first, broken, 14)
    finally:
        first.kill()
        first.wait()
    assert read_result(broken) is None
    run(stage, broken)
    run(stage, whole)
    assert digests_of(broken / "output") == digests_of(whole / "output")


def test_a_run_killed_after_its_last_step_is_not_trained_further(finished: Path) -> None:
    expected, steps = digests_of(finished / "output"), len(progress_of(finished))
    # What a kill while saving leaves: no result, half an output, and a torn checkpoint.
    (finished / "result.json").unlink()
    (finished / "output" / "training.json").unlink()
    shutil.copytree(finished / "checkpoints/checkpoint-6", finished / "checkpoints/checkpoint-8")
    (finished / "checkpoints/checkpoint-8/COMPLETE").unlink()
    run("sft", finished)
    assert digests_of(finished / "output") == expected
    assert len(progress_of(finished)) == steps
    assert not (finished / "checkpoints/checkpoint-8").exists()
