"""Test sets of the user's own: prompts with reference answers, and what is measured of the answers.

Each metric of a test set becomes a task of the evaluation, named `DATASET:METRIC`, with a score in
[0, 1] for every item, more is better: so the gate pairs it like any benchmark.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    WrapSerializer,
    field_validator,
    model_validator,
)

from posttrain.recipe.base import Strict, unhashed

TESTS = "tests:"
"""Begins the inputs of `evaluate` that hold the rows of a test set; then comes the dataset."""


class MetricConfig(Strict):
    """What all metrics share. A subclass's `metric` literal is what a recipe writes."""

    metric: str
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.@-]*$")] | None = None
    """What the metric is called in results and gate. Needed only where two of one test set would
    have the same name."""

    @property
    def title(self) -> str:
        """Name of the scores: what the recipe says, or what the metric is."""
        return self.name or self.default_title

    @property
    def default_title(self) -> str:
        """Name of the scores where the recipe gives none."""
        return self.metric


def _group(value: str | None) -> str | None:
    """A pattern whose one group is what counts."""
    if value is not None and _compiled(value).groups != 1:
        raise ValueError(f"`{value}` needs one group, in round brackets, around what counts")
    return value


def _pattern(value: str) -> str:
    _compiled(value)
    return value


def _compiled(value: str) -> Any:
    import regex  # type: ignore[import-untyped]

    try:
        return regex.compile(value)
    except regex.error as error:
        raise ValueError(f"`{value}` is no regular expression: {error}") from None


Extract: TypeAlias = Annotated[str | None, BeforeValidator(_group)]


class ExactMatch(MetricConfig):
    """1 where the answer is the reference. Runs of white space count as one space."""

    metric: Literal["exact_match"] = "exact_match"
    ignore_case: bool = False
    """Upper and lower case count as the same."""
    ignore_punctuation: bool = False
    """Punctuation marks and other symbols do not count."""
    extract: Extract = None
    """Regular expression with one group: only what it finds last is compared, such as
    `Answer: (.*)`. An answer without it is wrong; a reference without it stands as it is."""


class Numbers(MetricConfig):
    """1 where the last number of the answer is the last number of the reference, as in GSM8K."""

    metric: Literal["numbers"] = "numbers"
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """How far the two may lie apart."""


class Regex(MetricConfig):
    """1 where the answer matches a pattern. The reference does not count."""

    metric: Literal["regex"] = "regex"
    pattern: Annotated[str, BeforeValidator(_pattern)]
    """Regular expression, as Python's `re` and `regex` write them."""
    full: bool = False
    """The whole answer must match, and not only a part of it."""
    ignore_case: bool = False
    """Upper and lower case count as the same."""


