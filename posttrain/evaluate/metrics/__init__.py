"""Task metrics: what is measured of a model's answers to a test set, one module a family.

    matching   exact_match, numbers, regex
    labels     labels
    overlap    rouge, bleu, chrf
    structure  json
    code       code

Libraries do what they can do: scikit-learn, rouge-score, sacreBLEU, jsonschema.
"""

from __future__ import annotations

from posttrain.evaluate.metrics.base import Case, Metric, Scores
from posttrain.recipe.test_sets import (
    Bleu,
    Chrf,
    Code,
    ExactMatch,
    Json,
    Labels,
    MetricConfig,
    Numbers,
    Regex,
    Rouge,
)

__all__ = ["Case", "Metric", "Scores", "make_metric"]


def make_metric(config: MetricConfig) -> Metric:
    """What computes the scores that a recipe asks for. Imports the metric's library.

    Raises:
        SandboxError: the metric runs code, and this system does not allow that safely.
    """
    match config:
        case ExactMatch() | Numbers() | Regex():
            from posttrain.evaluate.metrics import matching

            return matching.make(config)
        case Labels():
            from posttrain.evaluate.metrics.labels import LabelMetric

            return LabelMetric(config)
        case Rouge() | Bleu() | Chrf():
            from posttrain.evaluate.metrics import overlap

            return overlap.make(config)
        case Json():
            from posttrain.evaluate.metrics.structure import JsonMetric

            return JsonMetric(config)
        case Code():
            from posttrain.evaluate.metrics.code import CodeMetric

            return CodeMetric(config)
    raise TypeError(f"no metric computes {type(config).__name__}")
