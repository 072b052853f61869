"""One remedy: what is changed in a recipe, why, and who says that it helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

Path = tuple[str | int, ...]
"""Keys down to a value of a recipe: `("stages", 1, "sft", "epochs")`."""

Confidence = Literal["good", "fair", "a try"]
"""`good`: helps in most cases that were studied. `fair`: helps often, and costs something. `a try`:
may as well not help."""


@dataclass(frozen=True)
class Change:
    """A value that is set, with the keys above it where they are missing."""

    path: Path
    value: JsonValue
    why: str
    """Stands as a comment above the line: what it was, and the reason."""
    in_place_of: str | None = None
    """A key beside it that goes, such as `full` where `adapter` comes."""


@dataclass(frozen=True)
class Insertion:
    """A stage that is added."""

    position: int
    """Where it will stand under `stages`."""
    stage: str
    body: dict[str, JsonValue]
    why: str


Edit = Change | Insertion


@dataclass(frozen=True)
class Remedy:
    """Something that may turn a verdict, as edits of a recipe."""

    id: str
    """What it is and how strongly, such as `interpolate-0.5`: not proposed again once it failed."""
    title: str
    why: str
    """Which check it answers, and how."""
    edits: tuple[Edit, ...]
    """In this order; a position or index is that after the edits before it. Empty: it takes
    something that only a person has."""
    confidence: Confidence
    sources: tuple[str, ...]
    by_hand: str = ""
    """What to do where there are no edits, or before them."""

    @property
    def can_be_written(self) -> bool:
        """Whether a recipe comes of it."""
        return bool(self.edits)


RULE_OF_THUMB = "practitioners' rule of thumb"
WISE_FT = "Wortsman et al. 2022, arXiv:2109.01903"
ALIGNMENT_TAX = "Lin et al. 2023, arXiv:2309.06256"
REPLAY = "Ibrahim et al. 2024, arXiv:2403.08763"
LORA_FORGETS_LESS = "Biderman et al. 2024, arXiv:2405.09673"
OVEROPTIMIZATION = "Gao et al. 2023, arXiv:2210.10760"
LENGTH_BIAS = "Singhal et al. 2023, arXiv:2310.03716"
KL_PENALTY = "Ziegler et al. 2019, arXiv:1909.08593"
DPO = "Rafailov et al. 2023, arXiv:2305.18290"
STATISTICS = "the gate's own power calculation"