class Labels(MetricConfig):
    """Whether the answer names the reference's label: accuracy, precision, recall and F1."""

    metric: Literal["labels"] = "labels"
    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)]
    """All labels. Case does not count."""
    extract: Extract = None
    """Regular expression with one group that holds the label, or the labels, such as
    `Category: (.*)`. Default: the whole answer is searched for the choices."""
    multi: bool = False
    """An answer may have several labels: its score is then the F1 of its labels against the
    reference's. Without it an answer that names several has none."""
    average: Literal["macro", "micro", "weighted"] = "macro"
    """How precision, recall and F1 are averaged over the labels. `macro`: all labels count the
    same. `micro`: all answers do. `weighted`: labels count by how often they are right."""

    @field_validator("choices")
    @classmethod
    def _choices_differ(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        if len({choice.casefold().strip() for choice in choices}) < len(choices):
            raise ValueError("two choices are the same but for case")
        return choices


class Rouge(MetricConfig):
    """Overlap of words with the reference, as F1 (Lin, 2004, aclanthology.org/W04-1013)."""

    metric: Literal["rouge"] = "rouge"
    type: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"
    """Single words, pairs of words, the longest common sequence of words, or that of each line."""
    stemmer: bool = False
    """Count words with the same stem as the same (Porter); for English only."""

    @property
    def default_title(self) -> str:
        """Such as `rouge_l`."""
        return {"rougeL": "rouge_l", "rougeLsum": "rouge_lsum"}.get(self.type, self.type)


class Bleu(MetricConfig):
    """Precision of runs of 1 to 4 words (Papineni et al., 2002, aclanthology.org/P02-1040)."""

    metric: Literal["bleu"] = "bleu"
    tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """What a word is, by sacreBLEU's names. `13a`: as in most papers. `intl`: by Unicode. `zh`: for
    Chinese. `char`: single characters. `none`: what spaces divide."""
    ignore_case: bool = False
    """Upper and lower case count as the same."""


class Chrf(MetricConfig):
    """F-score of runs of 1 to 6 characters (Popovic, 2015, aclanthology.org/W15-3049)."""

    metric: Literal["chrf"] = "chrf"
    word_order: Annotated[int, Field(ge=0, le=4)] = 0
    """Longest runs of words that count as well; 2 makes it chrF++."""
    ignore_case: bool = False
    """Upper and lower case count as the same."""


class Json(MetricConfig):
    """1 where the answer is valid JSON, and conforms to the schema if there is one."""

    # BaseModel has a method `schema`, so the field goes by another name in Python.
    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    metric: Literal["json"] = "json"
    json_schema: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    """JSON Schema, or the file that holds one. A file is read when the recipe is: what it says
    becomes part of the recipe. `format` is not checked, as the standard has it."""
    allow_fence: bool = False
    """Take the content of the first Markdown code block, if the answer has one."""

    @property
    def default_title(self) -> str:
        """`json_schema` where conformity is asked for."""
        return "json" if self.json_schema is None else "json_schema"

    @field_validator("json_schema", mode="before")
    @classmethod
    def _read_file(cls, value: Any) -> Any:
        return _read_json(value) if isinstance(value, str) else value

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, value: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        if value is not None:
            _check_schema(value)
        return value


class Code(MetricConfig):
    """Runs the answer's Python with the tests that are its reference: pass@k.

    Chen et al., 2021, arXiv:2107.03374. Needs `run_code: true`.
    """

    metric: Literal["code"] = "code"
    k: Annotated[int, Field(ge=1)] = 1
    """Answers that a user would get to try: an item's score is the probability that one of k
    passes."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Answers that are written and run, an item; one is the greedy answer. Several times `k`
    measures better than `k`."""
    temperature: Annotated[float, Field(gt=0)] = 0.8
    """Of several samples. 0.2 suits k = 1, 0.8 suits k = 10 and more."""
    setup: str = ""
    """Python that runs before each answer, such as imports."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Computing time of one answer with its tests, in seconds; three times that by the clock."""
    memory_mb: Annotated[int, Field(ge=64)] = 512
    """Memory of one process."""

    @property
    def default_title(self) -> str:
        """Such as `pass@1`."""
        return f"pass@{self.k}"

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if self.samples < self.k:
            raise ValueError(f"pass@{self.k} needs {self.k} `samples` or more, not {self.samples}")
        return self


METRICS: dict[str, type[MetricConfig]] = {
    "exact_match": ExactMatch,
    "labels": Labels,
    "numbers": Numbers,
    "regex": Regex,
    "rouge": Rouge,
    "bleu": Bleu,
    "chrf": Chrf,
    "json": Json,
    "code": Code,
}
"""Metrics by what a recipe writes."""

SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "rouge1": ("rouge", {"type": "rouge1"}),
    "rouge2": ("rouge", {"type": "rouge2"}),
    "rouge_l": ("rouge", {"type": "rougeL"}),
    "rouge_lsum": ("rouge", {"type": "rougeLsum"}),
    "rougeL": ("rouge", {"type": "rougeL"}),
    "rougeLsum": ("rouge", {"type": "rougeLsum"}),
    "chrf++": ("chrf", {"word_order": 2, "name": "chrf_pp"}),
    "pass@1": ("code", {}),
}
"""Names that stand for a metric with settings."""


def _tag_metric(entry: Any) -> Any:
    """Turn `exact_match` or `{exact_match: {...}}`, as written, into `{metric: exact_match, ...}`.

    Raises:
        ValueError: it is neither, or there is no such metric.
    """
    if isinstance(entry, MetricConfig):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(
            "a metric is its name, such as `- exact_match`, or one key with its settings, such as "
            "`- exact_match: {ignore_case: true}`"
        )
    kind, body = next(iter(entry.items()))
    if body is not None and not isinstance(body, dict):
        raise ValueError(f"the settings of `{kind}` must be keys and values")
    kind, defaults = SHORT.get(kind, (kind, {}))
    if kind not in METRICS:
        near = difflib.get_close_matches(str(kind), [*METRICS, *SHORT], n=2)
        meant = f" (did you mean {' or '.join(f'`{name}`' for name in near)}?)" if near else ""
        raise ValueError(
            f"there is no metric `{kind}`{meant}; the metrics are {', '.join(METRICS)}"
        )
    return {**defaults, **(body or {}), "metric": kind}


