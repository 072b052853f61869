"""`gate`: pass, fail, or not enough evidence, from evaluations of the base and of candidates.

Inputs: `base`; `candidate`, or `candidate:NAME` for each of several; and the output of each stage
that learned from rewards on the way to a candidate, as `watch:STEP`, or with several candidates as
`watch:NAME:STEP`.

Output: `verdict.json` and, for people, `verdict.md`. Imports neither torch nor lm-eval.
"""

from __future__ import annotations

from pathlib import Path

from posttrain.evaluate.candidates import judge_several
from posttrain.evaluate.report import headline, markdown
from posttrain.evaluate.results import Hacking, Verdict, Watched
from posttrain.evaluate.verdict import judge
from posttrain.recipe.gate import CANDIDATE, WATCH, GateConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.store.files import write_bytes


def main(context: StageContext[GateConfig]) -> StageResult:
    """Judge the candidates' evaluations against the base's.

    Raises:
        DataError: two of them cannot be compared, or there is nothing to compare.
    """
    base, config = Path(context.input("base").path), context.config
    if config.candidates:
        folders = {name: Path(context.input(CANDIDATE + name).path) for name in config.candidates}
        watched = {name: _watched(context, f"{WATCH}{name}:") for name in config.candidates}
        if sum(map(len, watched.values())) < len(_watched(context, WATCH)):
            raise ValueError(f"an input `{WATCH}...` names none of the candidates")
        verdict = judge_several(base, folders, config, watched)
    else:
        candidate = Path(context.input("candidate").path)
        verdict = judge(base, candidate, config, _watched(context, WATCH))
    verdict.save(context.output)
    write_bytes(context.output / "verdict.md", markdown(verdict).encode())
    return StageResult(
        metrics=_metrics(verdict),
        headline=headline(verdict),
        details=verdict.model_dump(mode="json"),
    )


def _watched(context: StageContext[GateConfig], prefix: str) -> tuple[Watched, ...]:
    """What the stages of the inputs that begin with `prefix` found, in the order of their names."""
    return tuple(
        Watched(step=name.removeprefix(prefix), hacking=Hacking.load(Path(source.path)))
        for name, source in sorted(context.job.inputs.items())
        if name.startswith(prefix)
    )


def _metrics(verdict: Verdict) -> dict[str, float]:
    metrics = {"passed": float(verdict.verdict == "pass"), **_of_checks(verdict)}
    for name, one in verdict.candidates.items():
        metrics[f"{name}/passed"] = float(one.verdict == "pass")
        metrics |= {f"{name}/{key}": value for key, value in _of_checks(one).items()}
    return metrics


def _of_checks(verdict: Verdict) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for check in verdict.checks:
        metrics[f"difference_{check.task}"] = check.difference
        metrics[f"low_{check.task}"] = check.low
        metrics[f"high_{check.task}"] = check.high
    if verdict.perplexity:
        metrics["difference_nats_per_token"] = verdict.perplexity.difference
    if verdict.watched:
        flagged = any(one.hacking.flagged for one in verdict.watched)
        metrics["flagged_for_reward_hacking"] = float(flagged)
    return metrics


if __name__ == "__main__":
    run_program(GateConfig, main)
