"""`watch.html`: what became of the answers while a reward was learned for, on one page.

The finding stands on top, then what was tested, the curves, and the answers that changed most.
Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from scipy import stats

from posttrain.charts import Frame, dot, join_points, polyline, round_marks, step_marks
from posttrain.data.rows import Messages
from posttrain.evaluate import answers as form
from posttrain.evaluate.looks import Look
from posttrain.evaluate.results import Change, Hacking
from posttrain.store.files import write_bytes

WATCH_PAGE = "watch.html"

_FRAME = Frame(width=430, height=210, left=58, right=12, top=12, bottom=30, numbers_below=10)
_MOST_ANSWERS = 12
_LONGEST_TEXT = 1_200
"""Characters of a prompt or an answer that are shown; the whole is in answers.parquet."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6774; --rule: #d9dee5;
  --line: #0b63c4; --band: #0b63c422; --kept: #c2410c; --paper: #fff; --bad: #b42318;
  --bad-paper: #fef1f0; --good: #14713c; --good-paper: #eef8f1; --open: #8a5a00;
  --open-paper: #fdf6e7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a2b0; --rule: #333b46;
  --line: #6cb2ff; --band: #6cb2ff2b; --kept: #ff9d5c; --paper: #14181d; --bad: #ff8d84;
  --bad-paper: #33191a; --good: #74d69a; --good-paper: #14291c; --open: #f0c268;
  --open-paper: #2d2512; } }
body { margin: 2rem auto; max-width: 1000px; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .8rem; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p.note, figcaption span { color: var(--soft); } p.note { margin: 0 0 .6rem; }
.finding { border-left: 4px solid var(--tint); background: var(--tint-paper);
  padding: .6rem .9rem; border-radius: 3px; }
.finding b { color: var(--tint); display: inline-block; }
.finding b::first-letter { text-transform: uppercase; }
.finding p { margin: .4rem 0 0; } .finding ul { margin: .2rem 0 0; padding-left: 1.2rem; }
.flagged { --tint: var(--bad); --tint-paper: var(--bad-paper); }
.quiet { --tint: var(--good); --tint-paper: var(--good-paper); }
.open { --tint: var(--open); --tint-paper: var(--open-paper); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr));
  gap: .6rem 1.4rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
