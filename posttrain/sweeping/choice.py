"""Which trial to take: the smallest value within one standard error of the best.

The rule is Breiman, Friedman, Olshen and Stone's (Classification and Regression Trees, 1984,
section 3.4.3): among models that the data cannot tell from the best one, take the simplest. They
compare with the standard error of the best model's own error. All trials here are measured on the
same held-out rows, so the standard error is that of the paired difference to the best: what is
hard about a row is hard for both and cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from posttrain.sweeping.record import Trial
from posttrain.train.held_out import HELD_OUT_ROWS

Floats = NDArray[np.float64]

SMALLER_IS_SIMPLER = frozenset(
    {
        *("rank", "initial_rank", "virtual_tokens", "projection_size"),
        *("epochs", "max_steps", "max_length", "limit"),
    }
)
"""Last words of the keys whose smaller values give a smaller model, or one that costs less to
train. Of a learning rate, say, no end is simpler than the other."""


@dataclass(frozen=True)
class Compared:
    """A trial against the best one."""

    difference: float
    """By how much it is worse; 0 for the best."""
    standard_error: float | None
    """Of the difference; None where it cannot be known."""


@dataclass(frozen=True)
class Pick:
    """The trial to take."""

    number: int
    best: int
    rule: Literal["one standard error", "best"]
    reason: str


@dataclass(frozen=True)
class HeldOutRows:
    """What a trained artifact says of each held-out row, at its best checkpoint."""

    rows: tuple[tuple[str, str], ...]
    """Task and id of each row, sorted."""
    tokens: Floats
    """Trained tokens of each row, shape (rows,)."""
    nll: Floats
    """Negative log-likelihood of those tokens in nats, summed over each row, shape (rows,)."""

    @classmethod
    def read(cls, folder: Path) -> HeldOutRows | None:
        """Of an artifact; None where it has none."""
        path = folder / HELD_OUT_ROWS
        if not path.exists():
            return None
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["task", "id", "tokens", "nll"])
        table = table.sort_by([("task", "ascending"), ("id", "ascending")])
        tasks, ids = table["task"].to_pylist(), table["id"].to_pylist()
        return cls(
            tuple((str(task), str(row)) for task, row in zip(tasks, ids, strict=True)),
            table["tokens"].to_numpy().astype(np.float64),
            table["nll"].to_numpy().astype(np.float64),
        )

    def comparable_with(self, other: HeldOutRows) -> bool:
        """Whether both were measured on the same tokens of the same rows."""
        return self.rows == other.rows and bool(np.array_equal(self.tokens, other.tokens))


def rows_standard_error(difference: Floats, tokens: Floats) -> float | None:
    """Standard error of sum(difference) / sum(tokens), rows being drawn and not tokens.

    The delta method (linearised variance of a ratio: Cochran, Sampling Techniques, 1977, section
    6.3): with D the ratio and n rows,

        SE = sqrt(n / (n - 1) * sum((difference - D * tokens)^2)) / sum(tokens)

    Args:
        difference: Nats by which a trial is worse than the best on each row, shape (rows,).
        tokens: Trained tokens of each row, shape (rows,).

    Returns:
        Nats a token; None for fewer than two rows.
    """
    from posttrain.evaluate.statistics import ratio_error  # scipy takes its time

    return ratio_error(difference, tokens) if len(difference) > 1 else None


def seeds_standard_error(values: Sequence[float], best: Sequence[float]) -> float | None:
    """Standard error of the mean difference over seeds, the seeds being paired.

    Returns:
        s / sqrt(k) with s the sample standard deviation of the k differences; None for k < 2.
    """
    if len(values) < 2 or len(values) != len(best):
        return None
    differences = np.asarray(values, dtype=np.float64) - np.asarray(best, dtype=np.float64)
    return float(differences.std(ddof=1) / math.sqrt(len(differences)))


def best_trial(trials: Sequence[Trial], maximize: bool) -> Trial | None:
    """The complete trial with the best objective, the earliest among equals.

    Where there is a gate, of those that pass it.
    """
    complete = [(t.value, t) for t in trials if t.may_be_chosen and t.value is not None]
    if not complete:
        return None
    pick = max if maximize else min
    return pick(complete, key=lambda pair: pair[0])[1]


def compare(trial: Trial, best: Trial, *, maximize: bool, rows: bool) -> Compared:
    """A complete trial's distance to the best one and its standard error.

    The variance is that over held-out rows (the mean over seeds of each row) plus that over
    seeds; what rows and seeds share is counted in both, which errs on the side of a larger error.

    Args:
        trial: A complete trial.
        best: The best trial.
        maximize: Whether more is better.
        rows: Whether the objective is a held-out loss, so that rows tell about it.
    """
    if trial.value is None or best.value is None:
        raise ValueError("only complete trials can be compared")
    difference = best.value - trial.value if maximize else trial.value - best.value
    if trial.number == best.number:
        return Compared(0.0, 0.0)
    over_rows = _over_rows(trial, best) if rows else None
    over_seeds = seeds_standard_error(_values(trial), _values(best))
    if rows and over_rows is None:
        return Compared(difference, None)
    parts = [part for part in (over_rows, over_seeds) if part is not None]
    error = math.sqrt(sum(part**2 for part in parts)) if parts else None
    return Compared(difference, error)


def on_other_rows(trials: Sequence[Trial]) -> bool:
    """Whether complete trials were measured on different held-out rows or tokens."""
    found = [_held_out(trial) for trial in trials if trial.status == "complete"]
    known = [rows[0] for rows in found if rows]
    return any(not known[0].comparable_with(rows) for rows in known[1:])


def choose(trials: Sequence[Trial], maximize: bool) -> Pick | None:
    """Apply the rule; None when no trial is complete, or none passes the gate.

    Where the rule does not apply (no swept key has a simpler end, or no standard error is known)
    the best trial is chosen and the reason says so. With several keys that have one, no value may
    be larger than the best trial's, and the first key counts first; of equals, the better one.

    Args:
        trials: With `difference` and `standard_error` filled in.
        maximize: Whether more of the objective is better.
    """
    best = best_trial(trials, maximize)
    if best is None:
        return None
    ordered = [key for key in best.values if _has_simpler_end(key, trials)]
    if not ordered:
        keys = " and ".join(key.rpartition(".")[2] for key in best.values)
        reason = (
            f"{_the_best(trials)}; the rule of one standard error does not apply, because of "
            f"{keys} no value makes a simpler model than another"
        )
        return Pick(best.number, best.number, "best", reason)
    others = [trial for trial in trials if trial.may_be_chosen and trial != best]
    if others and all(trial.standard_error is None for trial in others):
        reason = (
            f"{_the_best(trials)}; the rule of one standard error cannot be applied, because no "
            f"standard error is known (it needs {HELD_OUT_ROWS} of the same rows from every trial, "
            "or --seeds)"
        )
        return Pick(best.number, best.number, "best", reason)
    near = [best, *(trial for trial in others if _within_one(trial))]
    smaller = [t for t in near if all(_number(t, key) <= _number(best, key) for key in ordered)]

    def simplest(trial: Trial) -> tuple[float, ...]:
        sizes = (_number(trial, key) for key in ordered)
        return (*sizes, trial.difference or 0.0, trial.number)

    chosen = min(smaller, key=simplest)
    return Pick(chosen.number, best.number, "one standard error", _why(chosen, best, ordered))


def _the_best(trials: Sequence[Trial]) -> str:
    if all(trial.verdict is None for trial in trials):
        return "the best"
    passing = sum(trial.may_be_chosen for trial in trials)
    return (
        "the only one that passes the gate"
        if passing == 1
        else (f"the best of the {passing} that pass the gate")
    )


def _why(chosen: Trial, best: Trial, ordered: Sequence[str]) -> str:
    words = " and ".join(key.rpartition(".")[2] for key in ordered)
    if chosen == best:
        return f"the best; no smaller {words} is within one standard error of it"
    return (
        f"the smallest {words} within one standard error of the best ({best.label}): "
        f"{chosen.difference:.4f} worse, standard error {chosen.standard_error:.4f}"
    )


def _within_one(trial: Trial) -> bool:
    if trial.difference is None or trial.standard_error is None:
        return False
    return trial.difference <= trial.standard_error


def _has_simpler_end(key: str, trials: Sequence[Trial]) -> bool:
    return key.rpartition(".")[2] in SMALLER_IS_SIMPLER and all(
        _is_number(trial.values[key]) for trial in trials
    )


def _is_number(value: JsonValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(trial: Trial, key: str) -> float:
    value = trial.values[key]
    if not isinstance(value, int | float):
        raise TypeError(f"{key}: {value!r} is no number")
    return float(value)


def _values(trial: Trial) -> list[float]:
    return [run.value for run in trial.runs if run.value is not None]


def _held_out(trial: Trial) -> list[HeldOutRows]:
    """Of every seed; empty where one has none."""
    found = [HeldOutRows.read(Path(run.artifact)) if run.artifact else None for run in trial.runs]
    return [rows for rows in found if rows is not None] if None not in found else []


def _over_rows(trial: Trial, best: Trial) -> float | None:
    mine, other = _held_out(trial), _held_out(best)
    if not mine or len(mine) != len(other):
        return None
    first = mine[0]
    if not all(first.comparable_with(rows) for rows in (*mine, *other)):
        return None
    difference = np.mean([a.nll - b.nll for a, b in zip(mine, other, strict=True)], axis=0)
    return rows_standard_error(difference, first.tokens)


def with_comparisons(trials: Sequence[Trial], maximize: bool, *, rows: bool) -> tuple[Trial, ...]:
    """The trials with `difference` and `standard_error` to the best of those to choose from."""
    best = best_trial(trials, maximize)
    found = []
    for trial in trials:
        update: Mapping[str, float | None] = {"difference": None, "standard_error": None}
        if best is not None and trial.may_be_chosen:
            compared = compare(trial, best, maximize=maximize, rows=rows)
            update = {
                "difference": compared.difference,
                "standard_error": compared.standard_error,
            }
        found.append(trial.model_copy(update=dict(update)))
    return tuple(found)
