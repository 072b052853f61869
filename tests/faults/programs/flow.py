"""Stands for a flow: takes the stage's lock and runs `behaves` until killed.

python flow.py STAGE_DIR BEHAVIOUR NUM_PROCESSES GRACE_S [--with-forked-child]
"""

import fcntl
import os
import sys
import time
from pathlib import Path

from posttrain.launch import Program, run_to_end

stage_dir = Path(sys.argv[1])
lock = (stage_dir / "lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX)
program = Program(
    module="behaves",
    stage_dir=stage_dir,
    num_processes=int(sys.argv[3]),
    env={"BEHAVIOUR": sys.argv[2], "PYTHONPATH": str(Path(__file__).parent)},
    grace_s=float(sys.argv[4]),
    keep_fds=(lock.fileno(),),
)


def on_event(_event: object) -> None:
    if "--with-forked-child" in sys.argv and not (stage_dir / "forked").exists():
        child = os.fork()
        if child == 0:  # inherits all of the flow's descriptors, and outlives it
            lock.close()
            time.sleep(100)
        (stage_dir / "forked").write_text(str(child))


sys.stdout.write("starting\n")
sys.stdout.flush()
run_to_end(program, on_event, poll_s=0.05)
