"""posttrain's removal of near duplicates."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import timing

from posttrain.data.near_duplicates import deduplicate_jsonl


def deduplicate(corpus: Path, out: Path, *, bands: int, processes: int) -> None:
    """MinHash of word 5-grams, candidates from bands, then exact Jaccard from 0.8."""
    deduplicate_jsonl(
        sorted(corpus.glob("part-*.jsonl")),
        out / "kept.jsonl",
        threshold=0.8,
        bands=bands,
        processes=processes,
    )


if __name__ == "__main__":
    parser = timing.arguments()
    parser.add_argument("--bands", type=int, choices=[16, 32], default=16)
    given = parser.parse_args()
    timing.run(partial(deduplicate, bands=given.bands, processes=given.processes), given)
