"""The way to a model, step by step."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.lineage import Graph
from posttrain.lineage.graph import gets_in
from posttrain.store import Artifact


def way_to(graph: Graph, artifact: Artifact) -> tuple[Artifact, ...]:
    """All that got into an artifact and itself, each after what it was made from.

    The order is the same for the same store, whatever the clock said.
    """
    seen: set[str] = set()

    def visit(one: Artifact) -> Iterator[Artifact]:
        if one.fingerprint in seen:
            return
        seen.add(one.fingerprint)
        for name, made in sorted(graph.inputs(one), key=lambda pair: pair[0]):
            if gets_in(one.manifest.stage, name):
                yield from visit(made)
        yield one

    return tuple(visit(artifact))
