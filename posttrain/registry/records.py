"""What the registry says of models, versions and what was changed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from posttrain.registry.history import Alias
from posttrain.store.files import write_json


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    number: int
    aliases: tuple[str, ...]
    fingerprint: str | None
    """Of the model in the store; None for a version that posttrain did not register."""
    recipe: str
    verdict: str
    """`pass`, `fail`, `not enough evidence` or `not judged`."""
    compared_with: str
    """The champion that the gate compared it with, if any."""
    metrics: dict[str, str]
    differences: dict[str, str]
    """To the base, by task, with their bounds."""
    override: str
    """Why it took an alias though the gate did not pass it."""
    registered: datetime


@dataclass(frozen=True)
class Registered:
    """A registered model."""

    name: str
    versions: int
    champion: int | None
    challenger: int | None
    previous_champion: int | None
    """Where a rollback would lead."""


@dataclass(frozen=True)
class Moved:
    """What became of an alias."""

    name: str
    alias: Alias
    before: int | None
    after: int
    note: str = ""
    """What a person should know before trusting it."""

    @property
    def sentence(self) -> str:
        """Such as `champion of python-assistant: v3 (was v2)`."""
        was = "there was none" if self.before is None else f"was v{self.before}"
        was = "unchanged" if self.before == self.after else was
        return f"{self.alias} of {self.name}: v{self.after} ({was})"


class Registration(BaseModel):
    """Content of `registration.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int
    alias: Alias
    """The alias that the version has now. A champion that is registered again stays champion."""
    before: int | None
    """Version that had the alias."""
    fingerprint: str
    """Of the model in the store."""
    digest: str
    recipe: str
    verdict: str
    verdict_fingerprint: str | None
    metrics: dict[str, float]
    """Of the evaluation that the verdict is about."""
    override: str
    """Why it was registered though the gate did not pass it."""
    note: str = ""

    def save(self, folder: Path) -> None:
        """Write `registration.json`."""
        write_json(folder / "registration.json", self.model_dump(mode="json"))
