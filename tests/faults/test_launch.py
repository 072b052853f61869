"""Programs end, fail, are cancelled and killed; whatever happens, no process of theirs is left."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from posttrain.errors import StageFailed, StageInterrupted
from posttrain.events import Event, EventReader, EventWriter, Phase, Progress
from posttrain.launch import LocalLauncher, Program, kill_leftovers, run_to_end
from posttrain.stages.program import StageJob, StageResult

PROGRAMS = Path(__file__).parent / "programs"
FLOW = PROGRAMS / "flow.py"


@pytest.fixture
def stage_dir(tmp_path: Path) -> Iterator[Path]:
    """A stage's work directory; no process may be left in it."""
    folder = tmp_path / "stage"
    folder.mkdir()
    job = StageJob(stage="merge", name="merge", config={"stage": "merge"}, inputs={})
    (folder / "stage.json").write_text(job.model_dump_json())
    yield folder
    left = processes_of(folder)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert left == []


def program(stage_dir: Path, behaviour: str, **settings: object) -> Program:
    env = {"BEHAVIOUR": behaviour, "PYTHONPATH": str(PROGRAMS)}
    return Program(module="behaves", stage_dir=stage_dir, env=env, **settings)


def run(program: Program, on_event: Callable[[Event], None] | None = None) -> StageResult:
    return run_to_end(program, on_event or (lambda _: None), poll_s=0.05)


def processes_of(stage_dir: Path) -> list[psutil.Process]:
    """The program's processes, the reaper, and a daemon that has left no other trace."""
    daemon = stage_dir / "daemon"
    daemon_pid = int(daemon.read_text() or -1) if daemon.exists() else -1
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_marked = process.environ().get("POSTTRAIN_STAGE") == str(stage_dir)
            is_reaper = {"posttrain.launch.reaper", str(stage_dir)} <= set(process.cmdline())
            is_ours = is_marked or is_reaper or process.pid == daemon_pid
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def reaper_of(stage_dir: Path) -> psutil.Process:
    [reaper] = [p for p in processes_of(stage_dir) if "posttrain.launch.reaper" in p.cmdline()]
    return reaper


def messages(stage_dir: Path) -> list[tuple[int, str]]:
    events = EventReader(stage_dir / "events.jsonl").read()
    return [(event.rank, event.message) for event in events if isinstance(event, Phase)]


