"""Artifacts, fingerprints, manifests, locks, garbage collection."""

from posttrain.store.manifest import Artifact, FileRecord, InputRecord, Manifest
from posttrain.store.store import Store

__all__ = ["Artifact", "FileRecord", "InputRecord", "Manifest", "Store"]
