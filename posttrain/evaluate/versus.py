"""A candidate against one opponent, the base or the present champion: all checks, uncorrected."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.errors import DataError
from posttrain.evaluate import statistics
from posttrain.evaluate.pairing import Evaluation, Pair, check_comparable, paired_items
from posttrain.evaluate.perplexity_check import (
    MIN_PERPLEXITY_ROWS,
    check_perplexities,
    paired_rows,
    unproven_perplexity,
)
from posttrain.evaluate.results import Check, Outcome, PerplexityCheck, Requirement
from posttrain.evaluate.statistics import PairedDifference
from posttrain.evaluate.task_check import check_task, task_difference, unproven_task
from posttrain.recipe.gate import GateConfig


@dataclass(frozen=True)
class Rules:
    """What is asked of a candidate beside one opponent."""

    must_improve: tuple[str, ...]
    """Tasks to be better in; in all others no drop beyond what is allowed."""
    perplexity: Literal["must_improve", "must_not_rise", "ignore"]
    better_on_the_whole: bool = False
    """Whether the mean over all tasks has to be better."""

    @classmethod
    def beside_base(cls, config: GateConfig) -> Rules:
        """As the recipe says."""
        return cls(config.must_improve, config.perplexity)

    @classmethod
    def beside_champion(cls, config: GateConfig) -> Rules:
        """What has to be better than the base need only be as good as the champion."""
        return cls(
            must_improve=(),
            perplexity="ignore" if config.perplexity == "ignore" else "must_not_rise",
            better_on_the_whole=config.against_champion == "must_improve",
        )


@dataclass(frozen=True)
class Improvement:
    """Whether a candidate is better on the whole."""

    verdict: Outcome
    sentence: str
    p_worse: float
    """One-sided p-value against "it is not worse"."""


@dataclass(frozen=True)
class Compared:
    """What all checks against one opponent say, each by itself."""

    checks: tuple[Check, ...]
    perplexities: tuple[PerplexityCheck, ...]
    improvement: Improvement | None = None

    @property
    def _all(self) -> list[Check | PerplexityCheck | Improvement]:
        last = [self.improvement] if self.improvement else []
        return [*self.checks, *self.perplexities, *last]

    @property
    def p_values(self) -> list[float]:
        """Of all checks: small speaks for what would fail it."""
        return [one.p_worse for one in self._all]

    @property
    def outcomes(self) -> list[tuple[Outcome, str]]:
        """Of all checks, with their sentences."""
        return [(one.verdict, one.sentence) for one in self._all]

    def corrected(self, largest_p: float) -> Compared:
        """The same with failures left open whose p-value is above what counts beside the others."""

        def unproven(one: Check | PerplexityCheck | Improvement) -> bool:
            return one.verdict == "fail" and one.p_worse > largest_p

        improvement = self.improvement
        if improvement and unproven(improvement):
            improvement = replace(improvement, verdict="not enough evidence")
        return Compared(
            tuple(unproven_task(one) if unproven(one) else one for one in self.checks),
            tuple(unproven_perplexity(one) if unproven(one) else one for one in self.perplexities),
            improvement,
        )


def compare(
    opponent: Evaluation, candidate: Evaluation, rules: Rules, config: GateConfig
) -> Compared:
    """Make all checks against one opponent.

    Args:
        opponent: Evaluation of the base, of the champion, or of an earlier stage.
        candidate: Evaluation of the candidate.
        rules: What is asked beside this opponent.
        config: Bounds, confidence and bootstrap.

    Raises:
        DataError: the two were made with different settings or on different items, or the recipe
            names a task that they do not have.
    """
    check_comparable(opponent, candidate)
    _check_names(opponent, config)
    pairs = paired_items(opponent.items, candidate.items, (opponent.label, candidate.label))
    checks = []
    for task in opponent.results.tasks:
        improves = task.task in rules.must_improve
        asked: Requirement = "must_improve" if improves else "must_not_drop"
        max_drop = 0.0 if improves else config.max_drops.get(task.task, config.max_drop)
        checks.append(check_task(task, pairs[task.task], asked, max_drop, config))
    perplexities: list[PerplexityCheck] = []
    if rules.perplexity != "ignore":
        perplexities = check_perplexities(opponent, candidate, rules.perplexity, config)
    improvement = None
    if rules.better_on_the_whole:
        improvement = _improvement(opponent, candidate, pairs, config)
    return Compared(tuple(checks), tuple(perplexities), improvement)


def difference_on_the_whole(
    first: Evaluation,
    second: Evaluation,
    config: GateConfig,
    pairs: dict[str, list[Pair]] | None = None,
) -> tuple[PairedDifference | None, str]:
    """Mean over all tasks by which the second is better; without tasks, held-out perplexity.

    Args:
        first: An evaluation.
        second: Another one, with the same settings.
        config: Confidence and bootstrap.
        pairs: Their items, where they are known.

    Returns:
        The difference, None with too few held-out rows for one, and what it is over, such as `the
        mean of 2 tasks`.

    Raises:
        DataError: they are not of the same items or text.
    """
    tasks = first.results.tasks
    if tasks:
        pairs = pairs or paired_items(first.items, second.items, (first.label, second.label))
        over = f"{len(tasks)} task" if len(tasks) == 1 else f"the mean of {len(tasks)} tasks"
        differences = [task_difference(task, pairs[task.task], config) for task in tasks]
        return statistics.mean_of_tasks(differences, config.confidence), over
    # Where the evaluation is about no dataset in particular, the first that it has.
    others = list(first.results.other_perplexities)
    dataset = "" if first.results.perplexity or not others else others[0]
    rows = paired_rows(first, second, dataset)
    over = f"held-out rows, in {'nats a token' if rows.unit == 'token' else 'bits a byte'}"
    if len(rows.before) < MIN_PERPLEXITY_ROWS:
        return None, over
    return rows.difference(config), over


def _improvement(
    opponent: Evaluation,
    candidate: Evaluation,
    pairs: dict[str, list[Pair]],
    config: GateConfig,
) -> Improvement:
    found, over = difference_on_the_whole(opponent, candidate, config, pairs)
    if found is None:
        sentence = f"too few {over}, to be shown better"
        return Improvement("not enough evidence", sentence, 1.0)
    verdict = statistics.non_inferiority(found, 0.0)
    seen = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}] over {over}"
    if verdict == "pass":
        return Improvement(verdict, f"{seen}; better on the whole", found.p_worse)
    if verdict == "fail":
        return Improvement(verdict, f"{seen}; worse on the whole", found.p_worse)
    detectable = statistics.smallest_detectable_drop(found.standard_error, config.confidence)
    sentence = f"{seen}; not shown to be better (would have seen a gain of {detectable:.3f})"
    return Improvement(verdict, sentence, found.p_worse)


def _check_names(evaluation: Evaluation, config: GateConfig) -> None:
    known = [task.task for task in evaluation.results.tasks]
    for key, names in (("max_drops", config.max_drops), ("must_improve", config.must_improve)):
        for name in names:
            if name not in known:
                raise DataError(f"gate.{key}: no task `{name}` was evaluated{_hint(name, known)}")


def _hint(name: str, known: Sequence[str]) -> str:
    if not known:
        return "; the evaluation has no tasks: name some under `tasks` or `test_sets`"
    near = difflib.get_close_matches(name, known, n=3)
    meant = f"; did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else ""
    return f"{meant}; there are {', '.join(f'`{one}`' for one in known)}"
