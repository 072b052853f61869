"""The report's page: self-contained, safe against what rows say, true to its numbers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.report import (
    CLUSTERS,
    EXAMPLES_A_REASON,
    NAME_LIMIT,
    TEXT_LIMIT,
    differing_words,
    format_seconds,
    format_share,
    report_html,
    report_markdown,
    visible,
    write_report,
)
from posttrain.data.report_charts import bar, format_number
from posttrain.data.report_data import (
    Advice,
    Cluster,
    Example,
    FunnelStep,
    Histogram,
    Hit,
    ReportData,
    SideSummary,
)

EDGES = (0, 8, 16, 32, 64, 128)
NOTHING = Histogram(edges=EDGES, counts=(0, 0, 0, 0, 0))
HOSTILE = (
    "</pre><script>document.title='owned'</script><img src=http://x/y onerror=alert(1)> "
    "\u202egnp.exe\u202c \x00\x07\x1b[31m\x9b \ufeff& \"'` | " + "x" * 50_000
)


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text, and the cells of every table row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.cells: list[list[str]] = []
        self.in_cell = False
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "section":
            self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.cells[-1][-1] += data.strip()


def example(text: str, operation: str = "length", reason: str = "too short") -> Example:
    return Example(
        operation=operation,
        reason=reason,
        detail="3 words; at least 5",
        file="part-0.jsonl",
        row=17,
        id="00ff00ff00ff00ff",
        text=text,
    )


def minimal(**fields: object) -> ReportData:
    values: dict[str, object] = {
        "dataset": "chats",
        "source": "chats.jsonl",
        "family": "chats",
        "rows_in": 0,
        "sides": (),
        "funnel": (),
        "lengths_before": NOTHING,
        "lengths_after": NOTHING,
    }
    return ReportData.model_validate(values | fields)


def full(text: str = "plain text") -> ReportData:
    """All sections, `text` wherever a row or its source has a say."""
    row = example(text, text, text).model_copy(update={"detail": text, "file": text, "id": text})
    return minimal(
        dataset=text,
        source=text,
        rows_in=12_345,
        sides=(
            SideSummary(side="train", rows=9_000, words=1_234_567),
            SideSummary(side="validation", rows=1_000, words=100_000),
            SideSummary(side="test", rows=345, words=0),
        ),
        funnel=(
            FunnelStep(operation="read", rows=12_345, dropped={text: 345}),
            FunnelStep(operation="length", rows=12_000, dropped={"too short": 1_500, "long": 155}),
            FunnelStep(operation="pii", rows=10_345, edited=1_021, found={"email": 999, text: 22}),
        ),
        files={text: 12_000, "b.jsonl": 345},
        lengths_before=Histogram(
            edges=EDGES, counts=(2_345, 4_000, 3_000, 2_000, 1_000), mean=21.5, median=16, p95=130
        ),
        lengths_after=Histogram(
            edges=EDGES, counts=(345, 4_000, 3_000, 2_000, 1_000), mean=24, median=19, p95=140
        ),
        examples=(example(text), row),
        clusters=(Cluster(size=3, kept=row, dropped=(row, example("other"))),),
        cluster_sizes={size: 100 // size for size in range(2, 30)},
        labels={"before": {text: 5_000, "b": 4_000}, "after": {text: 4_500, "b": 4_500}},
        languages={"en": 12_000, text: 345},
        contamination=(Hit(benchmark="mmlu", rows=7, example=text),),
        preference_lengths={"chosen": 150.4, "rejected": 99.6, "chosen_longer": 0.713},
        advice=(
            Advice(level="good", text="All is well."),
            Advice(level="warning", text=f"Look at `this`: {text}"),
        ),
        leak_check="No row stands on two sides.",
        seconds={"read": 3.2, text: 61.0},
    )


def test_page_refers_to_nothing_outside_itself() -> None:
    page = report_html(full())
    seen = Page(page)
    references = [value for name, value in seen.attributes if name in ("src", "href", "srcset")]
    assert references
    assert all((value or "").startswith("#") for value in references)
    assert not re.search(r"url\(|@import|https?://", page)
    assert not seen.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert "default-src 'none'" in page


def test_page_is_written_as_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, full("žluťoučký 日本語 🙂"))
    assert "žluťoučký 日本語 🙂" in path.read_bytes().decode()


def test_hostile_text_stays_text() -> None:
    plain, hostile = Page(report_html(full())), Page(report_html(full(HOSTILE)))
    assert hostile.tags <= plain.tags | {"mark", "wbr", "code"}
    assert {name for name, _ in hostile.attributes} <= {name for name, _ in plain.attributes}
    assert "</pre><script>document.title='owned'</script>" in hostile.text


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_no_text_makes_tags_or_attributes(text: str) -> None:
    seen = Page(report_html(full(text)))
    assert not seen.tags & {"script", "img", "iframe", "svg:script", "a:script"}
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert set(seen.tags) <= set(Page(report_html(full())).tags) | {"mark", "wbr", "code"}


def test_invisible_characters_are_escapes() -> None:
    page = report_html(full(HOSTILE))
    assert r"\u202egnp.exe\u202c \x00\x07\x1b[31m\x9b \ufeff" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", page)


def test_visible_keeps_what_scripts_and_emoji_need() -> None:
    text = "क्\u200dष 👩\u200d🔬 a\tb\nc"
    assert visible(text) == text
    assert visible("a\r\nb\rc") == "a\nb\\rc"


def test_sections_without_data_are_left_out() -> None:
    assert Page(report_html(minimal())).ids == []
    data = minimal(rows_in=5, files={"a.jsonl": 5}, seconds={"read": 1.0})
    assert Page(report_html(data)).ids == ["files", "time"]


def test_contents_link_to_every_section() -> None:
    seen = Page(report_html(full()))
    links = [(value or "")[1:] for name, value in seen.attributes if name == "href"]
    assert len(seen.ids) == 12
    assert links == seen.ids


def test_size_does_not_grow_with_the_number_of_examples() -> None:
    few, many = 30, 5_000
    sizes = []
    for number in (few, many):
        rows = tuple(example(HOSTILE, "length", f"reason {n % 3}") for n in range(number))
        data = minimal(
            examples=rows, clusters=tuple(Cluster(size=9, kept=r, dropped=rows[:9]) for r in rows)
        )
        sizes.append(len(report_html(data)))
    assert sizes[0] == sizes[1]
    assert sizes[1] < 200_000


def test_size_is_bounded_with_many_different_reasons_and_names() -> None:
    names = {f"{n} {HOSTILE}": n for n in range(2_000)}
    data = full().model_copy(
        update={
            "examples": tuple(example(HOSTILE, "length", name) for name in names),
            "funnel": (FunnelStep(operation="length", rows=2_000_000, dropped=names),),
            "labels": {"before": names, "after": names},
            "languages": names,
            "files": names,
        }
    )
    assert len(report_html(data)) < 400_000


def test_texts_are_cut_at_the_stated_length() -> None:
    page = Page(report_html(minimal(examples=(example("x" * 50_000),))))
    assert max(len(run) for run in re.findall("x+", page.text)) == TEXT_LIMIT
    assert f"cut at\n    {TEXT_LIMIT} characters" in page.text


def test_names_are_cut_shorter_than_texts() -> None:
    page = Page(report_html(minimal(rows_in=1, files={"y" * 50_000: 1}))).text
    assert max(len(run) for run in re.findall("y+", page)) == NAME_LIMIT


@given(st.integers(1, 10**9), st.integers(0, 10**9))
@example_of(1_000, 999)
def test_a_segment_can_be_seen_and_stays_in_its_bar(whole: int, start: int) -> None:
    start %= whole
    shown = bar([(start, whole - start, "stay"), (0, 0, "gone")], whole)
    [(x, width)] = re.findall(r'x="([\d.]+)%" width="([\d.]+)%"', shown)
    assert float(width) >= 0.6
    assert float(x) + float(width) <= 100.02


def test_funnel_shows_the_counts_of_the_data() -> None:
    cells = Page(report_html(full())).cells
    rows = [row[:4] for row in cells]
    assert ["read", "12,345", "345", "2.8%"] in rows
    assert ["length", "12,000", "1,655", "13.8%"] in rows
    assert ["too short", "1,500", "12.5%", ""] in rows
    assert ["Stay", "10,345", "2,000", "16.2%"] in rows
    assert ["1,021 rows edited; found email 999, plain text 22".replace(" ", "")] in [
        [cell.replace("\n", "").replace(" ", "") for cell in row] for row in cells
    ]


def test_split_lengths_languages_and_labels_show_the_counts_of_the_data() -> None:
    rows = Page(report_html(full())).cells
    assert ["train", "9,000", "87.0%", "1,234,567", "137"] in rows
    assert ["test", "345", "3.3%", "0", "0"] in rows
    assert ["As read", "22", "16", "130"] in rows
    assert ["en", "12,000", "97.2%", ""] in rows
    assert ["plain text", "5,000", "4,500", "50.0%", ""] in rows
    assert ["Pairs whose chosen answer is the longer one", "71.3%"] in rows
    assert ["read", "3.2 s", "5.0%", ""] in rows


def test_headline_says_what_became_of_all_rows() -> None:
    assert (
        "12,345 rows read: 9,000 for training, 1,000 for validation and 345 for testing; "
        "2,000 dropped (16.2%)."
    ) in report_html(full())
    assert "0 rows read: none stays; 0 dropped." in report_html(minimal())


def test_rows_of_another_dataset_are_pointed_out() -> None:
    sides = (SideSummary(side="train", rows=10, words=9), SideSummary(side="test", rows=4, words=4))
    assert "4 rows more than the 10" in report_html(minimal(rows_in=10, sides=sides))
    assert "rows more than" not in report_html(full())


def test_histogram_tells_the_counts_of_each_bin() -> None:
    page = Page(report_html(full())).text
    assert "0 to 8 words: 2,345 read, 345 stay" in page
    assert "64 or more words: 1,000 read, 1,000 stay" in page
    assert "median 19" in page
    assert "p95 140" in page


def test_bars_of_the_histogram_are_as_high_as_their_counts() -> None:
    page = report_html(full())
    chart = page[page.index('class="plot"') :]
    found = re.findall(r'<rect class="gone"[^>]* y="[\d.]+" height="([\d.]+)"', chart)
    heights = [float(height) for height in found]
    assert [height / heights[1] for height in heights] == pytest.approx(
        [2_345 / 4_000, 1, 0.75, 0.5, 0.25], abs=0.001
    )


def test_histograms_with_different_edges_get_a_chart_each() -> None:
    other = Histogram(edges=(0, 10, float("inf")), counts=(3, 4), mean=9, median=10, p95=90)
    data = full().model_copy(update={"lengths_after": other})
    assert report_html(data).count('class="chart"') == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8), st.floats(0, 1e9))
@example_of([0, 1, 1], 0.0)
def test_any_histogram_can_be_drawn(counts: list[int], value: float) -> None:
    lengths = Histogram(
        edges=tuple(range(len(counts) + 1)), counts=tuple(counts), median=value, p95=value
    )
    page = report_html(minimal(lengths_before=lengths, lengths_after=lengths))
    assert all(0 <= float(share) <= 100 for share in re.findall(r'x\d?="([\d.-]+)%"', page))
    heights = re.findall(r'<rect class="gone"[^>]* height="([\d.-]+)"/><rect', page)
    assert all(0 <= float(height) <= 190 for height in heights)


def test_warnings_come_first() -> None:
    page = report_html(full())
    assert page.index("Look at <code>this</code>") < page.index("All is well.")


def test_examples_name_file_row_id_and_what_the_limit_was() -> None:
    text = " ".join(Page(report_html(full())).text.split())
    assert "part-0.jsonl:17 00ff00ff00ff00ff 3 words; at least 5" in text
    assert "too short 1 of 1,500" in text


def test_no_more_examples_and_clusters_than_promised() -> None:
    row = example("some text")
    data = minimal(examples=(row,) * 30, clusters=(Cluster(size=4, kept=row, dropped=(row,)),) * 30)
    page = report_html(data)
    assert page.count("<dt>") == EXAMPLES_A_REASON
    assert page.count("Cluster of 4 rows") == CLUSTERS


def test_page_says_that_personal_data_is_replaced_where_it_was_looked_for() -> None:
    assert "Personal data" in report_html(minimal(examples=(example("a@b.c", "pii", "edited"),)))
    assert "Personal data" not in report_html(minimal(examples=(example("abc"),)))


def test_words_that_differ_are_marked_on_both_sides() -> None:
    kept, dropped = example("The cat sat on a mat."), example("The dog sat on a <b>mat</b>.")
    page = report_html(minimal(clusters=(Cluster(size=2, kept=kept, dropped=(dropped,)),)))
    assert "The <mark>cat</mark> sat on a <mark>mat.</mark>" in page
    assert "The <mark>dog</mark> sat on a <mark>&lt;b&gt;mat&lt;/b&gt;.</mark>" in page


def test_rows_that_are_equal_where_shown_say_so() -> None:
    page = report_html(
        minimal(clusters=(Cluster(size=2, kept=example("a b"), dropped=(example("a  b"),)),))
    )
    assert "No word differs in what is shown." in page


words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12)


@given(words, words)
def test_texts_are_equal_without_the_marked_words(left: list[str], right: list[str]) -> None:
    only_left, only_right = differing_words(left, right)
    rest = [
        [word for number, word in enumerate(side) if number not in marked]
        for side, marked in ((left, only_left), (right, only_right))
    ]
    assert rest[0] == rest[1]


def test_words_beyond_a_cut_do_not_count_as_different() -> None:
    left = ["one", "two", "three", "fo", "…"]
    right = ["one", "2", "three", "four", "five", "…"]
    assert differing_words(left, right) == ({1}, {1})
    assert differing_words(["one", "two"], ["one", "two", "three"]) == (set(), {2})


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [
        (0, 7, "0%"),
        (7, 7, "100%"),
        (1, 3, "33.3%"),
        (7, 1_000, "0.70%"),
        (1, 1_000_000, "<0.01%"),
        (99_999, 100_000, ">99.9%"),
        (0, 0, "–"),  # noqa: RUF001
    ],
)
def test_shares_have_the_digits_that_say_something(part: int, whole: int, shown: str) -> None:
    assert format_share(part, whole) == shown


@given(st.integers(1, 10**9), st.integers(0, 10**9))
def test_a_share_is_only_0_or_100_percent_if_it_is_exact(whole: int, part: int) -> None:
    part %= whole + 1
    assert (format_share(part, whole) in ("0%", "100%")) == (part in (0, whole))
    assert format_share(part, whole) not in ("0.0%", "0.00%", "100.0%")


def test_numbers_and_times_are_readable() -> None:
    assert [format_number(n) for n in (0, 5.25, 99.6, 1234.5)] == ["0", "5.2", "100", "1,234"]
    seconds = (0.04, 9.96, 61, 3599.7, 7_830)
    shown = ["0.0 s", "10 s", "1 min 01 s", "1 h 00 min", "2 h 10 min"]
    assert [format_seconds(n) for n in seconds] == shown


def test_markdown_sums_up_and_holds_no_html() -> None:
    text = report_markdown(full())
    assert "| length | 12,000 | 1,655 | 0 | too short |" in text
    assert "| train | 9,000 | 1,234,567 |" in text
    assert text.index("Warning:") < text.index("Good:")
    hostile = report_markdown(full("<script>|[x](javascript:y)\n# `z`\x00"))
    assert "<" not in hostile
    assert r"&lt;script&gt;\|\[x\](javascript:y) \# \`z\`\\x00" in hostile


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_runs_no_script_of_a_row_and_needs_no_sideways_scrolling(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", full(HOSTILE))
    # A page around it measures it: the report itself may run no script.
    (tmp_path / "frame.html").write_text(
        """<iframe src="report.html" style="width:400px;height:800px;border:0"></iframe><script>
        onload = () => {
          const page = document.querySelector("iframe").contentDocument;
          document.body.textContent = JSON.stringify({
            title: page.title, width: page.documentElement.scrollWidth,
            sections: page.querySelectorAll("section").length,
            scripts: page.querySelectorAll("script, img").length,
            color: page.defaultView.getComputedStyle(page.querySelector("rect.stay")).fill,
          });
        };
        </script>"""
    )
    flags = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --dump-dom"
    profile = f"--user-data-dir={tmp_path / 'browser'}"
    seen = subprocess.run(
        ["chromium", *flags.split(), profile, (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(re.search(r"\{.*\}", unescape(seen.stdout)).group())  # type: ignore[union-attr]
    assert found["title"].startswith("</pre><script>document.title='owned'")
    assert found["width"] <= 400
    assert found["sections"] == 12
    assert found["scripts"] == 0
    assert found["color"] == "rgb(31, 95, 139)"


def test_real_rows_make_a_page(real_data: Path) -> None:
    rows = json.loads((real_data / "alpaca_en_demo.json").read_text())[:300]
    answers = [row["output"] for row in rows]
    examples = tuple(example(text, "length", f"reason {n % 7}") for n, text in enumerate(answers))
    page = Page(report_html(minimal(rows_in=300, examples=examples)))
    assert page.ids == ["examples"]
    assert all(part in page.text for part in ("reason 0", "reason 6"))
