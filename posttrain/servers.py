"""Prefect's and MLflow's servers on this machine: starting them, finding running ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UsageError
from posttrain.home import Home
from posttrain.store.files import write_json

LOOPBACK = "127.0.0.1"
_START_SECONDS = 180
"""A fresh Prefect database is migrated first, which takes a slow disk a minute or two."""


@dataclass(frozen=True)
class Server:
    """A server to be started."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    url: str
    health: str
    """URL that answers once it is up."""


def prefer_quiet_prefect() -> None:
    """Settings that Prefect needs before it is imported; whatever the user has set stays."""
    defaults = {
        # A fresh database is migrated first; the default of 20 s is too short for that.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)


def use_running_prefect(home: Home) -> str | None:
    """Point this process at the Prefect server that `posttrain ui` started, if it still runs."""
    if os.environ.get("PREFECT_API_URL"):
        return os.environ["PREFECT_API_URL"]
    try:
        url = str(json.loads(_address_file(home).read_bytes())["prefect_api"])
    except (OSError, ValueError, KeyError):
        return None
    if not _answers(f"{url}/health"):
        return None
    os.environ["PREFECT_API_URL"] = url
    return url


def prefect_server(port: int) -> Server:
    """Prefect's server and UI, on its usual database."""
    api = f"http://{LOOPBACK}:{port}/api"
    return Server(
        name="Prefect",
        command=(
            *(sys.executable, "-m", "prefect", "server", "start"),
            *("--host", LOOPBACK, "--port", str(port)),
        ),
        # Without the port in the environment the UI asks port 4200 for its data.
        environment={"PREFECT_SERVER_API_PORT": str(port), "PREFECT_API_URL": api},
        url=f"http://{LOOPBACK}:{port}",
        health=f"{api}/health",
    )


def mlflow_server(home: Home, port: int) -> Server:
    """MLflow's server and UI, on the database that runs are recorded in."""
    home.mlflow_artifacts.mkdir(parents=True, exist_ok=True)
    return Server(
        name="MLflow",
        command=(
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", LOOPBACK, "--port", str(port)),
            *("--backend-store-uri", home.tracking_uri),
            *("--artifacts-destination", str(home.mlflow_artifacts)),
        ),
        # Job execution costs ten more processes and twenty seconds.
        environment={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        url=f"http://{LOOPBACK}:{port}",
        health=f"http://{LOOPBACK}:{port}/health",
    )


@contextmanager
def running(home: Home, servers: list[Server]) -> Iterator[None]:
    """Start servers, wait until they answer, and stop them at the end.

    Raises:
        UsageError: a server ended or did not answer in time; its log is named.
    """
    logs = home.root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for server in servers:
            with (logs / f"{server.name.lower()}.log").open("ab") as log:
                processes.append(
                    subprocess.Popen(
                        server.command,
                        env={**os.environ, **server.environment},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        for server, process in zip(servers, processes, strict=True):
            _wait_until_up(server, process, logs)
            if server.name == "Prefect":
                write_json(_address_file(home), {"prefect_api": f"{server.url}/api"})
        yield
    finally:
        _address_file(home).unlink(missing_ok=True)
        for process in processes:
            _stop(process)


def free_port(preferred: int) -> int:
    """The preferred port on the loopback interface, or another one if it is taken."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UsageError("no free port on the loopback interface")


def _wait_until_up(server: Server, process: subprocess.Popen[bytes], logs: Path) -> None:
    log = logs / f"{server.name.lower()}.log"
    deadline = time.monotonic() + _START_SECONDS
    while not _answers(server.health):
        if process.poll() is not None:
            raise UsageError(f"{server.name}'s server ended while starting; see {log}")
        if time.monotonic() > deadline:
            raise UsageError(f"{server.name}'s server does not answer; see {log}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its workers: they share its process group."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _address_file(home: Home) -> Path:
    return home.root / "servers.json"
