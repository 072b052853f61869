"""How every contestant is timed: the same work, the same clock, the same warm-up.

A contestant is a program, run by the interpreter it is installed in:

    PROGRAM --corpus DIR --out DIR [options of its own]

It reads `DIR/part-*.jsonl`, writes the lines it keeps to one or more `.jsonl` files in `--out`,
and prints one JSON object: `seconds` from the opening of the input to the closing of the output,
after imports and after one untimed run over 200 documents, and `cpu_s`, the processor time that it
and its workers took meanwhile.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

Deduplicate = Callable[[Path, Path], None]
"""From a folder with a corpus to a folder for what is kept."""


def arguments() -> argparse.ArgumentParser:
    """What every contestant is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    return parser


def run(deduplicate: Deduplicate, given: argparse.Namespace) -> None:
    """Warm up, then do the work on the clock."""
    with tempfile.TemporaryDirectory() as folder:
        small, kept = Path(folder) / "small", Path(folder) / "kept"
        small.mkdir()
        kept.mkdir()
        for part in sorted(given.corpus.glob("part-*.jsonl"))[:2]:
            with part.open("rb") as lines, (small / part.name).open("wb") as copy:
                copy.writelines(islice(lines, 100))
        deduplicate(small, kept)
    given.out.mkdir(parents=True, exist_ok=True)
    cpu_before, begin = cpu_time(), time.perf_counter()
    deduplicate(given.corpus, given.out)
    seconds, cpu_s = time.perf_counter() - begin, cpu_time() - cpu_before
    print(json.dumps({"seconds": round(seconds, 3), "cpu_s": round(cpu_s, 3)}))


def cpu_time() -> float:
    """Seconds of user and system time of this process and of its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
