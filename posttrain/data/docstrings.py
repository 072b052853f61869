"""From a docstring to one paragraph of plain prose, or to nothing."""

from __future__ import annotations

import inspect
import re

_SHORTEST, _LONGEST = 5, 60
"""Words of a description."""
_ENOUGH = 12
"""Words; a shorter first paragraph takes the next one with it."""

_ROLE = re.compile(r":[a-z:]+:`~?([^`]*)`")
_CODE = re.compile(r"``([^`]+)``|`([^`' ]+)'|(?<![\w`])'(\w+)'(?![\w'])")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\w+)\*{1,2}(?![\w*])")
_SIGNATURE = re.compile(r"^[\w.]+\([^)]*\)+(\s*(->|=>|[-=]{1,2})\s*[^.]*?)?(\n|$)")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[A-Z`(])")
_NOT_PROSE = re.compile(
    r">>>|XXX|TODO|FIXME|\.\. |::|\|  |--- |===|[{}<>|\\]|https?:|\$|^(Internal|Private|Helper)\b|"
    r"\b(obsolete|for internal use|do not use)\b|\s[-*] ",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z]")


def describe(docstring: str) -> str | None:
    """The first paragraph of a docstring as clean prose of 5 to 60 words.

    A short first paragraph takes the next one with it. Markup of reStructuredText becomes plain
    text with backticks around code. None for a docstring that begins with anything but prose.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    paragraphs = [_SIGNATURE.sub("", paragraph, count=1).strip() for paragraph in paragraphs]
    paragraphs = [paragraph for paragraph in paragraphs if paragraph]
    if not paragraphs:
        return None
    text = _clean(paragraphs[0])
    if not _is_prose(text):
        return None
    if len(text.split()) < _ENOUGH and len(paragraphs) > 1:
        more = f"{text} {_clean(paragraphs[1])}"
        # An indented paragraph is an example or a list.
        if _is_prose(more) and len(more.split()) <= _LONGEST and "\n " not in paragraphs[1]:
            text = more
    text = _cut(text)
    return text if text and _SHORTEST <= len(text.split()) <= _LONGEST else None


def first_sentence(text: str) -> str:
    """Everything up to the end of the first sentence."""
    return _SENTENCE_END.split(text, maxsplit=1)[0]


def _clean(paragraph: str) -> str:
    text = " ".join(paragraph.split())
    text = _ROLE.sub(r"`\1`", text)
    text = _CODE.sub(lambda match: f"`{next(group for group in match.groups() if group)}`", text)
    text = _EMPHASIS.sub(r"`\1`", text)
    text = text.replace(" -- ", ", ").replace("--", ", ")
    return text if text.endswith((".", ".)", "!", "?", ":", ";", ",")) else f"{text}."


def _is_prose(text: str) -> bool:
    """Begins like a sentence, ends like one, and holds no markup or code."""
    if not text[0].isupper() or text.endswith((":", ";", ",")) or _NOT_PROSE.search(text):
        return False
    letters = sum(1 for _ in _WORD.finditer(text))
    return letters > 0.7 * len(text.replace(" ", ""))


def _cut(text: str) -> str:
    """As many whole sentences as fit."""
    kept: list[str] = []
    words = 0
    for sentence in _SENTENCE_END.split(text):
        words += len(sentence.split())
        if words > _LONGEST:
            break
        kept.append(sentence)
    return " ".join(kept)
