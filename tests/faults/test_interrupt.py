"""Ctrl-C in the terminal: the run ends, nothing stays behind, the next run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

ROWS = 64


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return {
        **clean,
        "POSTTRAIN_HOME": str(tmp_path / "home"),
        "PREFECT_HOME": str(tmp_path / "prefect"),
    }


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) + "\n"
                for n in range(ROWS))
    )  # fmt: skip
    sft = {
        "dataset": "chats",
        "max_steps": 4000,  # far more than are done before the interruption
        "dtype": "float32",
        "batching": {"batch_size": 2, "max_length": 64},
        "validation": {"every_steps": 2000},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": "interrupted",
                "model": str(tiny_model),
                "datasets": {"chats": {"source": str(rows)}},
                "stages": [{"sft": sft}],
                "tracking": {"enabled": False},
            }
        )
    )
    return file


def stage_processes(home: str) -> list[int]:
    """Processes that still carry the mark of a stage of this store."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("POSTTRAIN_STAGE", "").startswith(home):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_ctrl_c_keeps_a_checkpoint_and_leaves_no_process(
    recipe: Path, environment: dict[str, str]
) -> None:
    home = environment["POSTTRAIN_HOME"]
    command = [sys.executable, "-m", "posttrain", "run", str(recipe)]
    run = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def training() -> bool:
        assert run.poll() is None, run.communicate()
        events = Path(home).glob("store/work/*/events.jsonl")
        return any('"progress"' in file.read_text() for file in events
                   if "sft" in (file.parent / "stage.json").read_text())  # fmt: skip

    wait_for(training, 240, "training to begin")
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=90)
    assert run.returncode == 130
    assert "the next run goes on from here" in errors
    assert "Traceback" not in errors
    assert stage_processes(home) == []
    plan = [sys.executable, "-m", "posttrain", "plan", str(recipe), "--json"]
    done = subprocess.run(plan, env=environment, capture_output=True, text=True, timeout=60)
    actions = {step["stage"]: step["action"] for step in json.loads(done.stdout)["steps"]}
    assert actions == {"preflight": "reuse", "prepare": "reuse", "sft": "resume"}
