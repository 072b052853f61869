"""`gate`: pass, fail, or not enough evidence, from two evaluations.

Output: `verdict.json` and, for people, `verdict.md`. Imports neither torch nor lm-eval.
"""

from __future__ import annotations

from pathlib import Path

from posttrain.evaluate.report import headline, markdown
from posttrain.evaluate.results import Verdict
from posttrain.evaluate.verdict import judge
from posttrain.recipe.gate import GateConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.store.files import write_bytes


def main(context: StageContext[GateConfig]) -> StageResult:
    """Judge the evaluation `candidate` against the evaluation `base`.

    Raises:
        DataError: the two cannot be compared, or there is nothing to compare.
    """
    verdict = judge(
        Path(context.input("base").path), Path(context.input("candidate").path), context.config
    )
    verdict.save(context.output)
    write_bytes(context.output / "verdict.md", markdown(verdict).encode())
    return StageResult(
        metrics=_metrics(verdict),
        headline=headline(verdict),
        details=verdict.model_dump(mode="json"),
    )


def _metrics(verdict: Verdict) -> dict[str, float]:
    metrics = {"passed": float(verdict.verdict == "pass")}
    for check in verdict.checks:
        metrics[f"difference_{check.task}"] = check.difference
        metrics[f"low_{check.task}"] = check.low
        metrics[f"high_{check.task}"] = check.high
    if verdict.perplexity:
        metrics["difference_nats_per_token"] = verdict.perplexity.difference
    return metrics


if __name__ == "__main__":
    run_program(GateConfig, main)
