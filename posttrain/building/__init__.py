"""From a recipe to the steps of a pipeline: what a person means, and all that follows from it."""

from posttrain.building.builder import build_pipeline
from posttrain.building.data import contamination_step
from posttrain.building.layout import BASE

__all__ = ["BASE", "build_pipeline", "contamination_step"]
