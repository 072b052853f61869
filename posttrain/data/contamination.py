"""The index of evaluation items that a preparation keeps out of training."""

from __future__ import annotations

import os
from pathlib import Path

from posttrain.recipe.prepare import Decontaminate


def build_index(config: Decontaminate, folder: Path) -> Path:
    """Index every item of the benchmarks, read by the loader that the evaluation uses.

    Args:
        config: With `benchmarks` filled in.
        folder: Where the index goes; worker processes open it.

    Raises:
        DataError: an unknown benchmark, or one that cannot be read.
    """
    if config.offline_root is not None:
        # Libraries read these once, on import.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    from posttrain.data.operations.ngram_index import NgramIndex
    from posttrain.evaluate.contamination import evaluation_items
    from posttrain.evaluate.harness import Benchmarks

    items = evaluation_items(
        Benchmarks(
            tasks=config.benchmarks or (),
            task_folders=tuple(Path(path).resolve() for path in config.task_folders),
            offline_root=Path(config.offline_root).resolve() if config.offline_root else None,
        )
    )
    NgramIndex.build(items, config.ngram, config.short_ngram).save(folder)
    return folder
