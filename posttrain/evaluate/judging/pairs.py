"""Two answers to one prompt, and what was said of them. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.data.rows import Messages, plain_messages

Side = Literal["candidate", "opponent"]
"""Whose answer."""

Preferred = Literal["candidate", "opponent", "tie"]

ORDERS: tuple[Side, Side] = ("candidate", "opponent")
"""Both orders, by whose answer stands first."""


@dataclass(frozen=True)
class Written:
    """One model's answer."""

    text: str
    """Without white space around it."""
    tokens: int
    ended: bool
    """Whether the model ended it; False where it reached the longest length."""


@dataclass(frozen=True)
class Pair:
    """A prompt and two models' answers."""

    id: str
    """Id of the held-out row."""
    source: str
    """File and row that the prompt comes from."""
    prompt: Messages
    candidate: Written
    opponent: Written

    @property
    def identical(self) -> bool:
        """Whether there is nothing to choose: a tie that nobody is asked about."""
        return self.candidate.text == self.opponent.text

    def shown(self, first: Side) -> tuple[str, str]:
        """The texts at A and at B, where `first` stands at A."""
        texts = self.candidate.text, self.opponent.text
        return texts if first == "candidate" else (texts[1], texts[0])


@dataclass(frozen=True)
class Vote:
    """What one rater said of a pair that was shown in one order."""

    pair: str
    """The pair's id."""
    rater: str
    first: Side | None
    """Whose answer stood first; None where each answer was judged by itself."""
    preferred: Preferred | None
    """None where no verdict could be had; `reply` says why."""
    margin: float | None = None
    """By how much the candidate's answer is preferred: of a local model the log-odds of its
    verdict, of a reward model the difference of the scores; None of others."""
    reply: str = ""
    """What the judge wrote, or why there is no verdict."""


def preferred(choice: Literal["A", "B", "tie"], first: Side) -> Preferred:
    """Whose answer a choice means, where `first` stood at A."""
    if choice == "tie":
        return "tie"
    other: Side = "opponent" if first == "candidate" else "candidate"
    return first if choice == "A" else other


def write_answers(
    folder: Path, pairs: Sequence[Pair], votes: Sequence[Vote], scores: Sequence[float | None]
) -> None:
    """Write `answers.parquet`, a line a pair: prompt, both answers, all votes and the score.

    Args:
        folder: Of the comparison.
        pairs: All of them.
        votes: On the pairs that were asked about.
        scores: A pair each, as `posttrain.evaluate.judging.win_rate` makes them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    by_pair: dict[str, list[dict[str, object]]] = {pair.id: [] for pair in pairs}
    for vote in votes:
        by_pair[vote.pair].append(
            {
                "rater": vote.rater,
                "first": vote.first,
                "preferred": vote.preferred,
                "margin": vote.margin,
                "reply": vote.reply,
            }
        )
    text, number = pa.string(), pa.int64()
    turns = pa.list_(pa.struct([("role", text), ("content", text)]))
    vote_type = pa.struct(
        [
            ("rater", text),
            ("first", text),
            ("preferred", text),
            ("margin", pa.float64()),
            ("reply", text),
        ]
    )
    columns = {
        "id": pa.array([pair.id for pair in pairs], text),
        "source": pa.array([pair.source for pair in pairs], text),
        "prompt": pa.array([plain_messages(pair.prompt) for pair in pairs], turns),
        "candidate": pa.array([pair.candidate.text for pair in pairs], text),
        "opponent": pa.array([pair.opponent.text for pair in pairs], text),
        "candidate_tokens": pa.array([pair.candidate.tokens for pair in pairs], number),
        "opponent_tokens": pa.array([pair.opponent.tokens for pair in pairs], number),
        "candidate_ended": pa.array([pair.candidate.ended for pair in pairs], pa.bool_()),
        "opponent_ended": pa.array([pair.opponent.ended for pair in pairs], pa.bool_()),
        "votes": pa.array([by_pair[pair.id] for pair in pairs], pa.list_(vote_type)),
        "score": pa.array(scores, pa.float64()),
    }
    # Set here, so that another version's default does not change the bytes.
    path = folder / "answers.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd", version="2.6")
