"""Who rates what, and which answer stands at A: drawn once, written to the key, undone later."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

Order = Literal["AB", "BA"]
"""`AB`: an item's first answer stands at A."""

Choice = Literal["A", "B", "tie", "skip"]
"""What a rater says of an item."""

Vote = Literal["first", "second", "tie"]
"""What that means for the item's two answers."""


def draw_orders(count: int, draw: random.Random) -> list[Order]:
    """As many `AB` as `BA`, or one more of either, in an order drawn at random.

    Equal numbers keep a rater's preference for a side apart from the answers also on short sheets.
    """
    both: list[Order] = ["AB", "BA"]
    draw.shuffle(both)
    orders = [both[index % 2] for index in range(count)]
    draw.shuffle(orders)
    return orders


def assign(
    items: Mapping[str, str | None], raters: Sequence[str], overlap: float, seed: int
) -> dict[str, dict[str, Order]]:
    """Each rater's items in the order in which they are shown, and how each is turned.

    Args:
        items: Which of its answers was proposed as the better one, by id. On every sheet the
            proposed ones stand at A as often as at B, or one more often for each of `first`,
            `second` and None.
        raters: Names.
        overlap: Share of the items that all raters get; the others go to one rater each.
        seed: Of all draws.

    Returns:
        Rater -> item -> order. Every item is somebody's, and loads differ by one item at most.
    """
    draw = random.Random(f"sheets:{seed}")
    drawn = list(items)
    draw.shuffle(drawn)
    shared = round(overlap * len(drawn)) if len(raters) > 1 else 0
    sheets: dict[str, dict[str, Order]] = {}
    for number, rater in enumerate(raters):
        given = drawn[:shared] + drawn[shared + number :: len(raters)]
        # An order of one's own: what tires or sways one rater late in the sheet comes early in
        # another's.
        draw.shuffle(given)
        orders: dict[str, Order] = {}
        for proposed in ("first", "second", None):
            alike = [item for item in given if items[item] == proposed]
            orders |= zip(alike, draw_orders(len(alike), draw), strict=True)
        sheets[rater] = {item: orders[item] for item in given}
    return sheets


def shown_as(answers: tuple[str, str], order: Order) -> tuple[str, str]:
    """What stands at A and at B."""
    return answers if order == "AB" else (answers[1], answers[0])


def unblind(choice: Choice, order: Order) -> Vote | None:
    """Which of an item's answers a choice means; None for a skipped item."""
    if choice == "skip":
        return None
    if choice == "tie":
        return "tie"
    return "first" if choice == order[0] else "second"


def blind(vote: Vote, order: Order) -> Choice:
    """The choice that means a vote: the inverse of `unblind`."""
    if vote == "tie":
        return "tie"
    return "A" if (vote == "first") == (order == "AB") else "B"
