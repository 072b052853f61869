"""Registering models, and giving the aliases `challenger` and `champion` to them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from posttrain.errors import PosttrainError, StoreError, UsageError
from posttrain.home import Home
from posttrain.lineage.graph import SHORT
from posttrain.registry.connection import HASTY, connected, nothing_tracked
from posttrain.registry.entry import (
    AGAINST,
    DIFFERENCE,
    FINGERPRINT,
    GATE,
    METRIC,
    NOT_JUDGED,
    OVERRIDE,
    RECIPE,
    VERDICT,
    Entry,
)
from posttrain.registry.history import Alias, Change, read_history
from posttrain.registry.logged_model import logged_model
from posttrain.registry.moves import alias_of, move, override_tags, previous_champion
from posttrain.registry.queries import all_models, model_named, version_of, versions_of
from posttrain.registry.records import Moved, Registered, Registration, Version
from posttrain.store.locks import exclusive

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

LOCK = "registry.lock"
"""In the home: one change of the registry at a time."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


_ABOUT = (
    "Aliases say what a version is for: `champion` is in use, `challenger` waits to be promoted. "
    "Who moved them, when and why: `posttrain registry show {name}`. Promote and roll back there, "
    "so that the history is kept."
)


class Registry:
    """MLflow's Model Registry, under the rules of posttrain.

    Changes from one home are made one at a time, under a file lock. From several homes on one
    server the last one to set an alias wins; the history has all of them.
    """

    def __init__(self, home: Home, retries: int = HASTY) -> None:
        """Choose the registry of a home; `retries` is how patient a request to a server is."""
        self._home = home
        self._retries = retries

    # Looking

    def models(self) -> list[Registered]:
        """All registered models, by name."""
        if nothing_tracked(self._home):
            return []
        with self._client() as client:
            return [_registered(client, model) for model in all_models(client)]

    def model(self, name: str) -> Registered:
        """One registered model.

        Raises:
            UsageError: there is none of that name.
        """
        with self._looking() as client:
            return _registered(client, _known(client, name))

    def versions(self, name: str) -> list[Version]:
        """All versions, first to last.

        Raises:
            UsageError: there is no registered model of that name.
        """
        with self._looking() as client:
            aliases = _known(client, name).aliases
            found = versions_of(client, name)
            return [_version(one, aliases) for one in found]

    def history(self, name: str) -> list[Change]:
        """Who gave which version an alias, oldest first.

        Raises:
            UsageError: there is no registered model of that name.
        """
        with self._looking() as client:
            return read_history(_known(client, name).tags)

    # Changing

    def register(
        self,
        name: str,
        entry: Entry,
        *,
        alias: Alias = "challenger",
        override: str | None = None,
    ) -> Registration:
        """Make a model a version, and give it an alias.

        The same model is registered once: again, its version is brought up to date. So a process
        that was killed in between is repeated, and makes no second version.

        Raises:
            PosttrainError: the gate did not pass it, and there is no override.
            UsageError: it is an adapter, or no reason is given for the override.
            StoreError: the registry cannot be reached, or refuses.
        """
        override = _reason(override)
        _check(name, entry)
        if not entry.passed and not override:
            raise PosttrainError(
                f"{entry.model.fingerprint[:SHORT]} cannot be registered as {alias} of {name}: "
                f"{_not_passed(entry.verdict)}; to register it all the same, say why: "
                f"`posttrain registry add {entry.model.fingerprint[:SHORT]} --name {name} "
                '--override "REASON"`'
            )
        with self._changing() as client:
            number = self._enter(client, name, entry, override)
            moved = move(client, name, number, alias, "register", override)
        judged = entry.judged
        return Registration(
            name=name,
            version=number,
            alias=moved.alias,
            before=moved.before,
            fingerprint=entry.model.fingerprint,
            digest=entry.model.digest,
            recipe=entry.model.manifest.recipe,
            verdict=entry.verdict,
            verdict_fingerprint=judged.gate.fingerprint if judged else None,
            metrics=judged.evaluation.manifest.metrics if judged else {},
            override=override,
            note=moved.note,
        )

    def promote(
        self, name: str, version: int | Literal["challenger"], *, override: str | None = None
    ) -> Moved:
        """Make a version the champion.

        Raises:
            PosttrainError: the gate did not pass it, and there is no override.
            UsageError: there is no such version.
            StoreError: its model is gone from the store, or the registry cannot be reached.
        """
        override = _reason(override)
        with self._changing() as client:
            found = _wanted(client, name, version)
            self._check_there(found)
            verdict = found.tags.get(VERDICT, NOT_JUDGED)
            if verdict != "pass" and not override:
                raise PosttrainError(
                    f"{name} v{found.version} cannot be champion: {_not_passed(verdict)}; to "
                    f"promote it all the same, say why: `posttrain registry promote {name} "
                    f'{found.version} --override "REASON"`'
                )
            number = int(found.version)
            return move(client, name, number, "champion", "promote", override)

    def rollback(self, name: str) -> Moved:
        """Make the previous champion the champion again.

        Raises:
            UsageError: there is no champion, or none before it.
            StoreError: its model is gone from the store, or the registry cannot be reached.
        """
        with self._changing() as client:
            model = _known(client, name)
            present = alias_of(model, "champion")
            if present is None:
                raise UsageError(
                    f"{name} has no champion to roll back from; `posttrain registry promote {name} "
                    "VERSION` makes one"
                )
            target = previous_champion(client, model)
            if target is None:
                raise UsageError(f"{name}: v{present} is the first champion; none was before it")
            self._check_there(target)
            return move(client, name, int(target.version), "champion", "rollback", "")

    # Inside

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        with connected(self._home, self._retries) as client:
            yield client

    @contextmanager
    def _looking(self) -> Iterator[MlflowClient]:
        """A client for a question, which must not make a database."""
        if nothing_tracked(self._home):
            raise UsageError("nothing is registered yet; a recipe's `register` stage does it")
        with self._client() as client:
            yield client

    @contextmanager
    def _changing(self) -> Iterator[MlflowClient]:
        self._home.root.mkdir(parents=True, exist_ok=True)
        with exclusive(self._home.root / LOCK), self._client() as client:
            yield client

    def _enter(self, client: MlflowClient, name: str, entry: Entry, override: str) -> int:
        """The version of a model, made or brought up to date."""
        tags = entry.tags() | override_tags(override)
        if model_named(client, name) is not None:
            known = versions_of(client, name, (FINGERPRINT, entry.model.fingerprint))
            if known:
                _update(client, known[0], tags, entry.description())
                return int(known[0].version)
        import mlflow

        source = logged_model(client, self._home, entry.model)
        with redirect_stderr(io.StringIO()):  # it prints what the caller says itself
            made = mlflow.register_model(f"models:/{source}", name, tags=tags)
        client.update_model_version(name, made.version, entry.description())
        if int(made.version) == 1:
            client.update_registered_model(name, _ABOUT.format(name=name))
        return int(made.version)

    def _check_there(self, version: ModelVersion) -> None:
        """Raises: StoreError: the model behind a version is not in the store."""
        fingerprint = version.tags.get(FINGERPRINT)
        who = f"{version.name} v{version.version}"
        if fingerprint is None:
            raise UsageError(f"{who} was not registered by posttrain, so its weights are not known")
        if self._home.store.find("model", fingerprint) is None:
            raise StoreError(
                f"{who}: its model {fingerprint[:SHORT]} is no longer in the store; run its recipe "
                f"`{version.tags.get(RECIPE, 'unknown')}` again, or promote another version: "
                f"`posttrain registry promote {version.name} VERSION`"
            )


