"""What an evaluation, a watch and a verdict say: `results.json`, `watch.json`, `verdict.json`.

Imports nothing heavy: the command line reads these as well.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.errors import DataError
from posttrain.store.files import write_json

Outcome = Literal["pass", "fail", "not enough evidence"]

_MOST_NAMED = 3
"""Of the tasks that were asked differently."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _File(_Record):
    """A record that is a file of its own in an artifact."""

    FILE: ClassVar[str]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it from an artifact's folder.

        Raises:
            DataError: the folder has no such file, or none that this version can read.
        """
        path = folder / cls.FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{folder}: no {path.name} in it") from None
        except ValidationError as error:
            raise DataError(f"{path}: cannot be read by this version: {error}") from error

    def save(self, folder: Path) -> None:
        """Write it into an artifact's folder; equal records give equal bytes."""
        write_json(folder / self.FILE, self.model_dump(mode="json"))


def _empty(value: object) -> bool:
    return not value


def _is_base(value: object) -> bool:
    return value == "base"


class TaskResult(_Record):
    """One benchmark, as it was asked for: a task, or a group over its subtasks."""

    task: str
    metric: str
    """The metric that counts: `acc_norm` where there is one, else `acc`, else the first."""
    value: float
    """Mean over the items."""
    standard_error: float | None
    """Of `value`, over items; None for a single item."""
    n: int
    """Items answered."""
    higher_is_better: bool
    metrics: dict[str, float]
    """Means of all metrics that have a number for each item."""
    groups: dict[str, float]
    """Value of each subtask, for a group such as MMLU; empty otherwise."""


class PerplexityResult(_Record):
    """How well the model predicts held-out rows."""

    perplexity: float
    """exp(nats / tokens), so long rows weigh more."""
    nats_per_token: float
    bits_per_byte: float
    """Independent of the tokenizer, unlike perplexity."""
    rows: int
    tokens: int
    """Scored tokens: answers only for chats, everything for documents."""
    bytes: int
    """UTF-8 bytes that these tokens spell."""
    groups: Annotated[dict[str, PerplexityResult], Field(exclude_if=_empty)] = {}
    """By task, or by dataset of a mix, where there are several."""


class TaskSettings(_Record):
    """What was asked of one leaf task."""

    name: str
    version: str
    num_fewshot: int


class Settings(_Record):
    """All that has to be equal for two evaluations to be comparable."""

    lm_eval: str
    """Version of lm-eval."""
    tasks: tuple[TaskSettings, ...]
    limit: int | None
    seed: int
    dtype: str
    """Resolved precision of the weights."""
    questions_in_chat_template: bool
    chat_template: str | None
    """SHA-256 of the tokenizer's chat template."""
    perplexity_rows: int
    """Most held-out rows that were scored."""
    perplexity_max_length: int
    """Longest scored row, in tokens."""
    backend: str = "hf"
    """Who answered lm-eval."""
    test_sets: tuple[dict[str, Any], ...] = ()
    """As in the recipe, with the digests of their rows."""

    @property
    def digest(self) -> str:
        """SHA-256 over the settings."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: Settings) -> list[str]:
        """What differs, with both values, one line each; the first few of many tasks."""
        mine, theirs = self._by_name(), other._by_name()
        lines = []
        for key in mine:
            found = _differing(key, mine[key], theirs[key])
            lines += found[:_MOST_NAMED]
            if len(found) > _MOST_NAMED:
                lines.append(f"{key}: and {len(found) - _MOST_NAMED} more")
        return lines

    def _by_name(self) -> dict[str, Any]:
        """The same with tasks and test sets by their names."""
        return {
            **self.model_dump(exclude={"tasks", "test_sets"}),
            "tasks": {
                task.name: f"version {task.version}, {task.num_fewshot} examples"
                for task in self.tasks
            },
            "test_sets": {
                f"{one.get('dataset')}[{number}]": one for number, one in enumerate(self.test_sets)
            },
        }


def _differing(where: str, mine: Any, theirs: Any) -> list[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return [
            line
            for key in mine | theirs
            for line in _differing(f"{where}: {key}", mine.get(key), theirs.get(key))
        ]
    return [f"{where}: {mine!r} and {theirs!r}"] if mine != theirs else []


class EvaluationResults(_File):
    """Content of `results.json`."""

    FILE: ClassVar[str] = "results.json"

    tasks: tuple[TaskResult, ...]
    perplexity: PerplexityResult | None
    """On the dataset last trained on, or the one named."""
    settings: Settings
    settings_digest: str
    """Two evaluations are compared only where this is equal."""
    other_perplexities: Annotated[dict[str, PerplexityResult], Field(exclude_if=_empty)] = {}
    """On further datasets, by name."""


class WinRate(_File):
    """Content of `comparison.json`: how often a model's answers were preferred to another's."""

    FILE: ClassVar[str] = "comparison.json"

    candidate: str
    """Whose answers are judged: a stage's name."""
    opponent: str
    """Whose answers they are compared with: a stage's name, or `base`."""
    judge: str
    """Who compared: such as `people (2)`, `model NAME`, `endpoint MODEL`; empty where nobody has
    yet, and only sheets were written."""
    scores: tuple[float, ...]
    """By prompt: 1 where the candidate's answer is preferred, 0 where the opponent's is, 0.5 for a
    tie or where the judge changed its mind with the order; means over raters."""
    win_rate: float | None
    """Mean of `scores`; None without any."""
    low: float | None
    """95% interval."""
    high: float | None
    first_preferred: float | None
    """Share of decided votes for the answer shown first; 0.5 is unbiased."""
    consistent: float | None
    """Share of prompts on which the judge kept its mind with the order changed; None for people."""
    agreement: float | None
    """Cohen's kappa of the raters; None for one rater."""
    warnings: tuple[str, ...] = ()


