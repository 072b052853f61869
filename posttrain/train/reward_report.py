"""How good a reward model is on pairs it has not seen: accuracy, calibration, and length.

`held_out.parquet` of a reward model has one line a pair, from the checkpoint that was kept:

    id, task                         the row's id, and the dataset that it comes from
    chosen, rejected                 scores, as `RewardModel.scores` returns them
    margin                           the first less the second
    chosen_tokens, rejected_tokens   tokens of the answers, as they were read

Importing this module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posttrain.evaluate.shares import Share, wilson
from posttrain.train.reward_data import HeldOutPairs, correct, negative_log_likelihood

WEAK = 0.6
"""Held-out accuracy below which a reward model is said to be too weak to learn from."""

_BINS = 10
"""Calibration bins of equal width between a confidence of one half and 1."""


@dataclass(frozen=True)
class HeldOutScores:
    """Scores of held-out pairs; all arrays are of shape (pairs,)."""

    ids: Sequence[str]
    tasks: Sequence[str]
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray

    @classmethod
    def of(cls, held_out: HeldOutPairs, scores: np.ndarray) -> HeldOutScores:
        """From scores of the held-out pairs, float64 of shape (pairs, 2)."""
        return cls(
            ids=[row.id for row in held_out.rows],
            tasks=[held_out.task_names[task] for task in held_out.tasks],
            chosen=scores[:, 0],
            rejected=scores[:, 1],
            chosen_tokens=np.array([len(pair.chosen_ids) for pair in held_out.pairs], np.int64),
            rejected_tokens=np.array([len(pair.rejected_ids) for pair in held_out.pairs], np.int64),
        )

    @property
    def margins(self) -> np.ndarray:
        """Chosen less rejected."""
        difference: np.ndarray = self.chosen - self.rejected
        return difference

    @property
    def scores(self) -> np.ndarray:
        """Of all answers, the chosen ones first: float64 of shape (2 * pairs,)."""
        return np.concatenate([self.chosen, self.rejected])

    @property
    def tokens(self) -> np.ndarray:
        """Lengths of all answers, the chosen ones first: int64 of shape (2 * pairs,)."""
        return np.concatenate([self.chosen_tokens, self.rejected_tokens])

    def write(self, path: Path) -> None:
        """Leave `held_out.parquet`; its columns stand at the head of this module."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            "id": pa.array(self.ids, pa.string()),
            "task": pa.array(self.tasks, pa.string()),
            "chosen": pa.array(self.chosen, pa.float64()),
            "rejected": pa.array(self.rejected, pa.float64()),
            "margin": pa.array(self.margins, pa.float64()),
            "chosen_tokens": pa.array(self.chosen_tokens, pa.int64()),
            "rejected_tokens": pa.array(self.rejected_tokens, pa.int64()),
        }
        pq.write_table(pa.table(columns), path, compression="zstd", version="2.6")


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs about which the model is about as sure."""

    pairs: int
    confidence: float
    """Mean probability that the model gives to the answer that it prefers."""
    accuracy: float
    """Share of them where people chose that answer."""


@dataclass(frozen=True)
class LengthBias:
    """What scores have to do with the answers' length in tokens."""

    pearson: float | None
    """Correlation of score and length over all answers; None where one of both is constant."""
    spearman: float | None
    """The same of their ranks."""
    people: Share | None
    """Among pairs of unequal length, those whose longer answer people chose; None without any."""
    model: float | None
    """Among the same, those whose longer answer the model scores higher; ties count half."""


@dataclass(frozen=True)
class RewardReport:
    """What is to be known of a reward model."""

    accuracy: Share
    loss: float
    """Nats a pair."""
    brier: float
    """Mean squared distance of sigmoid(margin) from 1 (Brier, 1950); 0.25 for one who guesses."""
    calibration_error: float
    """Expected calibration error (Guo et al., 2017, arXiv:1706.04599, equation 5)."""
    calibration: tuple[CalibrationBin, ...]
    length: LengthBias


def report_of(scores: HeldOutScores) -> RewardReport:
    """Measure a reward model by its scores of held-out pairs."""
    margins = scores.margins
    bins = calibration(margins)
    wrong = sum(one.pairs * abs(one.accuracy - one.confidence) for one in bins)
    return RewardReport(
        accuracy=wilson(float(correct(margins).sum()), len(margins)),
        loss=float(negative_log_likelihood(margins).mean()),
        brier=float(np.mean((1 - _sigmoid(margins)) ** 2)),
        calibration_error=wrong / len(margins),
        calibration=bins,
        length=length_bias(scores),
    )


