"""From people's ratings to a preference dataset, and how far the people agree."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from posttrain.preferences.agreement import (
    PairAgreement,
    Share,
    cohen_kappa,
    krippendorff_alpha,
    pair_agreement,
    position_bias,
    share,
)
from posttrain.preferences.blinding import Vote
from posttrain.preferences.filled import Rating, votes_of
from posttrain.preferences.key import Item, Key, Turns
from posttrain.store.files import write_bytes, write_json

Disagreement = Literal["majority", "drop"]
"""What becomes of an item about which raters disagree: the majority's view, or nothing."""

FEW = 20
"""Items in common below which an agreement is hardly a number."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RaterReport(_Frozen):
    """What one rater did."""

    rater: str
    given: int
    rated: int
    """With ties and skips."""
    ties: int
    skips: int
    chose_a: Share | None
    """Of the choices of A or B."""
    with_proposal: PairAgreement | None
    """With whoever proposed the better answer of each pair."""


class RatedCounts(_Frozen):
    """What became of the items: `items` is the sum of all below it."""

    items: int
    pairs: int
    ties: int
    """Most said that neither answer is better."""
    skipped: int
    """Everyone who was shown it skipped it."""
    disagreed: int
    unrated: int


class RatedReport(_Frozen):
    """The counts and the agreement, as in the file beside the dataset."""

    sheets: str
    disagreement: Disagreement
    counts: RatedCounts
    raters: tuple[RaterReport, ...]
    agreement: tuple[PairAgreement, ...]
    """Of each two raters."""
    alpha: float | None
    """Krippendorff's, of three raters and more."""
    chose_a: Share | None
    """Of all choices of A or B."""
    proposed_by: tuple[str, ...]
    with_proposal: Share | None
    """Pairs that the people turned the way they were proposed."""
    pairs_turned: int
    """Pairs in which the proposed answer is now the rejected one."""


class Decided(_Frozen):
    """An item of which the people say which answer is better."""

    name: str
    item: Item
    winner: Literal["first", "second"]
    votes: dict[str, int]
    """How many said `first`, `second`, `tie`."""


def decide(
    key: Key, votes: Mapping[str, Mapping[str, Vote]], ratings: Sequence[Rating], rule: Disagreement
) -> tuple[list[Decided], RatedCounts]:
    """The items that the raters turned into pairs, in the order of the key, and the rest counted.

    An answer wins with more than half of an item's votes, ties among them; under `drop` with all.
    """
    touched = {rating.item for rating in ratings}
    decided: list[Decided] = []
    ends: Counter[str] = Counter()
    for name, item in key.items.items():
        counted = Counter(rated[name] for rated in votes.values() if name in rated)
        end = _outcome(counted, rule) if counted else "skipped" if name in touched else "unrated"
        ends[end] += 1
        if end == "first" or end == "second":
            decided.append(Decided(name=name, item=item, winner=end, votes=dict(counted)))
    counts = RatedCounts(
        items=len(key.items),
        pairs=len(decided),
        ties=ends["tie"],
        skipped=ends["skipped"],
        disagreed=ends["disagreed"],
        unrated=ends["unrated"],
    )
    return decided, counts


def report_ratings(key: Key, ratings: Sequence[Rating], rule: Disagreement) -> RatedReport:
    """Everything that is said about a set of ratings."""
    votes = votes_of(ratings, key)
    decided, counts = decide(key, votes, ratings, rule)
    proposed = _proposals(key)
    turned = sum(one.item.proposed not in (None, one.winner) for one in decided)
    known = sum(one.item.proposed is not None for one in decided)
    proposers = {item.proposed_by for item in key.items.values() if item.proposed_by}
    return RatedReport(
        sheets=key.sheets,
        disagreement=rule,
        counts=counts,
        raters=tuple(_rater(key, rater, ratings, votes, proposed) for rater in key.orders),
        agreement=tuple(pair_agreement(votes)),
        alpha=krippendorff_alpha(votes) if len(votes) > 2 else None,
        chose_a=position_bias([rating.choice for rating in ratings]),
        proposed_by=tuple(sorted(proposers)),
        with_proposal=share(known - turned, known),
        pairs_turned=turned,
    )


