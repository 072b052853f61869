"""What the page's tables say, before it is HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from posttrain.evaluate.page import charts, text
from posttrain.evaluate.page.differences import Against, Difference, PerplexityDifference
from posttrain.evaluate.page.measured import Measured, Value
from posttrain.evaluate.results import (
    Hacking,
    Outcome,
    PerplexityResult,
    Settings,
    Verdict,
    WinRate,
)
from posttrain.train.history import History

_MOST_SAMPLES = 10
_SAMPLE = 1_200
"""Characters shown of a prompt or an answer."""
_MOST_NAMES = 8


@dataclass(frozen=True)
class Compared:
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


@dataclass(frozen=True)
class CandidateLine:
    """One of several candidates in a line."""

    name: str
    outcome: Outcome
    chosen: bool
    mean: float | None
    """Of the differences to the base over all tasks."""
    reasons: tuple[str, ...]


def candidate_lines(verdict: Verdict | None) -> list[CandidateLine]:
    """Several candidates; none where there is one, or no gate."""
    if verdict is None:
        return []
    return [
        CandidateLine(
            name=name,
            outcome=one.verdict,
            chosen=name == verdict.choice,
            mean=fmean(check.difference for check in one.checks) if one.checks else None,
            reasons=one.reasons,
        )
        for name, one in verdict.candidates.items()
    ]


@dataclass(frozen=True)
class Forest:
    """Differences that are drawn to one scale."""

    title: str
    differences: list[Difference]
    plot: charts.Plot


def forests(against: Against, compared: Compared) -> list[Forest]:
    """Test sets apart from benchmarks: what one gains there would flatten what is lost here."""
    tests = compared.before.test_sets
    parts = {
        "Benchmarks": [one for one in against.differences if one.task not in tests],
        "Test sets": [one for one in against.differences if one.task in tests],
    }
    return [Forest(title, part, charts.forest(part)) for title, part in parts.items() if part]


@dataclass(frozen=True)
class Values:
    """Rows of the table of scores under one heading."""

    title: str
    rows: list[tuple[str, str, int, list[Value | None]]]
    """Task, metric, items, and the value of each evaluation."""


def values(compared: Compared) -> list[Values]:
    """Benchmarks, then test sets."""
    tests = compared.before.test_sets
    rows = [
        (name, task.metric, task.n, [one.value(name) for one in compared.measured])
        for name, task in compared.before.tasks.items()
    ]
    parts = [
        Values("Benchmarks", [row for row in rows if row[0] not in tests]),
        Values("Test sets", [row for row in rows if row[0] in tests]),
    ]
    return [part for part in parts if part.rows]


@dataclass(frozen=True)
class PerplexityLine:
    """One line of the table of perplexities."""

    dataset: str
    group: str
    rows: int
    results: list[PerplexityResult | None]
    """Of each evaluation."""
    differences: list[PerplexityDifference | None]
    """Of the candidate that is shown, to base and champion."""


def perplexities(compared: Compared) -> list[PerplexityLine]:
    """Of each dataset and its groups."""
    found = []
    for (dataset, group), result in compared.after.perplexities.items():
        rows = compared.after.of_group(dataset, "").rows
        named = next((row.dataset for row in rows if row.dataset), dataset)
        found.append(
            PerplexityLine(
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
class Preferred:
    """One blind comparison."""

    rate: WinRate
    won: int
    tied: int
    lost: int


def win_rates(comparisons: Mapping[str, Path]) -> list[Preferred]:
    """Of each blind comparison.

    Raises:
        DataError: a folder holds none that this version can read.
    """
    found = []
    for folder in comparisons.values():
        rate = WinRate.load(folder)
        won = sum(score > 0.5 for score in rate.scores)
        lost = sum(score < 0.5 for score in rate.scores)
        found.append(Preferred(rate, won, len(rate.scores) - won - lost, lost))
    return found


def watched(verdict: Verdict | None) -> list[tuple[str, Hacking]]:
    """Each stage that learned from rewards once, with what its watch found."""
    if verdict is None:
        return []
    every = [verdict, *verdict.candidates.values()]
    return list({one.step: one.hacking for said in every for one in said.watched}.items())


def training_curves(trained: Mapping[str, Path]) -> list[charts.Curves]:
    """Of each stage that trained; others, such as a merge, leave no losses."""
    drawn = [
        charts.curves(stage, History.read(folder))
        for stage, folder in trained.items()
        if (folder / "training.json").exists()
    ]
    return [one for one in drawn if one is not None]


@dataclass(frozen=True)
class Answers:
    """One prompt and what each model answers."""

    prompt: str
    answers: list[tuple[str, str]]
    """Label and answer."""
    reference: str


def samples(compared: Compared) -> list[Answers]:
    """The first prompts that the candidate answered."""
    by_id = [(one.label, {s.id: s for s in one.samples}) for one in compared.measured]
    return [
        Answers(
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


def settings_lines(settings: Settings) -> list[tuple[str, str]]:
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
