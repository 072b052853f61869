"""Stage directories and programs for the tests of the training stages."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from posttrain.data.prepared import write_dataset
from posttrain.data.rows import Chat, Message
from posttrain.events import EventReader, Progress
from posttrain.stages.program import StageInput, StageJob, StageResult, read_result
from posttrain.store.files import write_bytes
from posttrain.train.history import History

COLOURS = ("red", "green", "blue", "black", "white", "amber")
THINGS = ("door", "roof", "boat", "lamp", "coat", "leaf", "road", "cup")


def make_chats(count: int, seed: int = 0) -> list[Chat]:
    """Short chats with a rule to learn: the answer repeats the colour and the thing."""
    draw = random.Random(seed)
    chats = []
    for row in range(1, count + 1):
        colour, thing = draw.choice(COLOURS), draw.choice(THINGS)
        messages = (
            Message("user", f"What is {colour}? ({row})"),
            Message("assistant", f"The {thing} is {colour}."),
        )
        name = hashlib.sha256(f"{seed} {row}".encode()).hexdigest()[:16]
        chats.append(Chat(id=name, file="chats.jsonl", row=row, messages=messages))
    return chats


def make_dataset(folder: Path, train: int = 24, held_out: int = 8) -> Path:
    """A prepared dataset of chats."""
    rows = {"train": make_chats(train), "validation": make_chats(held_out, seed=1)}
    write_dataset(folder, "chats", rows)  # type: ignore[arg-type]
    return folder


def make_stage_dir(
    folder: Path, stage: str, config: dict[str, object], inputs: dict[str, StageInput]
) -> Path:
    """A work directory with `stage.json`."""
    job = StageJob(stage=stage, name=stage, config={"stage": stage, **config}, inputs=inputs)
    folder.mkdir(parents=True)
    write_bytes(folder / "stage.json", job.model_dump_json().encode())
    return folder


def sft_stage_dir(folder: Path, model: Path, dataset: Path, **config: object) -> Path:
    """A work directory of a short SFT run: six steps over 24 rows, evaluated at 0, 2, 4 and 6."""
    settings: dict[str, object] = {
        "dataset": "chats",
        "epochs": 2,
        "adapter": {"rank": 4, "dropout": 0.1},
        "optimization": {"learning_rate": 5e-3},
        "batching": {"batch_size": 8, "max_length": 64},
        "validation": {"every_steps": 2},
        "dtype": "float32",
        **config,
    }
    inputs = {
        "model": StageInput(kind="model", path=str(model), digest="base-digest"),
        "dataset": StageInput(kind="dataset", path=str(dataset), digest="dataset-digest"),
    }
    return make_stage_dir(folder, "sft", settings, inputs)


def start(stage: str, stage_dir: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    """Start a stage's program as the launcher does, its output in `log.txt`."""
    module = f"posttrain.stages.{stage}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", module, str(stage_dir)]
    # One thread: the same sums in the same order, whatever else the machine does.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (stage_dir / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def run(stage: str, stage_dir: Path, processes: int = 1) -> StageResult:
    """Run a stage's program to its end; its log is the message if it fails."""
    program = start(stage, stage_dir, processes)
    code = program.wait(timeout=120)
    result = read_result(stage_dir)
    events = stage_dir / "events.jsonl"
    said = (stage_dir / "log.txt").read_text() + (events.read_text() if events.exists() else "")
    assert code == 0, said
    assert result is not None, said
    return result


def progress_of(stage_dir: Path) -> list[Progress]:
    """All progress events so far."""
    events = EventReader(stage_dir / "events.jsonl").read()
    return [event for event in events if isinstance(event, Progress)]


def history_of(stage_dir: Path) -> History:
    """The losses in `training.json`."""
    return History.read(stage_dir / "output")


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path, but for the machine's measures."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "resources.json"
    }


def losses(history: History) -> Sequence[float]:
    """Training loss of each step."""
    return [step.loss for step in history.steps]
