"""What the charts of our pages share: inline SVG by small functions, no script and no other file.

A chart is drawn in a fixed box that scales with the page. Colours and type are the page's: shapes
carry CSS classes, `rule` for the lines of the grid and whatever the page calls its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Place = Callable[[float], float]
"""From a value to where it stands in the drawing."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """The box of a chart in the units of its drawing; what is plotted lies inside the margins."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    numbers_below: int = 12
    """From the lower edge up to the line that the numbers of the horizontal axis stand on."""
    gap: int = 8
    """Between the plot and the numbers of the vertical axis."""

    def across(self, low: float, high: float) -> Place:
        """Places of a horizontal axis."""
        return scale(low, high, self.left, self.width - self.right)

    def up(self, low: float, high: float) -> Place:
        """Places of a vertical axis, `high` at the top."""
        return scale(high, low, self.top, self.height - self.bottom)

    def rules(
        self, y: Place, marks: Iterable[float], show: Callable[[float], str] = "{:g}".format
    ) -> list[Markup]:
        """Horizontal lines through the plot, each with its number on the left."""
        return [
            Markup(
                '<line class="rule" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
                '<text x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>'
            ).format(
                self.left,
                self.width - self.right,
                y(mark),
                self.left - self.gap,
                y(mark) + 4,
                show(mark),
            )
            for mark in marks
        ]

    def ticks(
        self, x: Place, marks: Iterable[float], show: Callable[[float], str] = "{:g}".format
    ) -> list[Markup]:
        """Numbers below the plot."""
        return [
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x(mark), self.height - self.numbers_below, show(mark)
            )
            for mark in marks
        ]

    def svg(self, label: str, parts: Iterable[Markup]) -> Markup:
        """The drawing as one image, which `label` describes to who cannot see it."""
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            self.width, self.height, label, Markup("").join(parts)
        )


def scale(low: float, high: float, first: float, last: float) -> Place:
    """From values between `low` and `high` to places; all in the middle where these are equal."""
    if high == low:
        return lambda _: (first + last) / 2
    return lambda value: first + (last - first) * (value - low) / (high - low)


def round_marks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from below `low` to above `high`, 1, 2 or 5 times a power of ten apart.

    Args:
        low: The least value.
        high: The greatest value.
        most: Distances between them that `high - low` may be divided into.
    """
    if high - low < 1e-9:
        low, high = low - 0.05, high + 0.05
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(
        power * times for times in (1, 2, 5, 10, 20) if (high - low) / (power * times) <= most
    )
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def step_marks(last: int) -> list[int]:
    """About five steps from 0 to the last one."""
    return sorted({round(last * part / 4) for part in range(5)})


def polyline(kind: str, points: Iterable[Point]) -> Markup:
    """A line through points."""
    return Markup('<polyline class="{}" points="{}"/>').format(kind, join_points(points))


def join_points(points: Iterable[Point]) -> str:
    """Points as SVG writes them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def dot(kind: str, point: Point, radius: float, title: str) -> Markup:
    """A dot that says what it is when it is pointed at."""
    return Markup(
        '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>'
    ).format(kind, *point, radius, title)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Means over neighbouring points, where there are more than `most`."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