Requirement = Literal["must_not_drop", "must_improve"]


class Check(_Record):
    """One benchmark, candidate against base. A positive difference is better."""

    task: str
    metric: str
    base: float
    candidate: float
    difference: float
    low: float
    """One-sided lower bound of the difference, at the verdict's confidence."""
    high: float
    """One-sided upper bound."""
    n: int
    p_worse: float
    """One-sided p-value against "the drop is at most `max_drop`"."""
    mcnemar_p: float | None
    """Two-sided exact p-value of "equally often right"; None where scores are not right/wrong."""
    smallest_detectable_drop: float
    """Drop that this many items show with a chance of 80%."""
    items_needed: int | None
    """Items that would probably settle an open check; None when settled, or out of reach."""
    verdict: Outcome
    sentence: str
    """The check in words."""
    requirement: Requirement = "must_not_drop"
    max_drop: float = 0.02
    """The drop that had to be ruled out; with `must_improve` 0."""


class PerplexityCheck(_Record):
    """Held-out perplexity, candidate against base, paired by row."""

    requirement: Literal["must_improve", "must_not_rise"]
    base: float
    """Perplexity of the base; bits a byte where that is the `unit`."""
    candidate: float
    difference: float
    """Nats a token, or bits a byte, by which the candidate is better."""
    low: float | None
    """One-sided lower bound; None with too few rows for one."""
    high: float | None
    rows: int
    p_worse: float
    verdict: Outcome
    sentence: str
    dataset: str = ""
    """Name of the dataset; empty for the one that the evaluation is about."""
    unit: Literal["token", "byte"] = "token"
    """What `difference` is by: `byte` where the two models' tokenizers differ."""
    smallest_detectable_rise: float | None = None
    """Rise of perplexity, as a share, that this many rows show with a chance of 80%."""
    rows_needed: int | None = None
    """Rows that would probably settle an open check; None when settled, or out of reach."""


class WinRateCheck(_Record):
    """The share of prompts on which the candidate's answers were preferred."""

    judge: str
    opponent: str
    prompts: int
    win_rate: float | None
    low: float | None
    """One-sided lower bound, at the verdict's confidence."""
    high: float | None
    required: float
    """To be exceeded."""
    prompts_needed: int | None
    """Prompts that would probably settle an open check."""
    verdict: Outcome
    sentence: str
    p_worse: float = 1.0
    """One-sided p-value against "the win rate is at least `required`"."""
    smallest_detectable: float | None = None
    """Win rate that this many prompts show to exceed `required` with a chance of 80%."""


