"""A stage's program that behaves as the environment variable BEHAVIOUR says."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from posttrain.errors import DataError
from posttrain.events import EventWriter
from posttrain.recipe import MergeConfig
from posttrain.stages.program import StageContext, StageResult, run_program

STAGE_DIR = Path(sys.argv[1])
RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
EVENTS = EventWriter(STAGE_DIR / "events.jsonl", RANK)


def finish() -> None:
    def main(context: StageContext[MergeConfig]) -> StageResult | None:
        context.events.phase("working")
        context.events.progress(1, 2, values={"loss": 2.5})
        return StageResult(metrics={"loss": 2.5}, headline="it worked") if RANK == 0 else None

    run_program(MergeConfig, main)


def report_an_error() -> None:
    def main(context: StageContext[MergeConfig]) -> None:
        raise DataError("chats.jsonl, row 7: no answer to learn from")

    run_program(MergeConfig, main)


def crash() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write("Loading weights\n")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def run_out_of_memory() -> None:
    if RANK + 1 == WORLD_SIZE:
        os.kill(os.getpid(), signal.SIGKILL)
    ready_then_sleep()


def import_what_is_missing() -> None:
    import no_such_library  # noqa: F401


def import_from_working_directory() -> None:
    import hides_a_library  # noqa: F401


def end_without_result() -> None:
    sys.stdout.write("Nothing to do\n")


def fail_on_the_last_rank() -> None:
    """The last rank fails, and the first one then fails because of it."""

    def on_term(_number: int, _frame: object) -> None:
        EVENTS.error(ConnectionError("connection closed by peer"))
        sys.exit(1)

    signal.signal(signal.SIGTERM, on_term)
    (STAGE_DIR / f"started-{RANK}").touch()
    while len(list(STAGE_DIR.glob("started-*"))) < WORLD_SIZE:
        time.sleep(0.02)
    if RANK + 1 == WORLD_SIZE:
        EVENTS.error(ValueError("loss is not finite at step 12"))
        sys.exit(1)
    time.sleep(100)


def print_fds() -> None:
    fds = sorted(int(path.name) for path in Path("/proc/self/fd").iterdir())
    sys.stdout.write(f"open: {fds}\n")
    finish()


def write_checkpoint_on_term() -> None:
    def on_term(_number: int, _frame: object) -> None:
        (STAGE_DIR / f"checkpoint-{RANK}").write_text("step 12")
        sys.exit(143)

    signal.signal(signal.SIGTERM, on_term)
    ready_then_sleep()


def write_checkpoint_with_a_worker() -> None:
    """Like a rank whose data loader has a worker, needed until the checkpoint is written."""
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])

    def on_term(_number: int, _frame: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(0.5)
            os._exit(1)
        (STAGE_DIR / f"checkpoint-{RANK}").write_text("step 12")
        # A barrier: when one rank ends, torchrun stops the others and their workers.
        while len(list(STAGE_DIR.glob("checkpoint-*"))) < WORLD_SIZE:
            time.sleep(0.02)
        os._exit(143)

    signal.signal(signal.SIGTERM, on_term)
    ready_then_sleep()


def end_on_term_when_told() -> None:
    def on_term(_number: int, _frame: object) -> None:
        EVENTS.phase("got TERM")
        while not (STAGE_DIR / "told").exists():
            time.sleep(0.02)
        sys.exit(143)

    signal.signal(signal.SIGTERM, on_term)
    ready_then_sleep()


def ignore_term() -> None:
    signal.signal(signal.SIGTERM, lambda *_: EVENTS.phase("got TERM"))
    ready_then_sleep()


def leave_a_daemon() -> None:
    """A process that hides as well as it can: own session, no parent, no environment."""
    if os.fork() == 0:
        os.setsid()
        code = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        code += f"open({str(STAGE_DIR / 'daemon')!r}, 'w').write(str(os.getpid())); time.sleep(100)"
        subprocess.Popen([sys.executable, "-c", code], env={})
        os._exit(0)
    os.wait()
    while not (STAGE_DIR / "daemon").exists() or not (STAGE_DIR / "daemon").read_text():
        time.sleep(0.02)


def leave_a_daemon_and_finish() -> None:
    leave_a_daemon()
    finish()


def leave_a_daemon_and_wait() -> None:
    leave_a_daemon()
    ready_then_sleep()


def ready_then_sleep() -> None:
    EVENTS.phase("ready")
    time.sleep(100)


if __name__ == "__main__":
    globals()[os.environ["BEHAVIOUR"]]()
