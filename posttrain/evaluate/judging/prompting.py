"""What a judge reads, and what its reply says. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Literal

from posttrain.evaluate.judging.pairs import Pair, Side

NO_ANSWER = "(no answer)"
"""Stands for an answer without text."""

WITH_REASON = (
    "Say in one or two sentences what decides. Then write your verdict on a line of its own: [[A]] "
    "if answer A is better, [[B]] if answer B is better, [[tie]] if neither is."
)
LETTER_ALONE = "Which answer is better, A or B?"
BEGUN = "The better answer is"
"""How a local judge's reply begins; what follows is A or B."""

_VERDICT = re.compile(r"\[\[\s*(a|b|tie)\s*\]\]", re.IGNORECASE)
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


def judging_prompt(pair: Pair, first: Side, instructions: str, ending: str) -> str:
    """Instructions, the request, the answers as A and B, and how to reply.

    Headings carry a mark that no answer can know beforehand, so that a text which pretends that
    the next answer begins is seen to be part of its own. It is the same in both orders.
    """
    turns = "\n\n".join(f"{turn.role}:\n{turn.content}" for turn in pair.prompt)
    at_a, at_b = (text or NO_ANSWER for text in pair.shown(first))
    mark = _mark([turns, *sorted((at_a, at_b))])
    return "\n\n".join(
        [
            instructions.strip(),
            f"A part begins at a heading with the mark {mark} and ends at the next such heading.",
            f"## {mark} Request",
            turns,
            f"## {mark} Answer A",
            at_a,
            f"## {mark} Answer B",
            at_b,
            f"## {mark} End",
            ending,
        ]
    )


def read_verdict(reply: str) -> Literal["A", "B", "tie"] | None:
    """The one verdict in a reply; None where it has none, or several that differ.

    What a reasoning model thinks aloud before it replies does not count.
    """
    found = {match.lower() for match in _VERDICT.findall(_THOUGHTS.sub("", reply))}
    if len(found) != 1:
        return None
    verdicts: dict[str, Literal["A", "B", "tie"]] = {"a": "A", "b": "B", "tie": "tie"}
    return verdicts[found.pop()]


def _mark(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:6]
