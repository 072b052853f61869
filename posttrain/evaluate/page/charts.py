"""The page's drawings.

A plot over rows is a column of a table: one small SVG a row, horizontal measures in percent, so
that type keeps its size however narrow the page is, and labels are text that wraps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from posttrain.charts import Frame, Place, dot, polyline, round_marks, scale, step_marks, thinned
from posttrain.evaluate.page.differences import Difference
from posttrain.evaluate.page.subjects import Subject
from posttrain.train.history import History

_FRAME = Frame(width=430, height=220, left=58, right=12, top=12, bottom=30, numbers_below=10)
_MOST_POINTS = 300
_MOST_DOTS = 60
_SHAPES = {
    "disc": '<circle r="4"/>',
    "ring": '<circle r="4"/>',
    "square": '<rect x="-4" y="-4" width="8" height="8"/>',
    "bar": '<path d="M0 -7V7"/>',
}
"""Shapes of points around their place: which is which is never said by colour alone."""

Shape = Literal["disc", "ring", "square", "bar"]


@dataclass(frozen=True)
class Plot:
    """A plot over the rows of a table."""

    axis: Markup
    """For the head of the column."""
    rows: tuple[Markup, ...]


def forest(differences: Sequence[Difference]) -> Plot:
    """Differences with their bounds, the line of no change, and what is not accepted shaded."""
    lows = [min(one.low, -one.max_drop) for one in differences]
    highs = [max(one.high, 0.0) for one in differences]
    marks = round_marks(min(lows), max(highs), most=4)
    x = _percent(marks)
    return Plot(
        _axis(x, marks, signed_short), tuple(_forest_row(one, x, marks) for one in differences)
    )


def _forest_row(one: Difference, x: Place, marks: Sequence[float]) -> Markup:
    shapes: dict[str | None, Shape] = {"pass": "disc", "fail": "square"}
    kind = (one.outcome or one.event).replace(" ", "-")
    # Without a gate a disc says no more than where the difference is.
    shape = shapes.get(one.outcome, "ring") if one.outcome else "disc"
    return _row(
        [
            Markup('<rect class="beyond" width="{:.2f}%" height="100%"/>').format(x(-one.max_drop)),
            *_grid(x, marks),
            _upright("margin", x(-one.max_drop)),
            Markup('<line class="bound {}" x1="{:.2f}%" x2="{:.2f}%" y1="50%" y2="50%"/>').format(
                kind, x(one.low), x(one.high)
            ),
            _point(kind, shape, x(one.mean)),
        ]
    )


def dumbbells(subjects: Sequence[Subject]) -> Plot:
    """From the score before to the score after, for each subject."""
    values = [v for one in subjects for v in (one.before, one.after, one.champion) if v is not None]
    marks = round_marks(min(values), max(values), most=5)
    if min(values) >= 0 and max(values) <= 1:
        marks = [mark for mark in marks if 0 <= mark <= 1]
    x = _percent(marks)
    return Plot(_axis(x, marks, "{:g}".format), tuple(_dumbbell(one, x, marks) for one in subjects))


def _dumbbell(one: Subject, x: Place, marks: Sequence[float]) -> Markup:
    way = "up" if one.after > one.before else "down" if one.after < one.before else "same"
    parts = [
        *_grid(x, marks),
        Markup('<line class="way {}" x1="{:.2f}%" x2="{:.2f}%" y1="50%" y2="50%"/>').format(
            way, x(one.before), x(one.after)
        ),
    ]
    if one.champion is not None:
        parts.append(_point("champion", "bar", x(one.champion)))
    parts.append(_point("before", "ring", x(one.before)))
    parts.append(_point(f"after {way}", "disc", x(one.after)))
    return _row(parts)


def key(kind: str, shape: Shape) -> Markup:
    """A shape for the legend."""
    return Markup('<svg class="key" aria-hidden="true">{}</svg>').format(_point(kind, shape, 50))


def signed_short(value: float) -> str:
    """A mark of an axis of differences: `+0.05`, `0`."""
    return f"{value:+g}" if value else "0"


def _percent(marks: Sequence[float]) -> Place:
    return scale(marks[0], marks[-1], 0, 100)


def _axis(x: Place, marks: Sequence[float], show: Callable[[float], str]) -> Markup:
    """The numbers, every second one where there are many; that of zero always."""
    every = 2 if len(marks) > 5 else 1
    first = marks.index(0.0) % every if 0.0 in marks else 0
    texts = [
        Markup('<text x="{:.2f}%" y="14" text-anchor="middle">{}</text>').format(
            x(mark), show(mark)
        )
        for mark in marks[first::every]
    ]
    return Markup('<svg class="axis" aria-hidden="true">{}</svg>').format(Markup("").join(texts))


def _grid(x: Place, marks: Sequence[float]) -> list[Markup]:
    return [_upright("zero" if mark == 0 else "rule", x(mark)) for mark in marks]


def _upright(kind: str, at: float) -> Markup:
    return Markup('<line class="{0}" x1="{1:.2f}%" x2="{1:.2f}%" y2="100%"/>').format(kind, at)


def _point(kind: str, shape: Shape, at: float) -> Markup:
    # An inner drawing: circles may stand at a percentage, but no other shape may.
    return Markup('<svg class="point {} {}" x="{:.2f}%" y="50%">{}</svg>').format(
        shape, kind, at, Markup(_SHAPES[shape])
    )


def _row(parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="row" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


@dataclass(frozen=True)
class Curves:
    """How a training stage went."""

    stage: str
    said: str
    """First and kept value in words."""
    drawing: Markup


def curves(stage: str, history: History) -> Curves | None:
    """Training and held-out loss by step; the reward where a stage learned from one."""
    held_out = [(float(one.step), one.loss) for one in history.held_out]
    training = [(float(one.step), one.loss) for one in history.steps]
    measure = "loss"
    if history.held_out and all("reward" in one.values for one in history.held_out):
        measure = "reward"
        held_out = [(float(one.step), one.values["reward"]) for one in history.held_out]
        rewarded = [one for one in history.steps if "reward" in one.values]
        training = [(float(one.step), one.values["reward"]) for one in rewarded]
    points = [*training, *held_out]
    if not points or len(history.held_out) < 2:
        return None
    kept = history.best.step
    marks = round_marks(min(y for _, y in points), max(y for _, y in points), most=4)
    last = int(max(x for x, _ in points))
    x, y = _FRAME.across(0, max(last, 1)), _FRAME.up(marks[0], marks[-1])
    lines = [
        polyline(kind, ((x(step), y(value)) for step, value in thinned(drawn, _MOST_POINTS)))
        for kind, drawn in (("training", training), ("held-out", held_out))
        if drawn
    ]
    few = len(held_out) <= _MOST_DOTS
    dots = [
        dot(
            "kept" if step == kept else "dot",
            (x(step), y(value)),
            6 if step == kept else 3,
            f"step {step:.0f}: {value:.4f}",
        )
        for step, value in held_out
        if few or step == kept
    ]
    at = dict(held_out)
    said = (
        f"held-out {measure} {held_out[0][1]:.3f} to {at[float(kept)]:.3f}, kept at step {kept:,}"
    )
    axes = [*_FRAME.rules(y, marks), *_FRAME.ticks(x, step_marks(last), "{:,.0f}".format)]
    drawing = _FRAME.svg(f"{stage}: {said}", [*axes, *lines, *dots])
    return Curves(stage=stage, said=said, drawing=drawing)


def share_bar(parts: Sequence[tuple[str, float]]) -> Markup:
    """Shares side by side: CSS class and size of each; the whole is their sum."""
    whole = sum(size for _, size in parts) or 1.0
    rects, start = [], 0.0
    for kind, size in parts:
        if size:
            rects.append(
                Markup('<rect class="{}" x="{:.2f}%" width="{:.2f}%" height="100%"/>').format(
                    kind, 100 * start / whole, 100 * size / whole
                )
            )
        start += size
    return Markup('<svg class="shares" aria-hidden="true">{}</svg>').format(Markup("").join(rects))


def win_interval(win_rate: float, low: float, high: float) -> Markup:
    """A win rate from 0 to 1 with its interval, and the line of even odds."""
    x = scale(0, 1, 0, 100)
    row = _row(
        [
            *(_upright("rule", x(mark)) for mark in (0, 0.25, 0.75, 1)),
            _upright("zero", x(0.5)),
            Markup('<line class="bound" x1="{:.2f}%" x2="{:.2f}%" y1="50%" y2="50%"/>').format(
                x(low), x(high)
            ),
            _point("", "disc", x(win_rate)),
        ]
    )
    return row + _axis(x, [0, 0.25, 0.5, 0.75, 1], "{:g}".format)
