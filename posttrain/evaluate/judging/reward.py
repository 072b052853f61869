"""A reward model as the judge: it scores each answer by itself, so no order can sway it."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.data.rows import Message
from posttrain.evaluate.judging.pairs import Pair, Preferred, Vote
from posttrain.hardware import ResolvedDType
from posttrain.stages.program import StageInput

RATER = "reward model"


def judge_by_reward(
    source: StageInput, pairs: Sequence[Pair], margin: float, dtype: ResolvedDType
) -> list[Vote]:
    """One vote a pair: the higher score wins, and a difference of at most `margin` is a tie.

    A vote's `margin` is the candidate's score less the opponent's.

    Raises:
        ModelError: the reward model cannot be loaded.
    """
    from posttrain.train.reward_model import load_reward_model

    if not pairs:
        return []
    reward = load_reward_model(source, dtype)
    chats = [
        (*pair.prompt, Message("assistant", written.text))
        for pair in pairs
        for written in (pair.candidate, pair.opponent)
    ]
    scores = reward.scores(chats).reshape(len(pairs), 2)
    return [
        Vote(pair.id, RATER, None, _higher(float(of[0] - of[1]), margin), float(of[0] - of[1]))
        for pair, of in zip(pairs, scores, strict=True)
    ]


def _higher(difference: float, margin: float) -> Preferred:
    if abs(difference) <= margin:
        return "tie"
    return "candidate" if difference > 0 else "opponent"
