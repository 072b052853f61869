"""From votes to a win rate: scores, interval, position bias, agreement, and what to beware of.

No torch here: votes in, numbers out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from posttrain.evaluate.judging.pairs import ORDERS, Pair, Preferred, Vote
from posttrain.evaluate.results import WinRate
from posttrain.evaluate.shares import wilson
from posttrain.evaluate.statistics import paired_difference
from posttrain.preferences.agreement import PairAgreement, pair_agreement
from posttrain.preferences.blinding import draw_orders
from posttrain.preferences.rated import FEW

ADVISED = 50
"""Prompts below which hardly any difference can be shown."""

CONFIDENCE = 0.95
"""Of the two-sided interval."""

_SCORE = {"candidate": 1.0, "tie": 0.5, "opponent": 0.0}
_SURPRISING = 0.01
"""p-value below which a bias is remarked upon: several are looked for."""
_MANY_TIES = 0.5
_OFTEN_CUT = 0.25


@dataclass(frozen=True)
class Tallied:
    """A comparison, with what is not in `comparison.json`."""

    win_rate: WinRate
    scores: tuple[float | None, ...]
    """A pair each, in order; None where there is no verdict."""
    ties: float | None
    """Share of the scored prompts with a score of one half."""
    longer_preferred: float | None
    """Share of the decided prompts on which the longer answer won."""
    unread: int
    """Votes without a verdict."""

    @property
    def metrics(self) -> dict[str, float]:
        """What is tracked; numbers that are not known are left out."""
        found = self.win_rate
        numbers = {
            "win_rate": found.win_rate,
            "low": found.low,
            "high": found.high,
            "prompts": len(found.scores),
            "ties": self.ties,
            "first_preferred": found.first_preferred,
            "consistent": found.consistent,
            "agreement": found.agreement,
            "longer_preferred": self.longer_preferred,
            "unread_votes": self.unread,
        }
        return {name: float(value) for name, value in numbers.items() if value is not None}

    @property
    def headline(self) -> str:
        """`win rate 61.7% (48.9% to 73.0%) of 60 prompts by model NAME; 12% ties; ...`."""
        found = self.win_rate
        if found.win_rate is None or found.low is None or found.high is None:
            return "no ratings yet"
        parts = [
            f"win rate {found.win_rate:.1%} ({found.low:.1%} to {found.high:.1%}) "
            f"of {len(found.scores):,} prompts by {found.judge}",
            f"{self.ties or 0.0:.0%} ties",
        ]
        if found.first_preferred is not None:
            parts.append(f"first answer preferred {found.first_preferred:.0%}")
        if found.agreement is not None:
            parts.append(f"kappa {found.agreement:.2f}")
        return "; ".join(parts)


def tally(
    pairs: Sequence[Pair],
    votes: Sequence[Vote],
    *,
    candidate: str,
    opponent: str,
    judge: str,
    average: bool = False,
    remarks: Sequence[str] = (),
    seed: int = 0,
) -> Tallied:
    """What all votes say together.

    A pair's score is 1 where the candidate's answer is preferred and 0 where the opponent's is; a
    tie, and a rater who prefers another answer in the other order, make one half. With several
    raters it is the mean of theirs. A rater without a readable verdict on a pair has no say on it.

    Args:
        pairs: All of them; identical answers are a tie.
        votes: On the others.
        candidate: Name of the stage whose answers are judged.
        opponent: Name of the other one.
        judge: Who compared; empty where nobody has yet.
        average: Where the orders disagree, have the mean of the votes' margins decide.
        remarks: Further warnings, for the beginning of the list.
        seed: Of the bootstrap.
    """
    by_rater = _by_rater(votes)
    said = {rater: _said_of(given, average) for rater, given in by_rater.items()}
    scores = [_score(pair, said) if judge else None for pair in pairs]
    known = tuple(score for score in scores if score is not None)
    low, high = interval(known, seed=seed) if known else (None, None)
    agreements = _agreements(pairs, said, seed)
    tallied = Tallied(
        win_rate=WinRate(
            candidate=candidate,
            opponent=opponent,
            judge=judge,
            scores=known,
            win_rate=float(np.mean(known)) if known else None,
            low=low,
            high=high,
            first_preferred=_first_preferred(votes),
            consistent=_consistent(by_rater),
            agreement=_kappa(agreements),
        ),
        scores=tuple(scores),
        ties=sum(score == 0.5 for score in known) / len(known) if known else None,
        longer_preferred=_longer(pairs, scores)[0],
        unread=sum(vote.preferred is None for vote in votes),
    )
    if not known:
        return _warned(tallied, remarks)
    found = [
        *remarks,
        *_about_prompts(pairs, tallied),
        *_about_ties(pairs, tallied),
        *_about_place(by_rater),
        *_about_length(pairs, tallied),
        *_about_agreement(agreements),
    ]
    return _warned(tallied, found)


def interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Two-sided 95% interval of a mean of scores in [0, 1] where one half is a tie.

    A win rate is 1/2 + d/2 with d the share of wins less the share of losses: the difference of two
    paired proportions, ties being the pairs that agree. So this is the gate's interval for such
    differences: Tango's score interval, widened to the bootstrap's where that is wider; for means
    over raters Student's in place of Tango's. Wilson's interval with ties as half wins would have
    the variance of a sample without ties, and be far too wide with many; it is used only where all
    scores are the same and no tie, so that the others have no variance to go by.

    Args:
        scores: At least one.
        seed: Of the bootstrap.

    Returns:
        Lower and upper end, within [0, 1].
    """
    if len(set(scores)) == 1 and scores[0] != 0.5:
        share = wilson(sum(scores), len(scores))
        return share.low, share.high
    leaning = 2 * np.asarray(scores, dtype=np.float64) - 1
    won, lost = np.maximum(leaning, 0), np.maximum(-leaning, 0)
    found = paired_difference(lost, won, confidence=(1 + CONFIDENCE) / 2, seed=seed)
    return max(0.0, 0.5 + found.low / 2), min(1.0, 0.5 + found.high / 2)


