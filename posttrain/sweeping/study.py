"""What to try next and what to give up, by Optuna.

Nothing is kept between two calls: both questions are answered from the trials on record. A sweep
that was killed therefore goes on exactly as it would have gone on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import JsonValue

from posttrain.sweeping.record import Loss, Trial
from posttrain.sweeping.space import Choices, Point, Range, Space, show_value

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

WARMUP_PERCENT = 25
"""No trial is given up in the first quarter of its run, where the learning rate still rises."""
MIN_FINISHED = 2
"""Trials that must have ended before another one can be given up."""
HOPELESS_GAIN = 0.9
"""A trial is hopeless only if the held-out loss has fallen by less than this share of what the best
finished trial had reached. Below the median alone would stop trials for a difference that the rule
of one standard error would not have minded."""
_DIGITS = 3
"""Significant digits of values drawn from a range: more would tell nobody anything."""


def propose(space: Space, trials: Sequence[Trial], *, maximize: bool, seed: int = 0) -> Point:
    """The values of the next trial: all combinations in turn, or what TPE draws from ranges.

    The tree-structured Parzen estimator (Bergstra et al., Algorithms for Hyper-Parameter
    Optimization, NeurIPS 2011) draws its first ten points at random.

    Args:
        space: The keys and their values or ranges.
        trials: Those on record, in order.
        maximize: Whether more of the objective is better.
        seed: Of the draws; the same record then gives the same answer.
    """
    if space.is_grid:
        return space.grid()[len(trials)]
    from optuna.samplers import TPESampler

    study = _study(trials, maximize, space)
    study.sampler = TPESampler(seed=seed * 1_000_003 + len(trials))
    asked = study.ask(_distributions(space))
    return {axis.key: _value(axis, asked.params[axis.key]) for axis in space.axes}


def hopeless(losses: Sequence[Loss], trials: Sequence[Trial]) -> str | None:
    """Why a trial that runs should be given up, or None.

    Both must hold: Optuna's median rule (its best held-out loss so far is above the median of the
    finished trials' at this point of their runs; Golovin et al., Google Vizier, KDD 2017, section
    3.2.2), and it has gained less than `HOPELESS_GAIN` of what the best of them had gained.

    Args:
        losses: Held-out losses so far; the one before training is step 0.
        trials: Those on record.
    """
    finished = [trial for trial in trials if trial.status == "complete"]
    if not losses or losses[-1].percent is None or losses[-1].percent >= 100:
        return None
    from optuna.pruners import MedianPruner
    from optuna.trial import TrialState, create_trial

    pruner = MedianPruner(n_startup_trials=MIN_FINISHED, n_warmup_steps=WARMUP_PERCENT)
    running = create_trial(state=TrialState.RUNNING, intermediate_values=_by_percent(losses))
    if not pruner.prune(_study(finished, maximize=False), running):
        return None
    percent, mine = losses[-1].percent, min(loss.loss for loss in losses)
    reached = min(
        loss.loss
        for trial in finished
        for loss in trial.losses
        if loss.step > 0 and loss.percent is not None and loss.percent <= percent
    )
    before = losses[0].loss if losses[0].step == 0 else None
    if before is not None and before - mine >= HOPELESS_GAIN * (before - reached):
        return None
    return (
        f"held-out loss {mine:.3f} after {percent}% of the run, where the best trial had "
        f"{reached:.3f}"
    )


def _study(trials: Sequence[Trial], maximize: bool, space: Space | None = None) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    study.add_trials([_frozen(trial, space) for trial in trials])
    return study


def _frozen(trial: Trial, space: Space | None) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    # Where the gate says no, however good the number, is no place to look again: the estimator
    # takes what was pruned without a look at its losses for worse than all that came to an end.
    status = "pruned" if trial.value is not None and not trial.may_be_chosen else trial.status
    params = {}
    if space is not None:
        params = {axis.key: _parameter(axis, trial.values) for axis in space.axes}
    return create_trial(
        state=states.get(status, TrialState.FAIL),
        value=trial.value,
        params=params,
        distributions=_distributions(space) if space else {},
        intermediate_values=_by_percent(trial.losses),
    )


def _by_percent(losses: Sequence[Loss]) -> dict[int, float]:
    """Losses by how far the run was; trials of different lengths are compared at equal shares."""
    return {
        loss.percent: loss.loss for loss in losses if loss.percent is not None and loss.step > 0
    }


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    found: dict[str, BaseDistribution] = {}
    for axis in space.axes:
        match axis:
            case Choices():
                found[axis.key] = CategoricalDistribution([show_value(v) for v in axis.values])
            case Range(whole=True):
                found[axis.key] = IntDistribution(int(axis.low), int(axis.high), log=axis.log)
            case Range():
                found[axis.key] = FloatDistribution(axis.low, axis.high, log=axis.log)
    return found


def _parameter(axis: Choices | Range, values: Point) -> str | int | float:
    value = values[axis.key]
    if isinstance(axis, Choices) or not isinstance(value, int | float):
        return show_value(value)
    return value


def _value(axis: Choices | Range, drawn: str | int | float) -> JsonValue:
    if isinstance(axis, Choices):
        return next(value for value in axis.values if show_value(value) == drawn)
    if axis.whole:
        return int(drawn)
    rounded = float(f"{float(drawn):.{_DIGITS}g}")
    return min(max(rounded, axis.low), axis.high)
