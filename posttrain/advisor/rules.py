"""The rules of the adviser: data in `rules.yaml`, checked when they are read.

A condition is a few comparisons joined by `and`:

    rows > 0 and rows < sft-lora.minimum and goals has format and full_fits is true

On the left stands a field or property of `Situation` or, in rules that only set numbers, something
decided before them (`trains`, `base`, ...). On the right stands a number, a figure of
`posttrain.data.advice.SIZES` (`METHOD.minimum`, `.usual_from`, `.usual_to`, `.too_many`), `true` or
`false`, or a word. Nothing else can be written, and nothing is evaluated as Python. What is unknown
compares as false.
"""

from __future__ import annotations

import difflib
import operator
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from posttrain.advisor.situation import Goal, Situation
from posttrain.data.advice import SIZES
from posttrain.errors import Problem, RecipeError
from posttrain.recipe.base import Strict

EARLY = frozenset(
    {"instead", "pretrain", "sft", "preferences", "trains", "pretrain_trains", "base", "together"}
)
"""What is decided from the situation alone; all else may depend on it."""

RULES = Path(__file__).with_name("rules.yaml")
ALWAYS = "always"

Instead = Literal["prompting", "retrieval"]
Preferences = Literal["dpo", "ppo", "orpo", "kto"]
Trains = Literal["all", "adapter"]
Base = Literal["16bit", "4bit"]
Tasks = Literal["mix", "adapters"]
Scalar = bool | int | float | str
Decided = str | bool | frozenset[str]

_NUMBERS = {
    "rows": "labelled examples",
    "pairs": "preference pairs",
    "thumbs": "answers marked good or bad",
    "documents": "documents",
    "tokens": "tokens of text",
    "parameters": "billion parameters",
    "gpu_gb": "GiB of GPU memory",
    "gpus": "GPUs",
    "tasks": "tasks",
}
"""Fields that are compared with numbers, and what they count."""

_TRUTHS = {
    "labelled": ("there are labelled examples", "there are no labelled examples"),
    "paired": ("there are preference pairs", "there are no preference pairs"),
    "rated": ("there are answers marked good or bad", "no answers are marked good or bad"),
    "corpus": ("there is raw text to learn from", "there is no raw text to learn from"),
    "skills": ("demonstrations are to be learnt as well", "no demonstrations are to be learnt"),
    "gpu": ("there is a GPU", "there is no GPU"),
    "consumer_gpu": ("all there is is one consumer GPU", "there is more than a consumer GPU"),
    "full_fits": (
        "all weights fit: about {full_gb:.0f} GiB a device, and a fifth more to spare; there are "
        "{memory_gb:.0f}",
        "all weights do not fit into memory",
    ),
    "lora_fits": (
        "LoRA on 16-bit weights fits: about {lora_gb:.0f} GiB and a fifth more to spare; there "
        "are {memory_gb:.0f}",
        "LoRA on 16-bit weights does not fit, as with longer rows, a larger model or a smaller GPU",
    ),
    "qlora_fits": ("QLoRA fits into memory", "not even QLoRA fits into memory"),
    "separate": ("tasks are added, updated and served apart", "tasks are served together"),
    "structured": ("the answers have a complex structure", "the answers have a simple structure"),
    "quality": ("quality matters more than the cost of training", "the cost of training matters"),
    "latency": ("every millisecond of an answer counts", "latency is no concern"),
    "one_run": ("everything shall be learnt in a single run", "several runs are fine"),
}
"""Fields that are true or false, and what they say when they are."""

_WORDS: dict[str, tuple[str, ...]] = {
    "trains": get_args(Trains),
    "pretrain_trains": get_args(Trains),
    "base": get_args(Base),
    "preferences": get_args(Preferences),
    "together": get_args(Tasks),
}
"""What rules decide and later rules may ask for, beside `stages`."""

TRAINING_STAGES = ("pretrain", "sft", "reward", "ppo", "dpo", "orpo", "kto")
"""Stages that advice is about, in their order."""

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "is": operator.eq,
    "has": lambda goals, goal: goal in goals,
    "lacks": lambda goals, goal: goal not in goals,
}
_COMPARISON = re.compile(r"^(?P<term>\w+)\s*(?P<op><=|>=|==|!=|<|>|\bis\b|\bhas\b|\blacks\b)\s*(?P<value>\S+)$")


