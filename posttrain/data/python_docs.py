"""The built-in source: the documentation of the running Python as a dataset.

No text is shipped. The documents, chats and preferences are made from `pydoc_data.topics` and the
docstrings of the standard library, the same for every process of one Python build. About a quarter
of the objects are kept for an exam: nothing about them is in the chats or the preferences, so what
a model has learnt beyond its training rows can be measured.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from posttrain.data import docstrings, python_objects
from posttrain.data.python_objects import PythonObject, partition
from posttrain.data.records import RawRecord

PARTS = ("documents", "chats", "preferences", "choices")
"""What `builtin:python-docs/...` may end with."""

_QUESTIONS = {
    "module": ("What is the Python module `{}` for?", "What does Python's `{}` module provide?"),
    "class": ("What is `{}` in Python?", "Explain Python's `{}`.", "What is a `{}` in Python?"),
    "function": (
        "What does `{}` do in Python?",
        "Explain what Python's `{}` does.",
        "I found a call of `{}` in some Python code. What does it do?",
    ),
    "method": (
        "What does the method `{}` do in Python?",
        "What does `{}` do in Python?",
        "Explain Python's method `{}`.",
    ),
}
_HOW_TO_CALL = ("How do I call `{}` in Python?", "Which arguments does Python's `{}` take?")


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question about one object."""

    subject: str
    """The object's dotted name."""
    question: str
    choices: tuple[str, str, str, str]
    answer: int
    """Index of the right choice."""


def records(part: str) -> Iterator[RawRecord]:
    """Raw records of one part, each with its subject where it has one."""
    for number, (fields, subject) in enumerate(_PARTS[part](), start=1):
        yield RawRecord(f"builtin:python-docs/{part}", number, fields, subject)


@cache
def choices() -> tuple[Choice, ...]:
    """Four-way questions about exam objects and trained ones, ordered by subject.

    The wrong choices describe objects of the same kind, of the same module where it has enough,
    with a description of similar length. The position of the right one is spread evenly.
    """
    candidates = _examinable()
    neighbours = _Neighbours(candidates)
    ranked = sorted(candidates, key=lambda item: _hash("position", item.name))
    position = {item.name: rank % 4 for rank, item in enumerate(ranked)}
    return tuple(_choice(item, neighbours.of(item, 3), position[item.name]) for item in candidates)


def digest(part: str) -> str:
    """SHA-256 over the records of one part."""
    lines = (
        json.dumps([record.subject, record.fields], sort_keys=True) for record in records(part)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def generator_digest() -> str:
    """SHA-256 over the source of this generator: what changes its rows beside Python itself."""
    files = [docstrings.__file__, python_objects.__file__, __file__]
    return hashlib.sha256(b"\0".join(Path(file).read_bytes() for file in files)).hexdigest()


_Records = Iterable[tuple[dict[str, object], str | None]]


def _documents() -> _Records:
    """Topics of the language reference, then the docstrings of modules."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield {"text": topics[name].strip() + "\n"}, None
    for item in python_objects.python_objects():
        if item.kind == "module":
            yield {"text": f"{item.name}\n\n{item.docstring}\n"}, item.name


def _chats() -> _Records:
    """Questions and short answers; in hash order, so that the first rows are of all modules."""
    pairs = [
        (item.name, question, answer) for item in _trained() for question, answer in _turns(item)
    ]
    for name, question, answer in sorted(pairs, key=lambda pair: _hash("order", pair[1])):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        yield {"messages": messages}, name


def _preferences() -> _Records:
    """The right description against that of a similar object."""
    trained = _trained()
    neighbours = _Neighbours(trained)
    for item in sorted(trained, key=lambda item: _hash("order", item.name)):
        other = neighbours.of(item, 1)[0]
        fields: dict[str, object] = {
            "prompt": _question(item),
            "chosen": item.description,
            "rejected": other.description,
        }
        yield fields, item.name


def _choices() -> _Records:
    for item in choices():
        fields: dict[str, object] = {
            "question": item.question,
            "choices": list(item.choices),
            "answer": item.answer,
        }
        yield fields, item.subject


def _trained() -> list[PythonObject]:
    return [item for item in python_objects.python_objects() if _is_trained(item)]


@cache
def _examinable() -> tuple[PythonObject, ...]:
    """Objects to ask about: summaries that neither hold their own name nor were given away.

    An exam object whose summary stands inside a trained description would not be unseen.
    """
    given_away = "\n".join(_fold(item.description) for item in _trained())
    return tuple(
        item
        for item in python_objects.python_objects()
        if item.kind != "module"
        and not _names_itself(item)
        and (_is_trained(item) or _fold(item.summary).rstrip(".") not in given_away)
    )


def _is_trained(item: PythonObject) -> bool:
    """Modules are never examined: their documentation is among the documents."""
    return item.kind == "module" or partition(item.name) == "trained"


def _turns(item: PythonObject) -> Iterator[tuple[str, str]]:
    yield _question(item), item.description
    if item.signature is not None and item.signature != "()":
        question = _pick(_HOW_TO_CALL, item.name).format(item.name)
        yield question, f"Its signature is `{item.name}{item.signature}`. {item.summary}"


def _question(item: PythonObject) -> str:
    return _pick(_QUESTIONS[item.kind], item.name).format(item.name)


def _choice(item: PythonObject, others: Sequence[PythonObject], answer: int) -> Choice:
    texts = [other.summary for other in others]
    texts.insert(answer, item.summary)
    question = f"Which sentence describes `{item.name}` of Python's standard library?"
    return Choice(item.name, question, (texts[0], texts[1], texts[2], texts[3]), answer)


class _Neighbours:
    """Finds objects that are easily confused: same kind, same module, similar length."""

    def __init__(self, pool: Sequence[PythonObject]) -> None:
        self._modules: dict[tuple[str, str], list[PythonObject]] = defaultdict(list)
        self._kinds: dict[str, list[PythonObject]] = defaultdict(list)
        for item in sorted(pool, key=_by_length):
            self._modules[item.kind, item.module].append(item)
            self._kinds[item.kind].append(item)

    def of(self, item: PythonObject, count: int) -> list[PythonObject]:
        """The `count` nearest objects: of the same module first, then of any."""

        def distance(other: PythonObject) -> tuple[bool, int, str]:
            shorter, longer = sorted((len(other.summary), len(item.summary)))
            # In steps, so that among similar lengths the hash decides.
            return other.module != item.module, longer * 2 // shorter, _hash(item.name, other.name)

        kind = self._kinds[item.kind]
        place = bisect.bisect_left(kind, _by_length(item), key=_by_length)
        near = kind[max(0, place - 5 * count) : place + 5 * count]
        pool = dict.fromkeys(self._modules[item.kind, item.module] + near)
        return sorted((other for other in pool if other != item), key=distance)[:count]


def _by_length(item: PythonObject) -> tuple[int, str]:
    return len(item.summary), item.name


def _names_itself(item: PythonObject) -> bool:
    """Whether the summary holds the object's own name, which would answer the question."""
    return _fold(item.name.rpartition(".")[2]) in _fold(item.summary)


def _fold(text: str) -> str:
    return re.sub(r"[\s_`]+", " ", text).casefold()


def _pick(options: Sequence[str], name: str) -> str:
    return options[int(_hash("phrase", name)[:8], 16) % len(options)]


def _hash(purpose: str, name: str) -> str:
    return hashlib.sha256(f"{purpose}\0{name}".encode()).hexdigest()


_PARTS = {
    "documents": _documents,
    "chats": _chats,
    "preferences": _preferences,
    "choices": _choices,
}
