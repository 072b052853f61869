"""The Model Registry: which model is champion, what each version carries, who decided and when.

Nothing else in posttrain talks to MLflow's registry. Importing this package imports no MLflow.
"""

from posttrain.registry.champions import Champion, find_champion, registered_fingerprints
from posttrain.registry.entry import Entry
from posttrain.registry.history import Alias, Change
from posttrain.registry.judged import Judged, judged_by, judgement
from posttrain.registry.records import Moved, Registered, Registration, Version
from posttrain.registry.registry import Registry

__all__ = [
    "Alias",
    "Champion",
    "Change",
    "Entry",
    "Judged",
    "Moved",
    "Registered",
    "Registration",
    "Registry",
    "Version",
    "find_champion",
    "judged_by",
    "judgement",
    "registered_fingerprints",
]
