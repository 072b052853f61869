"""`reward.html`: scores, calibration and length, as a page without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from posttrain.charts import Frame, Place, dot, polyline
from posttrain.store.files import write_bytes
from posttrain.train.reward_report import HeldOutScores, RewardReport

REWARD_PAGE = "reward.html"

_FRAME = Frame(width=420, height=300, left=48, right=12, top=12, bottom=40, numbers_below=24, gap=6)
_COLUMNS = 24
_MOST_POINTS = 2000
"""Answers that are drawn; more than there is room for show nothing more."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #66707d; --rule: #d9dee5;
  --chosen: #0b63c4; --rejected: #c2410c; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a2b0; --rule: #333b46;
  --chosen: #6cb2ff; --rejected: #ff9d5c; --paper: #14181d; } }
body { margin: 2rem auto; max-width: 900px; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; } h2 { font-size: 1rem; margin: 0 0 .3rem; }
p { color: var(--soft); margin: 0 0 1rem; } .charts { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); margin-bottom: 1.5rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.rule { stroke: var(--rule); } .chosen { fill: var(--chosen); } .rejected { fill: var(--rejected); }
rect.chosen, rect.rejected { fill-opacity: .5; } circle { fill-opacity: .6; }
.curve { stroke: var(--chosen); stroke-width: 2; fill: none; }
.even { stroke: var(--soft); stroke-dasharray: 4 4; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td { padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--rule); }
td + td { text-align: right; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
"""


def write_reward_page(scores: HeldOutScores, report: RewardReport, title: str, path: Path) -> None:
    """Draw the scores of the held-out pairs, how far they can be believed, and against length."""
    charts = [
        ("Scores", _histogram(scores)),
        ("Calibration: how often the model is right by how sure it is", _calibration(report)),
        ("Score by the answer's length in tokens", _by_length(scores)),
    ]
    drawn = Markup("").join(
        Markup("<section><h2>{}</h2>{}</section>").format(name, chart) for name, chart in charts
    )
    page = Markup(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>{title}</title>'
        "<style>{style}</style><h1>{title}</h1><p>{pairs} held-out pairs."
        '<span class="key" style="background: var(--chosen)"></span>chosen'
        '<span class="key" style="background: var(--rejected)"></span>rejected</p>'
        '<div class="charts">{charts}</div>{table}</html>\n'
    ).format(
        title=title,
        style=Markup(_STYLE),
        pairs=len(scores.chosen),
        charts=drawn,
        table=_table(report),
    )
    write_bytes(path, page.encode())


def _histogram(scores: HeldOutScores) -> Markup:
    edges = np.histogram_bin_edges(scores.scores, _COLUMNS)
    counts = {
        kind: np.histogram(values, edges)[0]
        for kind, values in (("chosen", scores.chosen), ("rejected", scores.rejected))
    }
    highest = max(int(count.max()) for count in counts.values())
    x = _FRAME.across(float(edges[0]), float(edges[-1]))
    y = _FRAME.up(0, highest)
    bars = [
        Markup('<rect class="{}" x="{:.1f}" width="{:.1f}" y="{:.1f}" height="{:.1f}"/>').format(
            kind, x(low), x(high) - x(low), y(count), y(0) - y(count)
        )
        for kind, columns in counts.items()
        for low, high, count in zip(edges[:-1], edges[1:], columns, strict=True)
        if count
    ]
    ticks = [float(edges[0]), float(edges[len(edges) // 2]), float(edges[-1])]
    return _chart("scores", "score", [*_axes(x, ticks, y, [0, highest]), *bars])


def _calibration(report: RewardReport) -> Markup:
    x = _FRAME.across(0.5, 1)
    y = _FRAME.up(0, 1)
    points = [(x(one.confidence), y(one.accuracy), one) for one in report.calibration]
    marks = [
        Markup('<line class="even" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
            x(0.5), y(0.5), x(1), y(1)
        ),
        polyline("curve", ((across, up) for across, up, _ in points)),
        *(
            dot("chosen", (across, up), 4, f"{one.pairs} pairs: {one.accuracy:.0%} right")
            for across, up, one in points
        ),
    ]
    axes = _axes(x, [0.5, 0.75, 1], y, [0, 0.5, 1])
    return _chart("calibration", "confidence", [*axes, *marks])


def _by_length(scores: HeldOutScores) -> Markup:
    every, tokens = scores.scores, scores.tokens
    x = _FRAME.across(0, float(tokens.max()))
    y = _FRAME.up(float(every.min()), float(every.max()))
    step = -(-len(every) // _MOST_POINTS)
    points = [
        Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(
            "chosen" if number < len(scores.chosen) else "rejected", x(length), y(score)
        )
        for number, (length, score) in enumerate(zip(tokens, every, strict=True))
        if number % step == 0
    ]
    axes = _axes(x, [0, int(tokens.max())], y, [float(every.min()), float(every.max())])
    return _chart("score by length", "tokens", [*axes, *points])


def _axes(x: Place, across: Sequence[float], y: Place, up: Sequence[float]) -> list[Markup]:
    show = "{:.3g}".format
    return [*_FRAME.rules(y, up, show), *_FRAME.ticks(x, across, show)]


def _chart(label: str, below: str, parts: Sequence[Markup]) -> Markup:
    name = Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(
        _FRAME.width - _FRAME.right, _FRAME.height - 6, below
    )
    return _FRAME.svg(label, [*parts, name])


def _table(report: RewardReport) -> Markup:
    accuracy, length = report.accuracy, report.length
    lines = [
        ("Accuracy", f"{accuracy.value:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%})"),
        ("Loss, nats a pair", f"{report.loss:.4f}"),
        ("Brier score", f"{report.brier:.4f}"),
        ("Expected calibration error", f"{report.calibration_error:.4f}"),
        ("Correlation of score and length (Pearson)", _shown(length.pearson)),
        ("The same of ranks (Spearman)", _shown(length.spearman)),
        ("People choose the longer answer", _shown(length.people.value if length.people else None)),
        ("The model prefers the longer answer", _shown(length.model)),
    ]
    rows = [Markup("<tr><td>{}</td><td>{}</td></tr>").format(*line) for line in lines]
    return Markup("<table>{}</table>").format(Markup("").join(rows))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
