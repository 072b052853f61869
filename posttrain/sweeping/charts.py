"""The charts of a sweep: inline SVG by small functions, no script and no other file.

Drawn in a fixed box that scales with the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from pydantic import JsonValue

from posttrain.sweeping.record import SweepRecord, Trial
from posttrain.sweeping.space import show_value

WIDTH, HEIGHT = 760, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 736, 34, 290
_LOG_FROM = 4
"""Positive numbers are spaced by powers where the largest is this many times the smallest."""
_MOST_TICKS = 9
_MOST_CURVES = 30
_MOST_NAMED = 8
"""Curves that have their names beside them; of more, the names would hide each other."""
_CHARACTER, _LINE = 7.5, 15
"""Width and height of the text, in the chart's units."""


@dataclass(frozen=True)
class _Axis:
    """From a value to a place, and which values are written beside it."""

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


def key_chart(record: SweepRecord, key: str) -> Markup:
    """The objective of each trial against a key, with a standard error up and down.

    A dashed line marks the best trial's: one whose bar reaches it is within one standard error.
    """
    complete = [trial for trial in record.trials if trial.value is not None]
    across = _across([trial.values[key] for trial in record.trials])
    lows = [_value(t) - (t.standard_error or 0.0) for t in complete]
    highs = [_value(t) + (t.standard_error or 0.0) for t in complete]
    up = _vertical(min(lows), max(highs))
    parts = _frame(up, across)
    best = next((t for t in complete if record.choice and t.number == record.choice.best), None)
    if best is not None:
        parts.append(
            Markup('<line class="best" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(
                _LEFT, _RIGHT, y=up.place(_value(best))
            )
        )
    places = _places([trial.values[key] for trial in record.trials])
    parts.append(_lower_envelope(complete, places, key, across, up))
    for trial in record.trials:
        x = across.place(places[show_value(trial.values[key])])
        chosen = record.choice is not None and trial.number == record.choice.number
        parts.append(_point(trial, x, up, chosen=chosen) if trial.value is not None else
                     _missing(trial, x))  # fmt: skip
    parts.append(_title(f"{record.objective} by {key}"))
    return _svg(parts, f"{record.objective} of each trial against {key}")


def curve_chart(record: SweepRecord) -> Markup | None:
    """Held-out losses while training, one line a trial; None where nothing was measured."""
    drawn = [trial for trial in record.trials if len(trial.losses) > 1][-_MOST_CURVES:]
    if not drawn:
        return None
    names = [trial.label for trial in drawn] if len(drawn) <= _MOST_NAMED else []
    right = _RIGHT - min(_CHARACTER * max(map(len, names), default=0), (_RIGHT - _LEFT) / 3)
    last = max(trial.losses[-1].step for trial in drawn)
    across = _Axis(
        lambda step: _LEFT + (right - _LEFT) * step / last,
        tuple((tick, f"{tick:,.0f}") for tick in _round_ticks(0, last) if tick == int(tick)),
    )
    every = [loss.loss for trial in drawn for loss in trial.losses]
    up = _vertical(min(every), max(every))
    parts = _frame(up, across)
    parts += [_curve(trial, across, up, record) for trial in drawn]
    if names:
        parts += _names(drawn, across, up)
    parts.append(_title("held-out loss by optimizer step"))
    return _svg(parts, "Held-out loss of each trial by optimizer step")


def _names(trials: Sequence[Trial], across: _Axis, up: _Axis) -> list[Markup]:
    """The label of each trial at the end of its curve, one below the other where ends meet."""
    columns: dict[int, list[tuple[float, str]]] = {}
    for trial in sorted(trials, key=lambda trial: -trial.losses[-1].loss):
        end = trial.losses[-1]
        column = columns.setdefault(end.step, [])
        lowest = column[-1][0] + _LINE if column else -math.inf
        column.append((max(up.place(end.loss) + 4, lowest), trial.label))
    parts: list[Markup] = []
    for step, column in columns.items():
        x, too_low = across.place(step) + _CHARACTER, max(column[-1][0] - _BOTTOM, 0.0)
        parts += [
            Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(x, y - too_low, name)
            for y, name in column
        ]
    return parts


def _curve(trial: Trial, across: _Axis, up: _Axis, record: SweepRecord) -> Markup:
    chosen = record.choice is not None and trial.number == record.choice.number
    kind = "chosen" if chosen else trial.status
    places = [(across.place(loss.step), up.place(loss.loss)) for loss in trial.losses]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    last = trial.losses[-1]
    end = _cross(*places[-1]) if trial.status == "pruned" else Markup("")
    return Markup('<g class="curve {}"><title>{}: {:.4f} at step {}</title>'
                  '<polyline points="{}"/>{}</g>').format(
        kind, trial.label, last.loss, last.step, path, end
    )  # fmt: skip


def _point(trial: Trial, x: float, up: _Axis, *, chosen: bool) -> Markup:
    value, error = _value(trial), trial.standard_error
    y = up.place(value)
    text = f"{trial.label}: {value:.4f}"
    kind = "complete" if trial.may_be_chosen else "rejected"
    if trial.verdict not in (None, "pass"):
        text += f", gate: {trial.verdict}"
    bar = Markup("")
    if error:
        low, high = up.place(value - error), up.place(value + error)
        text += f", {trial.difference:.4f} worse than the best, standard error {error:.4f}"
        bar = Markup(
            '<path class="error" d="M{x:.1f} {high:.1f}V{low:.1f}M{l:.1f} {high:.1f}H{r:.1f}'
            'M{l:.1f} {low:.1f}H{r:.1f}"/>'
        ).format(x=x, low=low, high=high, l=x - 5, r=x + 5)
    ring = Markup("")
    if chosen:
        ring = Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="10"/>').format(x, y)
    return Markup(
        '<g class="{}"><title>{}</title>{}{}<circle class="trial" cx="{:.1f}" cy="{:.1f}" '
        'r="4.5"/></g>'
    ).format(kind, text, bar, ring, x, y)


