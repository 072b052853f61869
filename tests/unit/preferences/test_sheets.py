"""Sheets for people: what they show, what they hide, and what is read back from them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from posttrain.data.formats import read_rows
from posttrain.data.rows import Preference
from posttrain.errors import DataError
from posttrain.preferences.filled import read_ratings, votes_of
from posttrain.preferences.items import read_items
from posttrain.preferences.key import Item, read_key
from posttrain.preferences.rated import remarks, report_ratings, write_rated
from posttrain.preferences.sheets import guarded, make_key, write_sheets
from posttrain.recipe.datasets import DatasetSpec
from tests.unit.preferences.sheets_made import bad, fill, good, make_sheets, table, write_rows


def test_a_sheet_says_nothing_of_what_was_proposed(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 40, reward="judge@1", scores=[2.5, 1.5])
    key = make_sheets(tmp_path / "out", rows)
    header, *sheet = table(tmp_path / "out" / "sheets" / "rater-1.csv")
    assert header == ["sheets", "item", "rater", "prompt", "A", "B", "choice", "note"]
    assert len(sheet) == 26  # 12 for both, and half of 28
    assert [row[6] for row in sheet] == [""] * 26
    at_a = sum(row[4].startswith("good") for row in sheet)
    assert 12 <= at_a <= 14
    text = (tmp_path / "out" / "sheets" / "rater-1.csv").read_text("utf-8-sig")
    page = make_sheets(tmp_path / "pages", rows, "html")
    text += (tmp_path / "pages" / "sheets" / "rater-1.html").read_text()
    assert "judge@1" not in text
    assert "2.5" not in text
    assert page.items == key.items
    proposed = [item.proposed for item in key.items.values()]
    assert proposed.count("first") == proposed.count("second") == 20


def test_the_key_says_that_it_is_not_to_be_handed_out_and_lies_apart(tmp_path: Path) -> None:
    key = make_sheets(tmp_path / "out", write_rows(tmp_path / "rows.jsonl", 5))
    assert (
        "Do not hand this file to raters"
        in json.loads((tmp_path / "out/key.json").read_text())["note"]
    )
    assert sorted(p.name for p in (tmp_path / "out/sheets").iterdir()) == [
        "rater-1.csv",
        "rater-2.csv",
    ]
    assert read_key(tmp_path / "out") == key


def test_a_spreadsheet_opens_the_sheet_as_utf8_and_runs_no_formula(tmp_path: Path) -> None:
    row = {"prompt": "=1+1", "chosen": "@SUM(A1)", "rejected": '-2, "ä"\nsecond line 雪'}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    make_sheets(tmp_path / "out", path, raters=1)
    file = tmp_path / "out" / "sheets" / "rater-1.csv"
    assert file.read_bytes().startswith(b"\xef\xbb\xbf")
    cells = table(file)[1]
    assert cells[3] == "'=1+1"
    assert set(cells[4:6]) == {"'@SUM(A1)", '\'-2, "ä"\nsecond line 雪'}


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1", "  =1"])
def test_what_begins_like_a_formula_is_escaped(text: str) -> None:
    assert guarded(text) == f"'{text}"


def test_other_text_stays_as_it_is() -> None:
    assert [guarded(text) for text in ("", "a=1", "1-2", "ä@b")] == ["", "a=1", "1-2", "ä@b"]


def test_what_raters_chose_becomes_a_dataset_that_a_recipe_reads(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 20, model="sft@1", reward="judge@1")
    key = make_sheets(tmp_path / "out", rows, overlap=0.5)
    one = fill(tmp_path / "out", key, "rater-1", good, tmp_path / "one.csv")
    other = fill(tmp_path / "out", key, "rater-2", bad, tmp_path / "other.csv")
    report = write_rated(tmp_path / "rated.jsonl", key, read_ratings([other, one], key), "majority")
    read = list(read_rows(DatasetSpec(source=str(tmp_path / "rated.jsonl"))))
    assert all(isinstance(row, Preference) for row in read)
    assert report.counts.model_dump() == {
        "items": 20, "pairs": 10, "ties": 0, "skipped": 0, "disagreed": 10, "unrated": 0,
    }  # fmt: skip
    written = [json.loads(line) for line in (tmp_path / "rated.jsonl").read_text().splitlines()]
    assert sorted(line["chosen"][0]["content"].split()[0] for line in written) == (
        ["bad"] * 5 + ["good"] * 5
    )
    assert all(
        line["as_proposed"] == line["chosen"][0]["content"].startswith("good") for line in written
    )
    assert {(line["model"], line["reward"]) for line in written} == {("sft@1", "judge@1")}
    assert report.pairs_turned == 5
    assert report.with_proposal is not None
    assert (report.with_proposal.count, report.with_proposal.of) == (5, 10)
    [pair] = report.agreement
    assert (pair.agreed.count, pair.agreed.of) == (0, 10)
    assert pair.kappa is not None
    assert pair.kappa.value < -0.5
    first, second = (rater.with_proposal for rater in report.raters)
    assert first is not None
    assert second is not None
    assert (first.agreed.value, second.agreed.value) == (1.0, 0.0)


def test_most_votes_win_and_ties_and_skips_make_no_pair(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 5)
    key = make_sheets(tmp_path / "out", rows, raters=3, overlap=1.0)
    said = dict(
        zip(
            key.items,
            [("g", "g", "b"), ("g", "tie", "tie"), ("g", "b", "tie"), ("skip", "skip", "skip")],
            strict=False,
        )
    )
    names = {id(item): name for name, item in key.items.items()}

    def filled(number: int) -> Path:
        def choose(item: object) -> str:
            word = said.get(names[id(item)], ("", "", ""))[number]
            return {"g": good, "b": bad}[word](item) if word in ("g", "b") else word  # type: ignore[arg-type]

        path = tmp_path / f"{number}.csv"
        return fill(tmp_path / "out", key, f"rater-{number + 1}", choose, path)

    ratings = read_ratings([filled(number) for number in range(3)], key)
    by_most = report_ratings(key, ratings, "majority").counts.model_dump()
    assert by_most == {
        "items": 5, "pairs": 1, "ties": 1, "skipped": 1, "disagreed": 1, "unrated": 1,
    }  # fmt: skip
    unanimous = report_ratings(key, ratings, "drop")
    assert (unanimous.counts.pairs, unanimous.counts.disagreed) == (0, 3)
    assert unanimous.alpha is not None


def test_sheets_come_back_partly_filled_in_any_order_and_as_excel_saves_them(
    tmp_path: Path,
) -> None:
    key = make_sheets(tmp_path / "out", write_rows(tmp_path / "rows.jsonl", 6), raters=1)
    header, *rows = table(tmp_path / "out" / "sheets" / "rater-1.csv")
    rows[0][6], rows[1][6], rows[2][6] = "a", " B ", "TIE"
    rows[0][7] = "schön"
    mixed = [header[::-1], *(row[::-1] for row in rows[::-1]), [""] * 8]
    for name, delimiter, encoding in (
        ("semicolons", ";", "cp1252"),
        ("tabs", "\t", "utf-16"),
        ("commas", ",", "utf-8"),
    ):
        path = tmp_path / f"{name}.csv"
        with path.open("w", encoding=encoding, newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(mixed)
        ratings = read_ratings([path], key)
        assert [rating.choice for rating in ratings] == ["tie", "B", "A"], name
        assert [rating.where for rating in ratings] == [f"{path}:{n}" for n in (5, 6, 7)]


def test_rows_cut_short_after_empty_cells_are_not_rated_yet(tmp_path: Path) -> None:
    key = make_sheets(tmp_path / "out", write_rows(tmp_path / "rows.jsonl", 2), raters=1)
    header, first, second = table(tmp_path / "out" / "sheets" / "rater-1.csv")
    path = tmp_path / "short.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, first[:6], [*second[:6], "A"]])
    assert [rating.item for rating in read_ratings([path], key)] == [second[1]]


def test_what_does_not_belong_is_refused_with_file_and_row(tmp_path: Path) -> None:
    key = make_sheets(tmp_path / "out", write_rows(tmp_path / "rows.jsonl", 8), overlap=0.25)
    only_other = next(item for item in key.orders["rater-2"] if item not in key.orders["rater-1"])
    path = tmp_path / "filled.csv"
    mine = list(key.orders["rater-1"])
    lines = [
        "sheets,item,rater,choice",
        f"{key.sheets},{mine[0]},rater-1,A",
        f"sother,{mine[0]},rater-1,A",
        f"{key.sheets},{key.sheets}-99,rater-1,A",
        f"{key.sheets},{only_other},rater-1,A",
        f"{key.sheets},{mine[1]},ann,A",
        f"{key.sheets},{mine[1]},rater-1,both",
        f"{key.sheets},{mine[0]},rater-1,B",
    ]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as refused:
        read_ratings([path], key)
    said = str(refused.value).splitlines()
    assert [line.removeprefix(f"{path}:")[0] for line in said] == list("345678")
    assert "is of the sheets `sother`" in said[0]
    assert "there is no item" in said[1]
    assert "was not given to rater-1" in said[2]
    assert "there is no rater `ann`; the raters are rater-1, rater-2" in said[3]
    assert "write A, B, tie or skip" in said[4]
    assert f"rated {mine[0]} already, in {path}:2" in said[5]


def test_a_file_that_is_no_sheet_is_refused(tmp_path: Path) -> None:
    key = make_sheets(tmp_path / "out", write_rows(tmp_path / "rows.jsonl", 2))
    (tmp_path / "other.csv").write_text("name,age\nann,3\n")
    with pytest.raises(DataError, match=r"other\.csv: is no filled sheet: it has no column sheets"):
        read_ratings([tmp_path / "other.csv"], key)
    with pytest.raises(DataError, match=r"none\.csv: cannot be read"):
        read_ratings([tmp_path / "none.csv"], key)
    with pytest.raises(DataError, match=r"there is no key\.json in it"):
        read_key(tmp_path)
    (tmp_path / "key.json").write_text("{}")
    with pytest.raises(DataError, match=r"key\.json: is not as it was written"):
        read_key(tmp_path)


def test_a_rater_who_takes_whatever_stands_at_a_is_warned_of(tmp_path: Path) -> None:
    key = make_sheets(tmp_path / "out", write_rows(tmp_path / "rows.jsonl", 30), raters=1)
    header, *rows = table(tmp_path / "out" / "sheets" / "rater-1.csv")
    path = tmp_path / "lazy.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *([*row[:6], "A", ""] for row in rows)])
    report = report_ratings(key, read_ratings([path], key), "majority")
    assert report.chose_a is not None
    assert (report.chose_a.count, report.chose_a.of) == (30, 30)
    assert "chose A in 100% of 30 choices" in remarks(report)[0]
    [rater] = report.raters
    assert rater.with_proposal is not None
    # Whoever looks at the place alone agrees by half, which is chance.
    assert 14 <= rater.with_proposal.agreed.count <= 16
    assert rater.with_proposal.kappa is not None


def test_two_unlike_answers_of_several_are_rated(tmp_path: Path) -> None:
    rows = [
        {"prompt": "One?", "answers": ["a", "b", "a", " "]},
        {"prompt": "Two?", "answers": [{"text": "same"}, {"text": "same"}]},
        {"prompt": [{"role": "user", "content": "Three?"}], "answers": [{"text": "c"}, "d", "e"]},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, left_out = read_items(str(path), None, seed=1)
    assert left_out == 1
    assert set(items[0].texts) == {"a", "b"}
    assert len(set(items[1].texts) & {"c", "d", "e"}) == 2
    assert {item.proposed for item in items} == {None}
    key = make_sheets(tmp_path / "out", path, raters=1)
    filled = fill(tmp_path / "out", key, "rater-1", lambda item: "first", tmp_path / "f.csv")
    ratings = read_ratings([filled], key)
    assert votes_of(ratings, key) == {"rater-1": dict.fromkeys(key.orders["rater-1"], "first")}
    report = report_ratings(key, ratings, "majority")
    assert (report.counts.pairs, report.with_proposal, report.pairs_turned) == (2, None, 0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x", "completion": "y"}, "has no two answers"),
        ({"prompt": "x", "answers": "y"}, "`answers` must be a list"),
        ({"prompt": "x", "answers": [3, "y"]}, r"`answers\[0\]` must be a list of messages"),
        ({"prompt": "x", "answers": ["y", "y"]}, "no pair of unlike answers"),
    ],
)
def test_rows_without_two_answers_are_refused(
    tmp_path: Path, row: dict[str, object], said: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said):
        read_items(str(path), None, seed=0)


def test_real_pairs_come_back_word_for_word(real_data: Path, tmp_path: Path) -> None:
    source = str(real_data / "dpo_en_demo.json")
    rows = [row for row in read_rows(DatasetSpec(source=source)) if isinstance(row, Preference)]
    items, left_out = read_items(source, None, seed=0)
    assert (len(items), left_out) == (len(rows), 0)
    key = write_sheets(tmp_path / "out", make_key(items, 3, 0.1, seed=0), "csv").key

    def as_proposed(item: Item) -> str:
        return str(item.proposed)

    filled = [
        fill(tmp_path / "out", key, rater, as_proposed, tmp_path / f"{rater}.csv")
        for rater in key.orders
    ]
    report = write_rated(tmp_path / "rated.jsonl", key, read_ratings(filled, key), "majority")
    assert report.pairs_turned == 0
    assert report.alpha == 1.0
    assert report.chose_a is not None
    assert not report.chose_a.excludes_half
    read = list(read_rows(DatasetSpec(source=str(tmp_path / "rated.jsonl"))))
    pairs = [(row.prompt, row.chosen, row.rejected) for row in rows]
    assert [(r.prompt, r.chosen, r.rejected) for r in read if isinstance(r, Preference)] == pairs
