"""Blind sheets for people: a CSV file for a spreadsheet, or a page for a browser, a rater."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from jinja2 import Environment, StrictUndefined, Template

from posttrain.preferences.blinding import Order, assign, shown_as
from posttrain.preferences.key import NOTE, Item, Key, Turns, as_text, write_key
from posttrain.store.files import write_bytes
from posttrain.store.fingerprint import canonical_json

Format = Literal["csv", "html"]

SHEETS = "sheets"
"""Folder of what is handed out, apart from the key."""

COLUMNS = ("sheets", "item", "rater", "prompt", "A", "B", "choice", "note")
"""Of a CSV sheet. What is read back are `sheets`, `item`, `rater`, `choice` and `note`."""

QUESTION = "Which answer is better?"

_SPREADSHEET_CELL = 32_767
"""Characters that Excel keeps of a cell; it drops the rest without a word."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What begins a cell that a spreadsheet may run (OWASP, CSV Injection)."""


@dataclass(frozen=True)
class Sheets:
    """What was written."""

    key: Key
    files: dict[str, Path]
    """By rater."""
    too_long: int
    """Items of which a spreadsheet would drop the end; 0 for pages."""


def make_key(
    items: Sequence[Item],
    raters: int,
    overlap: float,
    seed: int,
    question: str = QUESTION,
    *,
    note: str = NOTE,
    guide: str = "",
) -> Key:
    """Name the items, give them to raters, and draw which answer stands at A.

    Args:
        items: As `read_items` gives them.
        raters: How many.
        overlap: Share of the items that all raters get.
        seed: Of the draws.
        question: What the raters are asked.
        note: What the key says of itself.
        guide: What counts as better, in words.
    """
    content = [item.model_dump(mode="json") for item in items]
    settings = canonical_json([content, raters, overlap, seed, question])
    # A letter first, or a spreadsheet takes it for a number.
    sheets = f"s{hashlib.sha256(settings).hexdigest()[:8]}"
    digits = len(str(len(items)))
    named = {f"{sheets}-{number:0{digits}}": item for number, item in enumerate(items, start=1)}
    names = [f"rater-{number}" for number in range(1, raters + 1)]
    proposed = {name: item.proposed for name, item in named.items()}
    orders = assign(proposed, names, overlap, seed)
    return Key(
        note=note,
        sheets=sheets,
        question=question,
        guide=guide,
        seed=seed,
        items=named,
        orders=orders,
    )


def write_sheets(folder: Path, key: Key, sheet_format: Format) -> Sheets:
    """Write each rater's sheet below `folder/sheets`, and the key last.

    Args:
        folder: New or empty.
        key: As `make_key` made it.
        sheet_format: A CSV file or an HTML page a rater.
    """
    write = {"csv": csv_sheet, "html": html_sheet}[sheet_format]
    written = {}
    for rater in key.orders:
        path = folder / SHEETS / f"{rater}.{sheet_format}"
        write_bytes(path, write(key, rater))
        written[rater] = path
    write_key(folder, key)
    long = sum(_too_long(item) for item in key.items.values()) if sheet_format == "csv" else 0
    return Sheets(key, written, long)


def csv_sheet(key: Key, rater: str) -> bytes:
    """A rater's items as CSV in UTF-8 with a byte order mark, without which Excel guesses."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for name, order in key.orders[rater].items():
        item = key.items[name]
        shown = (as_text(item.prompt), *shown_as(item.texts, order))
        writer.writerow((key.sheets, name, rater, *map(guarded, shown), "", ""))
    return text.getvalue().encode("utf-8-sig")


def guarded(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: an apostrophe stands before one."""
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text


def html_sheet(key: Key, rater: str) -> bytes:
    """A rater's items as a page that needs no other file and no network."""
    items = [_shown(name, key.items[name], order) for name, order in key.orders[rater].items()]
    data = {"sheets": key.sheets, "rater": rater, "items": items}
    page = _template().render(
        question=key.question, guide=key.guide, rater=rater, count=len(items), data=data
    )
    return page.encode()


def _shown(name: str, item: Item, order: Order) -> dict[str, object]:
    one, other = (item.first, item.second) if order == "AB" else (item.second, item.first)
    return {"item": name, "prompt": _turns(item.prompt), "A": _turns(one), "B": _turns(other)}


def _turns(turns: Turns) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _too_long(item: Item) -> bool:
    return any(len(text) >= _SPREADSHEET_CELL for text in (as_text(item.prompt), *item.texts))


@cache
def _template() -> Template:
    source = files("posttrain.preferences").joinpath("sheet.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    return environment.from_string(source)
