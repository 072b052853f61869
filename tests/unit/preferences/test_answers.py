"""The file in which sampled answers are kept."""

from __future__ import annotations

from pathlib import Path

from posttrain.preferences.answers import AnswerFile, AnswerSet
from posttrain.preferences.key import Turn


def answered(index: int, sampling: str = "s") -> AnswerSet:
    prompt = (Turn(role="user", content="?"),)
    return AnswerSet(
        index=index, prompt=prompt, answers=(), source="f:1", model="m", sampling=sampling
    )


def test_half_a_line_of_a_killed_run_spoils_no_other(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "pairs.answers.jsonl", "s")
    file.append([answered(0), answered(1)])
    torn = file.partial.read_bytes()[:-20]
    file.partial.write_bytes(torn)
    file.append([answered(1), answered(2)])
    assert sorted(file.read()) == [0, 1, 2]


def test_answers_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "pairs.answers.jsonl", "s")
    file.append([answered(0, sampling="other"), answered(1)])
    assert sorted(file.read()) == [1]
