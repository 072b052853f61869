"""Giving an alias to a version, with a record of who did it and why."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from posttrain.registry.entry import AGAINST, OVERRIDE
from posttrain.registry.history import (
    Action,
    Alias,
    Change,
    champions,
    moment_after,
    read_history,
    user_name,
)
from posttrain.registry.queries import version_of
from posttrain.registry.records import Moved

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel


def move(
    client: MlflowClient, name: str, number: int, alias: Alias, action: Action, override: str
) -> Moved:
    """Give an alias to a version: record it first, so that nothing happens without a record."""
    model = client.get_registered_model(name)
    if alias == "challenger" and alias_of(model, "champion") == number:
        alias = "champion"  # it is more already
    before = alias_of(model, alias)
    if before == number:
        return Moved(name, alias, before, number)
    history = read_history(model.tags)
    change = Change(
        at=moment_after(history),
        who=user_name(),
        action=action,
        alias=alias,
        before=before,
        after=number,
        override=override,
    )
    client.set_registered_model_tag(name, *change.tag)
    for key, value in override_tags(override).items():
        client.set_model_version_tag(name, str(number), key, value)
    client.set_registered_model_alias(name, alias, str(number))
    if alias == "champion" and alias_of(model, "challenger") == number:
        client.delete_registered_model_alias(name, "challenger")
    compared = alias == "champion" and action != "rollback"
    note = _note(client, name, number, before) if compared else ""
    return Moved(name, alias, before, number, note)


def override_tags(override: str) -> dict[str, str]:
    """Tags of a version that took an alias without the gate: why, who, when."""
    if not override:
        return {}
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {OVERRIDE: override, f"{OVERRIDE}_by": user_name(), f"{OVERRIDE}_at": at}


def previous_champion(client: MlflowClient, model: RegisteredModel) -> ModelVersion | None:
    """The champion before the present one, of those that were not deleted since."""
    present = alias_of(model, "champion")
    line = champions(read_history(model.tags), present)
    for number in reversed(line[:-1]):
        found = None if number == present else version_of(client, model.name, number)
        if found is not None:
            return found
    return None


def alias_of(model: RegisteredModel, alias: str) -> int | None:
    """The version that has an alias."""
    number = model.aliases.get(alias)
    return None if number is None else int(number)


def _note(client: MlflowClient, name: str, number: int, before: int | None) -> str:
    """Whether the gate compared the new champion with another one than it replaces."""
    found = client.get_model_version(name, str(number))
    seen, replaced = found.tags.get(AGAINST, ""), f"{name} v{before}"
    if before is None or not seen or seen.endswith(replaced):
        return ""
    return f"the gate compared v{number} with {seen}, not with v{before}, which it replaces"
