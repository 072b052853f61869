"""What was repaired already: comments at the head of a repaired recipe, and the files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^# repair (\d+) of (\S.*?): (\S+)$", re.MULTILINE)
_SUFFIX = re.compile(r"\.repair-(\d+)$")


@dataclass(frozen=True)
class Repair:
    """One line of a recipe's history."""

    number: int
    of: str
    """Name of the file it was made from."""
    remedy: str
    """Id of the remedy."""

    def __str__(self) -> str:
        """As it stands in the recipe."""
        return f"# repair {self.number} of {self.of}: {self.remedy}"


def history(text: str) -> tuple[Repair, ...]:
    """The repairs that led to a recipe, the first one first."""
    return tuple(Repair(int(n), of, remedy) for n, of, remedy in _LINE.findall(text))


def next_file(file: Path) -> Path:
    """`recipe.repair-1.yaml` beside `recipe.yaml`, or the next number that is free."""
    taken = [number for number, _ in _repairs_beside(file)]
    stem = _SUFFIX.sub("", file.stem)
    return file.with_name(f"{stem}.repair-{max(taken, default=0) + 1}{file.suffix or '.yaml'}")


def children(file: Path) -> Iterator[tuple[Path, Repair]]:
    """Recipes that were made from this one, each by one repair."""
    before = history(_read(file))
    for _, path in _repairs_beside(file):
        lines = history(_read(path))
        if len(lines) == len(before) + 1 and lines[:-1] == before and lines[-1].of == file.name:
            yield path, lines[-1]


def with_line(text: str, repair: Repair, reason: str) -> str:
    """The text with a further line of history at its head, below the others."""
    found = [*_LINE.finditer(text)]
    lines = f"{repair}\n#   {' '.join(reason.split())}\n"
    if not found:
        return lines + text
    at = text.index("\n", found[-1].end()) + 1
    while text[at : at + 4] == "#   ":  # its reason
        at = text.index("\n", at) + 1
    return text[:at] + lines + text[at:]


def number_of(file: Path) -> int:
    """The number in the name of a repaired recipe; 0 for any other."""
    found = _SUFFIX.search(file.stem)
    return int(found[1]) if found else 0


def _repairs_beside(file: Path) -> list[tuple[int, Path]]:
    stem = _SUFFIX.sub("", file.stem)
    found = []
    for path in file.parent.glob(f"*{file.suffix or '.yaml'}"):
        if _SUFFIX.sub("", path.stem) == stem and (number := number_of(path)):
            found.append((number, path))
    return sorted(found)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""
