"""Reward functions for configs/grpo.yaml, and a pattern for your own.

A function has parameters for what it needs of `prompts`, `answers` and `references`, each with one
entry an answer, and returns one number an answer. Further parameters come from the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence


def brevity(answers: Sequence[str], words: int) -> list[float]:
    """1 for an answer of at most so many words, falling to 0 at twice as many."""
    return [min(1.0, max(0.0, 2.0 - len(answer.split()) / words)) for answer in answers]


def overlap(answers: Sequence[str], references: Sequence[str | None]) -> list[float]:
    """Share of the reference's words that the answer has (unigram recall, as in ROUGE-1)."""
    pairs = zip(answers, references, strict=True)
    return [_recall(answer, reference or "") for answer, reference in pairs]


def _recall(answer: str, reference: str) -> float:
    wanted = set(reference.lower().split())
    return len(wanted & set(answer.lower().split())) / len(wanted) if wanted else 0.0
