"""Lineage: what was made from what, down to the single row."""

from posttrain.lineage.graph import Graph

__all__ = ["Graph"]
