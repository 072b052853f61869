"""General rows among those of the domain, against forgetting."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import JsonValue

from posttrain.recipe import (
    MixConfig,
    PretrainConfig,
    Recipe,
    RewardConfig,
    SftConfig,
    TrainingConfig,
)
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.repair.behind import Behind, stage_names
from posttrain.repair.remedy import REPLAY, RULE_OF_THUMB, Change, Edit, Insertion, Remedy
from posttrain.repair.symptoms import Symptom
from posttrain.repair.training import last_trained

_FIRST, _MOST = 0.1, 0.2


def replay(behind: Behind, symptom: Symptom) -> Iterator[Remedy]:
    """A share of general rows, or a larger one."""
    stage = last_trained(behind)[1]
    if not isinstance(stage, SftConfig | PretrainConfig):
        return
    present = _present(behind)
    if present is not None:
        yield from _larger(symptom, *present)
        return
    sources = _general(behind)
    why = f"{symptom.sentence}. Rows of the kind that was forgotten keep it in mind"
    title = f"replay: a tenth of what {_name(behind)} learns from is general rows"
    if not sources:
        rows = "documents" if isinstance(stage, PretrainConfig) else "chats"
        what = "replay" if isinstance(stage, PretrainConfig) else "a `mix` with replay"
        yield Remedy(
            "replay",
            title,
            why,
            (),
            "good",
            (RULE_OF_THUMB, REPLAY),
            f"the recipe has no dataset of general {rows}: add one under `datasets`, such as "
            f"`general: {{source: general.jsonl}}`, and {what}: "
            "`replay: {dataset: general, fraction: 0.1}`",
        )
        return
    for source in sources:
        made = _in_pretraining if isinstance(stage, PretrainConfig) else _in_a_mix
        edits = tuple(made(behind, source))
        identity = f"replay-{_FIRST:g}-{source}"
        yield Remedy(identity, title, why, edits, "good", (RULE_OF_THUMB, REPLAY))


def _larger(symptom: Symptom, where: tuple[str | int, ...], share: float) -> Iterator[Remedy]:
    fraction = min(share * 2, _MOST)
    if fraction <= share:
        return
    why = f"{symptom.sentence}. A share of {share:g} was too little to keep it in mind"
    yield Remedy(
        f"replay-{fraction:g}",
        f"more replay: {fraction:.0%} of the rows instead of {share:.0%}",
        why,
        (Change(where, fraction, f"was {share:g}: more general rows against forgetting"),),
        "fair",
        (RULE_OF_THUMB, REPLAY),
    )


def _present(behind: Behind) -> tuple[tuple[str | int, ...], float] | None:
    """Where a replay stands already, and its share."""
    where, stage = last_trained(behind)
    if isinstance(stage, PretrainConfig) and stage.replay is not None:
        return (*where, "replay", "fraction"), stage.replay.fraction
    for n, one in enumerate(behind.recipe.stages):
        if isinstance(one, MixConfig) and one.name == stage.dataset and one.replay is not None:
            return ("stages", n, "mix", "replay", "fraction"), one.replay.fraction
    return None


def _general(behind: Behind) -> list[str]:
    """Datasets that nothing is trained on, those first that are watched for forgetting.

    Whether their rows are of the right kind is found out when the recipe is opened.
    """
    recipe = behind.recipe
    stages = [stage for stage in recipe.stages if isinstance(stage, EvaluateConfig)]
    watched = [name for stage in stages for name in (*stage.other_datasets, stage.dataset)]
    used = _used(recipe)
    names = dict.fromkeys((*watched, *recipe.datasets))
    return [name for name in names if name in recipe.datasets and name not in used]


def _used(recipe: Recipe) -> set[str]:
    """Datasets that are trained or tested on."""
    used: set[str] = set()
    for stage in recipe.stages:
        if isinstance(stage, TrainingConfig | RewardConfig):
            used |= {stage.dataset, *recipe.made_of(stage.dataset)}
        if isinstance(stage, EvaluateConfig):
            used |= {test.dataset for test in stage.test_sets}
    return used


def _in_pretraining(behind: Behind, source: str) -> Iterator[Edit]:
    where, _ = last_trained(behind)
    value: dict[str, JsonValue] = {"dataset": source, "fraction": _FIRST}
    yield Change((*where, "replay"), value, "added: general text against forgetting")


def _in_a_mix(behind: Behind, source: str) -> Iterator[Edit]:
    recipe, (where, stage) = behind.recipe, last_trained(behind)
    share: dict[str, JsonValue] = {"dataset": source, "fraction": _FIRST}
    for n, one in enumerate(recipe.stages):
        if isinstance(one, MixConfig) and one.name == stage.dataset:
            path = ("stages", n, "mix", "replay")
            yield Change(path, share, "added: general rows against forgetting")
            return
    name = f"{stage.dataset}-with-{source}".lower()
    yield Change((*where, "dataset"), name, f"was {stage.dataset}")
    for n in behind.evaluations:
        evaluate = recipe.stages[n]
        if isinstance(evaluate, EvaluateConfig) and evaluate.dataset is None:
            # Else the perplexity would be that of the mix, and no more be comparable with before.
            path = ("stages", n, "evaluate", "dataset")
            yield Change(path, stage.dataset, "added: as before, without the general rows")
    body: dict[str, JsonValue] = {
        "name": name,
        "sources": [{"dataset": stage.dataset}],
        "replay": share,
    }
    position = behind.trained[0]
    yield Insertion(position, "mix", body, "added: a tenth of general rows, against forgetting")


def _name(behind: Behind) -> str:
    return stage_names(behind.recipe)[behind.trained[0]]
