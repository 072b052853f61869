"""The console that commands write to. Imports rich when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console(*, stderr: bool = False, width: int = 120) -> Console:
    """A console for text that may hold brackets, which are no markup.

    Args:
        stderr: Write there, because the standard output is for JSON.
        width: Columns where nobody looks at a terminal: a file or a pipe has no width, and eighty
            columns would break every line of numbers.
    """
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, highlight=False, markup=False, width=width)