def _update(
    client: MlflowClient, version: ModelVersion, tags: dict[str, str], description: str
) -> None:
    """Bring a version up to date with the latest verdict on its model."""
    name, number = version.name, str(version.version)
    for key in version.tags:
        if key.startswith((METRIC, DIFFERENCE, AGAINST, GATE)) and key not in tags:
            client.delete_model_version_tag(name, number, key)
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, number, key, value)
    if version.description != description:
        client.update_model_version(name, number, description)


def _reason(override: str | None) -> str:
    if override is not None and not override.strip():
        raise UsageError("--override: say why, such as --override 'the drop is in one subject'")
    return (override or "").strip()


def _not_passed(verdict: str) -> str:
    if verdict == NOT_JUDGED:
        return "no gate has judged it"
    return f"the gate says `{verdict}`"


def _check(name: str, entry: Entry) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r}: a registered model's name has letters, digits and . _ - only")
    if entry.model.kind != "model":
        what = "an adapter" if entry.model.kind == "adapter" else f"a {entry.model.kind}"
        raise UsageError(
            f"{entry.model.fingerprint[:SHORT]} is {what}, and complete weights are registered: "
            "put `- merge: {}` after the training, and register what it leaves"
        )


def _known(client: MlflowClient, name: str) -> RegisteredModel:
    found = model_named(client, name)
    if found is None:
        names = ", ".join(model.name for model in all_models(client)) or "none"
        raise UsageError(f"{name}: no model is registered by that name; there are: {names}")
    return found


def _wanted(client: MlflowClient, name: str, version: int | Literal["challenger"]) -> ModelVersion:
    model = _known(client, name)
    if version == "challenger":
        challenger = alias_of(model, "challenger")
        if challenger is None:
            raise UsageError(f"{name} has no challenger; name a version")
        version = challenger
    found = version_of(client, name, version)
    if found is None:
        known = ", ".join(f"v{one.version}" for one in versions_of(client, name))
        raise UsageError(f"{name} has no version {version}; it has {known or 'none'}")
    return found


def _registered(client: MlflowClient, model: RegisteredModel) -> Registered:
    previous = previous_champion(client, model)
    return Registered(
        name=model.name,
        versions=len(versions_of(client, model.name)),
        champion=alias_of(model, "champion"),
        challenger=alias_of(model, "challenger"),
        previous_champion=int(previous.version) if previous else None,
    )


def _version(found: ModelVersion, aliases: dict[str, str]) -> Version:
    tags = dict(found.tags)
    return Version(
        name=found.name,
        number=int(found.version),
        aliases=tuple(sorted(key for key, of in aliases.items() if int(of) == int(found.version))),
        fingerprint=tags.get(FINGERPRINT),
        recipe=tags.get(RECIPE, ""),
        verdict=tags.get(VERDICT, NOT_JUDGED),
        compared_with=tags.get(AGAINST, ""),
        metrics=_with_prefix(tags, METRIC),
        differences=_with_prefix(tags, DIFFERENCE),
        override=tags.get(OVERRIDE, ""),
        registered=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
    )


def _with_prefix(tags: dict[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): tags[key] for key in sorted(tags) if key.startswith(prefix)}