def calibration(margins: np.ndarray) -> tuple[CalibrationBin, ...]:
    """Confidence and accuracy in ten bins of equal width from 0.5 to 1; empty ones left out.

    The confidence in a pair is what sigmoid(margin) gives to the answer that the model prefers; it
    is right where people chose that one. With the probability of the chosen answer instead, every
    case would be a success, and a model that is sure of the wrong order could not be told.
    """
    confidence = _sigmoid(np.abs(margins))
    right = correct(margins)
    number = np.minimum(((confidence - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    return tuple(
        CalibrationBin(
            pairs=int((number == bin_).sum()),
            confidence=float(confidence[number == bin_].mean()),
            accuracy=float(right[number == bin_].mean()),
        )
        for bin_ in range(_BINS)
        if (number == bin_).any()
    )


def length_bias(scores: HeldOutScores) -> LengthBias:
    """Correlation of scores with length, and who prefers the longer answer how often.

    Reward models often learn little else than length (Singhal et al., 2023, arXiv:2310.03716).
    """
    from scipy.stats import pearsonr, spearmanr

    pearson = spearman = None
    if np.ptp(scores.scores) > 0 and np.ptp(scores.tokens) > 0:
        pearson = float(pearsonr(scores.scores, scores.tokens).statistic)
        spearman = float(spearmanr(scores.scores, scores.tokens).statistic)
    longer = np.sign(scores.chosen_tokens - scores.rejected_tokens)
    unequal = longer != 0
    count = int(unequal.sum())
    if not count:
        return LengthBias(pearson, spearman, None, None)
    people = wilson(float((longer > 0).sum()), count)
    model = float(correct(scores.margins[unequal] * longer[unequal]).mean())
    return LengthBias(pearson, spearman, people, model)


def report_metrics(report: RewardReport) -> dict[str, float]:
    """The report's numbers by the names that MLflow shows."""
    length = report.length
    metrics: dict[str, float | None] = {
        "held_out_accuracy": report.accuracy.value,
        "held_out_accuracy_low": report.accuracy.low,
        "held_out_accuracy_high": report.accuracy.high,
        "held_out_brier": report.brier,
        "held_out_calibration_error": report.calibration_error,
        "length_pearson": length.pearson,
        "length_spearman": length.spearman,
        "longer_chosen_by_people": length.people.value if length.people else None,
        "longer_chosen_by_model": length.model,
    }
    return {name: value for name, value in metrics.items() if value is not None}


def report_warnings(report: RewardReport) -> list[str]:
    """What someone who wants to learn from these scores has to be told."""
    warnings = []
    accuracy, length = report.accuracy, report.length
    if accuracy.value < WEAK:
        warnings.append(
            f"the reward model prefers the chosen answer in {accuracy.value:.0%} of the held-out "
            f"pairs (95% interval {accuracy.low:.0%} to {accuracy.high:.0%}), and 50% would be "
            "guessing: a reward model this weak misleads PPO, GRPO and RLOO, which learn its "
            "mistakes. Give it more pairs or clearer ones, train it for longer, or start it from a "
            "larger or better tuned model; `dpo` on the same pairs needs no reward model"
        )
    if length.people is None or length.model is None or length.spearman is None:
        return warnings
    people = length.people
    longer = length.spearman > 0.5 and length.model > people.high
    shorter = length.spearman < -0.5 and length.model < people.low
    if longer or shorter:
        warnings.append(
            f"scores follow the answers' length (Spearman correlation {length.spearman:.2f}): the "
            f"reward model prefers the longer answer in {length.model:.0%} of the held-out pairs, "
            f"people in {people.value:.0%} (95% interval {people.low:.0%} to {people.high:.0%}). "
            f"What learns from it will learn to be {'long' if longer else 'short'}: balance the "
            "lengths of chosen and rejected answers in the pairs, or write `shaping: "
            "{length_penalty: ...}` in `ppo`"
        )
    return warnings


def _sigmoid(values: np.ndarray) -> np.ndarray:
    # Through tanh, which does not overflow.
    probability: np.ndarray = 0.5 * (1 + np.tanh(values / 2))
    return probability
