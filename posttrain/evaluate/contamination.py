"""The items of an evaluation as texts that no training row may share words with.

The items come from the loader that the evaluation itself uses, so what is looked for is what will
be asked. A leak may hold the question alone, the answer alone, or both, in the benchmark's own
form or formatted as a prompt. An index over prompt and answer only would miss most of them: every
n-gram of it that crosses from the question into the choices is missing where the question stands
alone. So each item gives several texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from posttrain.evaluate.harness import Benchmarks, load_benchmarks
from posttrain.evaluate.python_docs_task import TASKS

_MIN_FIELD_WORDS = 3


@dataclass(frozen=True)
class EvaluationItem:
    """One item of a benchmark."""

    benchmark: str
    """The name that was asked for, such as `mmlu`."""
    leaf: str
    """The task it stands in, such as `mmlu_anatomy`; the benchmark itself where it has no parts."""
    item: int
    """Number of the item in that task, counted from 0 as lm-eval does."""
    question: str
    """The question without choices; the whole prompt where the two cannot be told apart."""
    texts: tuple[str, ...]
    """What to look for, without repetition: the prompt, each text of the raw item, the right
    answers, and prompt and question each followed by an answer."""


def evaluation_items(benchmarks: Benchmarks) -> list[EvaluationItem]:
    """Every item of the benchmarks, whatever `benchmarks.limit` says.

    The `python_docs_*` tasks are left out: they are about the training rows on purpose. A task
    that two names share (`mmlu` and `mmlu_anatomy`) counts for the first of them. Wrong choices are
    looked for only inside the prompt, where the benchmark shows them.

    Raises:
        DataError: An unknown task, or a benchmark that cannot be read.
    """
    tasks = tuple(name for name in benchmarks.tasks if name not in TASKS)
    loaded = load_benchmarks(replace(benchmarks, tasks=tasks))
    seen: set[str] = set()
    items: list[EvaluationItem] = []
    for name, leaves in loaded.leaves.items():
        for leaf, task in leaves.items():
            if leaf not in seen:
                docs = enumerate(task.eval_docs)
                items += (_item(name, leaf, number, task, doc) for number, doc in docs)
            seen.add(leaf)
    return items


def _item(benchmark: str, leaf: str, number: int, task: Any, doc: Any) -> EvaluationItem:
    prompt, answers = _prompt_and_answers(task, doc)
    fields = _fields(doc)
    question = _question(prompt, fields)
    joined = [f"{before}\n{answer}" for before in (prompt, question) for answer in answers]
    texts = dict.fromkeys(text for text in (prompt, *fields, *answers, *joined) if text.strip())
    return EvaluationItem(benchmark, leaf, number, question or next(iter(texts), ""), tuple(texts))


def _prompt_and_answers(task: Any, doc: Any) -> tuple[str, list[str]]:
    """What the model is shown, and what it should say."""
    prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if getattr(getattr(task, "config", None), "doc_to_choice", None) is None:
        return " ".join(_strings(prompt)), _strings(target)
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    if isinstance(prompt, int):
        # The choices are prompts, of which one fits the target (Winogrande).
        return choices[prompt], _strings(target)
    right = [index for index in _indices(target, choices) if 0 <= index < len(choices)]
    # MMLU's choices are the letters A to D; what they stand for is a list in the raw item.
    lists = [texts for texts in (choices, *_lists(doc)) if len(texts) == len(choices)]
    answers = [texts[index] for index in right for texts in lists if not _letters(texts)]
    return " ".join(_strings(prompt)), list(dict.fromkeys(answers)) or _strings(target)


def _indices(target: object, choices: list[str]) -> list[int]:
    """Which choices are right; lm-eval gives an index, the choice itself, or several."""
    if isinstance(target, list | tuple):
        return [index for one in target for index in _indices(one, choices)]
    if isinstance(target, str):
        return [choices.index(target)] if target in choices else []
    return [int(target)] if isinstance(target, int) else []


def _question(prompt: str, fields: list[str]) -> str:
    """The text of the raw item that the prompt ends with or comes closest to ending with.

    A passage stands before its question. Of texts that end together the longest is taken.
    """
    inside = [
        (prompt.rindex(field) + len(field), len(field), field)
        for field in fields
        if field in prompt
        # A subject's name may also occur in some choice; a short question comes first.
        and (len(field.split()) >= _MIN_FIELD_WORDS or prompt.startswith(field))
    ]
    return max(inside)[2] if inside else prompt


def _letters(choices: list[str]) -> bool:
    return all(len(choice.strip()) == 1 and choice.strip().isalpha() for choice in choices)


def _fields(doc: Any) -> list[str]:
    """Texts of the raw item, with those in nested mappings; lists hold choices, so not they."""
    return [value.strip() for value in _values(doc) if isinstance(value, str) and value.strip()]


def _lists(doc: Any) -> list[list[str]]:
    """Lists of texts in the raw item."""
    return [
        value
        for value in _values(doc)
        if isinstance(value, list) and all(isinstance(text, str) for text in value)
    ]


def _values(doc: Any) -> Iterator[object]:
    if isinstance(doc, Mapping):
        for value in doc.values():
            yield from _values(value)
    else:
        yield doc


def _strings(value: object) -> list[str]:
    """Texts in what lm-eval gives for a prompt or a target: a text, or a list of alternatives."""
    if isinstance(value, list | tuple):
        return [text for one in value for text in _strings(one)]
    return [value] if isinstance(value, str) else []