def remarks(report: RatedReport) -> list[str]:
    """What a person should know before the pairs are used."""
    said = []
    if report.chose_a is not None and report.chose_a.excludes_half:
        said.append(_bias("the raters", report.chose_a))
    elif report.chose_a is not None:
        said += [
            _bias(one.rater, one.chose_a)
            for one in report.raters
            if one.chose_a is not None and one.chose_a.excludes_half
        ]
    few = [pair for pair in report.agreement if pair.agreed.of < FEW]
    if few:
        least = min(pair.agreed.of for pair in few)
        said.append(
            f"two raters have {least} items in common; below {FEW} their agreement is hardly a "
            "number: give out sheets with a larger --overlap"
        )
    low = [pair for pair in report.agreement if pair.kappa is not None and pair.kappa.low <= 0]
    for pair in low:
        if pair.agreed.of >= FEW:
            names = " and ".join(pair.raters)
            said.append(f"{names} agree no more than chance would; look at what they were asked")
    return said


def write_rated(out: Path, key: Key, ratings: Sequence[Rating], rule: Disagreement) -> RatedReport:
    """Write the pairs as JSON lines of the format `preference`, and the report beside them."""
    report = report_ratings(key, ratings, rule)
    decided, _ = decide(key, votes_of(ratings, key), ratings, rule)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(decided)]
    write_bytes(out, "".join(lines).encode())
    write_json(out.with_name(f"{out.name}.json"), report.model_dump(mode="json"))
    return report


def _outcome(counted: Counter[Vote], rule: Disagreement) -> str:
    """`first`, `second`, `tie` or `disagreed`, of one vote or more."""
    [(most, count)] = counted.most_common(1)
    total = counted.total()
    if count == total or (rule == "majority" and 2 * count > total):
        return most
    return "disagreed"


def _proposals(key: Key) -> dict[str, str]:
    """Item -> the answer that was proposed as the better one."""
    return {name: item.proposed for name, item in key.items.items() if item.proposed is not None}


def _rater(
    key: Key,
    rater: str,
    ratings: Sequence[Rating],
    votes: Mapping[str, Mapping[str, Vote]],
    proposed: Mapping[str, str],
) -> RaterReport:
    choices = [rating.choice for rating in ratings if rating.rater == rater]
    return RaterReport(
        rater=rater,
        given=len(key.orders[rater]),
        rated=len(choices),
        ties=choices.count("tie"),
        skips=choices.count("skip"),
        chose_a=position_bias(choices),
        with_proposal=_with_proposal(rater, votes.get(rater, {}), proposed),
    )


def _with_proposal(
    rater: str, votes: Mapping[str, Vote], proposed: Mapping[str, str]
) -> PairAgreement | None:
    """A rater beside the proposal as if that were one; ties are no choice and left out."""
    both = [name for name, vote in votes.items() if vote != "tie" and name in proposed]
    first, second = [votes[name] for name in both], [proposed[name] for name in both]
    agreed = share(sum(a == b for a, b in zip(first, second, strict=True)), len(both))
    if agreed is None:
        return None
    kappa = cohen_kappa(first, second)
    return PairAgreement(raters=(rater, "proposal"), agreed=agreed, kappa=kappa)


def _rows(decided: Sequence[Decided]) -> Iterator[dict[str, object]]:
    for one in decided:
        item, first = one.item, one.winner == "first"
        chosen, rejected = (item.first, item.second) if first else (item.second, item.first)
        wins, losses = ("first", "second") if first else ("second", "first")
        yield {
            "prompt": _plain(item.prompt),
            "chosen": _plain(chosen),
            "rejected": _plain(rejected),
            "votes": {
                "chosen": one.votes.get(wins, 0),
                "rejected": one.votes.get(losses, 0),
                "tie": one.votes.get("tie", 0),
            },
            "model": item.model,
            "reward": item.proposed_by,
            "as_proposed": None if item.proposed is None else item.proposed == one.winner,
            "item": one.name,
        }


def _plain(turns: Turns) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _bias(who: str, chose: Share) -> str:
    return (
        f"{who} chose A in {chose.value:.0%} of {chose.of} choices (95% interval {chose.low:.0%} "
        f"to {chose.high:.0%}): the place of an answer sways them"
    )
