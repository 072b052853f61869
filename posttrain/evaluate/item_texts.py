"""The words of a benchmark's items: what was asked, what is right, and what the model answered.

For people who look up the items that flipped. Nothing is computed from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_QUESTION = 2000
"""Characters; of a longer text the middle is left out, as the question itself tends to stand last
and what it is about first."""
LONGEST_ANSWER = 1000

_GAP = " [...] "


@dataclass(frozen=True)
class Texts:
    """As in `posttrain.evaluate.items.Item`."""

    question: str
    choices: tuple[str, ...]
    target: str
    answer: str


def texts_of(task: Any, sample: dict[str, Any], metric: str) -> Texts:
    """What a person reads of an item.

    Args:
        task: lm-eval's task.
        sample: One of the samples that lm-eval logged of it.
        metric: The one that counts: it decides which choice is the model's answer.
    """
    try:
        texts = _READERS.get(task.OUTPUT_TYPE, _read_written)(task, sample, metric)
    # Tasks may be programs of anybody's; words for a report are no reason to lose an evaluation.
    except Exception:
        texts = Texts(str(sample["arguments"][0][0]), (), str(sample["target"]), "")
    return Texts(
        question=shortened(texts.question.strip(), LONGEST_QUESTION),
        choices=tuple(shortened(choice.strip(), LONGEST_ANSWER) for choice in texts.choices),
        target=shortened(texts.target.strip(), LONGEST_ANSWER),
        answer=shortened(texts.answer.strip(), LONGEST_ANSWER),
    )


def shortened(text: str, longest: int) -> str:
    """The text, or its beginning and its end in `longest` characters."""
    if len(text) <= longest:
        return text
    kept = longest - len(_GAP)
    return text[: kept - kept // 2] + _GAP + text[-(kept // 2) :]


def _read_choice(task: Any, sample: dict[str, Any], metric: str) -> Texts:
    """A question with choices, or (as in WinoGrande) several beginnings of one end."""
    doc = sample["doc"]
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    asked, right = task.doc_to_text(doc), task.doc_to_target(doc)
    if getattr(task, "multiple_input", False):
        asked, right = right, asked
    return Texts(
        question=str(asked),
        choices=tuple(choices),
        target=_target(right, choices),
        answer=choices[_picked(sample["filtered_resps"], choices, metric)],
    )


def _picked(answers: Sequence[tuple[float, bool]], choices: Sequence[str], metric: str) -> int:
    """Index of the likeliest choice, by the likelihood that lm-eval's metric compares."""
    import numpy as np

    every = np.array([answer[0] for answer in answers])
    likelihoods = every[: len(choices)]
    match metric:
        case "acc_norm":
            likelihoods = likelihoods / [float(len(choice)) for choice in choices]
        case "acc_bytes":
            likelihoods = likelihoods / [float(len(choice.encode())) for choice in choices]
        case "acc_mutual_info":
            likelihoods = likelihoods - every[len(choices) :]
    return int(np.argmax(likelihoods))


def _read_written(task: Any, sample: dict[str, Any], metric: str) -> Texts:
    """A question that is answered in writing; the answer as written, before any filter."""
    del metric
    doc, choices = sample["doc"], []
    if task.get_config("doc_to_choice") is not None:
        choices = [str(choice) for choice in task.doc_to_choice(doc)]
    return Texts(
        question=str(task.doc_to_text(doc)),
        choices=(),
        target=_target(task.doc_to_target(doc), choices),
        answer=str(sample["resps"][0][0]),
    )


def _read_likelihood(task: Any, sample: dict[str, Any], metric: str) -> Texts:
    """A text to go on with, and whether the model would have gone on like that."""
    del metric
    target = str(task.doc_to_target(sample["doc"]))
    greedy = bool(sample["filtered_resps"][0][1])
    return Texts(str(task.doc_to_text(sample["doc"])), (), target, target if greedy else "")


def _read_text(task: Any, sample: dict[str, Any], metric: str) -> Texts:
    """A text that is scored as a whole."""
    del metric
    return Texts(str(task.doc_to_target(sample["doc"])), (), "", "")


_READERS = {
    "multiple_choice": _read_choice,
    "generate_until": _read_written,
    "loglikelihood": _read_likelihood,
    "loglikelihood_rolling": _read_text,
}


def _target(right: Any, choices: Sequence[str]) -> str:
    """The right answer in words; of several, all."""
    if isinstance(right, (list, tuple)):
        return " / ".join(_target(one, choices) for one in right)
    if isinstance(right, int) and choices:
        return choices[right] if 0 <= right < len(choices) else ""
    return str(right)