figcaption span { font-weight: 400; font-size: .9em; margin-left: .5em; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.rule { stroke: var(--rule); } .line { stroke: var(--line); stroke-width: 2; fill: none; }
.band { fill: var(--band); } .dot { fill: var(--line); } .kept { fill: var(--kept); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th { color: var(--soft); font-weight: 500; } th, td { text-align: right; vertical-align: top;
  padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child, .text, .bounds { text-align: left; }
.shown td { font-weight: 600; }
.answers td { font-size: 13.5px; } .answers td.text { width: 29%; }
.answers div { max-height: 15em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin: 0 .3em 0 .6em;
  background: var(--kept); }
"""


def write_watch_page(
    finding: Hacking, looks: Sequence[Look], prompts: Sequence[Messages], title: str, path: Path
) -> None:
    """Draw the page.

    Args:
        finding: What was found of the step that is kept.
        looks: All looks, by step; step 0 and the kept one are among them.
        prompts: What the answers answer, in the looks' order.
        title: Heads the page.
        path: File to write.
    """
    page = Markup(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>{title}</title>'
        "<style>{style}</style><h1>{title}</h1>{finding}{tests}{charts}{answers}</html>\n"
    ).format(
        title=title,
        style=Markup(_STYLE),
        finding=_finding(finding),
        tests=_tests(finding),
        charts=_charts(finding, looks),
        answers=_answers(finding, looks, prompts),
    )
    write_bytes(path, page.encode())


def _finding(finding: Hacking) -> Markup:
    kind = "flagged" if finding.flagged else "quiet" if finding.audited else "open"
    word, _, rest = finding.text.partition(": ")
    warnings = Markup("").join(Markup("<li>{}</li>").format(text) for text in finding.warnings)
    if warnings:
        warnings = Markup(
            "<p>The form of the answers changed; no flag by itself:</p><ul>{}</ul>"
        ).format(warnings)
    return Markup('<div class="finding {}"><b>{}</b>: {}{}</div>').format(
        kind, word, rest, warnings
    )


def _tests(finding: Hacking) -> Markup:
    return Markup(
        '<h2>Reward and independent signals</h2><p class="note">Held-out answers before training '
        "and at step {}, the one that is kept. Brackets hold one-sided bounds at {:.0%} confidence "
        "each. In bold: shown at that confidence, signals and form each corrected by Holm for how "
        "many there are. <i>Detectable</i> is the change that this many show four times out of "
        'five.</p><div class="wide">{}</div><h2>Form of the answers</h2>'
        '<div class="wide">{}</div>'
    ).format(
        finding.step,
        finding.confidence,
        _table([finding.reward, *finding.signals]),
        _table(finding.style),
    )


def _table(changes: Sequence[Change]) -> Markup:
    columns = ("", "before", "after", "difference", "", "prompts or items", "p", "detectable")
    rows = [
        Markup('<tr class="{}">{}</tr>').format(
            "shown" if change.shown else "",
            _cells(
                change.name,
                _number(change.before),
                _number(change.after),
                _signed(change.difference),
            )
            + Markup('<td class="bounds">{}</td>').format(_interval(change))
            + _cells(
                f"{change.n:,}",
                f"{change.p_value:.2g}",
                "" if change.detectable is None else _number(change.detectable),
            ),
        )
        for change in changes
    ]
    head = Markup("").join(Markup("<th>{}</th>").format(column) for column in columns)
    return Markup("<table><tr>{}</tr>{}</table>").format(head, Markup("").join(rows))


def _cells(*cells: str) -> Markup:
    return Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells)


def _interval(change: Change) -> str:
    if change.low is None or change.high is None:
        return ""
    return f"[{_signed(change.low)}, {_signed(change.high)}]"


@dataclass(frozen=True)
class _Curve:
    name: str
    unit: str
    points: list[tuple[int, float, float]]
    """Step, mean, and half the width of its interval."""
    lowest: float = -math.inf
    """Below which no value can be, and so no interval."""


def _charts(finding: Hacking, looks: Sequence[Look]) -> Markup:
    level = finding.confidence
    curves = [_curve("reward", "mean with its interval", looks, lambda look: look.reward, level)]
    if all(look.judge is not None for look in looks):
        curves.append(
            _curve("judge", "mean with its interval", looks, lambda look: look.judge, level)
        )
    measured = {look.step: form.measure(look.answers) for look in looks}
    curves += [
        _curve("KL", "nats an answer", looks, lambda look: look.kl, level),
        _curve("length", "tokens an answer", looks, lambda look: look.tokens, level, 0.0),
        _curve(
            "repetition",
            "share of 3-grams seen before",
            looks,
            lambda look: measured[look.step].repetition,
            level,
            0.0,
        ),
        _Curve(
            "distinct-2",
            "over all answers",
            [(look.step, form.distinct(look.answers, 2), 0.0) for look in looks],
        ),
    ]
    figures = [_figure(curve, finding.step) for curve in curves]
    return Markup(
        '<h2>Over the steps</h2><p class="note">All held-out prompts at each evaluation.'
        '<span class="key"></span>kept</p><div class="charts">{}</div>'
    ).format(Markup("").join(figures))


def _curve(
    name: str,
    unit: str,
    looks: Sequence[Look],
    values: Callable[[Look], np.ndarray | None],
    level: float,
    lowest: float = -math.inf,
) -> _Curve:
    points = []
    for look in looks:
        scores = np.asarray(values(look), np.float64)
        half = 0.0
        if len(scores) > 1:
            error = float(scores.std(ddof=1)) / math.sqrt(len(scores))
            half = float(stats.t.ppf(level, len(scores) - 1)) * error
        points.append((look.step, float(scores.mean()), half))
    return _Curve(name, unit, points, lowest)


def _figure(curve: _Curve, kept: int) -> Markup:
    lows = [max(mean - half, curve.lowest) for _, mean, half in curve.points]
    highs = [mean + half for _, mean, half in curve.points]
    marks = round_marks(min(lows), max(highs), most=4)
    last = max(step for step, _, _ in curve.points)
    x, y = _FRAME.across(0, max(last, 1)), _FRAME.up(marks[0], marks[-1])
    steps = [x(step) for step, _, _ in curve.points]
    up = list(zip(steps, map(y, highs), strict=True))
    down = list(zip(steps, map(y, lows), strict=True))
    shapes = [
        Markup('<polygon class="band" points="{}"/>').format(join_points([*up, *reversed(down)])),
        polyline("line", ((x(step), y(mean)) for step, mean, _ in curve.points)),
    ]
    dots = [
        dot(
            "kept" if step == kept else "dot",
            (x(step), y(mean)),
            5 if step == kept else 3,
            f"step {step}: {_number(mean)}",
        )
        for step, mean, _ in curve.points
    ]
    axes = [*_FRAME.rules(y, marks), *_FRAME.ticks(x, step_marks(last), str)]
    return Markup("<figure><figcaption>{}<span>{}</span></figcaption>{}</figure>").format(
        curve.name, curve.unit, _FRAME.svg(f"{curve.name} by step", [*axes, *shapes, *dots])
    )


def _answers(finding: Hacking, looks: Sequence[Look], prompts: Sequence[Messages]) -> Markup:
    seen = {look.step: look for look in looks}
    before, after = seen[0], seen[finding.step]
    order = _most_changed(before, after)
    judged = before.judge is not None and after.judge is not None
    columns = ["prompt", "before", "after", "reward", *(["judge"] if judged else [])]
    head = Markup("").join(
        Markup('<th class="{}">{}</th>').format("text" if place < 3 else "", column)
        for place, column in enumerate(columns)
    )
    rows = [_answer(before, after, prompts[number], number) for number in order]
    how = "Those whose reward changed most"
    if judged:
        how = "Those whose reward rose most against what the judge says, in standard deviations"
    return Markup(
        '<h2>The answers that changed most</h2><p class="note">{}; before training and at step {}, '
        "scores one above the other. All are in answers.parquet.</p>"
        '<table class="answers"><tr>{}</tr>{}</table>'
    ).format(how, finding.step, head, Markup("").join(rows))


def _most_changed(before: Look, after: Look) -> list[int]:
    """Positions of the answers to show, the most telling first."""
    reward = after.reward - before.reward
    order = np.abs(reward)
    if before.judge is not None and after.judge is not None:
        order = _standardised(reward) - _standardised(after.judge - before.judge)
    changed = [
        number for number in range(len(before)) if before.answers[number] != after.answers[number]
    ]
    return sorted(changed, key=lambda number: (-float(order[number]), number))[:_MOST_ANSWERS]


def _standardised(values: np.ndarray) -> np.ndarray:
    spread = float(values.std())
    return (values - values.mean()) / spread if spread else np.zeros(len(values))


def _answer(before: Look, after: Look, prompt: Messages, number: int) -> Markup:
    asked = prompt[-1].content if prompt else ""
    texts = [asked, before.answers[number], after.answers[number]]
    cells = [Markup('<td class="text"><div>{}</div></td>').format(_cut(text)) for text in texts]
    pairs = [(before.reward, after.reward)]
    if before.judge is not None and after.judge is not None:
        pairs.append((before.judge, after.judge))
    cells += [
        Markup("<td>{}<br>{}</td>").format(_number(float(old[number])), _number(float(new[number])))
        for old, new in pairs
    ]
    return Markup("<tr>{}</tr>").format(Markup("").join(cells))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ..."


def _number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+,.1f}" if abs(value) >= 10 else f"{value:+.3f}"