def _by_rater(votes: Sequence[Vote]) -> dict[str, dict[str, list[Vote]]]:
    """Rater -> pair -> votes in each order."""
    found: dict[str, dict[str, list[Vote]]] = {}
    for vote in votes:
        found.setdefault(vote.rater, {}).setdefault(vote.pair, []).append(vote)
    return found


def _said_of(given: Mapping[str, Sequence[Vote]], average: bool = False) -> dict[str, Preferred]:
    """Pair -> what a rater said of it in all orders; pairs without a readable verdict left out."""
    said: dict[str, Preferred] = {}
    for pair, votes in given.items():
        verdicts = {vote.preferred for vote in votes}
        if None not in verdicts:
            [first, *others] = verdicts
            agreed = first if not others and first is not None else "tie"
            said[pair] = _leaning(votes) if others and average else agreed
    return said


def _leaning(votes: Sequence[Vote]) -> Preferred:
    """What the margins say on average."""
    margin = sum(vote.margin or 0.0 for vote in votes)
    return "candidate" if margin > 0 else "opponent" if margin < 0 else "tie"


def _score(pair: Pair, said: Mapping[str, Mapping[str, Preferred]]) -> float | None:
    if pair.identical:
        return 0.5
    given = [_SCORE[of_pair[pair.id]] for of_pair in said.values() if pair.id in of_pair]
    return float(np.mean(given)) if given else None


def _first_preferred(votes: Sequence[Vote]) -> float | None:
    decided = [vote for vote in votes if vote.first and vote.preferred in ORDERS]
    if not decided:
        return None
    return sum(vote.preferred == vote.first for vote in decided) / len(decided)


def _consistent(by_rater: Mapping[str, Mapping[str, Sequence[Vote]]]) -> float | None:
    """Share of the pairs, asked in both orders, with the same verdict in both."""
    both = [
        votes[0].preferred == votes[1].preferred
        for given in by_rater.values()
        for votes in given.values()
        if len(votes) == 2 and all(vote.preferred is not None for vote in votes)
    ]
    return sum(both) / len(both) if both else None


def _agreements(
    pairs: Sequence[Pair], said: Mapping[str, Mapping[str, Preferred]], seed: int
) -> list[PairAgreement]:
    """Each two raters, on each pair's two answers in an order that is drawn.

    Not on candidate and opponent: raters who agree because one model is plainly better would be
    said to agree by chance.
    """
    orders = draw_orders(len(pairs), random.Random(f"agreement:{seed}"))
    turned = {pair.id: order == "BA" for pair, order in zip(pairs, orders, strict=True)}

    def category(pair: str, verdict: Preferred) -> str:
        return verdict if verdict == "tie" else str((verdict == "candidate") != turned[pair])

    return pair_agreement(
        {rater: {pair: category(pair, v) for pair, v in own.items()} for rater, own in said.items()}
    )


