"""A program on two machines, both of them this one: it ends, fails and is stopped on both."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from posttrain.errors import StageFailed, StageInterrupted
from posttrain.events import Event, Phase
from posttrain.launch import Program, run_to_end
from posttrain.launch.join import take_part
from posttrain.stages.program import StageJob, StageResult

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture
def two_machines(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Programs of two machines, of which no process may be left."""
    stage_dir = tmp_path / "stage"
    stage_dir.mkdir()
    job = StageJob(stage="merge", name="merge", config={"stage": "merge"}, inputs={})
    (stage_dir / "stage.json").write_text(job.model_dump_json())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def prepare(behaviour: str, **settings: object) -> Program:
        return Program(
            module="behaves",
            stage_dir=stage_dir,
            nodes=2,
            rendezvous=f"127.0.0.1:{port}",
            env={"BEHAVIOUR": behaviour, "PYTHONPATH": str(PROGRAMS)},
            **settings,  # type: ignore[arg-type]
        )

    yield prepare
    left = [p for p in psutil.process_iter() if str(stage_dir) in _command_line(p)]
    for process in left:
        process.kill()
    assert left == []


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            return list(process.cmdline())
    return []


def run_both(
    program: Program, when: str = "", then: Callable[[], None] = lambda: None
) -> tuple[StageResult | BaseException, BaseException | None]:
    """How the run ended on the first machine, and on the second one."""
    with ThreadPoolExecutor(1) as pool:
        second: list[Future[None]] = []

        def on_event(event: Event) -> None:
            if not isinstance(event, Phase):
                return
            if event.message.startswith("waiting at") and when != "waiting":
                second.append(pool.submit(take_part, program))
            if when and event.message.startswith(when):
                then()

        try:
            first: StageResult | BaseException = run_to_end(program, on_event, poll_s=0.05)
        except (KeyboardInterrupt, StageFailed, StageInterrupted) as error:
            first = error
        return first, second[0].exception(timeout=60) if second else None


def interrupt() -> None:
    raise KeyboardInterrupt


def test_both_end_with_the_run(two_machines: Callable[..., Program]) -> None:
    first, second = run_both(two_machines("finish"))
    assert first == StageResult(metrics={"loss": 2.5}, headline="it worked")
    assert second is None


def test_an_error_on_the_other_machine_is_the_runs_error(
    two_machines: Callable[..., Program],
) -> None:
    first, second = run_both(two_machines("report_an_error"))
    assert isinstance(first, StageFailed)
    assert "chats.jsonl, row 7" in str(first)
    assert isinstance(second, StageFailed)


def test_stopping_the_run_ends_the_ranks_of_the_other_machine(
    two_machines: Callable[..., Program],
) -> None:
    """Those ranks were asked by nobody and would sleep for a hundred seconds."""
    began = time.monotonic()
    first, second = run_both(two_machines("ignore_term", grace_s=2.0), "ready", interrupt)
    assert isinstance(first, KeyboardInterrupt)
    assert isinstance(second, StageInterrupted)
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_run_can_be_stopped_while_it_waits_for_others(
    two_machines: Callable[..., Program],
) -> None:
    first, second = run_both(two_machines("finish", grace_s=5.0), "waiting", interrupt)
    assert isinstance(first, KeyboardInterrupt)
    assert second is None
