"""`report.html`: what a gate says and everything behind it, or two models side by side.

One file, no script, nothing from elsewhere, and equal inputs give equal bytes. Its size is bounded:
of every list the most telling part is shown, of every text the beginning; the evaluations' own
files have all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from posttrain.evaluate.page import charts, tables, text
from posttrain.evaluate.page.differences import (
    BOTH_SIDES,
    Against,
    compute,
    from_verdict,
    from_versus,
)
from posttrain.evaluate.page.flips import MOST, flips
from posttrain.evaluate.page.measured import Measured
from posttrain.evaluate.page.subjects import by_subject
from posttrain.evaluate.page.tables import Compared
from posttrain.evaluate.results import Verdict, three_digits

REPORT_PAGE = "report.html"

_CHAMPION = "champion"
_PACKAGE = files("posttrain.evaluate.page")


def gate_report(
    verdict: Verdict,
    evaluations: Mapping[str, Path],
    trained: Mapping[str, Path],
    comparisons: Mapping[str, Path],
) -> str:
    """The page of a gate.

    Args:
        verdict: What it says.
        evaluations: Folders of the evaluations by label, in order: the base; the champion, if
            there is one, its label beginning with `champion`; the candidates, of several each
            under its name in the verdict.
        trained: Folders that training stages left, by the stage's name.
        comparisons: Folders of blind comparisons by name.

    Raises:
        DataError: one of them cannot be read, or two evaluations hold different items.
        ValueError: there is no candidate among the evaluations.
    """
    measured = [Measured.read(label, folder) for label, folder in evaluations.items()]
    base, *others = measured
    champion = next(
        (
            one
            for one in others
            if one.label.startswith(_CHAMPION) and one.label not in verdict.candidates
        ),
        None,
    )
    candidates = [one for one in others if one is not champion]
    if not candidates:
        raise ValueError("no candidate among the evaluations")
    said = _of_candidates(verdict, candidates)
    focus = next((one for one in candidates if one.label == verdict.choice), candidates[0])
    ordered = [focus, *(one for one in candidates if one is not focus)]
    against = [one for each in ordered for one in _against(base, champion, each, said[each.label])]
    return _render(
        Compared(measured, base, focus, champion, against),
        verdict=verdict,
        trained=trained,
        comparisons=comparisons,
    )


def comparison_report(
    evaluations: Mapping[str, Path], *, max_drop: float = 0.02, confidence: float = BOTH_SIDES
) -> str:
    """The page of two models that no gate decides on.

    Args:
        evaluations: Folders of two evaluations by label, the one that is compared with first.
        max_drop: The drop that is drawn as a margin.
        confidence: Of each bound.

    Raises:
        DataError: one of them cannot be read, or they were not made alike.
    """
    before, after = (Measured.read(label, folder) for label, folder in evaluations.items())
    against = [compute(before, after, max_drop=max_drop, confidence=confidence)]
    return _render(Compared([before, after], before, after, None, against))


def _of_candidates(verdict: Verdict, candidates: Sequence[Measured]) -> dict[str, Verdict]:
    """What is said of each candidate, by its label.

    Raises:
        ValueError: the verdict names no candidate of that label.
    """
    if not verdict.candidates and len(candidates) == 1:
        return {candidates[0].label: verdict}
    unknown = [one.label for one in candidates if one.label not in verdict.candidates]
    if unknown:
        raise ValueError(f"the verdict says nothing of {', '.join(unknown)}")
    return {one.label: verdict.candidates[one.label] for one in candidates}


def _against(
    base: Measured, champion: Measured | None, candidate: Measured, verdict: Verdict
) -> list[Against]:
    found = [from_verdict(base, candidate, verdict)]
    if verdict.champion is not None:
        found.append(from_versus(champion, candidate, verdict.champion, verdict.confidence))
    return found


def _render(
    compared: Compared,
    verdict: Verdict | None = None,
    trained: Mapping[str, Path] | None = None,
    comparisons: Mapping[str, Path] | None = None,
) -> str:
    before, after = compared.before, compared.after
    parts: dict[str, object] = {
        "differences": [
            (one, tables.forests(one, compared)) for one in compared.against if one.differences
        ],
        "values": tables.values(compared),
        "subjects": [
            (one, charts.dumbbells(one.subjects))
            for one in by_subject(before, after, compared.champion)
        ],
        "perplexity": tables.perplexities(compared),
        "preferences": tables.win_rates(comparisons or {}),
        "watch": tables.watched(verdict),
        "training": tables.training_curves(trained or {}),
        "items": flips(before, after),
        "samples": tables.samples(compared),
        "settings": tables.settings_lines(after.results.settings),
    }
    return _template().render(
        verdict=verdict,
        compared=compared,
        style=_style(),
        sections={name: title for name, title in _SECTIONS.items() if parts[name]},
        candidates=tables.candidate_lines(verdict),
        most=MOST,
        **parts,
    )


_SECTIONS = {
    "differences": "Differences",
    "values": "Scores",
    "subjects": "Subjects",
    "perplexity": "Perplexity",
    "preferences": "Preferred answers",
    "watch": "Reward hacking",
    "training": "Training",
    "items": "Items that turned",
    "samples": "Samples",
    "settings": "Settings",
}


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "breakable": text.breakable,
        "count": "{:,}".format,
        "level": lambda value: f"{100 * value:.4g}%",
        "name": lambda value: text.cut(str(value), 160),
        "p": text.p_value,
        "pair": lambda low_high: text.bounds(*low_high),
        "perplexity": three_digits,
        "prose": lambda value: text.cut(str(value), 2_000),
        "score": "{:.3f}".format,
        "share": "{:.0%}".format,
        "signed": text.signed,
    }
    environment.globals |= {"key": charts.key, "share_bar": charts.share_bar}
    environment.globals["win_interval"] = charts.win_interval
    source = _PACKAGE.joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


@cache
def _style() -> Markup:
    return Markup(_PACKAGE.joinpath("report.css").read_text(encoding="utf-8"))
