"""The report's charts: inline SVG by small functions, no plotting library.

Horizontal measures are percentages and vertical ones pixels: a chart is as wide as the page lets it
be, and its type keeps its size.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from posttrain.data.report_data import Histogram

PLOT_TOP, PLOT_BOTTOM, CHART_HEIGHT = 40, 230, 254


def bar(segments: Iterable[tuple[float, float, str]], whole: float) -> Markup:
    """A horizontal bar: start, length and CSS class of each segment, in units of `whole`.

    A segment that is not zero is never too thin to be seen.
    """
    rects = [
        Markup('<rect class="{}" x="{:.2f}%" width="{:.2f}%" height="100%"/>').format(
            kind, min(100 * start / whole, 99.4), max(100 * length / whole, 0.6)
        )
        for start, length, kind in segments
        if length > 0
    ]
    return Markup('<svg class="bar" aria-hidden="true">{}</svg>').format(Markup("").join(rects))


Layer = tuple[str, str, Histogram]
"""CSS class, the word for these rows, and their lengths."""


def length_charts(before: Histogram, after: Histogram) -> list[Markup]:
    """Both histograms in one chart, or in one each if their edges differ."""
    layers: list[Layer] = [("gone", "read", before), ("stay", "stay", after)]
    same = before.edges == after.edges
    return [_chart(part) for part in ([layers] if same else [layers[:1], layers[1:]])]


def _chart(layers: Sequence[Layer]) -> Markup:
    """Histograms over the same edges, each drawn over the one before, all bins equally wide."""
    last = layers[-1][2]
    used = [n for n in range(len(last.counts)) if any(h.counts[n] for *_, h in layers)]
    if not used:
        return Markup("")
    bins = range(used[0], used[-1] + 1)
    step, top = _scale(max(max(h.counts) for *_, h in layers))
    levels = [(n, _y(n, top)) for n in range(0, top + 1, step)]
    width = 12 + 8 * max(len(_compact(n, top)) for n, _ in levels)
    label = "; ".join(f"{word}: median {format_number(h.median)}" for _, word, h in layers)
    scale = [
        Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            width - 8, y + 4, _compact(n, top)
        )
        for n, y in levels
    ]
    plot = [Markup('<line x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(y) for _, y in levels]
    plot += [_bin(layers, number, bins, top) for number in bins]
    plot += _ticks(last.edges, bins)
    plot += _marks(last, bins)
    return Markup(
        '<div class="chart" role="img" aria-label="Histogram of words a row; {0}">'
        '<svg width="{1}" height="{2}">{3}</svg><svg class="plot" height="{2}">{4}</svg></div>'
    ).format(label, width, CHART_HEIGHT, Markup("").join(scale), Markup("").join(plot))


def _scale(highest: int) -> tuple[int, int]:
    """Distance of the grid's lines (1, 2 or 5 times a power of ten) and the uppermost line."""
    power = 10 ** max(len(str(highest)) - 2, 0)
    step = next(step for f in (1, 2, 5, 10, 20, 50) if (step := f * power) * 4 >= highest)
    return step, step * math.ceil(highest / step)


def _y(count: float, top: int) -> float:
    return PLOT_BOTTOM - (PLOT_BOTTOM - PLOT_TOP) * count / top


def _bin(layers: Sequence[Layer], number: int, bins: range, top: int) -> Markup:
    """The bars of one bin, with the counts as the tooltip."""
    edges = layers[0][2].edges
    is_last = number == len(edges) - 2
    upto = " or more" if is_last else f" to {format_number(edges[number + 1])}"
    counts = ", ".join(f"{h.counts[number]:,} {word}" for _, word, h in layers)
    rects = [
        Markup('<rect class="{}" x="{:.2f}%" width="{:.2f}%" y="{:.1f}" height="{:.1f}"/>').format(
            kind,
            100 * (number - bins.start + 0.04) / len(bins),
            92 / len(bins),
            (y := _y(histogram.counts[number], top)),
            PLOT_BOTTOM - y,
        )
        for kind, _, histogram in layers
        if histogram.counts[number]
    ]
    return Markup("<g><title>{}{} words: {}</title>{}</g>").format(
        format_number(edges[number]), upto, counts, Markup("").join(rects)
    )


def _ticks(edges: Sequence[float], bins: range) -> list[Markup]:
    """About eight of the edges under the plot; the last bin has no right edge."""
    every = math.ceil(len(bins) / 8)
    return [
        Markup('<text x="{:.2f}%" y="{}" text-anchor="{}">{}</text>').format(
            100 * (number - bins.start) / len(bins),
            CHART_HEIGHT - 6,
            "middle" if number > bins.start else "start",
            _compact(edges[number], edges[number]),
        )
        for number in bins[::every]
    ]


def _marks(histogram: Histogram, bins: range) -> list[Markup]:
    """Lines at median and p95, each with its name above the plot."""
    marks = []
    for row, (name, value) in enumerate((("median", histogram.median), ("p95", histogram.p95))):
        number = min(max(bisect_right(histogram.edges, value) - 1, bins.start), bins.stop - 1)
        left, right = histogram.edges[number : number + 2]
        is_open = number == len(histogram.counts) - 1
        inside = 0.5 if is_open else min(max((value - left) / (right - left), 0.0), 1.0)
        x = 100 * (number - bins.start + inside) / len(bins)
        marks.append(
            Markup(
                '<line class="halo" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1}" y2="{2}"/>'
                '<line class="mark" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1}" y2="{2}"/>'
                '<text x="{0:.2f}%" y="{3}" dx="{4}" text-anchor="{5}">{6} {7}</text>'
            ).format(
                x,
                8 + 16 * row,
                PLOT_BOTTOM,
                16 + 16 * row,
                *((5, "start") if x < 70 else (-5, "end")),
                name,
                format_number(value),
            )
        )
    return marks


def _compact(value: float, largest: float) -> str:
    """A number of an axis that goes up to `largest`: `512`, `1,024`, `16k`, `2.5M`."""
    for limit, divisor, unit in ((10_000_000, 1_000_000, "M"), (10_000, 1_000, "k")):
        if largest >= limit and value:
            return f"{value / divisor:,.4g}{unit}"
    return format_number(value)


def format_number(value: float) -> str:
    """`1,234`, `5.7`: one decimal below 10, where it says something."""
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:,.1f}"