@dataclass(frozen=True)
class Comparison:
    """One term compared with one value."""

    term: str
    op: str
    value: float | bool | str

    def holds(self, situation: Situation, decided: Mapping[str, Decided]) -> bool:
        """Whether it is true; what is unknown is not."""
        have = decided.get(self.term) if self.late else getattr(situation, self.term)
        return have is not None and _OPERATORS[self.op](have, self.value)

    @property
    def late(self) -> bool:
        """Whether it asks for what other rules decide."""
        return self.term in _WORDS or self.term == "stages"

    def wish(self, situation: Situation) -> str:
        """What would have to be so, as the end of a sentence that begins with "if"."""
        if self.term in _TRUTHS:
            positive, negative = _TRUTHS[self.term]
            return fill(positive if self.value else negative, situation)
        if self.term == "goals":
            verb = "is" if self.op == "has" else "is not"
            return f"the goal {verb} {self.value}"
        have = getattr(situation, self.term)
        known = f"you have {have:,}" if have is not None else "unknown how many you have"
        amount = {
            ">": "more than {}",
            ">=": "{} or more",
            "<": "fewer than {}",
            "<=": "{} or fewer",
            "==": "exactly {}",
            "!=": "other than {}",
        }[self.op].format(f"{self.value:,.0f}")
        return f"there are {amount} {_NUMBERS[self.term]} ({known})"


class Source(Strict):
    """Where a rule comes from: `rule of thumb`, `our choice`, or a paper by its arXiv number."""

    kind: Literal["paper", "rule of thumb", "our choice", "library"]
    """`rule of thumb` is what guides by practitioners agree on."""
    name: str = ""
    """Authors and year of a paper, or the library."""
    arxiv: Annotated[str, Field(pattern=r"^\d{4}\.\d{4,5}$")] | None = None
    """Number of a paper."""

    def __str__(self) -> str:
        """Short enough for a line's end."""
        if self.kind == "rule of thumb":
            return "practitioners' rule of thumb"
        if self.kind == "our choice":
            return "our choice"
        return f"{self.name}, arXiv:{self.arxiv}" if self.arxiv else self.name


class Other(Strict):
    """A method that a rule does not choose but names."""

    name: str
    """The method, as a person would say it."""
    right_if: str
    """What would make it the better choice."""


class Decision(Strict):
    """What a rule decides. For each key the matching rule with the highest priority wins."""

    instead: Instead | None = None
    """What to do before any training."""
    pretrain: bool | None = None
    """Continued pretraining first."""
    sft: bool | None = None
    """Supervised fine-tuning."""
    preferences: Preferences | None = None
    """How preferences are learnt."""
    trains: Trains | None = None
    """What SFT and the stages after it train."""
    pretrain_trains: Trains | None = None
    """What continued pretraining trains."""
    base: Base | None = None
    """How a base under an adapter is held."""
    together: Tasks | None = None
    """How several tasks are taught: in a mix, or an adapter each."""
    replay: bool | None = None
    """Whether general chats are mixed into SFT."""
    merge: bool | None = None
    """Whether the adapter is merged before deployment."""
    settings: dict[str, Scalar] = {}
    """Recipe keys by stage, such as `sft.adapter.rank: 8`."""

    @property
    def choices(self) -> dict[str, Decided]:
        """What is decided, without the settings."""
        return self.model_dump(exclude={"settings"}, exclude_none=True)


class Rule(Strict):
    """One piece of advice."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    when: Annotated[tuple[Comparison, ...], BeforeValidator(lambda text: parse(text))]
    """When it holds."""
    decides: Decision = Decision()
    """What follows."""
    priority: int = 0
    """Of two rules that decide the same thing the higher one wins; of equal ones the first."""
    why: str = ""
    """The reason, for whoever asked. `{rows}` and other fields are filled in."""
    watch: str = ""
    """What can go wrong, and what to do then."""
    instead_of_it: tuple[Other, ...] = ()
    """Methods worth a thought when this rule holds."""
    right_if: str = ""
    """For a rule that always holds: what would make it right where another one won."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if not self.why and not self.watch:
            raise ValueError("a rule says `why`, or what to `watch`")
        early = EARLY & self.decides.choices.keys()
        late = [comparison.term for comparison in self.when if comparison.late]
        if early and late:
            raise ValueError(
                f"it decides `{min(early)}` and asks for `{late[0]}`, which is decided no earlier"
            )
        for text in (self.why, self.watch, self.right_if, *(o.right_if for o in self.instead_of_it)):
            _check_fields(text)
        return self


def load_rules(file: Path = RULES) -> tuple[Rule, ...]:
    """Rules in the order of the file.

    Raises:
        RecipeError: with every mistake of the file, by the rule's id.
    """
    return _load(file)


@cache
def _load(file: Path) -> tuple[Rule, ...]:
    return read_rules(yaml.safe_load(file.read_text(encoding="utf-8")), file)


