"""What the searches for personal data share: spans, and a cheap look before the patterns.

Most texts hold nothing to find. A pattern that starts with a digit stops at every digit of a page;
mapping the page's bytes onto a few classes and looking for a run of one class takes a microsecond.
"""

from __future__ import annotations

import string
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]
"""Start and end of a finding, as for slicing."""

# The bytes of the no-break space and of Unicode's dashes in UTF-8 are among the separators.
_SEPARATORS = b" ().-/\xc2\xa0\xe2\x80\x90\x91\x92\x93\x94"
_NUMBER_TABLE = bytes.maketrans(
    (string.digits + string.ascii_uppercase).encode(), b"0" * 10 + b"A" * 26
)
_TOKEN_CHARACTERS = string.ascii_letters + string.digits + "_-+/="
_TOKEN_TABLE = bytes.maketrans(_TOKEN_CHARACTERS.encode(), b"x" * len(_TOKEN_CHARACTERS))


def number_shape(text: str) -> bytes:
    """The text in UTF-8, every ASCII digit a `0` and every ASCII capital an `A`."""
    return text.encode("utf-8", "replace").translate(_NUMBER_TABLE)


def has_digits(text: str, count: int) -> bool:
    """Whether so many digits stand together, with or without separators between them."""
    packed = text.encode("utf-8", "replace").translate(_NUMBER_TABLE, _SEPARATORS)
    return b"0" * count in packed


def has_token(text: str, length: int) -> bool:
    """Whether a run of so many letters, digits and `_-+/=` stands in the text."""
    return b"x" * length in text.encode("utf-8", "replace").translate(_TOKEN_TABLE)
