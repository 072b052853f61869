"""Remedies for a reward that was learned for too hard."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.evaluate.results import Hacking
from posttrain.recipe import OnlineConfig, PpoConfig
from posttrain.repair.behind import Behind, stage_names
from posttrain.repair.remedy import LENGTH_BIAS, OVEROPTIMIZATION, RULE_OF_THUMB, Change, Remedy
from posttrain.repair.symptoms import Symptom
from posttrain.repair.training import fewer_epochs, lower_rate, stay_closer

_LENGTH = "length"
"""The watch's name for the mean length of the answers, in tokens."""


def against_hacking(behind: Behind, symptom: Symptom) -> Iterator[Remedy]:
    """Closer to the model as it was, no price on length, an earlier end, another reward."""
    flagged = _only_to(behind, symptom.step)
    if flagged is None:
        return
    yield from stay_closer(flagged, symptom)
    yield from _length_penalty(flagged, symptom)
    yield from fewer_epochs(flagged, symptom)
    yield from lower_rate(flagged, symptom)
    yield Remedy(
        "reward-terms",
        "a reward that is harder to fool",
        f"{symptom.sentence}. What the reward leaves out is what got worse",
        (),
        "good",
        (OVEROPTIMIZATION, RULE_OF_THUMB),
        "read the answers that changed most in watch.html, then add a term to `reward` that "
        "measures what fell, or pairs in which that kind of answer is the rejected one; the "
        "watch's own signal belongs in no reward",
    )


def _only_to(behind: Behind, step: str) -> Behind | None:
    """The same gate, with the flagged stage as the last one trained."""
    names = stage_names(behind.recipe)
    if step not in names or names.index(step) not in behind.models:
        return None
    cut = behind.models[behind.models.index(names.index(step)) :]
    found = Behind(behind.recipe, behind.gate, behind.evaluations, cut)
    return found if isinstance(behind.recipe.stages[cut[0]], OnlineConfig) else None


def _length_penalty(behind: Behind, symptom: Symptom) -> Iterator[Remedy]:
    """What the longer answers earned more, by the tokens that they are longer."""
    position = behind.trained[0]
    stage = behind.recipe.stages[position]
    if not isinstance(stage, PpoConfig) or symptom.hacking is None:
        return
    price = _price_of_length(symptom.hacking)
    if price is None or price <= stage.shaping.length_penalty:
        return
    was = stage.shaping.length_penalty
    path = ("stages", position, "ppo", "shaping", "length_penalty")
    yield Remedy(
        f"length-penalty-{price:g}",
        f"a price on length: {price:g} of reward a token instead of {was:g}",
        f"{symptom.sentence}. The answers became longer; at this price what the reward rose by "
        "pays for no more than the tokens they are longer by",
        (Change(path, price, f"was {was:g}: longer answers shall earn nothing by their length"),),
        "fair",
        (LENGTH_BIAS,),
    )


def _price_of_length(hacking: Hacking) -> float | None:
    longer = [one for one in hacking.style if one.name == _LENGTH and one.shown]
    if not longer or longer[0].difference <= 0 or hacking.reward.difference <= 0:
        return None
    return float(f"{hacking.reward.difference / longer[0].difference:.1g}")
