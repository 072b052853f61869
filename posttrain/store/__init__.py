"""Artifacts, fingerprints, manifests, locks, garbage collection."""