def read_rules(data: Any, file: Path | str | None = None) -> tuple[Rule, ...]:
    """Validate rules given as plain data.

    Raises:
        RecipeError: with every mistake, by the rule's id.
    """
    try:
        rules = TypeAdapter(tuple[Rule, ...]).validate_python(data)
    except ValidationError as error:
        problems = [
            Problem(_where(data, detail["loc"]), str(detail.get("ctx", {}).get("error", detail["msg"])))
            for detail in error.errors()
        ]
        raise RecipeError(problems, file) from None
    ids = [rule.id for rule in rules]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise RecipeError([Problem(name, "occurs twice", "give it another id") for name in twice], file)
    return rules


def parse(text: object) -> tuple[Comparison, ...]:
    """A condition as its comparisons; `always` has none.

    Raises:
        ValueError: a term that does not exist, or a value that does not belong to it.
    """
    if isinstance(text, tuple):
        return text
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"is {text!r}: write comparisons joined by `and`, or `{ALWAYS}`")
    if text.strip() == ALWAYS:
        return ()
    return tuple(_comparison(part) for part in re.split(r"\s+and\s+", text.strip()))


def fill(text: str, situation: Situation) -> str:
    """A sentence with the numbers of the situation in it."""
    names = [name for _, name, _, _ in string.Formatter().parse(text) if name]
    return text.format(**{name: _shown(getattr(situation, name)) for name in names})


class _Unknown:
    """Stands in a sentence for a number that is not known."""

    def __format__(self, spec: str) -> str:
        return "an unknown number of"


def _shown(value: object) -> object:
    return _Unknown() if value is None else value


def _comparison(text: str) -> Comparison:
    match = _COMPARISON.match(text.strip())
    if match is None:
        raise ValueError(f"`{text}` is no comparison: write `FIELD OPERATOR VALUE`")
    term, op, value = match["term"], match["op"], match["value"]
    if term in _NUMBERS:
        _allow(text, op, "<", "<=", "==", "!=", ">=", ">")
        return Comparison(term, op, _number(text, value))
    if term in _TRUTHS:
        _allow(text, op, "is")
        if value not in ("true", "false"):
            raise ValueError(f"`{text}`: `{term}` is true or false")
        return Comparison(term, op, value == "true")
    if term == "goals":
        _allow(text, op, "has", "lacks")
        return Comparison(term, op, _word(text, value, get_args(Goal)))
    if term == "stages":
        _allow(text, op, "has", "lacks")
        return Comparison(term, op, _word(text, value, TRAINING_STAGES))
    if term in _WORDS:
        _allow(text, op, "is")
        return Comparison(term, op, _word(text, value, _WORDS[term]))
    raise ValueError(f"`{text}`: there is no field `{term}`{_near(term, _terms())}")


def _terms() -> list[str]:
    return [*_NUMBERS, *_TRUTHS, "goals", *_WORDS, "stages"]


def _allow(text: str, op: str, *allowed: str) -> None:
    if op not in allowed:
        raise ValueError(f"`{text}`: `{op}` does not go with it; write one of: {' '.join(allowed)}")


def _word(text: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"`{text}`: write one of: {', '.join(known)}")
    return value


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        pass
    figures = _figures()
    if value not in figures:
        raise ValueError(f"`{text}`: `{value}` is no number{_near(value, list(figures))}")
    return figures[value]


@cache
def _figures() -> dict[str, float]:
    """Figures of `SIZES` by the name that a condition has for them."""
    figures: dict[str, float] = {}
    for method, size in SIZES.items():
        figures[f"{method}.minimum"] = size.minimum
        figures[f"{method}.usual_from"], figures[f"{method}.usual_to"] = size.usual
        if size.too_many is not None:
            figures[f"{method}.too_many"] = size.too_many
    return figures


def _check_fields(text: str) -> None:
    """Refuse a sentence that names what a situation does not have."""
    for _, name, _, _ in string.Formatter().parse(text):
        if name is not None and not hasattr(Situation, name):
            raise ValueError(f"`{{{name}}}` in a sentence: there is no such field")


def _near(word: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean `{matches[0]}`?" if matches else f"; there are: {', '.join(known)}"


def _where(data: Any, loc: tuple[int | str, ...]) -> str:
    """`few-rows.when` instead of `3.when`."""
    position, *rest = loc if loc else (0,)
    name = str(position)
    if isinstance(data, list) and isinstance(position, int) and isinstance(data[position], dict):
        name = str(data[position].get("id", f"rule {position + 1}"))
    return ".".join([name, *map(str, rest)])
