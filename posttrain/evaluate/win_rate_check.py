"""What a blind comparison says: whether more than the required share of prompts is won.

A preference is a paired difference like any other: of one prompt, the candidate's answer is better,
or the opponent's, or neither. Wins less losses over the prompts is what Tango's interval is made
for, and the win rate is half of that plus a half. Wilson's interval of a share would take two ties
for a win and a loss, and so not know that ties carry less variance: with many ties it is too wide,
and with means over raters it does not apply.

For few prompts no score interval keeps its promise exactly: of candidates that win exactly half of
20 prompts, 6 in 100 would be called better at 95%. So the bounds are moved outwards by half a
prompt, Yates's continuity correction, which brings all cases that were tried below 5 in 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from posttrain.evaluate import statistics
from posttrain.evaluate.results import Outcome, WinRate, WinRateCheck
from posttrain.evaluate.statistics import PairedDifference
from posttrain.recipe.gate import GateConfig

MIN_PROMPTS = 10
"""Judged prompts below which no interval is believed."""


def wins_less_losses(
    scores: Sequence[float], required: float, config: GateConfig
) -> PairedDifference:
    """Wins less losses, as a share of the prompts: twice the win rate, less one.

    Args:
        scores: By prompt, in [0, 1]; 0.5 is a tie.
        required: The win rate that `p_worse` tests "at least" of.
        config: Confidence and bootstrap.

    Raises:
        ValueError: no scores.
    """
    won = np.asarray(scores, dtype=np.float64)
    lost = 1 - won
    if np.isin(won, (0.0, 0.5, 1.0)).all():
        won, lost = (won > 0.5).astype(np.float64), (won < 0.5).astype(np.float64)
    half_a_prompt = 1 / len(won)
    found = statistics.paired_difference(
        lost,
        won,
        max_drop=1 - 2 * required + half_a_prompt,
        confidence=config.confidence,
        bootstrap_samples=config.bootstrap_samples,
        seed=config.seed,
    )
    return replace(
        found, low=max(-1.0, found.low - half_a_prompt), high=min(1.0, found.high + half_a_prompt)
    )


def check_win_rate(comparison: WinRate, required: float, config: GateConfig) -> WinRateCheck:
    """The comparison by itself, before any correction for several checks.

    Args:
        comparison: What people or a judge preferred.
        required: The win rate that has to be exceeded.
        config: Confidence and bootstrap.
    """
    prompts = len(comparison.scores)
    difference: PairedDifference | None = None
    verdict: Outcome = "not enough evidence"
    needed, smallest = None, None
    if comparison.win_rate is not None and prompts >= MIN_PROMPTS:
        difference = wins_less_losses(comparison.scores, required, config)
        margin = 1 - 2 * required
        verdict = statistics.non_inferiority(difference, margin)
        detectable = statistics.smallest_detectable_drop(
            difference.standard_error, config.confidence
        )
        smallest = min(1.0, required + detectable / 2)
        if verdict == "not enough evidence":
            needed = statistics.items_needed(difference, margin, config.confidence)
    check = WinRateCheck(
        judge=comparison.judge,
        opponent=comparison.opponent,
        prompts=prompts,
        win_rate=comparison.win_rate,
        low=_rate(difference.low) if difference else None,
        high=_rate(difference.high) if difference else None,
        required=required,
        prompts_needed=needed,
        verdict=verdict,
        sentence="",
        p_worse=difference.p_worse if difference else 1.0,
        smallest_detectable=smallest,
    )
    return check.model_copy(update={"sentence": _sentence(check)})


def unproven_win_rate(check: WinRateCheck) -> WinRateCheck:
    """A failed check that does not stand beside so many others."""
    sentence = f"{_seen(check)}; less than {check.required:g}, but not beyond chance among so many"
    update = {"verdict": "not enough evidence", "sentence": f"{sentence} checks"}
    return check.model_copy(update=update)


def _rate(difference: float) -> float:
    return (1 + difference) / 2


def _sentence(check: WinRateCheck) -> str:
    if check.win_rate is None:
        return (
            f"win rate against {check.opponent}: nobody has judged yet; fill in the sheets that "
            "`judge` wrote and name them under `judge.by.people.ratings`, or let a model judge"
        )
    if check.low is None or check.smallest_detectable is None:
        return f"{_seen(check)}; fewer than {MIN_PROMPTS} judged prompts show nothing"
    if check.verdict == "fail":
        return f"{_seen(check)}; less than {check.required:g} is shown"
    power = f"(would have seen one of {check.smallest_detectable:.2f})"
    more = f"more than {check.required:g}"
    if check.verdict == "pass":
        return f"{_seen(check)}; {more} is shown {power}"
    settle = "more prompts would hardly settle it"
    if check.prompts_needed is not None:
        settle = f"about {check.prompts_needed:,} prompts would settle it"
    return f"{_seen(check)}; {more} is not shown; {settle} {power}"


def _seen(check: WinRateCheck) -> str:
    bounds = ""
    if check.low is not None and check.high is not None:
        bounds = f" [{check.low:.2f}, {check.high:.2f}]"
    judge = f", judged by {check.judge}" if check.judge else ""
    rate = f"{check.win_rate:.2f}" if check.win_rate is not None else "none"
    return f"win rate against {check.opponent}: {rate}{bounds} on {check.prompts:,} prompts{judge}"
