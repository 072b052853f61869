"""When two texts count as the same."""

from __future__ import annotations

import hashlib
import unicodedata


def normalise(text: str, *, ignore_case: bool = False) -> str:
    """NFC with every run of white space as one space; `ignore_case` folds case as well.

    Texts equal without `ignore_case` are equal with it.
    """
    if text.isascii():  # ASCII is in NFC, and folds by lower case
        return " ".join((text.lower() if ignore_case else text).split())
    text = unicodedata.normalize("NFC", text)
    if ignore_case:
        # Folding can take a text out of NFC (Unicode 16, section 3.13, D145).
        text = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    return " ".join(text.split())


def hash64(text: str) -> int:
    """64 bits of BLAKE2b: the same for the same text, always."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
