"""The cheapest remedy for forgetting: go back a part of the way to the base. Nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pydantic import JsonValue

from posttrain.recipe import MergeConfig, TrainingConfig
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.recipe.judge import JudgeConfig
from posttrain.repair.behind import BASE, Behind, leaves_model, model_of, stage_names
from posttrain.repair.remedy import (
    ALIGNMENT_TAX,
    WISE_FT,
    Change,
    Confidence,
    Edit,
    Insertion,
    Remedy,
)
from posttrain.repair.symptoms import Symptom

LADDER = (0.85, 0.7, 0.5, 0.3, 0.15)
"""Weights of the tuned model that are tried, one after the other."""
_FIRST, _FIRST_LOW = 0.7, 0.3
"""Between these lies the first weight that is tried."""
_FAR = 2.0
"""Times the allowed drop that is guessed to be left, from which on it is no more than a try."""
_NAME = "interpolate"
"""Of the added stage, where the recipe has another `merge`."""


def step_back(
    behind: Behind, symptom: Symptom, tried: frozenset[str], confidence: Confidence = "good"
) -> Iterator[Remedy]:
    """Interpolate, or interpolate further, towards the base."""
    present = _present(behind)
    now = 1.0 if present is None else present
    left = [w for w in LADDER if w < now and _id(w) not in tried]
    if not left or not _has_line(behind):
        return
    fitting = [w for w in left if w <= _largest(symptom, now)] or left[-1:]
    weight = fitting[0]
    guess = _guess(symptom, weight, now)
    why = f"{symptom.sentence}. {guess}" if guess else symptom.sentence
    if symptom.excess * (weight / now) ** 2 > _FAR:
        confidence = "a try"
    yield _remedy(behind, weight, why, confidence)


def step_forward(behind: Behind, symptom: Symptom, tried: frozenset[str]) -> Iterator[Remedy]:
    """Keep more of what was learned, where an interpolation took too much of it away."""
    present = _present(behind)
    above = [w for w in reversed(LADDER) if present is not None and w > present]
    left = [w for w in above if _id(w) not in tried]
    if left:
        why = f"{symptom.sentence}. The interpolation at {present:g} may have taken too much back"
        yield _remedy(behind, left[0], why, "fair")


def _remedy(behind: Behind, weight: float, why: str, confidence: Confidence) -> Remedy:
    return Remedy(
        id=_id(weight),
        title=f"interpolate: {weight:g} of the way from the base to the tuned weights (WiSE-FT)",
        why=why,
        edits=tuple(_edits(behind, weight)),
        confidence=confidence,
        sources=(WISE_FT, ALIGNMENT_TAX),
        by_hand="other weights are cheap to try: posttrain sweep RECIPE "
        f"--over {_merge_name(behind)}.weight=0.3,0.5,0.7,0.9,1.0",
    )


def _id(weight: float) -> str:
    return f"interpolate-{weight:g}"


def _largest(symptom: Symptom, now: float) -> float:
    """The weight at which a drop that grows with its square is what was allowed.

    Near a minimum of the base's own loss that is how it grows; a guess all the same, and no more
    than a first step where the drop is merely possible.
    """
    fits = now * math.sqrt(1 / max(symptom.excess, 1.0))
    return max(_FIRST_LOW, min(_FIRST, fits)) if now == 1 else fits


def _guess(symptom: Symptom, weight: float, now: float) -> str:
    if symptom.excess <= 1:
        return ""
    times = symptom.excess * (weight / now) ** 2
    return (
        f"If it grows with the square of the weight, it is {_times(times)} what is allowed at "
        f"{weight:g}, instead of {_times(symptom.excess)}"
    )


def _times(value: float) -> str:
    return f"{value:,.0f} times" if value >= 10 else f"{value:.1f} times"


def _present(behind: Behind) -> float | None:
    """The weight of the interpolation that is there already."""
    head = _head(behind)
    return head.part if isinstance(head, MergeConfig) and head.interpolates else None


def _head(behind: Behind) -> object:
    return behind.recipe.stages[behind.models[0]] if behind.models else None


def _has_line(behind: Behind) -> bool:
    """Whether something was trained whose weights can be mixed with the base's."""
    stages = behind.recipe.stages
    adapters = [
        stage.adapter
        for n in behind.models[:1]
        if isinstance(stage := stages[n], TrainingConfig) and stage.adapter is not None
    ]
    return bool(behind.trained) and all(adapter.mergeable for adapter in adapters)


def _edits(behind: Behind, weight: float) -> Iterator[Edit]:
    position, head = behind.models[0], _head(behind)
    stages: tuple[str | int, ...] = ("stages", position, "merge")
    if isinstance(head, MergeConfig) and head.interpolates:
        why = f"was {head.part:g}: less of what was learned, less forgotten"
        yield Change((*stages, "weight"), weight, why)
        return
    reason = "part of the way from base to tuned weights (WiSE-FT), so that less is forgotten"
    if isinstance(head, MergeConfig) and not head.models:
        yield Change((*stages, "method"), "interpolate", f"was a plain fold: {reason}")
        yield Change((*stages, "weight"), weight, "added: 1 is the tuned model, 0 the base")
        if _far_from_base(behind):
            yield Change((*stages, "base"), BASE, "added: not only the last stage's changes")
        return
    yield from _inserted(behind, weight, reason)


def _inserted(behind: Behind, weight: float, reason: str) -> Iterator[Edit]:
    """A stage before the first one that measures the model, which they then name."""
    recipe, head = behind.recipe, behind.models[0]
    names = stage_names(recipe)
    measuring = [n for n in _measuring(behind) if model_of(recipe, n) == head]
    position, name = min(measuring), _merge_name(behind)
    body: dict[str, JsonValue] = {"method": "interpolate", "weight": weight}
    if name != "merge":
        body = {"name": name, **body}
    if model_of(recipe, position) != _current(behind, position):
        body["model"] = names[head]
    if _far_from_base(behind):
        body["base"] = BASE
    for n in measuring:
        if getattr(recipe.stages[n], "model", None) is not None:
            path = ("stages", n, recipe.stages[n].stage, "model")
            yield Change(path, name, f"was {names[head]}")
    yield Insertion(position, "merge", body, f"added: {reason}")


def _measuring(behind: Behind) -> Sequence[int]:
    stages = behind.recipe.stages
    return [
        n
        for n in range(behind.models[0] + 1, behind.gate)
        if isinstance(stages[n], EvaluateConfig | JudgeConfig)
    ]


def _current(behind: Behind, position: int) -> int | None:
    """The model that a stage at this position would start from, if it named none."""
    before = [n for n in range(position) if leaves_model(behind.recipe.stages[n])]
    return before[-1] if before else None


def _merge_name(behind: Behind) -> str:
    names = stage_names(behind.recipe)
    head = _head(behind)
    if isinstance(head, MergeConfig) and not head.models:
        return names[behind.models[0]]
    name, count = ("merge" if "merge" not in names else _NAME), 1
    while name in names:
        count += 1
        name = f"{_NAME}-{count}"
    return name


def _far_from_base(behind: Behind) -> bool:
    """Whether several stages trained on the way, so that the last model before is not the base."""
    return len(behind.trained) > 1 and behind.config.against == BASE
