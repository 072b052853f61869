"""datasketch, tuned: xxHash instead of SHA-1, bulk sketches, 16 bands of 8 of 128 values.

A document goes when the index already holds one that shares a band with it. Its users sketch in
several processes and fill the index in one, since the index cannot be shared: so does this.
"""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import timing
from datasketch import MinHash, MinHashLSH
from xxhash import xxh32_intdigest

BANDS, ROWS = 16, 8
WORD = re.compile(r"\w+")
A_CHUNK = 1_000
PERMUTATIONS = MinHash(num_perm=BANDS * ROWS).permutations


def deduplicate(corpus: Path, out: Path, *, processes: int) -> None:
    """One pass: sketch, ask the index, keep and insert, or drop."""
    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    number = 0
    pool = multiprocessing.Pool(processes) if processes > 1 else nullcontext()
    with pool as workers, (out / "kept.jsonl").open("wb") as kept:
        chunks = chunks_of_lines(corpus)
        done = workers.imap(sketched, chunks) if workers else map(sketched, chunks)
        for lines, values in done:
            for line, value in zip(lines, values, strict=True):
                sketch = MinHash(hashvalues=value, permutations=PERMUTATIONS, scheme="affine32")
                if not index.query(sketch):
                    index.insert(number, sketch, check_duplication=False)
                    kept.write(line)
                number += 1


def chunks_of_lines(corpus: Path) -> Iterator[list[bytes]]:
    """Lines of all parts, a thousand at a time."""
    for part in sorted(corpus.glob("part-*.jsonl")):
        with part.open("rb") as lines:
            while chunk := list(islice(lines, A_CHUNK)):
                yield chunk


def sketched(lines: list[bytes]) -> tuple[list[bytes], np.ndarray]:
    """The lines again, and the 128 values of each."""
    grams = [five_grams(json.loads(line)["text"]) for line in lines]
    sketches = MinHash.generator(grams, num_perm=BANDS * ROWS, hashfunc=xxh32_intdigest)
    return lines, np.array([sketch.hashvalues for sketch in sketches])


def five_grams(text: str) -> set[bytes]:
    """Word 5-grams in lower case."""
    words = WORD.findall(text.lower())
    return {" ".join(words[at : at + 5]).encode() for at in range(max(1, len(words) - 4))}


if __name__ == "__main__":
    given = timing.arguments().parse_args()
    timing.run(partial(deduplicate, processes=given.processes), given)
