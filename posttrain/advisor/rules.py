"""The rules of the adviser: data in `rules.yaml`, checked when they are read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from posttrain.advisor.conditions import (
    Base,
    Comparison,
    Decided,
    Instead,
    Preferences,
    Tasks,
    Trains,
    check_sentence,
    parse,
)
from posttrain.errors import Problem, RecipeError
from posttrain.recipe.base import Strict

EARLY = frozenset(
    {"instead", "pretrain", "sft", "preferences", "trains", "pretrain_trains", "base", "together"}
)
"""What is decided from the situation alone; all else may depend on it."""

RULES = Path(__file__).with_name("rules.yaml")
Scalar = bool | int | float | str


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
    when: Annotated[tuple[Comparison, ...], BeforeValidator(parse)]
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
        for text in (
            self.why,
            self.watch,
            self.right_if,
            *(o.right_if for o in self.instead_of_it),
        ):
            check_sentence(text)
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
            Problem(
                _where(data, detail["loc"]), str(detail.get("ctx", {}).get("error", detail["msg"]))
            )
            for detail in error.errors()
        ]
        raise RecipeError(problems, file) from None
    ids = [rule.id for rule in rules]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise RecipeError(
            [Problem(name, "occurs twice", "give it another id") for name in twice], file
        )
    return rules


def _where(data: Any, loc: tuple[int | str, ...]) -> str:
    """`few-rows.when` instead of `3.when`."""
    position, *rest = loc if loc else (0,)
    name = str(position)
    if isinstance(data, list) and isinstance(position, int) and isinstance(data[position], dict):
        name = str(data[position].get("id", f"rule {position + 1}"))
    return ".".join([name, *map(str, rest)])