def _write_metric(metric: Any, handler: SerializerFunctionWrapHandler) -> Any:
    """Write a metric back as a person writes it: `{exact_match: {...}}`."""
    data = handler(metric)
    return {metric.metric: {key: value for key, value in data.items() if key != "metric"}}


AnyMetric = Annotated[
    Annotated[
        ExactMatch | Labels | Numbers | Regex | Rouge | Bleu | Chrf | Json | Code,
        Field(discriminator="metric"),
    ],
    BeforeValidator(_tag_metric),
    WrapSerializer(_write_metric),
]


class TestSet(Strict):
    """Prompts of a dataset, answered greedily, and the metrics of the answers."""

    __test__ = False  # pytest takes every class named Test... for tests

    dataset: str
    """Name under `datasets`, of chats: the last turn of the assistant is the reference, what stands
    before it the prompt. Where a stage trains on it, its held-out rows are asked; else all."""
    metrics: tuple[AnyMetric, ...]
    """What is measured of each answer: names, or one key with settings each."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Rows asked, drawn with the evaluation's seed. Default: all."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer, in tokens."""
    run_code: bool = unhashed(
        False,
        "Allow the metric `code` to run Python that the model wrote, cut off from network and "
        "files: see docs/test-sets.md.",
    )

    @field_validator("metrics")
    @classmethod
    def _something_is_measured(cls, metrics: tuple[AnyMetric, ...]) -> tuple[AnyMetric, ...]:
        # No `min_length`: it would complain as well whenever the only metric is wrong.
        if not metrics:
            raise ValueError("name at least one metric, such as `exact_match`")
        return metrics

    @model_validator(mode="after")
    def _titles_differ(self) -> Self:
        titles = [metric.title for metric in self.metrics]
        repeated = sorted({title for title in titles if titles.count(title) > 1})
        if repeated:
            raise ValueError(
                f"two metrics are called {', '.join(f'`{title}`' for title in repeated)}; give one "
                f"a name of its own, such as `name: {repeated[0]}_2`"
            )
        return self

    @model_validator(mode="after")
    def _code_is_allowed(self) -> Self:
        if not self.run_code and any(isinstance(metric, Code) for metric in self.metrics):
            raise ValueError(
                "the metric `code` runs Python that the model wrote, which is off by default: "
                "write `run_code: true` beside `metrics` to allow it"
            )
        return self


def _read_json(name: str) -> JsonValue:
    """The content of a JSON or YAML file, relative to the working directory."""
    import yaml

    try:
        # JSON is YAML, and people write schemas in both.
        value: JsonValue = yaml.safe_load(Path(name).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"the schema `{name}` cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the schema `{name}` is neither JSON nor YAML: {error}") from None
    return value


def _check_schema(schema: dict[str, JsonValue]) -> None:
    from jsonschema.exceptions import SchemaError  # type: ignore[import-untyped]
    from jsonschema.validators import Draft202012Validator, validator_for  # type: ignore[import-untyped]

    validator = validator_for(schema, default=Draft202012Validator)
    try:
        validator.check_schema(schema)
    except SchemaError as error:
        where = "/".join(str(part) for part in error.absolute_path)
        raise ValueError(
            f"not a JSON Schema{f' at `{where}`' if where else ''}: {error.message}"
        ) from None
    elsewhere = sorted(_references_elsewhere(schema))
    if elsewhere:
        raise ValueError(
            f"the schema refers to `{elsewhere[0]}`, which is not part of it: put that under "
            "`$defs` and refer to `#/$defs/...`"
        )


def _references_elsewhere(schema: JsonValue) -> set[str]:
    """References that would have to be fetched from somewhere."""
    if isinstance(schema, list):
        return {name for item in schema for name in _references_elsewhere(item)}
    if not isinstance(schema, dict):
        return set()
    found = {name for item in schema.values() for name in _references_elsewhere(item)}
    for key in ("$ref", "$dynamicRef"):
        target = schema.get(key)
        if isinstance(target, str) and not target.startswith("#"):
            found.add(target)
    return found