def _kappa(agreements: Sequence[PairAgreement]) -> float | None:
    """Cohen's kappa of two raters; of several the mean over each two.

    Light (1971), Psychological Bulletin 76(5).
    """
    known = [pair.kappa.value for pair in agreements if pair.kappa is not None]
    return float(np.mean(known)) if known else None


def _longer(pairs: Sequence[Pair], scores: Sequence[float | None]) -> tuple[float | None, int, int]:
    """Share, wins and number of decided prompts with answers of unlike length in characters."""
    wins = decided = 0
    for pair, score in zip(pairs, scores, strict=True):
        longer = len(pair.candidate.text) - len(pair.opponent.text)
        if score is not None and score != 0.5 and longer:
            decided += 1
            wins += (longer > 0) == (score > 0.5)
    return (wins / decided if decided else None), wins, decided


def _warned(tallied: Tallied, warnings: Sequence[str]) -> Tallied:
    found = tallied.win_rate.model_copy(update={"warnings": tuple(warnings)})
    return replace(tallied, win_rate=found)


def _about_prompts(pairs: Sequence[Pair], tallied: Tallied) -> list[str]:
    said = []
    count = len(tallied.win_rate.scores)
    if count < ADVISED:
        said.append(f"{count} prompts were compared: at least {ADVISED} are advised")
    if missing := len(pairs) - count:
        said.append(f"{missing} of {len(pairs)} prompts have no verdict and are left out")
    if tallied.unread:
        said.append(f"{tallied.unread} votes have no verdict that could be read")
    for side in ORDERS:
        cut = sum(not getattr(pair, side).ended for pair in pairs) / len(pairs)
        if cut > _OFTEN_CUT:
            said.append(
                f"{cut:.0%} of the {side}'s answers were cut off at `max_new_tokens`: beginnings "
                "of answers are compared"
            )
    return said


def _about_ties(pairs: Sequence[Pair], tallied: Tallied) -> list[str]:
    if tallied.ties is None or tallied.ties < _MANY_TIES:
        return []
    identical = sum(pair.identical for pair in pairs)
    why = f"; {identical} times the two answers were identical" if identical else ""
    consistent = tallied.win_rate.consistent
    if consistent is not None and consistent < _MANY_TIES:
        why += f"; in the other order the judge said something else on {1 - consistent:.0%} of them"
    return [f"{tallied.ties:.0%} of the prompts are ties{why}"]


def _about_place(by_rater: Mapping[str, Mapping[str, Sequence[Vote]]]) -> list[str]:
    said = []
    for rater, given in by_rater.items():
        first, decided = _free_choices(given)
        if decided and stats.binomtest(first, decided).pvalue < _SURPRISING:
            place = "first" if 2 * first > decided else "second"
            count = max(first, decided - first)
            twice = any(len(votes) == 2 for votes in given.values())
            where = "prompts on which the order decided" if twice else "choices"
            said.append(
                f"the place of an answer sways {rater}: the one shown {place} was preferred in "
                f"{count} of {decided} {where}"
            )
    return said


def _free_choices(given: Mapping[str, Sequence[Vote]]) -> tuple[int, int]:
    """How often the answer shown first was chosen, of the choices on which place can show.

    Each prompt counts once. Asked in both orders, a judge that looks at the answers chooses each
    place once; only those pairs tell on which it chose one place twice.
    """
    first = decided = 0
    for votes in given.values():
        places = {
            vote.preferred == vote.first
            for vote in votes
            if vote.first is not None and vote.preferred in ORDERS
        }
        if len(places) == 1 and all(vote.preferred in ORDERS for vote in votes):
            decided += 1
            first += places.pop()
    return first, decided


def _about_length(pairs: Sequence[Pair], tallied: Tallied) -> list[str]:
    share, wins, decided = _longer(pairs, tallied.scores)
    if share is None or share <= 0.5 or stats.binomtest(wins, decided).pvalue >= _SURPRISING:
        return []
    return [
        f"the longer answer won {wins} of {decided} decided prompts: judges favour long answers, "
        "so look whether the winners say more or merely write more"
    ]


def _about_agreement(agreements: Sequence[PairAgreement]) -> list[str]:
    said = []
    for pair in agreements:
        names = " and ".join(pair.raters)
        if pair.agreed.of < FEW:
            said.append(f"{names} have only {pair.agreed.of} prompts in common")
        elif pair.kappa is not None and pair.kappa.low <= 0:
            said.append(f"{names} agree no more than chance would (kappa {pair.kappa.value:.2f})")
    return said
