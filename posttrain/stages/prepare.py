"""`prepare`: rows in, a clean and split dataset, a ledger of every row and a report out."""

from __future__ import annotations

import shutil
from pathlib import Path

from posttrain.data.preparation import (
    Preparation,
    Sources,
    headline,
    left_out_by_reason,
    prepare_dataset,
)
from posttrain.data.report import write_report
from posttrain.data.reporting import report_of
from posttrain.data.sources import source_digest
from posttrain.errors import DataError
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.prepare import AGAINST, PrepareConfig
from posttrain.stages.program import StageContext, StageInput, StageResult, run_program
from posttrain.store.files import write_json


def main(context: StageContext[PrepareConfig]) -> StageResult:
    """Read, clean, split and write; every input row is in the ledger.

    Raises:
        DataError: a source or a row cannot be used, or one side of the split ends up empty.
    """
    scratch = context.stage_dir / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    sources = _sources(context)
    done = prepare_dataset(sources, context.config, context.output, scratch, context.events)
    # Read once more at the end: files that changed meanwhile must not be published as these.
    _check_unchanged(context.input("rows"), sources.rows)
    if sources.test is not None:
        _check_unchanged(context.input("test"), sources.test)
    context.events.phase("writing the report")
    report = report_of(done)
    write_json(context.output / "report.json", report.model_dump(mode="json"))
    write_report(context.output / "report.html", report)
    for advice in report.advice:
        if advice.level == "warning":
            context.events.warning(advice.text)
    shutil.rmtree(scratch)
    return StageResult(
        metrics=_metrics(done),
        headline=headline(done.counts),
        details=done.counts.model_dump(mode="json"),
    )


def _sources(context: StageContext[PrepareConfig]) -> Sources:
    inputs, config = context.job.inputs, context.config
    test = inputs.get("test")
    return Sources(
        name=config.dataset,
        rows=DatasetSpec.model_validate(inputs["rows"].spec),
        shown=inputs["rows"].path,
        against={
            name.removeprefix(AGAINST): Path(value.path)
            for name, value in inputs.items()
            if name.startswith(AGAINST)
        },
        test=DatasetSpec.model_validate(test.spec) if test else None,
        tokenizer=Path(inputs["model"].path) if "model" in inputs else None,
        contamination=Path(inputs["contamination"].path) if "contamination" in inputs else None,
    )


def _check_unchanged(source: StageInput, spec: DatasetSpec) -> None:
    """Refuse to publish rows of files that changed since the run was planned."""
    if source_digest(spec) != source.digest:
        raise DataError(f"{source.path}: changed since the run was planned; run it again")


def _metrics(done: Preparation) -> dict[str, float]:
    counts = done.counts
    metrics: dict[str, float] = {
        "rows_in": counts.rows_in,
        "rows_train": counts.train,
        "rows_validation": counts.validation,
        "rows_test": counts.test,
    }
    for reason, number in left_out_by_reason(counts).items():
        metrics[f"dropped_{reason.replace(' ', '_').replace(':', '')}"] = number
    return metrics


if __name__ == "__main__":
    run_program(PrepareConfig, main)
