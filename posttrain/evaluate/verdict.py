"""From evaluations to a verdict: each check by itself, and what all of them add up to.

To pass, *every* check has to rule out a drop beyond what is allowed, against the base and against
the champion. Asking for all of them at once needs no correction for their number (an
intersection-union test: Berger, Technometrics 24, 1982, 295-300): more benchmarks never make
passing easier. Failing is different: with twenty benchmarks one of them shows a drop by chance
alone. So a check fails only where the drop stands after Holm's correction over all checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import DataError
from posttrain.evaluate import statistics
from posttrain.evaluate.pairing import Evaluation
from posttrain.evaluate.results import (
    Outcome,
    PerplexityCheck,
    Verdict,
    Versus,
    Watched,
    WinRate,
    WinRateCheck,
)
from posttrain.evaluate.versus import Compared, Rules, compare
from posttrain.evaluate.win_rate_check import check_win_rate, unproven_win_rate
from posttrain.recipe.gate import GateConfig

_Outcomes = Sequence[tuple[Outcome, str]]


@dataclass(frozen=True)
class Opponents:
    """What candidates are compared with."""

    base: Evaluation
    champion: Evaluation | None = None

    @classmethod
    def read(cls, base: Path, champion: Path | None, config: GateConfig) -> Opponents:
        """Read the evaluations' folders.

        Raises:
            DataError: a folder holds no evaluation that this version can read.
        """
        asked = champion is not None and config.against_champion != "ignore"
        return cls(
            Evaluation.read(base, config.against),
            Evaluation.read(champion, champion_label(config)) if champion and asked else None,
        )


@dataclass(frozen=True)
class Candidate:
    """What is known of a candidate."""

    evaluation: Evaluation
    watched: tuple[Watched, ...] = ()
    """What was found by the stages that learned from rewards on the way to it."""
    comparison: WinRate | None = None
    """How often its answers were preferred."""
    is_champion: bool = False
    """Whether it is the present champion itself, which need not prove itself against itself."""

    @classmethod
    def read(
        cls,
        folder: Path,
        label: str = "candidate",
        watched: tuple[Watched, ...] = (),
        comparison: Path | None = None,
        is_champion: bool = False,
    ) -> Candidate:
        """Read an evaluation's folder, and that of a comparison.

        Raises:
            DataError: a folder does not hold what this version can read.
        """
        return cls(
            Evaluation.read(folder, label),
            watched,
            WinRate.load(comparison) if comparison else None,
            is_champion,
        )


def champion_label(config: GateConfig) -> str:
    """What messages and pages call the champion."""
    return f"champion {config.champion}" if config.champion else "champion"


def judge(
    base: Path,
    candidate: Path,
    config: GateConfig,
    watched: tuple[Watched, ...] = (),
    *,
    champion: Path | None = None,
    comparison: Path | None = None,
) -> Verdict:
    """Compare evaluations, given as folders, item by item.

    Args:
        base: Evaluation of the base.
        candidate: Evaluation of the candidate.
        config: What is asked of the candidate.
        watched: What was found by the stages that learned from rewards on the way to it.
        champion: Evaluation of the present champion, if there is one.
        comparison: Output of a `judge` stage over the candidate's answers, if there is one.

    Raises:
        DataError: two were made with different settings or on different items, or there is nothing
            to compare.
    """
    opponents = Opponents.read(base, champion, config)
    return decide(
        opponents, Candidate.read(candidate, watched=watched, comparison=comparison), config
    )


def decide(opponents: Opponents, candidate: Candidate, config: GateConfig) -> Verdict:
    """The same on what has been read.

    Raises:
        DataError: as `judge`.
    """
    evaluation = candidate.evaluation
    champion = None if candidate.is_champion else opponents.champion
    found = [compare(opponents.base, evaluation, Rules.beside_base(config), config)]
    if champion:
        found.append(compare(champion, evaluation, Rules.beside_champion(config), config))
    win_rate = None
    if candidate.comparison and config.min_win_rate is not None:
        win_rate = check_win_rate(candidate.comparison, config.min_win_rate, config)
    if not any(one.outcomes for one in found) and win_rate is None:
        ignored = config.perplexity == "ignore" and evaluation.rows
        raise DataError(
            "gate: nothing to compare; give the evaluate stage `tasks` or a `dataset`"
            + (", or do not ignore `perplexity`" if ignored else "")
        )
    compared, win_rate = _corrected(found, win_rate, 1 - config.confidence)
    versus = _versus(champion.label, compared[1]) if champion else None

    outcomes = list(compared[0].outcomes)
    if win_rate:
        outcomes.append((win_rate.verdict, win_rate.sentence))
    if versus:
        prefix = f"{versus.opponent}: "
        outcomes += [(outcome, prefix + sentence) for outcome, sentence in compared[1].outcomes]
    if candidate.is_champion:
        outcomes.append(("pass", f"{champion_label(config)}: is this very model"))
    if config.reward_hacking == "fail":
        outcomes += [("fail", one.sentence) for one in candidate.watched if one.hacking.flagged]
    main, others = _by_dataset(compared[0].perplexities)
    return Verdict(
        verdict=_overall(outcomes),
        reasons=_reasons(outcomes),
        checks=compared[0].checks,
        perplexity=main,
        max_drop=config.max_drop,
        confidence=config.confidence,
        watched=candidate.watched,
        other_perplexities=others,
        against=config.against,
        win_rate=win_rate,
        champion=versus,
    )


def _corrected(
    found: Sequence[Compared], win_rate: WinRateCheck | None, alpha: float
) -> tuple[list[Compared], WinRateCheck | None]:
    """What fails after Holm's correction over all checks; what does not is left open."""
    p_values = [p for one in found for p in one.p_values]
    p_values += [win_rate.p_worse] if win_rate else []
    stands = statistics.holm(p_values, alpha)
    # Holm rejects the smallest p-values, so the largest of them says which.
    largest = max((p for p, kept in zip(p_values, stands, strict=True) if kept), default=-1.0)
    if win_rate and win_rate.verdict == "fail" and win_rate.p_worse > largest:
        win_rate = unproven_win_rate(win_rate)
    return [one.corrected(largest) for one in found], win_rate


def _versus(label: str, compared: Compared) -> Versus:
    return Versus(
        opponent=label,
        verdict=_overall(compared.outcomes),
        reasons=_reasons(compared.outcomes),
        checks=compared.checks,
        perplexities=compared.perplexities,
        improvement=compared.improvement.sentence if compared.improvement else "",
    )


def _by_dataset(
    checks: Sequence[PerplexityCheck],
) -> tuple[PerplexityCheck | None, tuple[PerplexityCheck, ...]]:
    """The check on the dataset that the evaluation is about, and those on the others."""
    main = next((check for check in checks if not check.dataset), None)
    return main, tuple(check for check in checks if check.dataset)


def _overall(outcomes: _Outcomes) -> Outcome:
    for worst in ("fail", "not enough evidence"):
        if any(outcome == worst for outcome, _ in outcomes):
            return worst
    return "pass"


def _reasons(outcomes: _Outcomes) -> tuple[str, ...]:
    """What decided."""
    verdict = _overall(outcomes)
    return tuple(sentence for outcome, sentence in outcomes if outcome == verdict)
