"""Remedies for a gate that could not decide: measure more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.recipe.judge import JudgeConfig
from posttrain.repair.behind import Behind
from posttrain.repair.remedy import RULE_OF_THUMB, STATISTICS, Change, Remedy
from posttrain.repair.symptoms import Shortage


def measure_more(behind: Behind, short: Sequence[Shortage]) -> Iterator[Remedy]:
    """What would settle the open checks, one remedy for each kind of measurement."""
    items = [one for one in short if one.of == "items"]
    if items:
        yield from _more_items(behind, items)
    rows = [one for one in short if one.of == "rows"]
    if rows:
        yield _more_rows(behind, rows)
    for one in short:
        if one.of == "prompts":
            yield _more_prompts(behind, one)
        elif one.of == "ratings":
            yield _ratings(one)


def _more_items(behind: Behind, short: Sequence[Shortage]) -> Iterator[Remedy]:
    factor = max((one.need or one.have) / max(one.have, 1) for one in short)
    edits, texts = [], []
    for n in behind.evaluations:
        stage = behind.recipe.stages[n]
        if not isinstance(stage, EvaluateConfig):
            continue
        for path, limit in _limits(n, stage, {one.name for one in short}):
            new = _rounded_up(limit * factor)
            why = f"was {limit}: about as many items as would settle it"
            edits.append(Change(path, new, why))
            texts.append(f"{new} instead of {limit}")
    needs = "; ".join(f"{one.name} needs about {one.need:,} items" for one in short)
    by_hand = ""
    if not edits:
        by_hand = "all items are asked already: add benchmarks of the same kind under `tasks`, or "
        by_hand += "rows to the test set"
    yield Remedy(
        "limit" + "".join(f"-{edit.value}" for edit in edits),
        f"more items: {', '.join(dict.fromkeys(texts))} of each task" if edits else "more items",
        "; ".join(one.sentence for one in short),
        tuple(edits),
        "good",
        (STATISTICS,),
        by_hand or f"{needs}; a benchmark that has fewer is asked in full",
    )


def _limits(
    position: int, stage: EvaluateConfig, names: set[str]
) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """The limits that hold for these tasks; a test set's are named DATASET:METRIC."""
    where = ("stages", position, "evaluate")
    if stage.limit is not None and names & set(stage.tasks):
        yield (*where, "limit"), stage.limit
    for n, test in enumerate(stage.test_sets):
        if test.limit is not None and any(name.startswith(f"{test.dataset}:") for name in names):
            yield (*where, "test_sets", n, "limit"), test.limit


def _more_rows(behind: Behind, short: Sequence[Shortage]) -> Remedy:
    edits = []
    wanted = max(one.need or one.have * 4 for one in short)
    for n in behind.evaluations:
        stage = behind.recipe.stages[n]
        if not isinstance(stage, EvaluateConfig):
            continue
        # Fewer than the limit means that there are no more.
        if any(one.have >= stage.max_perplexity_rows for one in short):
            path = ("stages", n, "evaluate", "max_perplexity_rows")
            new = _rounded_up(wanted)
            edits.append(Change(path, new, f"was {stage.max_perplexity_rows}: not enough to tell"))
    by_hand = (
        ""
        if edits
        else (
            "all held-out rows are used already: hold out more with `split: {validation: 0.2}` in "
            "`prepare`, or add rows; both train again"
        )
    )
    return Remedy(
        "perplexity-rows" + "".join(f"-{edit.value}" for edit in edits),
        f"more held-out rows for perplexity: {_rounded_up(wanted):,}"
        if edits
        else "more held-out rows for perplexity",
        "; ".join(one.sentence for one in short),
        tuple(edits),
        "fair",
        (STATISTICS,),
        by_hand,
    )


def _more_prompts(behind: Behind, short: Shortage) -> Remedy:
    edits = []
    wanted = short.need or short.have * 2
    for n in behind.judges:
        stage = behind.recipe.stages[n]
        if isinstance(stage, JudgeConfig) and stage.prompts < wanted:
            why = f"was {stage.prompts}: not enough to tell"
            edits.append(Change(("stages", n, "judge", "prompts"), _rounded_up(wanted), why))
    return Remedy(
        "prompts" + "".join(f"-{edit.value}" for edit in edits),
        f"more prompts to judge: {_rounded_up(wanted)} instead of {short.have}",
        short.sentence,
        tuple(edits),
        "good" if short.need else "fair",
        (STATISTICS, RULE_OF_THUMB),
        "" if edits else "the dataset has no more held-out prompts: add rows, or hold out more",
    )


def _ratings(short: Shortage) -> Remedy:
    return Remedy(
        "ratings",
        "fill in the sheets of the blind comparison",
        short.sentence,
        (),
        "good",
        (RULE_OF_THUMB,),
        "give the sheets of the `judge` stage to two people or more, name the filled files in the "
        "stage, and run again: only what reads them runs",
    )


def _rounded_up(value: float) -> int:
    """Two significant digits, upwards."""
    size = int(10 ** max(math.floor(math.log10(max(value, 1))) - 1, 0))
    return math.ceil(value / size - 1e-9) * size
