"""`loss.html`: how the loss fell, as a page without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from markupsafe import Markup

from posttrain.store.files import write_bytes
from posttrain.train.history import History

LOSS_PAGE = "loss.html"

_WIDTH, _HEIGHT = 860, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 16, 36
_MOST_POINTS = 800
"""Points of a line; more than there are pixels show nothing more."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #66707d; --rule: #d9dee5;
  --train: #9fb3c8; --held: #0b63c4; --best: #c2410c; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a2b0; --rule: #333b46;
  --train: #54687e; --held: #6cb2ff; --best: #ff9d5c; --paper: #14181d; } }
body { margin: 2rem auto; max-width: 900px; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; } p { color: var(--soft); margin: 0 0 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.rule { stroke: var(--rule); } .train { stroke: var(--train); fill: none; }
.held { stroke: var(--held); stroke-width: 2; fill: none; } .dot { fill: var(--held); }
.best { fill: var(--best); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--rule); }
.key { display: inline-block; width: 1.4em; height: 3px; vertical-align: middle;
  margin: 0 .3em 0 1em; }
"""


def write_loss_page(
    history: History, title: str, path: Path, unit: str = "Nats a trained token"
) -> None:
    """Draw training and held-out loss over the steps, and list the evaluations.

    Args:
        history: The run.
        title: Of the page.
        path: File to write.
        unit: What the loss is, as the beginning of a sentence.
    """
    page = Markup(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>{title}</title>'
        "<style>{style}</style><h1>{title}</h1>"
        "<p>{unit} over optimizer steps."
        '<span class="key" style="background: var(--train)"></span>training'
        '<span class="key" style="background: var(--held)"></span>held-out'
        '<span class="key" style="background: var(--best)"></span>kept</p>{chart}{table}</html>\n'
    ).format(
        title=title, style=Markup(_STYLE), unit=unit, chart=_chart(history), table=_table(history)
    )
    write_bytes(path, page.encode())


def _chart(history: History) -> Markup:
    training = [(step.step, step.loss) for step in history.steps]
    held_out = [(evaluation.step, evaluation.loss) for evaluation in history.held_out]
    last = max(step for step, _ in [*training, *held_out])
    losses = [loss for _, loss in [*training, *held_out]]
    marks = _marks(min(losses), max(losses))
    low, high = marks[0], marks[-1]

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(last, 1)

    def y(loss: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - loss) / (high - low)

    rules = [
        Markup(
            '<line class="rule" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
            '<text x="{3}" y="{4:.1f}" text-anchor="end">{5:g}</text>'
        ).format(_LEFT, _WIDTH - _RIGHT, y(mark), _LEFT - 8, y(mark) + 4, mark)
        for mark in marks
    ]
    ticks = [
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            x(step), _HEIGHT - 12, step
        )
        for step in sorted({round(last * part / 4) for part in range(5)})
    ]
    best = history.best
    dots = [
        Markup(
            '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>'
        ).format(
            "best" if step == best.step else "dot",
            x(step),
            y(loss),
            5 if step == best.step else 3,
            f"step {step}: {loss:.4f}",
        )
        for step, loss in held_out
    ]
    lines = [_line("train", _thinned(training), x, y), _line("held", held_out, x, y)]
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="loss by step">{}</svg>').format(
        _WIDTH, _HEIGHT, Markup("").join([*rules, *ticks, *lines, *dots])
    )


def _line(
    kind: str,
    points: Iterable[tuple[float, float]],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> Markup:
    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    return Markup('<polyline class="{}" points="{}"/>').format(kind, path)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means over neighbouring steps, where there are more than can be seen."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(step for step, _ in group) / len(group), sum(loss for _, loss in group) / len(group))
        for group in groups
    ]


def _marks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from below `low` to above `high`."""
    span = max(high - low, 1e-6)
    power = 10.0**-12
    while span / power > 60:
        power *= 10
    step = next(power * times for times in (1, 2, 5, 10) if span / (power * times) <= 6)
    first, last = int(low // step), int(-(-high // step))
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _table(history: History) -> Markup:
    tasks = list(history.held_out[0].tasks)
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in ("step", "loss", *tasks))
    rows = [
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup("<td>{}</td>").format(cell)
                for cell in (
                    f"{evaluation.step}{' (kept)' if evaluation.step == history.best.step else ''}",
                    f"{evaluation.loss:.4f}",
                    *(f"{evaluation.tasks[task]:.4f}" for task in tasks),
                )
            )
        )
        for evaluation in history.held_out
    ]
    return Markup("<h2>Held-out loss</h2><table><tr>{}</tr>{}</table>").format(
        head, Markup("").join(rows)
    )
