"""The key of a set of blind sheets: the items, who proposed what, and which answer stands where."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.data.rows import Message, Messages
from posttrain.errors import DataError
from posttrain.preferences.blinding import Order
from posttrain.store.files import write_json

KEY = "key.json"

NOTE = (
    "Do not hand this file to raters: it says which answer stands at A and which one was proposed "
    "as the better. `posttrain data preferences read` needs it to read the sheets."
)


class Turn(BaseModel):
    """One message."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: str


Turns = tuple[Turn, ...]


class Item(BaseModel):
    """A prompt and two answers, in an order that says nothing about them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Turns
    first: Turns
    second: Turns
    source: str
    """File and row that the item comes from."""
    proposed: Literal["first", "second"] | None = None
    """The better one, to whoever proposed the pair."""
    proposed_by: str | None = None
    """The reward that did, or `dataset`."""
    model: str | None = None
    """What wrote the answers, where the row says it."""
    scores: tuple[float, float] | None = None
    """The reward's scores of the first and of the second answer."""

    @property
    def texts(self) -> tuple[str, str]:
        """Both answers as a person reads them."""
        return as_text(self.first), as_text(self.second)


class Key(BaseModel):
    """What `key.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    note: str = NOTE
    sheets: str
    """Name of this set of sheets; stands in every row of every sheet."""
    question: str
    guide: str = ""
    """What counts as better, in words; stands on every sheet."""
    seed: int
    items: dict[str, Item]
    orders: dict[str, dict[str, Order]]
    """Rater -> item -> order, in the order in which the rater sees the items."""


def write_key(folder: Path, key: Key) -> None:
    """Write `key.json`, last of all: with it the sheets are complete."""
    write_json(folder / KEY, key.model_dump(mode="json"))


def read_key(folder: Path) -> Key:
    """The key in a folder that `posttrain data preferences sheet` wrote.

    Raises:
        DataError: there is none, or it is not what was written.
    """
    path = folder / KEY
    if not path.is_file():
        raise DataError(
            f"{folder}: there is no {KEY} in it; name the folder that `posttrain data preferences "
            "sheet` wrote"
        )
    try:
        return Key.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: is not as it was written: {error}") from error


def turns_of(messages: Messages) -> Turns:
    """Messages as the key keeps them."""
    return tuple(Turn(role=message.role, content=message.content) for message in messages)


def messages_of(turns: Turns) -> Messages:
    """What `turns_of` made of messages."""
    return tuple(Message(turn.role, turn.content) for turn in turns)


def as_text(turns: Turns) -> str:
    """Turns as a person reads them: roles are named where there is more than one turn."""
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role}:\n{turn.content}" for turn in turns)
