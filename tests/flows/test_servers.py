"""The pinned servers really work together: start, deploy, fire a schedule, answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain import servers
from posttrain.home import Home
from tests.flows.conftest import Tiny

ROOT = Path(__file__).parents[2]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.5)
    return found


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Both servers on free ports and fresh databases: (Prefect's API, MLflow, environment)."""
    folder = tmp_path_factory.mktemp("servers")
    home = Home(folder / "home")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("PREFECT_"):
                patch.delenv(name)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("PREFECT_HOME", str(folder / "prefect"))
        patch.setenv("POSTTRAIN_HOME", str(home.root))
        servers.prefer_quiet_prefect()
        prefect = servers.prefect_server(servers.free_port(4200))
        mlflow = servers.mlflow_server(home, servers.free_port(5000))
        with servers.running(home, [prefect, mlflow]):
            environment = {**os.environ, "PREFECT_API_URL": f"{prefect.url}/api"}
            yield f"{prefect.url}/api", mlflow.url, environment


def test_mlflows_server_answers(up: tuple[str, str, dict[str, str]]) -> None:
    found = post(f"{up[1]}/api/2.0/mlflow/experiments/search", {"max_results": 10})
    assert [item["name"] for item in found["experiments"]] == ["Default"]


def test_a_deployed_schedule_fires_every_minute(
    up: tuple[str, str, dict[str, str]], tiny: Tiny, tmp_path: Path
) -> None:
    api, _, environment = up
    recipe = tmp_path / "prepare.yaml"
    recipe.write_text(
        f"name: scheduled\nmodel: {tiny.model}\n"
        f"datasets:\n  chats: {{source: {tiny.rows}}}\n"
        "stages:\n  - prepare: {dataset: chats}\n"
    )

    def prefect(*arguments: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr

    prefect("work-pool", "create", "posttrain", "--type", "process")
    prefect("deploy", "--prefect-file", "deployments/prefect.yaml", "--name", "post-training",
            "--cron", "* * * * *", "--param", f"recipe={recipe}")  # fmt: skip
    worker = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "posttrain"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        completed = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
        [run, *_] = wait_for(
            lambda: post(f"{api}/flow_runs/filter", {"flow_runs": completed}),
            180,
            "a scheduled run",
        )
    finally:
        worker.terminate()
        worker.wait(60)
    assert (run["state_type"], run["auto_scheduled"]) == ("COMPLETED", True)
    tasks = post(f"{api}/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    assert [task["name"] for task in tasks] == ["prepare"]
