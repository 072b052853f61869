"""`contamination`: the items of evaluation sets, indexed for `prepare` to look rows up in.

A stage of its own, since reading thousands of items through lm-eval takes longer than cleaning a
hundred thousand rows, and gives the same for every dataset and run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.evaluate.offline import stay_local
from posttrain.recipe.contamination import ContaminationConfig
from posttrain.stages.program import StageContext, StageResult, run_program

if TYPE_CHECKING:
    from posttrain.data.operations.ngram_index import NgramIndex


def main(context: StageContext[ContaminationConfig]) -> StageResult:
    """Read every item with the loader that the evaluation uses, and leave an n-gram index.

    Raises:
        DataError: an unknown benchmark, or one that cannot be read.
    """
    config = context.config
    stay_local(config.offline_root)
    from posttrain.data.operations.ngram_index import NgramIndex
    from posttrain.evaluate.contamination import evaluation_items
    from posttrain.evaluate.harness import Benchmarks

    context.events.phase(f"reading the items of {', '.join(config.benchmarks)}")
    items = evaluation_items(
        Benchmarks(
            tasks=config.benchmarks,
            task_folders=tuple(Path(path).resolve() for path in config.task_folders),
            offline_root=Path(config.offline_root).resolve() if config.offline_root else None,
        )
    )
    context.events.phase(f"indexing {len(items):,} items")
    index = NgramIndex.build(items, config.ngram, config.short_ngram)
    index.save(context.output)
    return StageResult(
        headline=headline(index),
        metrics={"items": len(items), "ngrams": len(index)},
        details={"items": index.items, "too_short": index.too_short, "unseen": index.unseen},
    )


def headline(index: NgramIndex) -> str:
    """`mmlu 7,032 items, hellaswag 5,021 items; 535 questions are too short to be found alone`."""
    listed = ", ".join(f"{name} {count:,} items" for name, count in index.items.items())
    short = sum(index.too_short.values())
    return f"{listed}; {short:,} questions are too short to be found alone" if short else listed


if __name__ == "__main__":
    run_program(ContaminationConfig, main)
