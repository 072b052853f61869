"""`mix`: several prepared datasets become one, with a ledger of every row."""

from __future__ import annotations

import re
from pathlib import Path

from posttrain.data.mix_report import MixReport, headline
from posttrain.data.mixing import mix_datasets
from posttrain.recipe.mix import MIXED, MixConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.store.files import write_json


def main(context: StageContext[MixConfig]) -> StageResult:
    """Mix the prepared datasets and leave them with a ledger and `report.json`.

    Inputs: `mixed:NAME`, a prepared dataset, for each that the mix names.

    Raises:
        DataError: the datasets cannot be mixed.
    """
    folders = {name: Path(context.input(MIXED + name).path) for name in context.config.datasets}
    report = mix_datasets(context.config, folders, context.output, context.events)
    write_json(context.output / "report.json", report.model_dump(mode="json"))
    return StageResult(
        metrics=_metrics(report),
        headline=headline(report),
        details=report.model_dump(mode="json"),
    )


def _metrics(report: MixReport) -> dict[str, float]:
    metrics: dict[str, float] = {f"rows_{side}": count for side, count in report.rows.items()}
    for dataset in report.datasets:
        # MLflow takes fewer characters in a metric's name than a recipe in a dataset's.
        name = re.sub(r"[^\w.-]", "_", dataset.dataset)
        metrics[f"rows_train_{name}"] = dataset.sides["train"].rows_out
    return metrics


if __name__ == "__main__":
    run_program(MixConfig, main)
