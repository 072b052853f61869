"""From a verdict to remedies, the one to try first at the head."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from posttrain.evaluate.results import Verdict
from posttrain.recipe import Recipe
from posttrain.repair.behind import Behind, behind_gate
from posttrain.repair.evidence import measure_more
from posttrain.repair.interpolating import step_back, step_forward
from posttrain.repair.remedy import RULE_OF_THUMB, Remedy
from posttrain.repair.replaying import replay
from posttrain.repair.rewards import against_hacking
from posttrain.repair.symptoms import Symptom, shortages, symptoms
from posttrain.repair.training import (
    fewer_epochs,
    higher_rate,
    lora_for_full,
    lower_rate,
    more_data,
    more_epochs,
    other_rank,
    stay_closer,
)


def propose(
    verdict: Verdict, recipe: Recipe, *, gate: str | None = None, tried: Collection[str] = ()
) -> list[Remedy]:
    """What may turn a verdict, the first one to try first.

    Args:
        verdict: What the gate said.
        recipe: What it said it of, as it was run.
        gate: Name of the gate. Default: the last one.
        tried: Ids of remedies that were tried and did not help.

    Returns:
        None twice, none that was tried; empty where the gate passed, or nothing is known to help.
    """
    behind = behind_gate(recipe, gate)
    if verdict.verdict == "pass" or behind is None or not behind.trained:
        return []
    known = frozenset(tried)
    found: dict[str, Remedy] = {}
    for remedy in _in_order(verdict, behind, known):
        if remedy.id not in known:
            found.setdefault(remedy.id, remedy)
    return list(found.values())


def hints(remedies: Sequence[Remedy], file: str, most: int = 3) -> list[str]:
    """A few lines below a verdict: what `posttrain repair` would do."""
    written = [remedy for remedy in remedies if remedy.can_be_written]
    if not written:
        return [f"{remedy.title}: {remedy.by_hand}" for remedy in remedies[:1]]
    lines = [f"posttrain repair {file} would {_as_a_deed(written[0].title)}"]
    lines += [f"  or: {remedy.title}" for remedy in written[1:most]]
    return lines


def _as_a_deed(title: str) -> str:
    return title if title.startswith("interpolate") else f"try {title}"


def _in_order(verdict: Verdict, behind: Behind, tried: frozenset[str]) -> Iterator[Remedy]:
    found = symptoms(
        verdict,
        hacking_fails=behind.config.reward_hacking == "fail",
        trained_on=behind.measured_on_training,
    )
    if verdict.verdict == "not enough evidence":
        # Nothing is shown to be wrong: first look closer, then change something.
        yield from measure_more(behind, list(shortages(verdict)))
    else:
        found = [symptom for symptom in found if symptom.shown] or found
    # Of each kind the gravest: what is shown before what is possible, then the largest drop.
    kinds = {one.kind: one for one in sorted(found, key=lambda one: (one.shown, one.excess))}
    if "reward hacking" in kinds:
        yield from against_hacking(behind, kinds["reward hacking"])
    if "overfitting" in kinds:
        yield from _overfitting(behind, kinds["overfitting"])
    if "forgetting" in kinds:
        yield from _forgetting(behind, kinds["forgetting"], tried, "no improvement" in kinds)
    elif "no improvement" in kinds:
        yield from _no_improvement(behind, kinds["no improvement"], tried)
    if "champion" in kinds:
        yield _from_champion(kinds["champion"])
    if verdict.verdict == "fail":
        yield from measure_more(behind, list(shortages(verdict)))


def _forgetting(
    behind: Behind, symptom: Symptom, tried: frozenset[str], nothing_learned: bool
) -> Iterator[Remedy]:
    if nothing_learned:
        # Worse on both sides is what too large steps look like: going back gains nothing.
        yield from lower_rate(behind, symptom, "fair")
    else:
        yield from step_back(behind, symptom, tried)
    yield from replay(behind, symptom)
    yield from stay_closer(behind, symptom)
    yield from lower_rate(behind, symptom)
    yield from fewer_epochs(behind, symptom)
    yield from lora_for_full(behind, symptom)
    yield from other_rank(behind, symptom, 0.5)
    if nothing_learned:
        yield from step_back(behind, symptom, tried, "a try")


def _overfitting(behind: Behind, symptom: Symptom) -> Iterator[Remedy]:
    yield from fewer_epochs(behind, symptom)
    yield from lower_rate(behind, symptom)
    yield from more_data(behind, symptom)
    yield from lora_for_full(behind, symptom)
    yield from other_rank(behind, symptom, 0.5)


def _no_improvement(behind: Behind, symptom: Symptom, tried: frozenset[str]) -> Iterator[Remedy]:
    yield from step_forward(behind, symptom, tried)
    yield from more_epochs(behind, symptom)
    yield from higher_rate(behind, symptom)
    yield from other_rank(behind, symptom, 2)
    yield from more_data(behind, symptom)


def _from_champion(symptom: Symptom) -> Remedy:
    return Remedy(
        "champion",
        "start from the champion",
        f"{symptom.sentence}. What it was trained on can be built upon instead of repeated",
        (),
        "fair",
        (RULE_OF_THUMB,),
        "write the champion's model under `model`: `artifact:NAME` takes a model from the store by "
        "the stage or recipe that left it. The gate then compares with the champion as the base",
    )
