"""Who gave which version an alias, when and why: a record that is only ever added to.

Each change is a tag of its own on the registered model, so that two people who promote at once,
from two machines, cannot overwrite each other's entry.
"""

from __future__ import annotations

import getpass
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

Alias = Literal["champion", "challenger"]
Action = Literal["register", "promote", "rollback"]

_PREFIX = "posttrain.history."
_STAMP = "%Y%m%dT%H%M%S.%fZ"


class Change(BaseModel):
    """One alias moved from one version to another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: datetime
    """UTC."""
    who: str
    """Name of the user whose process did it."""
    action: Action
    alias: Alias
    before: int | None
    """Version that had the alias."""
    after: int
    """Version that has it now."""
    override: str = ""
    """Why a version took it that the gate did not pass."""

    @property
    def tag(self) -> tuple[str, str]:
        """Key and value of the tag; keys sort by time."""
        key = f"{_PREFIX}{self.at.astimezone(UTC).strftime(_STAMP)}-{uuid.uuid4().hex[:6]}"
        return key, self.model_dump_json()


def read_history(tags: Mapping[str, str]) -> list[Change]:
    """The changes among a registered model's tags, oldest first."""
    found = []
    for key in sorted(key for key in tags if key.startswith(_PREFIX)):
        try:
            found.append(Change.model_validate_json(tags[key]))
        except ValidationError:  # of a newer version, or edited by hand
            continue
    return found


def moment_after(history: Sequence[Change]) -> datetime:
    """Now, or just after the last change where this machine's clock is behind."""
    present = datetime.now(UTC)
    if not history:
        return present
    return max(present, history[-1].at + timedelta(microseconds=1))


def user_name() -> str:
    """Who runs this process, or `unknown` where the system has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def champions(history: Iterable[Change], present: int | None) -> list[int]:
    """Versions that were champion, first to present, without those that were rolled back from.

    What the aliases say counts: a change that was recorded and then not made, because its process
    was killed in between, is left out, and one made elsewhere, such as in MLflow's UI, is put in.

    Args:
        history: All changes, oldest first.
        present: The version that has the alias now.
    """
    line: list[int] = []
    earlier: list[int] = []
    for change in history:
        if change.alias != "champion":
            continue
        line = _as_found(line, earlier, change.before)
        earlier = list(line)
        if change.action == "rollback" and change.after in line:
            while line[-1] != change.after:
                line.pop()
        else:
            line.append(change.after)
    return _as_found(line, earlier, present)


def _as_found(line: list[int], earlier: list[int], found: int | None) -> list[int]:
    """The line of champions as the alias shows it; `earlier` is the line before the last change."""
    if found is None:
        return line if earlier else []
    if line and line[-1] == found:
        return line
    if earlier and earlier[-1] == found:
        return earlier
    return [*line, found]
