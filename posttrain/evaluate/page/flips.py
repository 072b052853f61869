"""Items whose answer turned: from wrong to right, and from right to wrong.

Shown are those whose margin moved most. The margin is how far the right answer's log-likelihood is
ahead of the best other answer's, in nats; of `acc_norm` in nats a character, as that metric counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.evaluate.items import Item
from posttrain.evaluate.page.measured import Measured, is_binary
from posttrain.evaluate.page.text import cut, plain_name, written_size
from posttrain.evaluate.pairing import Pair, paired_items

MOST = 20
"""Items shown of a task in each direction."""
QUESTION = 1_200
"""Characters shown of a question."""
ANSWER = 600
"""Characters shown of a choice or an answer."""
MOST_CHOICES = 12
BUDGET = 1_000_000
"""Bytes that all items may take in the page; the tasks share it evenly."""
_AN_ITEM = 700
"""Bytes of the page around the texts of an item."""
_A_CHOICE = 120


@dataclass(frozen=True)
class Choice:
    """One of the answers to choose from."""

    text: str
    right: bool
    before: bool
    """Whether it was the answer before."""
    after: bool


@dataclass(frozen=True)
class Flip:
    """One item, with its texts cut for the page."""

    where: str
    """Subject and position, or the position alone."""
    digest: str
    question: str
    """Empty where the evaluation kept no texts."""
    choices: tuple[Choice, ...]
    """Empty for generated answers."""
    target: str
    before: str
    after: str
    change: str
    """How the margin or the score moved, in words; empty where that is not known."""

    @property
    def size(self) -> int:
        """Bytes in the page, roughly and never less."""
        texts = [self.question, self.target, self.before, self.after, self.where, self.change]
        texts += [choice.text for choice in self.choices]
        return sum(map(written_size, texts)) + _AN_ITEM + _A_CHOICE * len(self.choices)


@dataclass(frozen=True)
class Flips:
    """The items of one task that turned."""

    task: str
    binary: bool
    """Whether items are right or wrong; else they rose and fell."""
    better: int
    worse: int
    shown_better: tuple[Flip, ...]
    shown_worse: tuple[Flip, ...]

    @property
    def words(self) -> tuple[str, str]:
        """What happened to the items, the better first."""
        return ("became right", "became wrong") if self.binary else ("rose", "fell")


def flips(before: Measured, after: Measured) -> list[Flips]:
    """What turned in each task.

    Raises:
        DataError: the two did not answer the same items.
    """
    turned = []
    for name, task in before.tasks.items():
        pairs = paired_items(before.items.get(name, []), after.items.get(name, [])).get(name, [])
        sign = 1.0 if task.higher_is_better else -1.0
        better = [pair for pair in pairs if sign * (pair[1].value - pair[0].value) > 0]
        worse = [pair for pair in pairs if sign * (pair[1].value - pair[0].value) < 0]
        if pairs:
            binary = is_binary([item.value for pair in pairs for item in pair])
            turned.append((name, binary, better, worse))
    share = BUDGET // max(2 * len(turned), 1)
    return [
        Flips(
            task=name,
            binary=binary,
            better=len(better),
            worse=len(worse),
            shown_better=_shown(name, better, binary, share),
            shown_worse=_shown(name, worse, binary, share),
        )
        for name, binary, better, worse in turned
    ]


def _shown(task: str, pairs: Sequence[Pair], binary: bool, budget: int) -> tuple[Flip, ...]:
    """Those that moved most, as far as they fit; ties by digest."""
    moved = _moved if binary else _score_moved
    found: list[Flip] = []
    for pair in sorted(pairs, key=_order(moved))[:MOST]:
        flip = _flip(task, pair, moved)
        budget -= flip.size
        if budget < 0:
            break
        found.append(flip)
    return tuple(found)


Move = tuple[float, float, str]
"""Before, after, and what it is."""


def _order(moved: Callable[[Pair], Move | None]) -> Callable[[Pair], tuple[float, str, int]]:
    def key(pair: Pair) -> tuple[float, str, int]:
        move = moved(pair)
        size = abs(move[1] - move[0]) if move else 0.0
        return (-size, pair[0].item_digest, pair[0].item_id)

    return key


def _moved(pair: Pair) -> Move | None:
    first, second = margin(pair[0]), margin(pair[1])
    unit = " nats a character" if pair[0].metric == "acc_norm" else " nats"
    return None if first is None or second is None else (first, second, f"margin{unit}")


def _score_moved(pair: Pair) -> Move | None:
    return (pair[0].value, pair[1].value, pair[0].metric)


def margin(item: Item) -> float | None:
    """How far the right answer is ahead, in nats, of `acc_norm` in nats a character.

    None where the texts or the log-likelihoods are not known.
    """
    if (
        item.target not in item.choices
        or len(item.log_likelihoods) != len(item.choices)
        or (len(item.choices) < 2)
    ):
        return None
    scores = list(item.log_likelihoods)
    if item.metric == "acc_norm":
        # As lm-eval normalises: by characters of the choice.
        scores = [s / max(len(c), 1) for s, c in zip(scores, item.choices, strict=True)]
    right = scores.pop(item.choices.index(item.target))
    return right - max(scores)


def _flip(task: str, pair: Pair, moved: Callable[[Pair], Move | None]) -> Flip:
    first, second = pair
    # What a later evaluation knows of the same question stands in for what an older one lacks.
    told = first if first.question else second
    move = moved(pair)
    where = f"item {first.item_id:,}"
    if first.group != task:
        where = f"{plain_name(first.group, task)}, {where}"
    choices = tuple(
        Choice(
            text=cut(text, ANSWER),
            right=text == told.target,
            before=text == first.answer,
            after=text == second.answer,
        )
        for text in told.choices[:MOST_CHOICES]
    )
    return Flip(
        where=cut(where, 200),
        digest=first.item_digest[:12],
        question=cut(told.question, QUESTION),
        choices=choices,
        target=cut(told.target, ANSWER),
        before=cut(first.answer, ANSWER),
        after=cut(second.answer, ANSWER),
        change=f"{_words(move)}" if move else "",
    )


def _words(move: Move) -> str:
    before, after, what = move
    name, _, unit = what.partition(" ")
    return (
        f"{name} {before:+.2f} to {after:+.2f} {unit}".rstrip()
        if unit
        else (f"{name} {before:.2f} to {after:.2f}")
    )
