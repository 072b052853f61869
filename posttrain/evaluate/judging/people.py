"""People as the judges: blind sheets, the key that undoes the blinding, and filled sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain.evaluate.judging.pairs import Pair, Preferred, Vote
from posttrain.evaluate.judging.prompting import NO_ANSWER
from posttrain.preferences.blinding import unblind
from posttrain.preferences.filled import read_ratings
from posttrain.preferences.key import Item, Key, Turn, turns_of
from posttrain.preferences.sheets import SHEETS, make_key, write_sheets
from posttrain.recipe.judge import People
from posttrain.store.files import write_bytes

NOTE = (
    "Do not hand this file to raters: it says which answer stands at A. An item's first answer is "
    "the candidate's, the second the opponent's."
)
HOW_TO_RATE = "HOW-TO-RATE.txt"

_MEANING: dict[str, Preferred] = {"first": "candidate", "second": "opponent", "tie": "tie"}

_EXPLANATION = """\
{question}

{guide}

Each rater has a sheet twice: as a page and as a table. Use one of them.

{rater}.html  Open it in a browser; it needs no network. Your choices are kept in that browser, so
              you can stop and go on later. At the end press Download and send the file back.
{rater}.csv   Open it in a spreadsheet. Write A, B, tie or skip into the column `choice` of each
              row, save it as CSV and send it back. Change no other column but `note`.
"""


def make_sheets(pairs: Sequence[Pair], config: People, seed: int) -> Key:
    """Who is shown which pair, and which answer stands at A; the same for the same pairs.

    Args:
        pairs: Without identical answers.
        config: Raters, overlap, and what they are asked.
        seed: Of the draws.
    """
    items = [
        Item(
            prompt=turns_of(pair.prompt),
            first=(Turn(role="assistant", content=pair.candidate.text or NO_ANSWER),),
            second=(Turn(role="assistant", content=pair.opponent.text or NO_ANSWER),),
            source=pair.source,
        )
        for pair in pairs
    ]
    return make_key(
        items, config.raters, config.overlap, seed, config.question, note=NOTE, guide=config.guide
    )


def write_folder(folder: Path, key: Key) -> None:
    """Write a page and a table a rater, how to rate, and the key, apart from them."""
    for sheet_format in ("html", "csv"):
        write_sheets(folder, key, sheet_format)
    raters = list(key.orders)
    name = raters[0] if len(raters) == 1 else "rater-N"
    text = _EXPLANATION.format(question=key.question, guide=key.guide, rater=name)
    write_bytes(folder / SHEETS / HOW_TO_RATE, text.replace("\n\n\n\n", "\n\n").encode())


def read_votes(paths: Sequence[Path], key: Key, pairs: Sequence[Pair]) -> list[Vote]:
    """What the raters said, in the order of the raters and of the pairs; skipped pairs left out.

    Args:
        paths: Filled sheets.
        key: As `make_sheets` made it of these very pairs.
        pairs: The pairs of the key.

    Raises:
        DataError: a sheet cannot be read, or is not of this key: the answers are others now.
    """
    ids = dict(zip(key.items, (pair.id for pair in pairs), strict=True))
    places = {rater: n for n, rater in enumerate(key.orders)}
    items = {item: n for n, item in enumerate(key.items)}
    votes = []
    ratings = read_ratings(paths, key)
    for rating in sorted(ratings, key=lambda one: (places[one.rater], items[one.item])):
        order = key.orders[rating.rater][rating.item]
        meant = unblind(rating.choice, order)
        if meant is not None:
            first = "candidate" if order == "AB" else "opponent"
            votes.append(Vote(ids[rating.item], rating.rater, first, _MEANING[meant]))  # type: ignore[arg-type]
    return votes
