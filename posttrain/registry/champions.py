"""What other parts of posttrain ask: who is champion, and what must not be thrown away."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.errors import StoreError, UsageError
from posttrain.home import Home
from posttrain.lineage.graph import SHORT
from posttrain.registry.connection import connected, nothing_tracked
from posttrain.registry.entry import FINGERPRINT, GATE, RECIPE
from posttrain.registry.history import champions, read_history
from posttrain.registry.queries import all_models, model_named, version_of
from posttrain.store import Artifact


@dataclass(frozen=True)
class Champion:
    """The version of a registered model that is in use."""

    name: str
    """Of the registered model."""
    version: int
    artifact: Artifact

    @property
    def label(self) -> str:
        """Such as `champion python-assistant v3`."""
        return f"champion {self.name} v{self.version}"


def find_champion(name: str, home: Home) -> Champion | None:
    """The present champion, or None where no model is registered by that name or none is champion.

    Costs nothing, not even the import of MLflow, where nothing was ever tracked.

    Raises:
        UsageError: the champion was registered by something else than posttrain.
        StoreError: its weights are gone from the store, or the registry cannot be reached.
    """
    if nothing_tracked(home):
        return None
    with connected(home) as client:
        model = model_named(client, name)
        number = model.aliases.get("champion") if model else None
        found = version_of(client, name, int(number)) if number else None
    if found is None:
        return None
    version, tags = int(found.version), dict(found.tags)
    who = f"champion {name} v{version}"
    around = (
        f"promote another version (`posttrain registry promote {name} VERSION`), or write "
        "`against_champion: ignore` in the gate"
    )
    if FINGERPRINT not in tags:
        raise UsageError(
            f"{who}: was not registered by posttrain (it has no tag {FINGERPRINT}), so there is "
            f"nothing to compare with; {around}"
        )
    artifact = home.store.find("model", tags[FINGERPRINT])
    if artifact is None:
        raise StoreError(
            f"{who}: its model {tags[FINGERPRINT][:SHORT]} is not in the store at "
            f"{home.store.root}; run its recipe `{tags.get(RECIPE, 'unknown')}` again, {around}"
        )
    return Champion(name, version, artifact)


def registered_fingerprints(home: Home) -> set[str]:
    """What garbage collection must keep: all that an alias or a rollback would lead to.

    Those are the models of all versions with an alias and of each previous champion, and the
    verdicts on them. Costs nothing where nothing was ever tracked.

    Raises:
        StoreError: the registry cannot be reached; then nobody knows, and nothing may be removed.
    """
    if nothing_tracked(home):
        return set()
    needed: set[str] = set()
    with connected(home) as client:
        for model in all_models(client):
            present = model.aliases.get("champion")
            line = champions(read_history(model.tags), int(present) if present else None)
            for number in {int(value) for value in model.aliases.values()} | set(line[-2:]):
                found = version_of(client, model.name, number)
                tags = dict(found.tags) if found else {}
                needed |= {tags[key] for key in (FINGERPRINT, GATE) if key in tags}
    return needed
