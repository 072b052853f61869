"""datatrove's four MinHash stages, 14 bands of 8 values, as it comes or tuned.

As it comes, words are split by spaCy's English tokenizer. Tuned, they are split at white space,
which finds nearly the same pairs. Workers are forked in both, which starts them faster than
datatrove's own default.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import timing
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

CONFIG = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)


class SplitAtSpaces:
    """A tokenizer for text whose punctuation is already gone."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words of a text."""
        return text.split()


def deduplicate(corpus: Path, out: Path, *, stock: bool, processes: int) -> None:
    """Signatures, matches within each band, clusters, and the filter over the input."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sketches, matches, remove = (str(work / name) for name in ("sketches", "matches", "remove"))
        reader = JsonlReader(str(corpus), glob_pattern="part-*.jsonl", compression=None)
        sketch = MinhashDedupSignature(sketches, config=CONFIG)
        if not stock:
            sketch.word_tokenizer = SplitAtSpaces()
        match = MinhashDedupBuckets(sketches, matches, config=CONFIG)
        cluster = MinhashDedupCluster(matches, remove, config=CONFIG)
        keep = MinhashDedupFilter(remove)
        writer = JsonlWriter(str(out), compression=None)
        stages: list[tuple[list[PipelineStep], int]] = [
            ([reader, sketch], processes),
            ([match], CONFIG.num_buckets),
            ([cluster], 1),
            ([reader, keep, writer], processes),
        ]
        for number, (pipeline, tasks) in enumerate(stages):
            LocalPipelineExecutor(
                pipeline,
                tasks=tasks,
                workers=min(tasks, processes),
                logging_dir=str(work / f"logs-{number}"),
                start_method="fork",
            ).run()


if __name__ == "__main__":
    parser = timing.arguments()
    parser.add_argument("--stock", action="store_true", help="spaCy's tokenizer, the default")
    given = parser.parse_args()
    if given.stock:
        # Workers are forked from here and would each import it on the clock.
        import spacy  # noqa: F401
    timing.run(partial(deduplicate, stock=given.stock, processes=given.processes), given)
