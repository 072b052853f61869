import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.data.prepared import write_dataset
from posttrain.data.rows import Chat, Message
from posttrain.errors import ModelError
from posttrain.events import EventReader, Warn
from posttrain.recipe.sft import SftConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.stages.sft import main
from posttrain.train import probe
from posttrain.train.probe import PassTooLarge, within_memory
from posttrain.train.resources import RESOURCES
from tests.unit.train.programs import (
    digests_of,
    history_of,
    losses,
    make_dataset,
    sft_stage_dir,
)

# Loads what a training program loads, then lets it have only so much more.
LIMITED = """
import resource, sys, threading
import trl, peft, torch
from posttrain.train import callbacks, trainer, probe
from posttrain.recipe.sft import SftConfig
from posttrain.stages.program import run_program
from posttrain.stages.sft import main
torch.set_num_threads(1)
threading.stack_size(2**18)  # the loader starts threads, and each would take 8 MiB
torch.ones(8, 8, requires_grad=True).sum().backward()
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
limit = used + int(sys.argv.pop()) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
run_program(SftConfig, main)
"""


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows of far more than 500 tokens."""
    folder = tmp_path_factory.mktemp("long") / "chats"
    texts = [" ".join(f"{row} is not {number}." for number in range(400)) for row in range(18)]
    chats = [
        Chat(
            id=f"{row:016}",
            file="long.jsonl",
            row=row + 1,
            messages=(Message("user", f"Say {row}."), Message("assistant", text)),
        )
        for row, text in enumerate(texts)
    ]
    write_dataset(folder, "chats", {"train": chats[:16], "validation": chats[16:]})
    return folder


def train(stage_dir: Path) -> StageResult:
    context = StageContext(stage_dir, SftConfig)
    context.output.mkdir()
    result = main(context)
    assert result is not None
    return result


def train_limited(stage_dir: Path, mebibytes: int) -> subprocess.CompletedProcess[str]:
    """Run the program in a process that can have only so much memory beyond its libraries."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", LIMITED, str(stage_dir), str(mebibytes)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def warnings_of(stage_dir: Path) -> list[str]:
    events = EventReader(stage_dir / "events.jsonl").read()
    return [event.message for event in events if isinstance(event, Warn)]


def long_run(folder: Path, model: Path, dataset: Path, micro_batch_size: int) -> Path:
    return sft_stage_dir(
        folder,
        model,
        dataset,
        adapter={"rank": 4, "dropout": 0.0},
        epochs=1,
        batching={"batch_size": 8, "micro_batch_size": micro_batch_size, "max_length": 500},
        validation={"every_steps": 2},
    )


def test_the_probe_leaves_no_trace_in_what_is_learned(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, so that a draw too many would show."""
    data = make_dataset(tmp_path / "data")
    with_probe = sft_stage_dir(tmp_path / "with", tiny_model, data)
    without = sft_stage_dir(tmp_path / "without", tiny_model, data)
    train(with_probe)
    monkeypatch.setattr(probe.ProbeMemory, "on_train_begin", lambda *_, **__: None)
    train(without)
    ours, theirs = digests_of(with_probe / "output"), digests_of(without / "output")
    for digests in (ours, theirs):
        digests.pop(RESOURCES, None)  # says how much memory this process needed
    assert ours == theirs


def test_out_of_memory_halves_the_pass_and_learns_the_same(
    tiny_model: Path, long_rows: Path, tmp_path: Path
) -> None:
    """A pass of 8 rows needs more than 130 MiB, a pass of 4 less; 115 MiB are there."""
    limited = long_run(tmp_path / "limited", tiny_model, long_rows, micro_batch_size=8)
    done = train_limited(limited, mebibytes=115)
    events = (limited / "events.jsonl").read_text()
    assert done.returncode == 0, done.stderr + events
    said = [line for line in warnings_of(limited) if "out of memory" in line]
    assert said[0].startswith("out of memory with 8 rows a pass; going on with 4, and 2 passes")
    free = long_run(tmp_path / "free", tiny_model, long_rows, micro_batch_size=8)
    train(free)
    assert losses(history_of(limited)) == pytest.approx(losses(history_of(free)), abs=1e-4)
    assert json.loads((limited / "output" / RESOURCES).read_bytes())["micro_batch_size"] < 8


def test_not_even_one_row_is_an_error_that_says_what_to_write(
    tiny_model: Path, long_rows: Path, tmp_path: Path
) -> None:
    stage_dir = long_run(tmp_path / "run", tiny_model, long_rows, micro_batch_size=2)
    done = train_limited(stage_dir, mebibytes=40)
    assert done.returncode == 1
    last = json.loads((stage_dir / "events.jsonl").read_text().splitlines()[-1])
    assert last["type"] == "ModelError"
    assert "out of memory with 1 row a pass" in last["message"]
    assert "max_length: 250" in last["message"]


@pytest.fixture
def context(tiny_model: Path, tmp_path: Path) -> StageContext[SftConfig]:
    """A stage of 24 rows a step, in passes of 6."""
    batching = {"batch_size": 24, "micro_batch_size": 6, "max_length": 64}
    stage_dir = sft_stage_dir(tmp_path / "stage", tiny_model, tmp_path, batching=batching)
    return StageContext(stage_dir, SftConfig)


def test_memory_that_runs_out_in_the_middle_starts_again_with_smaller_passes(
    context: StageContext[SftConfig],
) -> None:
    tried = []

    def attempt(micro_batch_size: int) -> str:
        tried.append(micro_batch_size)
        if micro_batch_size > 1:
            # What torch says, from the allocator itself.
            torch.empty(2**62, dtype=torch.uint8)
        return "done"

    assert within_memory(context, attempt) == "done"
    assert tried == [6, 3, 1], "each divides the one before"
    assert "3, and 8 passes an optimizer step" in warnings_of(context.stage_dir)[0]


def test_other_errors_are_not_taken_for_it(context: StageContext[SftConfig]) -> None:
    def attempt(micro_batch_size: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        within_memory(context, attempt)


def test_one_of_several_processes_cannot_go_on_alone(
    context: StageContext[SftConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    def in_the_middle(micro_batch_size: int) -> None:
        raise MemoryError("no room")

    with pytest.raises(ModelError, match=r"micro_batch_size: 3"):
        within_memory(context, in_the_middle)

    def before_the_first_step(micro_batch_size: int) -> int:
        if micro_batch_size > 3:
            raise PassTooLarge("too large")
        return micro_batch_size

    assert within_memory(context, before_the_first_step) == 3


def test_measured_memory_is_near_the_estimate(tiny_model: Path, tmp_path: Path) -> None:
    """In a program of its own: this process has had more memory before."""
    from tests.unit.train.programs import run

    data = make_dataset(tmp_path / "data")
    for name, adapter in (("full", None), ("lora", {"type": "lora"})):
        stage_dir = sft_stage_dir(tmp_path / name, tiny_model, data, adapter=adapter)
        metrics = run("sft", stage_dir).metrics
        estimate, peak = metrics["memory_estimate_gib"], metrics["memory_peak_gib"]
        assert estimate == pytest.approx(peak, rel=0.15)
        record = json.loads((stage_dir / "output" / RESOURCES).read_bytes())
        assert record["memory_before_model_gib"] < record["memory_peak_gib"]
        assert record["memory_estimate_gib"]["total"] == pytest.approx(estimate, abs=1e-3)


def test_resources_are_an_account_and_no_content() -> None:
    assert RESOURCES in SftConfig.accounts
