"""What a verdict says went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from posttrain.evaluate.results import Check, Hacking, PerplexityCheck, Verdict, WinRateCheck

Kind = Literal["forgetting", "overfitting", "no improvement", "reward hacking", "champion"]
"""`overfitting`: held-out rows of what was trained on became harder to predict."""

_POWER = 1.5
"""Times as wide as its one-sided 95% bound is what an interval has to become, to leave a difference
out with a chance of 80%: (1.645 + 0.842) / 1.645."""
_TOLERANCE = 0.01
"""Nats a token by which the gate lets perplexity rise under `must_not_rise`."""
_MOST_TIMES = 50
"""More rows than this many times the present ones are not asked for."""


@dataclass(frozen=True)
class Symptom:
    """One check that did not pass."""

    kind: Kind
    sentence: str
    """The check in the gate's words."""
    shown: bool
    """Whether the harm is shown; otherwise it could not be ruled out."""
    excess: float = 1.0
    """Size of a drop as a multiple of what was allowed."""
    hacking: Hacking | None = None
    step: str = ""
    """Of reward hacking: the stage that learned from the reward."""


@dataclass(frozen=True)
class Shortage:
    """Measurements that more of would probably settle."""

    of: Literal["items", "rows", "prompts", "ratings"]
    name: str
    """The task or dataset."""
    have: int
    need: int | None
    """None: out of reach, or not known."""
    sentence: str


def symptoms(
    verdict: Verdict, *, hacking_fails: bool = True, trained_on: bool = True
) -> list[Symptom]:
    """All that keeps a verdict from being a pass, the gravest first.

    Args:
        verdict: Of a gate; of several candidates what it says of the first or the chosen one.
        hacking_fails: Whether a flag of the watch counts.
        trained_on: Whether the perplexity is on rows like those that were trained on. On others a
            rise is forgetting.
    """
    found = [*_flags(verdict)] if hacking_fails else []
    found += [one for check in verdict.checks if (one := _of_check(check)) is not None]
    if verdict.perplexity is not None:
        found += _of_perplexity(verdict.perplexity, "overfitting" if trained_on else "forgetting")
    found += [
        Symptom("forgetting", check.sentence, check.verdict == "fail", _excess(check))
        for check in verdict.other_perplexities
        if check.verdict != "pass"
    ]
    if verdict.win_rate is not None and verdict.win_rate.verdict != "pass":
        shown = verdict.win_rate.verdict == "fail"
        found.append(Symptom("no improvement", verdict.win_rate.sentence, shown))
    if verdict.champion is not None and verdict.champion.verdict != "pass":
        reasons = "; ".join(verdict.champion.reasons) or verdict.champion.improvement
        sentence = f"beside {verdict.champion.opponent}: {reasons}"
        found.append(Symptom("champion", sentence, verdict.champion.verdict == "fail"))
    return sorted(found, key=lambda symptom: not symptom.shown)


def shortages(verdict: Verdict) -> Iterator[Shortage]:
    """What more measurements would settle, for every check that is open."""
    for check in verdict.checks:
        if check.verdict == "not enough evidence" and check.items_needed is not None:
            yield Shortage("items", check.task, check.n, check.items_needed, check.sentence)
    rows = [verdict.perplexity, *verdict.other_perplexities]
    for one in rows:
        if one is not None and one.verdict == "not enough evidence":
            yield Shortage("rows", one.dataset, one.rows, _rows_needed(one), one.sentence)
    if verdict.win_rate is not None and verdict.win_rate.verdict == "not enough evidence":
        yield _of_votes(verdict.win_rate)


def _of_check(check: Check) -> Symptom | None:
    if check.verdict == "pass":
        return None
    shown = check.verdict == "fail"
    if check.requirement == "must_improve":
        return Symptom("no improvement", check.sentence, shown)
    drop = max(-check.difference, 0.0)
    excess = drop / check.max_drop if check.max_drop > 0 else 1.0
    return Symptom("forgetting", check.sentence, shown, excess)


def _of_perplexity(check: PerplexityCheck, rise: Kind) -> Iterator[Symptom]:
    if check.verdict == "pass":
        return
    worse = check.verdict == "fail" and check.difference < 0
    if worse:
        yield Symptom(rise, check.sentence, shown=True, excess=_excess(check))
    elif check.requirement == "must_improve":
        yield Symptom("no improvement", check.sentence, check.verdict == "fail")
    elif check.difference < 0:
        yield Symptom(rise, check.sentence, shown=False, excess=_excess(check))


def _excess(check: PerplexityCheck) -> float:
    return max(-check.difference, 0.0) / _TOLERANCE


def _flags(verdict: Verdict) -> Iterator[Symptom]:
    for one in verdict.watched:
        if one.hacking.flagged:
            yield Symptom(
                "reward hacking", one.sentence, shown=True, hacking=one.hacking, step=one.step
            )


def _of_votes(check: WinRateCheck) -> Shortage:
    if check.win_rate is None:
        return Shortage("ratings", check.judge, 0, None, check.sentence)
    return Shortage("prompts", check.judge, check.prompts, check.prompts_needed, check.sentence)


def _rows_needed(check: PerplexityCheck) -> int | None:
    """Rows at which the interval, which narrows with their root, would leave the bound out."""
    if check.low is None or check.rows < 1:
        return None
    margin = check.difference
    if check.requirement == "must_not_rise":
        margin += _TOLERANCE
    if margin <= 0:
        return None
    needed = check.rows * (_POWER * (check.difference - check.low) / margin) ** 2
    return int(needed) + 1 if needed <= _MOST_TIMES * check.rows else None