def _missing(trial: Trial, x: float) -> Markup:
    """A trial without a value: where it would be, at the upper edge."""
    return Markup(
        '<g class="{}"><title>{}: {}</title>{}'
        '<text x="{:.1f}" y="{}" text-anchor="middle">{}</text></g>'
    ).format(
        *(trial.status, trial.label, trial.message.splitlines()[0] if trial.message else ""),
        _cross(x, _TOP + 8),
        *(x, _TOP + 28, trial.status),
    )


def _cross(x: float, y: float) -> Markup:
    return Markup('<path class="cross" d="M{:.1f} {:.1f}l8 8m0 -8l-8 8"/>').format(x - 4, y - 4)


def _lower_envelope(
    trials: Sequence[Trial], places: dict[str, float], key: str, across: _Axis, up: _Axis
) -> Markup:
    """A line through the best trial at each value: the highest up when more is better is last."""
    best: dict[float, float] = {}
    for trial in trials:
        at = places[show_value(trial.values[key])]
        worse = trial.difference if trial.difference is not None else math.inf
        if at not in best or worse < best[at]:
            best[at] = worse
    by_place = {
        at: next(
            _value(t)
            for t in trials
            if places[show_value(t.values[key])] == at and t.difference == worse
        )
        for at, worse in best.items()
        if worse != math.inf
    }
    path = " ".join(
        f"{across.place(at):.1f},{up.place(value):.1f}" for at, value in sorted(by_place.items())
    )
    return Markup('<polyline class="through" points="{}"/>').format(path)


def _frame(up: _Axis, across: _Axis) -> list[Markup]:
    """The grid's lines with their numbers, and the values below."""
    parts = []
    for value, text in up.ticks:
        parts.append(
            Markup(
                '<line class="grid" x1="{l}" x2="{r}" y1="{y:.1f}" y2="{y:.1f}"/>'
                '<text x="{t}" y="{b:.1f}" text-anchor="end">{text}</text>'
            ).format(l=_LEFT, r=_RIGHT, t=_LEFT - 10, y=(y := up.place(value)), b=y + 4, text=text)
        )
    for value, text in across.ticks:
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                across.place(value), _BOTTOM + 24, text
            )
        )
    return parts


def _title(text: str) -> Markup:
    return Markup('<text class="title" x="{}" y="18">{}</text>').format(0, text)


def _svg(parts: Sequence[Markup], text: str) -> Markup:
    return Markup(
        '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, text, Markup("").join(parts))


def _places(values: Sequence[JsonValue]) -> dict[str, float]:
    """Where each value stands: numbers by their size (or its logarithm), others side by side."""
    numbers = _numbers(values)
    if numbers is None:
        return {text: float(n) for n, text in enumerate(dict.fromkeys(map(show_value, values)))}
    log = _by_powers(numbers)
    return {
        show_value(value): math.log2(number) if log else number
        for value, number in zip(values, numbers, strict=True)
    }


def _across(values: Sequence[JsonValue]) -> _Axis:
    places = _places(values)
    low, high = min(places.values()), max(places.values())
    margin = (high - low) * 0.08 or 1.0
    low, high = low - margin, high + margin

    def place(at: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (at - low) / (high - low)

    ticks = sorted((at, text) for text, at in places.items())
    numbers = _numbers(values)
    if len(ticks) > _MOST_TICKS and numbers is not None:
        log = _by_powers(numbers)
        chosen = _powers(min(numbers), max(numbers)) if log else _round_ticks(low, high)
        ticks = [(math.log2(n) if log else n, f"{n:g}") for n in chosen]
    return _Axis(place, _readable(ticks, place))


def _readable(
    ticks: Sequence[tuple[float, str]], place: Callable[[float], float]
) -> tuple[tuple[float, str], ...]:
    """The ticks, without those whose text would run into the one before."""
    kept: list[tuple[float, str]] = []
    end = -math.inf
    for at, text in ticks:
        half = len(text) * _CHARACTER / 2
        if place(at) - half >= end:
            kept.append((at, text))
            end = place(at) + half + _CHARACTER
    return tuple(kept)


def _numbers(values: Sequence[JsonValue]) -> list[float] | None:
    """As numbers, or None if one is none."""
    found = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return found if len(found) == len(values) else None


def _by_powers(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) / min(numbers) >= _LOG_FROM


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or the powers alone where there would be many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    every = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [value for value in every if low <= value <= high]


def _vertical(low: float, high: float) -> _Axis:
    margin = (high - low) * 0.08 or abs(high) * 0.01 or 1.0
    low, high = low - margin, high + margin
    ticks = _round_ticks(low, high)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 3
    return _Axis(
        lambda value: _BOTTOM - (_BOTTOM - _TOP) * (value - low) / (high - low),
        tuple((tick, f"{tick:.{digits}f}") for tick in ticks),
    )


def _round_ticks(low: float, high: float) -> list[float]:
    """About five numbers at a distance of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def _value(trial: Trial) -> float:
    if trial.value is None:
        raise ValueError(f"{trial.label} has no value")
    return trial.value
