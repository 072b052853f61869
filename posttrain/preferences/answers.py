"""Sampled answers in a file: written as they come, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.errors import UsageError
from posttrain.preferences.key import Turns
from posttrain.store.files import sync_folder, write_bytes


class SampledAnswer(BaseModel):
    """One answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    """Without special tokens, and without white space around it."""
    tokens: int
    """Written, with the one that ends the answer."""
    ended: bool
    """Whether the model ended it; False where it reached the longest length."""


class AnswerSet(BaseModel):
    """All answers to one prompt: a line of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    """Position of the prompt among all that are asked, from 0."""
    prompt: Turns
    answers: tuple[SampledAnswer, ...]
    source: str
    """File and row of the prompt."""
    model: str
    sampling: str
    """Digest of all that the answers depend on."""


@dataclass(frozen=True)
class AnswerFile:
    """`NAME.answers.jsonl`, and the unfinished file that becomes it."""

    path: Path
    sampling: str
    """Of the answers that are wanted."""

    @property
    def partial(self) -> Path:
        """What a killed run leaves."""
        return self.path.with_name(f".{self.path.name}.partial")

    def read(self) -> dict[int, AnswerSet]:
        """The answers of these settings that are there already, by position of the prompt."""
        found = {}
        for path in (self.path, self.partial):
            for one in _read(path):
                if one.sampling == self.sampling:
                    found[one.index] = one
        return found

    def check(self, overwrite: bool) -> None:
        """Refuse to lose answers of other settings, hours of work maybe; or remove them.

        Raises:
            UsageError: there are some and `overwrite` is not set.
        """
        for path in (self.path, self.partial):
            others = sum(one.sampling != self.sampling for one in _read(path))
            if not others:
                continue
            if not overwrite:
                raise UsageError(
                    f"{path}: holds the answers to {others:,} prompts that were sampled with other "
                    "settings; write --overwrite to sample anew, or another --out"
                )
            path.unlink()

    def append(self, sets: Sequence[AnswerSet]) -> None:
        """Add answers, durably."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(_line(one) for one in sets)
        with self.partial.open("ab") as file:
            # A killed run may have left half a line.
            end = file.tell()
            file.write(b"\n" if end and not _ends_a_line(self.partial) else b"")
            file.write(text.encode())
            file.flush()
            sync_folder(self.partial)

    def finish(self, sets: Mapping[int, AnswerSet]) -> None:
        """Write all answers in the order of the prompts under the final name."""
        text = "".join(_line(sets[index]) for index in sorted(sets))
        write_bytes(self.path, text.encode())
        self.partial.unlink(missing_ok=True)


def _read(path: Path) -> Iterator[AnswerSet]:
    """Every whole line; half a line of a killed run is sampled again."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                yield AnswerSet.model_validate_json(line)
            except ValidationError:
                continue


def _line(one: AnswerSet) -> str:
    return json.dumps(one.model_dump(mode="json"), ensure_ascii=False) + "\n"


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"
