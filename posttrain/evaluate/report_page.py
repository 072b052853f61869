"""`report.html`: what a gate says and everything behind it, or two models side by side.

One file, no script, nothing from elsewhere, and equal inputs give equal bytes. Its size is bounded:
of every list the most telling part is shown, of every text the beginning; the evaluations' own
files have all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, StrictUndefined, Template

from posttrain.evaluate.page import charts, text
from posttrain.evaluate.page.differences import (
    Against,
    Difference,
    PerplexityDifference,
    compute,
    from_verdict,
    from_versus,
)
from posttrain.evaluate.page.flips import MOST, flips
from posttrain.evaluate.page.measured import Measured, Value
from posttrain.evaluate.page.subjects import by_subject
from posttrain.evaluate.results import (
    Outcome,
    PerplexityResult,
    Settings,
    Verdict,
    WinRate,
    three_digits,
)
from posttrain.train.history import History

REPORT_PAGE = "report.html"

_MOST_SAMPLES = 10
_SAMPLE = 1_200
"""Characters shown of a prompt or an answer."""
_MOST_NAMES = 8
_CHAMPION = "champion"


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
    champion = next((one for one in others if one.label.startswith(_CHAMPION)), None)
    candidates = [one for one in others if one is not champion]
    if not candidates:
        raise ValueError("no candidate among the evaluations")
    said = _of_candidates(verdict, candidates)
    focus = next((one for one in candidates if one.label == verdict.choice), candidates[0])
    ordered = [focus, *(one for one in candidates if one is not focus)]
    against = [one for each in ordered for one in _against(base, champion, each, said[each.label])]
    return _render(
        _Compared(measured, base, focus, champion, against),
        verdict=verdict,
        trained=trained,
        comparisons=comparisons,
    )


def comparison_report(
    evaluations: Mapping[str, Path], *, max_drop: float = 0.02, confidence: float = 0.95
) -> str:
    """The page of two models that no gate decides on.

    Args:
        evaluations: Folders of two evaluations by label, the one that is compared with first.
        max_drop: The drop that is drawn as a margin.
        confidence: Of each one-sided bound.

    Raises:
        DataError: one of them cannot be read, or they were not made alike.
    """
    before, after = (Measured.read(label, folder) for label, folder in evaluations.items())
    against = [compute(before, after, max_drop=max_drop, confidence=confidence)]
    return _render(_Compared([before, after], before, after, None, against))


@dataclass(frozen=True)
class _Compared:
    """What the page is about."""

    measured: Sequence[Measured]
    before: Measured
    after: Measured
    """The candidate whose subjects, items and answers are shown."""
    champion: Measured | None
    against: Sequence[Against]
    """Each candidate against base and champion, those of `after` first."""

    @property
    def of_after(self) -> list[Against]:
        """Those of the candidate that is shown."""
        return [one for one in self.against if one.after == self.after.label]


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
    compared: _Compared,
    verdict: Verdict | None = None,
    trained: Mapping[str, Path] | None = None,
    comparisons: Mapping[str, Path] | None = None,
) -> str:
    before, after = compared.before, compared.after
    parts: dict[str, object] = {
        "differences": [
            (one, _forests(one, compared)) for one in compared.against if one.differences
        ],
        "values": _values(compared),
        "subjects": [
            (one, charts.dumbbells(one.subjects))
            for one in by_subject(before, after, compared.champion)
        ],
        "perplexity": _perplexities(compared),
        "preferences": _win_rates(comparisons or {}),
        "watch": _watched(verdict),
        "training": _curves(trained or {}),
        "items": flips(before, after),
        "samples": _samples(compared),
        "settings": _settings(after.results.settings),
    }
    return _template().render(
        verdict=verdict,
        compared=compared,
        sections={name: title for name, title in _SECTIONS.items() if parts[name]},
        candidates=_candidates(verdict),
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


@dataclass(frozen=True)
class _Candidate:
    """One of several candidates in a line."""

    name: str
    outcome: Outcome
    chosen: bool
    mean: float | None
    """Of the differences to the base over all tasks."""
    reasons: tuple[str, ...]


def _candidates(verdict: Verdict | None) -> list[_Candidate]:
    return [
        _Candidate(
            name=name,
            outcome=one.verdict,
            chosen=name == verdict.choice,
            mean=fmean(check.difference for check in one.checks) if one.checks else None,
            reasons=one.reasons,
        )
        for name, one in (verdict.candidates if verdict else {}).items()
    ]


@dataclass(frozen=True)
class _Forest:
    """Differences that are drawn to one scale."""

    title: str
    differences: list[Difference]
    plot: charts.Plot


def _forests(against: Against, compared: _Compared) -> list[_Forest]:
    """Test sets apart from benchmarks: what one gains there would flatten what is lost here."""
    tests = compared.before.test_sets
    parts = {
        "Benchmarks": [one for one in against.differences if one.task not in tests],
        "Test sets": [one for one in against.differences if one.task in tests],
    }
    return [_Forest(title, part, charts.forest(part)) for title, part in parts.items() if part]


@dataclass(frozen=True)
class _Values:
    """Rows of the table of scores under one heading."""

    title: str
    rows: list[tuple[str, str, int, list[Value | None]]]
    """Task, metric, items, and the value of each evaluation."""


def _values(compared: _Compared) -> list[_Values]:
    tests = compared.before.test_sets
    rows = [
        (name, task.metric, task.n, [one.value(name) for one in compared.measured])
        for name, task in compared.before.tasks.items()
    ]
    parts = [
        _Values("Benchmarks", [row for row in rows if row[0] not in tests]),
        _Values("Test sets", [row for row in rows if row[0] in tests]),
    ]
    return [part for part in parts if part.rows]


@dataclass(frozen=True)
class _Perplexity:
    """One line of the table of perplexities."""

    dataset: str
    group: str
    rows: int
    results: list[PerplexityResult | None]
    """Of each evaluation."""
    differences: list[PerplexityDifference | None]
    """Of the candidate that is shown, to base and champion."""


def _perplexities(compared: _Compared) -> list[_Perplexity]:
    found = []
    for (dataset, group), result in compared.after.perplexities.items():
        rows = compared.after.of_group(dataset, "").rows
        named = next((row.dataset for row in rows if row.dataset), dataset)
        found.append(
            _Perplexity(
                dataset=named or "held-out rows",
                group=group,
                rows=result.rows,
                results=[one.perplexities.get((dataset, group)) for one in compared.measured],
                differences=[
                    next(
                        (p for p in one.perplexities if (p.dataset, p.group) == (dataset, group)),
                        None,
                    )
                    for one in compared.of_after
                ],
            )
        )
    return found


@dataclass(frozen=True)
class _Preferred:
    """One blind comparison."""

    rate: WinRate
    won: int
    tied: int
    lost: int


def _win_rates(comparisons: Mapping[str, Path]) -> list[_Preferred]:
    found = []
    for folder in comparisons.values():
        rate = WinRate.load(folder)
        won = sum(score > 0.5 for score in rate.scores)
        lost = sum(score < 0.5 for score in rate.scores)
        found.append(_Preferred(rate, won, len(rate.scores) - won - lost, lost))
    return found


def _watched(verdict: Verdict | None) -> list[tuple[str, object]]:
    """Each stage that learned from rewards once, with what its watch found."""
    if verdict is None:
        return []
    every = [verdict, *verdict.candidates.values()]
    return list({one.step: one.hacking for said in every for one in said.watched}.items())


def _curves(trained: Mapping[str, Path]) -> list[charts.Curves]:
    drawn = [
        charts.curves(stage, History.read(folder))
        for stage, folder in trained.items()
        if (folder / "training.json").exists()
    ]
    return [one for one in drawn if one is not None]


@dataclass(frozen=True)
class _Answers:
    """One prompt and what each model answers."""

    prompt: str
    answers: list[tuple[str, str]]
    """Label and answer."""
    reference: str


def _samples(compared: _Compared) -> list[_Answers]:
    by_id = [(one.label, {s.id: s for s in one.samples}) for one in compared.measured]
    return [
        _Answers(
            prompt=text.cut(sample.prompt, _SAMPLE),
            answers=[
                (label, text.cut(answers[sample.id].answer, _SAMPLE))
                for label, answers in by_id
                if sample.id in answers
            ],
            reference=text.cut(sample.reference, _SAMPLE),
        )
        for sample in compared.after.samples[:_MOST_SAMPLES]
    ]


def _settings(settings: Settings) -> list[tuple[str, str]]:
    """Name and value of all that two evaluations have to have in common."""
    shots: dict[tuple[int, str], list[str]] = {}
    for task in settings.tasks:
        shots.setdefault((task.num_fewshot, task.version), []).append(task.name)
    said = [
        ("Examples before each question", f"{count}, in {_listed(names)} (version {version})")
        for (count, version), names in shots.items()
    ]
    limit = "all" if settings.limit is None else f"{settings.limit:,} a task or subject"
    template = settings.chat_template
    said += [
        ("Items", f"{limit}; seed {settings.seed}"),
        ("lm-eval", f"{settings.lm_eval}, answered by {settings.backend}"),
        ("Precision of the weights", settings.dtype),
        ("Questions in the chat template", "yes" if settings.questions_in_chat_template else "no"),
        ("Chat template", f"SHA-256 {template[:16]}" if template else "none"),
        (
            "Held-out rows",
            f"at most {settings.perplexity_rows:,} of {settings.perplexity_max_length:,} tokens",
        ),
    ]
    for one in settings.test_sets:
        metrics = ", ".join(map(str, one.get("metrics", ())))
        said.append((f"Test set {one.get('dataset', '')}", metrics))
    return said


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


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
    source = files("posttrain.evaluate.page").joinpath("report.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8"))
