"""Texts and numbers of the page. All texts are hostile: cut, made visible, and escaped later."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from posttrain.data.report import visible

LINES = 40
"""Lines shown of a text."""
_CUT = " …"


def cut(text: str, characters: int) -> str:
    """The beginning of a text, with characters that cannot be seen as escapes."""
    begin = "\n".join(text[:characters].split("\n")[:LINES])
    # Escapes are longer than what they stand for.
    shown = visible(begin)[: 2 * characters]
    whole = begin == text and len(visible(begin)) == len(shown)
    return shown if whole else f"{shown.rstrip()}{_CUT}"


def written_size(text: str) -> int:
    """Bytes that a text takes in the page."""
    return len(str(escape(text)).encode())


def signed(value: float) -> str:
    """A difference: `+0.012`."""
    return f"{value:+.3f}" if round(value, 3) else "0.000"


def bounds(low: float | None, high: float | None) -> str:
    """Such as `[-0.012, +0.034]`; nothing where they are not known."""
    return "" if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def p_value(p: float | None) -> str:
    """Such as `0.034`, `<0.001`; nothing where there is none."""
    if p is None:
        return ""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def plain_name(name: str, task: str = "") -> str:
    """A leaf task for reading: `mmlu_world_religions` of `mmlu` is `world religions`."""
    return name.removeprefix(f"{task}_").replace("_", " ")


def breakable(name: str) -> Markup:
    """A task's name that a line may break in at its punctuation."""
    parts = re.split(r"(?<=[:_.-])", cut(name, 160))
    return Markup("<wbr>").join(parts)