class Versus(_Record):
    """Candidate against the present champion: the same checks as against the base."""

    opponent: str
    """Such as `champion python-assistant v3`."""
    verdict: Outcome
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    perplexities: tuple[PerplexityCheck, ...]
    """On the dataset trained on first, then on the others."""
    improvement: str = ""
    """With `against_champion: must_improve`, what the mean over all tasks shows, in words."""


class Change(_Record):
    """A number before training and at the kept step, paired by prompt or by item."""

    name: str
    """A term of the watch such as `reward` or `length`, or a benchmark's task."""
    before: float
    after: float
    difference: float
    """After minus before, in the number's own unit."""
    low: float | None
    """One-sided lower bound of the difference; None where no interval is known."""
    high: float | None
    n: int
    """Prompts, or items of a benchmark."""
    p_value: float
    """One-sided, against "it has not moved in the direction that is looked for"."""
    shown: bool
    """Whether it has, after the correction for several."""
    detectable: float | None
    """Change that this many show with a chance of 80%; None where it is not known."""
    sentence: str
    """The change in words."""


class Hacking(_File):
    """Content of `watch.json`: whether the reward rose while an independent signal fell."""

    FILE: ClassVar[str] = "watch.json"

    flagged: bool
    """Whether both are shown."""
    audited: bool
    """Whether there was an independent signal to hold against the reward."""
    text: str
    """The finding in words: `flagged: ...`, `not flagged: ...` or `not audited: ...`."""
    step: int
    """Optimizer step of the weights that are kept."""
    confidence: float
    reward: Change
    signals: tuple[Change, ...]
    """What the reward has no part in: benchmarks, and the judge."""
    style: tuple[Change, ...]
    """Length, repetition and what else is measured of the answers' form."""
    warnings: tuple[str, ...]
    """What moved in the form of the answers; none of it is a flag by itself."""


class Watched(_Record):
    """What the watch of one stage found."""

    step: str
    """The stage."""
    hacking: Hacking

    @property
    def sentence(self) -> str:
        """Such as `ppo: flagged: the reward rose while ...`."""
        return f"{self.step}: {self.hacking.text}"


class Comparison(_Record):
    """The best of several candidates against another one that passes."""

    best: str
    other: str
    difference: float
    """By which the best one is better: mean over the tasks, or nats a token without tasks."""
    low: float
    high: float
    better: bool
    """Whether it is shown to be better."""
    sentence: str


class Verdict(_File):
    """Content of `verdict.json`."""

    FILE: ClassVar[str] = "verdict.json"

    verdict: Outcome
    reasons: tuple[str, ...]
    """What decided: the failed checks, else the open ones, else all of them."""
    checks: tuple[Check, ...]
    """Of several candidates: of the chosen one, or of the first where none passes."""
    perplexity: PerplexityCheck | None
    max_drop: float
    confidence: float
    """Of each bound. Of several candidates it is raised for their number."""
    watched: Annotated[tuple[Watched, ...], Field(exclude_if=_empty)] = ()
    """What was found by the stages that learned from rewards."""
    choice: Annotated[str | None, Field(exclude_if=_empty)] = None
    """Of several candidates: the one to go on with, if one passes."""
    candidates: Annotated[dict[str, Verdict], Field(exclude_if=_empty)] = {}
    """Of several candidates: what is said of each, by its name."""
    comparisons: Annotated[tuple[Comparison, ...], Field(exclude_if=_empty)] = ()
    """Of several candidates: the best one that passes against the others."""
    other_perplexities: Annotated[tuple[PerplexityCheck, ...], Field(exclude_if=_empty)] = ()
    """On further datasets."""
    against: Annotated[str, Field(exclude_if=_is_base)] = "base"
    """What the candidates are compared with: an `evaluate` stage, or `base`."""
    win_rate: Annotated[WinRateCheck | None, Field(exclude_if=_empty)] = None
    champion: Annotated[Versus | None, Field(exclude_if=_empty)] = None


def three_digits(value: float) -> str:
    """A positive number for reading: `9.81`, `12.3`, `1,234`."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}"