def wait_until(condition: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_ready(stage_dir: Path, ranks: int = 1) -> Callable[[], bool]:
    return lambda: {(rank, "ready") for rank in range(ranks)} <= set(messages(stage_dir))


def is_locked(stage_dir: Path) -> bool:
    with (stage_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def flow(
    stage_dir: Path, behaviour: str, *options: str, ranks: int = 1, grace_s: float = 20
) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that runs the program, as a flow does; killed at the end if need be."""
    command = [sys.executable, str(FLOW), str(stage_dir), behaviour, str(ranks), str(grace_s)]
    with subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def when_ready(action: Callable[[], None]) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if isinstance(event, Phase) and event.message == "ready":
            action()

    return on_event


def raise_when_ready(error: BaseException) -> Callable[[Event], None]:
    def action() -> None:
        raise error

    return when_ready(action)


# How programs end by themselves


def test_a_program_that_finishes_gives_its_result_and_its_events(stage_dir: Path) -> None:
    events: list[Event] = []
    result = LocalLauncher(poll_s=0.05).run(program(stage_dir, "finish"), events.append)
    assert result == StageResult(metrics={"loss": 2.5}, headline="it worked")
    assert [type(event) for event in events] == [Phase, Progress]
    status = json.loads((stage_dir / "status.json").read_text())
    assert status == {"returncode": 0, "signal": None, "stopped": False, "killed": 0}


def test_the_programs_own_error_is_the_message(stage_dir: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        run(program(stage_dir, "report_an_error", name="merge-chats"))
    expected = f"merge-chats: chats.jsonl, row 7: no answer to learn from\n  log: {stage_dir}"
    assert str(caught.value) == f"{expected}/log.txt"
    assert caught.value.stage == "merge-chats"


def test_a_crash_is_told_by_its_signal_and_the_end_of_the_log(stage_dir: Path) -> None:
    (stage_dir / "log.txt").write_text("From an earlier attempt\n")
    with pytest.raises(StageFailed, match=r"killed by signal 11 \(SIGSEGV\); a crash") as caught:
        run(program(stage_dir, "crash"))
    assert "Loading weights" in str(caught.value)
    assert "earlier attempt" not in str(caught.value)
    assert (stage_dir / "log.txt").read_text().startswith("From an earlier attempt\n")


def test_a_kill_that_nobody_here_sent_suggests_memory(stage_dir: Path) -> None:
    with pytest.raises(StageFailed, match=r"signal 9 \(SIGKILL\); out of memory\?"):
        run(program(stage_dir, "run_out_of_memory"))


def test_an_import_error_is_in_the_message(stage_dir: Path) -> None:
    with pytest.raises(StageFailed, match="No module named 'no_such_library'"):
        run(program(stage_dir, "import_what_is_missing"))


def test_exit_code_0_without_a_result_is_a_failure(stage_dir: Path) -> None:
    (stage_dir / "result.json").write_text('{"headline": "from an earlier attempt"}')
    with pytest.raises(StageFailed, match="without a result"):
        run(program(stage_dir, "end_without_result"))


@pytest.mark.parametrize("torn", [b"", b'{"ti', b'{"time": 1, "event": "phase", "message": "x"}'])
def test_events_of_an_earlier_attempt_are_not_replayed(stage_dir: Path, torn: bytes) -> None:
    path = stage_dir / "events.jsonl"
    EventWriter(path).error(ValueError("of an earlier attempt"))
    with path.open("ab") as file:
        file.write(torn)
    events: list[Event] = []
    run(program(stage_dir, "finish"), events.append)
    assert [type(event) for event in events] == [Phase, Progress]
    assert all(event in EventReader(path).read() for event in events), (
        "a torn line must not swallow the next"
    )
    with pytest.raises(StageFailed, match="before it could say why"):
        run(program(stage_dir, "import_what_is_missing"))


def test_files_in_the_working_directory_hide_no_library(
    stage_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hides_a_library.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageFailed, match="No module named 'hides_a_library'"):
        run(program(stage_dir, "import_from_working_directory"))


def test_kept_descriptors_are_not_passed_to_the_program(stage_dir: Path) -> None:
    with (stage_dir / "lock").open("w") as lock:
        os.dup2(lock.fileno(), 99)
        try:
            run(program(stage_dir, "print_fds", keep_fds=(99,)))
        finally:
            os.close(99)
    assert "open: [0, 1, 2, " in (log := (stage_dir / "log.txt").read_text())
    assert "99" not in log


def test_a_daemon_does_not_outlive_its_program(stage_dir: Path) -> None:
    run(program(stage_dir, "leave_a_daemon_and_finish"))
    assert json.loads((stage_dir / "status.json").read_text())["killed"] == 1
    assert processes_of(stage_dir) == []


# How programs are stopped


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug in on_event")])
def test_any_exception_of_the_caller_stops_the_program(
    stage_dir: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        run(program(stage_dir, "write_checkpoint_on_term"), raise_when_ready(error))
    assert caught.value is error
    assert processes_of(stage_dir) == []
    assert (stage_dir / "checkpoint-0").exists()
    status = json.loads((stage_dir / "status.json").read_text())
    assert status == {"returncode": 143, "signal": None, "stopped": True, "killed": 0}


def test_a_program_that_ignores_term_is_killed_after_the_grace_period(stage_dir: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(program(stage_dir, "ignore_term", grace_s=0.5), raise_when_ready(KeyboardInterrupt()))
    assert (0, "got TERM") in messages(stage_dir)
    status = json.loads((stage_dir / "status.json").read_text())
    assert status == {"returncode": -9, "signal": 9, "stopped": True, "killed": 1}


def test_workers_of_a_program_are_not_told_to_end_before_it(stage_dir: Path) -> None:
    stop = raise_when_ready(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(program(stage_dir, "write_checkpoint_with_a_worker"), stop)
    assert (stage_dir / "checkpoint-0").exists()
    assert json.loads((stage_dir / "status.json").read_text())["killed"] == 1


def test_a_daemon_does_not_outlive_a_cancelled_program(stage_dir: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(program(stage_dir, "leave_a_daemon_and_wait"), raise_when_ready(KeyboardInterrupt()))
    assert processes_of(stage_dir) == []


def test_term_to_the_program_is_an_interruption(stage_dir: Path) -> None:
    terminate = when_ready(lambda: reaper_of(stage_dir).children()[0].terminate())
    with pytest.raises(StageInterrupted, match="the next run goes on"):
        run(program(stage_dir, "write_checkpoint_on_term"), terminate)
    assert (stage_dir / "checkpoint-0").exists()


def test_term_to_the_reaper_is_an_interruption(stage_dir: Path) -> None:
    terminate = when_ready(lambda: reaper_of(stage_dir).terminate())
    with pytest.raises(StageInterrupted, match="the next run goes on"):
        run(program(stage_dir, "ignore_term", grace_s=0.5), terminate)
    assert (0, "got TERM") in messages(stage_dir)


def test_ctrl_c_stops_the_program(stage_dir: Path) -> None:
    with flow(stage_dir, "write_checkpoint_on_term") as process:
        wait_until(is_ready(stage_dir))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
        output, _ = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in output
    assert processes_of(stage_dir) == []
    assert (stage_dir / "checkpoint-0").exists()


def test_a_second_ctrl_c_ends_the_grace_period(stage_dir: Path) -> None:
    with flow(stage_dir, "ignore_term", grace_s=600) as process:
        wait_until(is_ready(stage_dir))
        process.send_signal(signal.SIGINT)
        wait_until(lambda: (0, "got TERM") in messages(stage_dir))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert processes_of(stage_dir) == []


# How flows and reapers are killed


def test_the_lock_is_held_until_a_killed_flows_program_is_gone(stage_dir: Path) -> None:
    with flow(stage_dir, "end_on_term_when_told") as process:
        wait_until(is_ready(stage_dir))
        process.kill()
        process.wait()
        wait_until(lambda: (0, "got TERM") in messages(stage_dir))
        assert is_locked(stage_dir)
        (stage_dir / "told").touch()
        wait_until(lambda: not is_locked(stage_dir))
        status = json.loads((stage_dir / "status.json").read_text())
        assert status == {"returncode": 143, "signal": None, "stopped": True, "killed": 0}
        wait_until(lambda: processes_of(stage_dir) == [])


def test_a_forked_child_of_a_killed_flow_does_not_keep_the_program_alive(stage_dir: Path) -> None:
    with flow(stage_dir, "write_checkpoint_on_term", "--with-forked-child") as process:
        forked = stage_dir / "forked"
        wait_until(lambda: forked.exists() and forked.read_text() != "")
        child = psutil.Process(int((stage_dir / "forked").read_text()))
        try:
            process.kill()
            wait_until(lambda: processes_of(stage_dir) == [])
        finally:
            child.kill()


def test_a_killed_reaper_is_noticed_and_its_program_killed(stage_dir: Path) -> None:
    with pytest.raises(StageFailed, match=r"reaper\) was killed by signal 9 \(SIGKILL\)"):
        run(program(stage_dir, "ignore_term"), when_ready(lambda: reaper_of(stage_dir).kill()))
    assert processes_of(stage_dir) == []


def test_when_flow_and_reaper_are_killed_the_program_is_told(stage_dir: Path) -> None:
    with flow(stage_dir, "write_checkpoint_on_term") as process:
        wait_until(is_ready(stage_dir))
        reaper = reaper_of(stage_dir)
        process.send_signal(signal.SIGSTOP)  # or it would clean up before it is killed
        reaper.kill()
        process.kill()
        wait_until(lambda: processes_of(stage_dir) == [])
    assert (stage_dir / "checkpoint-0").exists()


def test_the_next_run_kills_what_a_killed_flow_and_reaper_left(stage_dir: Path) -> None:
    with flow(stage_dir, "ignore_term") as process:
        wait_until(is_ready(stage_dir))
        reaper = reaper_of(stage_dir)
        process.send_signal(signal.SIGSTOP)
        reaper.kill()
        process.kill()
        process.wait()
    [left] = processes_of(stage_dir)
    beside: list[bool] = []
    run(program(stage_dir, "finish"), lambda _: beside.append(left in processes_of(stage_dir)))
    assert beside == [False, False], "killed before the next attempt starts, not after it"


def test_leftovers_of_other_stages_are_left_alone(stage_dir: Path) -> None:
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(100)"]
    others = [stage_dir.with_name("stage2"), stage_dir / "nested"]
    running = [
        subprocess.Popen(
            command, env={"POSTTRAIN_STAGE": str(mark)}, stdout=subprocess.PIPE, text=True
        )
        for mark in [stage_dir, *others]
    ]
    try:
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        assert kill_leftovers(stage_dir) == 1
        assert running[0].wait(timeout=10) == -signal.SIGKILL
        assert [process.poll() for process in running[1:]] == [None, None]
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("seed", range(4))
def test_a_flow_killed_at_any_moment_leaves_nothing(stage_dir: Path, seed: int) -> None:
    with flow(stage_dir, "leave_a_daemon_and_wait", grace_s=0.2) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it is about to start the program
        # Not a wait for something to happen: the moment of the kill is what the test varies.
        time.sleep(random.Random(seed).uniform(0, 1.2))
        process.kill()
        process.wait()
        wait_until(lambda: processes_of(stage_dir) == [])
        wait_until(lambda: not is_locked(stage_dir))


# torchrun, whose ranks are in sessions of their own


def test_ranks_finish(stage_dir: Path) -> None:
    events: list[Event] = []
    result = run(program(stage_dir, "finish", num_processes=2), events.append)
    assert result.headline == "it worked"
    assert {event.rank for event in events} == {0, 1}


def test_cancelled_ranks_all_write_their_checkpoint(stage_dir: Path) -> None:
    with flow(stage_dir, "write_checkpoint_with_a_worker", ranks=2) as process:
        wait_until(is_ready(stage_dir, ranks=2))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert processes_of(stage_dir) == []
    assert (stage_dir / "checkpoint-0").exists()
    assert (stage_dir / "checkpoint-1").exists()


def test_ranks_do_not_outlive_a_killed_flow(stage_dir: Path) -> None:
    with flow(stage_dir, "ignore_term", ranks=2, grace_s=0.5) as process:
        wait_until(is_ready(stage_dir, ranks=2))
        sessions = {os.getsid(p.pid) for p in processes_of(stage_dir)}
        assert len(sessions) == 3, "torchrun, and each rank in a session of its own"
        process.kill()
        process.wait()
        wait_until(lambda: processes_of(stage_dir) == [])


def test_term_to_torchrun_is_an_interruption(stage_dir: Path) -> None:
    def on_event(event: Event) -> None:
        if is_ready(stage_dir, ranks=2)():
            reaper_of(stage_dir).children()[0].terminate()

    with pytest.raises(StageInterrupted):
        run(program(stage_dir, "write_checkpoint_on_term", num_processes=2), on_event)


def test_the_error_of_the_rank_that_failed_is_the_message(stage_dir: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        run(program(stage_dir, "fail_on_the_last_rank", num_processes=2))
    assert str(caught.value).startswith("behaves: loss is not finite at step 12\n")
    assert "connection closed by peer" in (stage_dir / "events.jsonl").read_text()


def test_a_killed_rank_is_told_by_its_number_and_signal(stage_dir: Path) -> None:
    with pytest.raises(StageFailed, match=r"rank 1 was killed by signal 9 \(SIGKILL\)") as caught:
        run(program(stage_dir, "run_out_of_memory", num_processes=2))
    assert "torch/distributed" not in str(caught.value)


# What the parts must not import


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("posttrain.launch.reaper", ["pydantic", "posttrain.stages", "torch"]),
        ("posttrain.launch.local", ["torch", "transformers", "datasets", "mlflow", "prefect"]),
    ],
)
def test_starting_programs_imports_nothing_heavy(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
