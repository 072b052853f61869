"""`gate`: pass, fail, or not enough evidence, from evaluations of opponents and candidates.

Inputs: `base`, the evaluation to compare with; `champion`, that of the present champion, if there
is one; `candidate`, or `candidate:NAME` for each of several; `comparison` (`comparison:NAME`), what
a judge preferred; the output of each stage that learned from rewards on the way to a candidate, as
`watch:STEP`, or with several candidates as `watch:NAME:STEP`; and `trained:STEP`, what training
left, for the curves of the report.

Output: `verdict.json` and, for people, `verdict.md` and `report.html`. Imports neither torch nor
lm-eval.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from posttrain.evaluate.candidates import judge_several
from posttrain.evaluate.report import headline, markdown
from posttrain.evaluate.report_page import REPORT_PAGE, gate_report
from posttrain.evaluate.results import Hacking, Verdict, Watched
from posttrain.evaluate.verdict import Candidate, Opponents, champion_label, decide
from posttrain.recipe.gate import CANDIDATE, COMPARISON, TRAINED, WATCH, GateConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.store.files import write_bytes

_SINGLE = "candidate"


def main(context: StageContext[GateConfig]) -> StageResult:
    """Judge the candidates' evaluations against those of base and champion.

    Raises:
        DataError: two of them cannot be compared, or there is nothing to compare.
    """
    config = context.config
    opponents = Opponents.read(_folder(context, "base"), _champion(context), config)
    if config.candidates:
        candidates = {name: _candidate(context, name) for name in config.candidates}
        of_candidates = sum(len(one.watched) for one in candidates.values())
        if of_candidates < len(_watched(context, WATCH)):
            raise ValueError(f"an input `{WATCH}...` names none of the candidates")
        verdict = judge_several(opponents, candidates, config)
    else:
        verdict = decide(opponents, _candidate(context, None), config)
    verdict.save(context.output)
    write_bytes(context.output / "verdict.md", markdown(verdict).encode())
    page = gate_report(
        verdict, _evaluations(context), _named(context, TRAINED), _comparisons(context)
    )
    write_bytes(context.output / REPORT_PAGE, page.encode())
    return StageResult(
        metrics=_metrics(verdict),
        headline=headline(verdict),
        details=verdict.model_dump(mode="json"),
    )


def _folder(context: StageContext[GateConfig], name: str) -> Path:
    return Path(context.input(name).path)


def _champion(context: StageContext[GateConfig]) -> Path | None:
    return _folder(context, "champion") if "champion" in context.job.inputs else None


def _candidate(context: StageContext[GateConfig], name: str | None) -> Candidate:
    """One of several, by its name, or the only one."""
    key = CANDIDATE + name if name else _SINGLE
    comparison = f"{COMPARISON}:{name}" if name else COMPARISON
    return Candidate.read(
        _folder(context, key),
        name or _SINGLE,
        _watched(context, f"{WATCH}{name}:" if name else WATCH),
        _folder(context, comparison) if comparison in context.job.inputs else None,
        # One model measured in one way leaves the same bytes, whichever stage measured it.
        "champion" in context.job.inputs
        and context.input("champion").digest == context.input(key).digest,
    )


def _evaluations(context: StageContext[GateConfig]) -> dict[str, Path]:
    """Folders by what a page calls their models."""
    config, champion = context.config, _champion(context)
    folders = {config.against: _folder(context, "base")}
    if champion:
        folders[champion_label(config)] = champion
    for name in config.candidates:
        folders[name] = _folder(context, CANDIDATE + name)
    if not config.candidates:
        folders[_SINGLE] = _folder(context, _SINGLE)
    return folders


def _comparisons(context: StageContext[GateConfig]) -> dict[str, Path]:
    named = _named(context, f"{COMPARISON}:")
    if COMPARISON in context.job.inputs:
        named[_SINGLE] = _folder(context, COMPARISON)
    return named


def _named(context: StageContext[GateConfig], prefix: str) -> dict[str, Path]:
    """Folders of the inputs that begin with `prefix`, by what comes after it, in its order."""
    return {
        name.removeprefix(prefix): Path(source.path)
        for name, source in sorted(context.job.inputs.items())
        if name.startswith(prefix)
    }


def _watched(context: StageContext[GateConfig], prefix: str) -> tuple[Watched, ...]:
    """What the stages of the inputs that begin with `prefix` found, in the order of their names."""
    folders: Mapping[str, Path] = _named(context, prefix)
    return tuple(
        Watched(step=name, hacking=Hacking.load(folder)) for name, folder in folders.items()
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
    for rows in (verdict.perplexity, *verdict.other_perplexities):
        if rows:
            of = f"_{rows.dataset}" if rows.dataset else ""
            unit = "nats_per_token" if rows.unit == "token" else "bits_per_byte"
            metrics[f"difference_{unit}{of}"] = rows.difference
    if verdict.win_rate and verdict.win_rate.win_rate is not None:
        metrics["win_rate"] = verdict.win_rate.win_rate
    if verdict.champion:
        metrics["passed_champion"] = float(verdict.champion.verdict == "pass")
        for check in verdict.champion.checks:
            metrics[f"champion/difference_{check.task}"] = check.difference
    if verdict.watched:
        flagged = any(one.hacking.flagged for one in verdict.watched)
        metrics["flagged_for_reward_hacking"] = float(flagged)
    return metrics


if __name__ == "__main__":
    run_program(GateConfig, main)
