"""`loss.html`: how the loss fell, as a page without anything from elsewhere."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from posttrain.charts import Frame, dot, polyline, round_marks, step_marks, thinned
from posttrain.store.files import write_bytes
from posttrain.train.history import History

LOSS_PAGE = "loss.html"

_FRAME = Frame(width=860, height=340, left=56, right=16, top=16, bottom=36)
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
    marks = round_marks(min(losses), max(losses), most=6)
    x, y = _FRAME.across(0, max(last, 1)), _FRAME.up(marks[0], marks[-1])
    best = history.best
    dots = [
        dot(
            "best" if step == best.step else "dot",
            (x(step), y(loss)),
            5 if step == best.step else 3,
            f"step {step}: {loss:.4f}",
        )
        for step, loss in held_out
    ]
    lines = [
        polyline(kind, ((x(step), y(loss)) for step, loss in points))
        for kind, points in (("train", thinned(training, _MOST_POINTS)), ("held", held_out))
    ]
    axes = [*_FRAME.rules(y, marks), *_FRAME.ticks(x, step_marks(last), str)]
    return _FRAME.svg("loss by step", [*axes, *lines, *dots])


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
