"""The language of the rules' conditions and sentences: small, typed, and never run as Python.

A condition is a few comparisons joined by `and`:

    rows > 0 and rows < sft-lora.minimum and goals has format and full_fits is true

On the left stands a field or property of `Situation` or, in rules that only set numbers, something
decided before them (`trains`, `stages`, ...). On the right stands a number, a figure of
`posttrain.data.advice.SIZES` (`METHOD.minimum`, `.usual_from`, `.usual_to`, `.too_many`), `true` or
`false`, or a word. What is unknown compares as false.

A sentence may hold `{rows}` and other fields, and `{METHOD.minimum}` and other figures.
"""

from __future__ import annotations

import difflib
import operator
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal, get_args

from posttrain.advisor.situation import Goal, Situation
from posttrain.data.advice import SIZES

ALWAYS = "always"

Instead = Literal["prompting", "retrieval"]
Preferences = Literal["dpo", "ppo", "orpo", "kto"]
Trains = Literal["all", "adapter"]
Base = Literal["unquantized", "4bit"]
Tasks = Literal["mix", "adapters"]
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
        "all weights fit and leave a quarter free: about {full_gb:.0f} GiB a device, and there are "
        "{memory_gb:.0f}",
        "all weights do not fit into memory",
    ),
    "lora_fits": (
        "LoRA on unquantized weights fits and leaves a quarter free: about {lora_gb:.0f} GiB, and "
        "there are {memory_gb:.0f}",
        "LoRA on unquantized weights does not fit, as with longer rows, a larger model or a "
        "smaller GPU",
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
_COMPARISON = re.compile(
    r"^(?P<term>\w+)\s*(?P<op><=|>=|==|!=|<|>|\bis\b|\bhas\b|\blacks\b)\s*(?P<value>\S+)$"
)


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
    """A sentence with the numbers of the situation, and of `SIZES`, in it."""
    names = {name.partition(".")[0] for _, name, _, _ in string.Formatter().parse(text) if name}
    values = {name: _named(name, situation) for name in names}
    return text.format(**values)


class _Unknown:
    """Stands in a sentence for a number that is not known."""

    def __format__(self, spec: str) -> str:
        return "an unknown number of"


def _named(name: str, situation: Situation) -> object:
    """What a name in braces stands for."""
    if name in SIZES:
        prefix = f"{name}."
        of_method = {key: value for key, value in _figures().items() if key.startswith(prefix)}
        return SimpleNamespace(**{key.removeprefix(prefix): of_method[key] for key in of_method})
    value = getattr(situation, name)
    return _Unknown() if value is None else value


def check_sentence(text: str) -> None:
    """Refuse a sentence that names what a situation does not have."""
    for _, name, _, _ in string.Formatter().parse(text):
        if name is not None and name not in _figures() and not hasattr(Situation, name):
            raise ValueError(f"`{{{name}}}` in a sentence: there is no such field")


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
def _figures() -> dict[str, int]:
    """Figures of `SIZES` by the name that a condition has for them."""
    figures: dict[str, int] = {}
    for method, size in SIZES.items():
        figures[f"{method}.minimum"] = size.minimum
        figures[f"{method}.usual_from"], figures[f"{method}.usual_to"] = size.usual
        if size.too_many is not None:
            figures[f"{method}.too_many"] = size.too_many
    return figures


def _near(word: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean `{matches[0]}`?" if matches else f"; there are: {', '.join(known)}"
