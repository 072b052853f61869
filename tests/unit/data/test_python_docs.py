from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from posttrain.data import python_docs
from posttrain.data.docstrings import describe, first_sentence
from posttrain.data.formats import read_rows
from posttrain.data.python_objects import python_objects
from posttrain.data.rows import Chat, Document, Preference, all_messages
from posttrain.recipe import DatasetSpec


def rows(part: str, limit: int | None = None) -> list[object]:
    return list(read_rows(DatasetSpec(source=f"builtin:python-docs/{part}", limit=limit)))


def test_every_part_reads_as_its_family() -> None:
    for part, row_type, least in (
        ("documents", Document, 100),
        ("chats", Chat, 1_500),
        ("preferences", Preference, 1_000),
    ):
        made = rows(part)
        assert {type(row) for row in made} == {row_type}
        assert len(made) >= least


def test_answers_are_short_and_every_chat_has_a_subject() -> None:
    for row in rows("chats"):
        assert isinstance(row, Chat)
        assert row.subject
        assert row.subject in row.messages[0].content
        assert 4 <= len(row.messages[1].content.split()) <= 75


def test_first_chats_are_a_mixture() -> None:
    roots = {
        row.subject.split(".")[0]
        for row in rows("chats", 400)
        if isinstance(row, Chat) and row.subject
    }
    assert len(roots) > 60


def test_exam_objects_are_in_no_training_row() -> None:
    training = [row for part in ("chats", "preferences") for row in rows(part)]
    subjects = {row.subject for row in training if isinstance(row, Chat | Preference)}
    said = "\n".join(
        message.content
        for row in training
        if isinstance(row, Chat | Preference)
        for message in all_messages(row)
    )
    asked = {all_messages(row)[0].content for row in training if isinstance(row, Chat | Preference)}
    exam = [choice for choice in python_docs.choices() if choice.subject not in subjects]
    trained = [choice for choice in python_docs.choices() if choice.subject in subjects]
    assert len(exam) >= 300
    assert len(trained) >= 600
    assert 0.15 < len(exam) / (len(exam) + len(trained)) < 0.35
    for choice in exam:
        assert choice.choices[choice.answer] not in said, choice.subject
        assert not any(f"`{choice.subject}`" in question for question in asked)


def test_choices_cannot_be_guessed_without_reading() -> None:
    choices = python_docs.choices()
    answers = Counter(choice.answer for choice in choices)
    assert set(answers) == {0, 1, 2, 3}
    assert max(answers.values()) - min(answers.values()) <= 1
    longest = sum(
        max(choice.choices, key=len) == choice.choices[choice.answer] for choice in choices
    )
    assert 0.2 < longest / len(choices) < 0.3
    for choice in choices:
        assert len(set(choice.choices)) == 4
        assert choice.subject in choice.question
        name = choice.subject.rpartition(".")[2].casefold()
        assert name not in choice.choices[choice.answer].casefold()


def test_right_answer_is_the_object_s_own_summary() -> None:
    summaries = {item.name: item.summary for item in python_objects()}
    for choice in python_docs.choices():
        assert choice.choices[choice.answer] == summaries[choice.subject]


def test_preferences_contrast_two_descriptions() -> None:
    descriptions = {item.name: item.description for item in python_objects()}
    for row in rows("preferences"):
        assert isinstance(row, Preference)
        assert row.chosen[0].content == descriptions[str(row.subject)]
        assert row.rejected[0].content in set(descriptions.values()) - {row.chosen[0].content}


def test_well_known_objects_are_there_under_their_public_names() -> None:
    known = {item.name: item for item in python_objects()}
    assert known["textwrap.dedent"].signature == "(text)"
    assert known["textwrap.dedent"].summary.startswith("Remove any common leading whitespace")
    assert known["str.join"].kind == "method"
    assert {"os.path.exists", "math.sqrt", "asyncio.gather", "unittest.TestCase"} <= known.keys()
    assert not any(part.startswith("_") for name in known for part in name.split("."))


@pytest.mark.parametrize("seed", ["1", "2"])
def test_generation_is_the_same_in_every_process_and_imports_no_oddities(seed: str) -> None:
    code = (
        "import sys\n"
        "from posttrain.data import python_docs\n"
        "print([python_docs.digest(part) for part in python_docs.PARTS])\n"
        "assert not {'this', 'antigravity', 'turtle', 'tkinter'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": seed},
    )
    assert done.stdout.strip() == str([python_docs.digest(part) for part in python_docs.PARTS])


@pytest.mark.parametrize(
    ("docstring", "description"),
    [
        (
            "f(x, y) -> value\n\nReturn the sum of *x* and :class:`~m.Y`, as ``int``.\n\nMore.",
            "Return the sum of `x` and `m.Y`, as `int`. More.",
        ),
        (
            "Return the   sum\nof both the given numbers",
            "Return the sum of both the given numbers.",
        ),
        ("Too short.", None),
        ("lower case begins no sentence, so it is none.", None),
        ("The arguments of this function are as follows:\n\n  x", None),
        ("Use it as in >>> f(1, 2) and be happy.", None),
        ("", None),
        ("word " * 80, None),
    ],
)
def test_descriptions_are_prose_or_nothing(docstring: str, description: str | None) -> None:
    assert describe(docstring) == description


def test_first_sentence_is_not_cut_at_an_abbreviation() -> None:
    text = "Return text, e.g. The name. Then more."
    assert first_sentence(text) == "Return text, e.g. The name."
