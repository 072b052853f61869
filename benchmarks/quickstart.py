"""The quickstart, cold and again: what a newcomer waits for.

Runs `posttrain run configs/quickstart.yaml` twice in a home of its own. The first run does
everything, the second nothing. The last line of output is one JSON object:

    cold_s     seconds of the first run
    cached_s   seconds of the second run
    verdict    what the gate said
    stages     seconds of each stage of the first run
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="precision of training and evaluation; float32 shows a CPU without fast bfloat16",
    )  # fmt: skip
    dtype = parser.parse_args().dtype
    with tempfile.TemporaryDirectory(prefix="posttrain-quickstart-") as folder:
        cold_s, cold = timed_run(Path(folder), dtype)
        cached_s, cached = timed_run(Path(folder), dtype)
    assert all(stage["status"] == "reused" for stage in cached["stages"])
    figures = {
        "cold_s": round(cold_s, 1),
        "cached_s": round(cached_s, 1),
        "verdict": cold["verdict"],
        "stages": {stage["stage"]: stage["seconds"] for stage in cold["stages"]},
    }
    print(json.dumps(figures))


def timed_run(home: Path, dtype: str) -> tuple[float, dict]:
    """Wall-clock seconds of one run, and its summary."""
    command = [sys.executable, "-m", "posttrain", "run", "configs/quickstart.yaml", "--json"]
    command += ["--set", f"sft.dtype={dtype}", "--set", f"evaluate.dtype={dtype}"]
    environment = {**os.environ, "POSTTRAIN_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode not in (0, 3):
        sys.exit(done.returncode)
    return seconds, json.loads(done.stdout)


if __name__ == "__main__":
    main()
