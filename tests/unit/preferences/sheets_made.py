"""A small preference dataset and sheets of it, for the tests of this folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

from posttrain.preferences.items import read_items
from posttrain.preferences.key import Item, Key
from posttrain.preferences.sheets import Format, guarded, make_key, write_sheets

Choose = Callable[[Item], str]
"""What a rater thinks of an item: `first`, `second`, `tie`, `skip` or nothing."""


def write_rows(path: Path, count: int, **more: object) -> Path:
    """Pairs whose better answer says so, proposed the right way round."""
    rows = [
        {"prompt": f"Question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}", **more}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_sheets(
    folder: Path, rows: Path, sheet_format: Format = "csv", raters: int = 2, overlap: float = 0.3
) -> Key:
    """Sheets below `folder`, from a file of rows."""
    items, _ = read_items(str(rows), None, seed=0)
    return write_sheets(folder, make_key(items, raters, overlap, seed=0), sheet_format).key


def table(path: Path) -> list[list[str]]:
    """Header and rows of a sheet."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def fill(folder: Path, key: Key, rater: str, choose: Choose, path: Path) -> Path:
    """Fill a rater's sheet in, by what the rater reads at A and B alone."""
    header, *rows = table(folder / "sheets" / f"{rater}.csv")
    name, a, choice = header.index("item"), header.index("A"), header.index("choice")
    for row in rows:
        item = key.items[row[name]]
        said = choose(item)
        if said in ("first", "second"):
            wanted = item.texts[said == "second"]
            said = "A" if row[a] == guarded(wanted) else "B"
        row[choice] = said
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def good(item: Item) -> str:
    """The answer that says it is good."""
    return "first" if item.texts[0].startswith("good") else "second"


def bad(item: Item) -> str:
    """The other one."""
    return "second" if good(item) == "first" else "first"
