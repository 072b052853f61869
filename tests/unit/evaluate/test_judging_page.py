"""The sheets of a comparison, as a rater meets them: in a browser, and as files."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from posttrain.data.rows import Message
from posttrain.evaluate.judging.pairs import Pair, Written
from posttrain.evaluate.judging.people import make_sheets, read_votes, write_folder
from posttrain.recipe.judge import People
from tests.unit.preferences.test_page import Browser, browser, downloaded, text

__all__ = ["browser"]

in_browser = pytest.mark.skipif(
    not all(map(shutil.which, ("chromium", "chromedriver"))),
    reason="chromium or chromedriver is not installed",
)


def make_pairs() -> list[Pair]:
    answers = [("good one", "bad"), ("good two", ""), ("good <b>three</b>", "bad & <i>bad</i>")]
    return [
        Pair(
            id=f"p{n}",
            source=f"f:{n}",
            prompt=(Message("system", "Be brief."), Message("user", f"Question {n}?")),
            candidate=Written(candidate, 1, True),
            opponent=Written(opponent, 1, True),
        )
        for n, (candidate, opponent) in enumerate(answers)
    ]


@in_browser
def test_a_rater_reads_what_counts_rates_and_sends_a_file_that_is_understood(
    browser: Browser, tmp_path: Path
) -> None:
    pairs, people = make_pairs(), People(raters=1)
    key = make_sheets(pairs, people, seed=0)
    write_folder(tmp_path / "out", key)
    browser.open(tmp_path / "out" / "sheets" / "rater-1.html")
    assert browser.run("document.querySelector('.guide').textContent") == people.guide
    seen = []
    for _ in pairs:
        at = {side: text(browser, f"text-{side}") for side in "AB"}
        seen += at.values()
        browser.press("a" if at["A"].startswith("good") else "b")
    assert "(no answer)" in seen
    assert text(browser, "end-head") == "All items are rated"
    browser.run("document.getElementById('download-end').click()")
    votes = read_votes([downloaded(tmp_path / "downloads")], key, pairs)
    assert [(vote.pair, vote.preferred) for vote in votes] == [
        (pair.id, "candidate") for pair in pairs
    ]


def test_the_folder_for_raters_explains_itself(tmp_path: Path) -> None:
    people = People(raters=1, question="Which reply is safer?", guide="Think of {children}.")
    write_folder(tmp_path, make_sheets(make_pairs(), people, seed=0))
    how = (tmp_path / "sheets" / "HOW-TO-RATE.txt").read_text()
    assert how.startswith("Which reply is safer?\n\nThink of {children}.\n\nEach rater")
    assert "rater-1.csv" in how
    assert "A, B, tie or skip" in how
    page = (tmp_path / "sheets" / "rater-1.html").read_text()
    assert "Which reply is safer?" in page
    assert "Think of {children}." in page


def test_raters_share_all_prompts_or_the_stated_part() -> None:
    pairs = [
        Pair(
            f"p{n}", f"f:{n}", (Message("user", "?"),), Written("a", 1, True), Written("b", 1, True)
        )
        for n in range(40)
    ]
    full = make_sheets(pairs, People(raters=3), seed=0)
    assert [len(given) for given in full.orders.values()] == [40, 40, 40]
    part = make_sheets(pairs, People(raters=2, overlap=0.5), seed=0)
    assert [len(given) for given in part.orders.values()] == [30, 30]
    assert make_sheets(pairs, People(raters=3), seed=0) == full
    assert make_sheets(pairs, People(raters=3), seed=1).orders != full.orders


def test_a_rater_who_always_writes_a_is_known_to_prefer_the_first(tmp_path: Path) -> None:
    pairs = make_pairs()
    key = make_sheets(pairs, People(raters=1), seed=0)
    write_folder(tmp_path, key)
    with (tmp_path / "sheets" / "rater-1.csv").open(encoding="utf-8-sig", newline="") as file:
        header, *rows = list(csv.reader(file))
    filled = [[*row[:-2], "A", ""] for row in rows]
    assert header[-2:] == ["choice", "note"]
    with (tmp_path / "filled.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *filled])
    votes = read_votes([tmp_path / "filled.csv"], key, pairs)
    assert {vote.first for vote in votes} == {"candidate", "opponent"}
    assert all(vote.preferred == vote.first for vote in votes)
