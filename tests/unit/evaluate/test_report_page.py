"""`report.html`: what a gate says and what is behind it, read as a browser reads it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from lxml import html

from posttrain.errors import DataError
from posttrain.evaluate.candidates import judge_several
from posttrain.evaluate.page.flips import flips, margin
from posttrain.evaluate.page.measured import Measured
from posttrain.evaluate.report_page import comparison_report, gate_report
from posttrain.evaluate.results import Change, Hacking, Verdict, Watched, WinRate
from posttrain.evaluate.verdict import Candidate, Opponents, judge
from posttrain.recipe.gate import GateConfig
from posttrain.store.files import write_json
from tests.unit.evaluate.report_made import evaluation, item, quiz, rows

HOSTILE = "</pre><script>document.title='owned'</script><img src=x onerror=alert(1)> & \x00\u202e"
CONFIG = GateConfig(champion="guide", perplexity="must_improve")


class Page:
    """The page as a tree, and what a person sees of it."""

    def __init__(self, text: str) -> None:
        self.source = text
        self.tree = html.document_fromstring(text)

    @property
    def sections(self) -> list[str]:
        return [section.get("id") for section in self.tree.iter("section")]

    def text(self, where: str = "body") -> str:
        """Of the first element that a path finds, in one line."""
        found = self.tree.xpath(f"//{where}")
        assert found, where
        return " ".join(found[0].text_content().split())

    def rows(self, section: str) -> list[list[str]]:
        return [
            [" ".join(cell.text_content().split()) for cell in row.xpath("./th|./td")]
            for row in self.tree.xpath(f"//section[@id='{section}']//tbody/tr")
        ]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Base, champion and candidate: the candidate is better in each way."""
    right = [1.0] * 120 + [0.0] * 80
    samples = {"Where is <north>?": "Up there.", "And south?": "Down."}
    scored = {"base": right, "champion": [*right[1:], 1.0], "candidate": [1.0] * 180 + [0.0] * 20}
    nats = {"base": 3.0, "champion": 2.5, "candidate": 2.0}
    return {
        name: evaluation(
            tmp_path / name,
            quiz(scores),
            [*rows(nats[name], dataset="docs"), *rows(nats[name], dataset="news")],
            samples={prompt: f"{name}: {answer}" for prompt, answer in samples.items()},
        )
        for name, scores in scored.items()
    }


def labelled(folders: Mapping[str, Path]) -> dict[str, Path]:
    names = {"champion": "champion guide"}
    return {names.get(name, name): folder for name, folder in folders.items()}


def decided(folders: Mapping[str, Path], config: GateConfig = CONFIG) -> Verdict:
    return judge(folders["base"], folders["candidate"], config, champion=folders.get("champion"))


def page_of(folders: Mapping[str, Path], **parts: Mapping[str, Path]) -> Page:
    text = gate_report(
        decided(folders), labelled(folders), parts.get("trained", {}), parts.get("comparisons", {})
    )
    return Page(text)


def trained(folder: Path, **values: float) -> Path:
    """What a training stage leaves."""
    step = {"learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 10, "trained_tokens": 5}
    folder.mkdir()
    record = {
        "steps": [{**step, "step": n, "loss": 3 - n / 10, "values": values} for n in range(1, 11)],
        "held_out": [
            {"step": n, "loss": 3 - n / 20, "tasks": {}, "values": values} for n in (0, 5, 10)
        ],
    }
    write_json(folder / "training.json", record)
    return folder


# The verdict


@pytest.mark.parametrize(
    ("after", "outcome"),
    [
        ([1.0] * 180 + [0.0] * 20, "pass"),
        ([1.0] * 60 + [0.0] * 140, "fail"),
        ([1.0] * 119 + [0.0] * 81, "not enough evidence"),
    ],
)
def test_the_verdict_stands_on_top_in_a_word_and_a_sign(
    tmp_path: Path, after: list[float], outcome: str
) -> None:
    folders = {
        "base": evaluation(tmp_path / "base", quiz([1.0] * 120 + [0.0] * 80)),
        "candidate": evaluation(tmp_path / "candidate", quiz(after)),
    }
    verdict = decided(folders, GateConfig())
    page = Page(gate_report(verdict, folders, {}, {}))
    assert verdict.verdict == outcome
    assert page.text("h1") == outcome
    assert page.tree.xpath("//body/*[1]//h1/*[1]")[0].tag == "svg"
    assert page.text("title") == f"Gate: {outcome}"
    for reason in verdict.reasons:
        assert " ".join(reason.split()) in page.text("header")


def test_base_champion_and_candidate_stand_side_by_side_with_intervals(
    folders: dict[str, Path],
) -> None:
    page = page_of(folders)
    assert page.sections == [
        "differences", "values", "perplexity", "items", "samples", "settings", "reading",
    ]  # fmt: skip
    (scores,) = page.rows("values")
    assert scores == [
        "quizacc, 200 items",
        "0.6000.531 to 0.665",
        "0.6000.531 to 0.665",
        "0.9000.851 to 0.934",
    ]
    heads = page.tree.xpath("//section[@id='values']//thead//th[position() > 1]")
    assert [head.text_content() for head in heads] == ["base", "champion guide", "candidate"]
    heads = [" ".join(one.text_content().split()) for one in page.tree.xpath("//h3")]
    assert heads == ["candidate against base pass", "candidate against champion guide pass"]
    against_base, against_champion = page.rows("differences")
    check = decided(folders).checks[0]
    assert against_base[2] == f"+0.300[{check.low:+.3f}, {check.high:+.3f}]"
    assert against_base[3:] == ["200", "<0.001", f"{check.smallest_detectable_drop:.3f}", "pass"]
    assert against_champion[2].startswith("+0.300[")


def test_perplexity_of_each_dataset_has_bits_a_byte_and_what_the_gate_says(
    folders: dict[str, Path],
) -> None:
    docs, news = page_of(folders).rows("perplexity")
    assert docs[0] == "docs40 rows"
    assert docs[1].startswith("20.")
    assert docs[-1].endswith("pass")
    assert docs[-2].startswith("+1.000[")
    assert news[0] == "news40 rows"


def test_groups_of_held_out_rows_have_their_own_intervals(tmp_path: Path) -> None:
    made = {
        name: evaluation(
            tmp_path / name,
            held_out=[
                *rows(nats, dataset="docs", group="billing"),
                *rows(3.0, dataset="docs", group="legal", count=4),
            ],
        )
        for name, nats in (("base", 3.0), ("candidate", 2.0))
    }
    whole, billing, legal = page_of(made).rows("perplexity")
    assert whole[0] == "docs44 rows"
    assert billing[0] == "docsbilling, 40 rows"
    assert re.fullmatch(r"\+1\.000\[\+\S+, \+\S+\]", billing[-1])
    assert legal[-1] == "0.000", "no interval from four rows"


def test_other_tokenizers_are_compared_by_byte(tmp_path: Path) -> None:
    made = {
        "one": evaluation(tmp_path / "one", held_out=rows(3.0)),
        "other": evaluation(tmp_path / "other", held_out=rows(2.0, tokens=12)),
    }
    (line,) = Page(comparison_report(made)).rows("perplexity")
    assert line[-1].endswith("bits a byte")
    assert line[-1].startswith("+0.289")


def test_of_several_candidates_the_choice_is_shown_and_all_are_judged(tmp_path: Path) -> None:
    scored = {"base": 120, "first": 60, "champion-like": 180}
    made = {
        name: evaluation(tmp_path / name, quiz([1.0] * right + [0.0] * (200 - right)))
        for name, right in scored.items()
    }
    config = GateConfig(candidates=("first", "champion-like"))
    verdict = judge_several(
        Opponents.read(made["base"], None, config),
        {name: Candidate.read(made[name], name) for name in config.candidates},
        config,
    )
    page = Page(gate_report(verdict, made, {}, {}))
    assert "To go on with: champion-like, 1 of 2 candidates pass." in page.text("header")
    first, second = page.rows("candidates")
    assert first[:3] == ["first", "fail", "-0.300"]
    assert second[:3] == ["champion-like the choice", "pass", "+0.300"]
    heads = [" ".join(one.text_content().split()) for one in page.tree.xpath("//h3")]
    assert heads == ["champion-like against base pass", "first against base fail"]
    assert "60 became right, 0 became wrong" in page.text("section[@id='items']")


def test_a_candidate_that_the_verdict_does_not_name_is_refused(folders: dict[str, Path]) -> None:
    verdict = decided(folders)
    named = verdict.model_copy(update={"candidates": {"someone": verdict}})
    with pytest.raises(ValueError, match="says nothing of candidate"):
        gate_report(named, labelled(folders), {}, {})
    with pytest.raises(ValueError, match="no candidate"):
        gate_report(verdict, {"base": folders["base"]}, {}, {})


# Its parts


def test_subjects_are_sorted_and_only_what_is_beyond_chance_is_bold(tmp_path: Path) -> None:
    def asked(right: Mapping[str, int]) -> list:
        return [
            one
            for subject, count in right.items()
            for one in quiz([1.0] * count + [0.0] * (50 - count), "mmlu", f"mmlu_{subject}")
        ]

    made = {
        "base": evaluation(tmp_path / "base", asked({"law": 20, "us_history": 20, "sea": 30})),
        "candidate": evaluation(tmp_path / "next", asked({"law": 45, "us_history": 18, "sea": 30})),
    }
    page = page_of(made)
    assert page.rows("subjects") == [
        ["law", "", "0.400", "0.900", "+0.500", "50"],
        ["sea", "", "0.600", "0.600", "0.000", "50"],
        ["us history", "", "0.400", "0.360", "-0.040", "50"],
    ]
    bold = page.tree.xpath("//tr[@class='stands']/th")
    assert [one.text_content() for one in bold] == ["law"]
    said = page.text("section[@id='subjects']/p")
    assert "1 of 3 subjects rose and 1 fell. 1 changed beyond chance" in said
    rows_drawn = page.tree.xpath("//section[@id='subjects']//td/svg[@class='row']")
    assert len(rows_drawn) == 3
    places = [float(at[:-1]) for at in page.tree.xpath("//svg/@x") if at.endswith("%")]
    assert all(0 <= at <= 100 for at in places)


def test_items_that_turned_stand_with_the_largest_change_of_margin_first(tmp_path: Path) -> None:
    before = [item("quiz", n, 0.0, margin=n / 10) for n in range(30)]
    before += [item("quiz", n, 1.0) for n in range(30, 35)]
    after = [item("quiz", n, 1.0) for n in range(30)]
    after += [item("quiz", n, 0.0 if n == 30 else 1.0) for n in range(30, 35)]
    made = {
        "base": evaluation(tmp_path / "base", before),
        "candidate": evaluation(tmp_path / "candidate", after),
    }
    page = page_of(made)
    items = page.tree.xpath("//section[@id='items']/details")
    assert " ".join(items[0].find("summary").text_content().split()) == (
        "quiz: 30 became right, 1 became wrong"
    )
    better = items[0].xpath(".//details[contains(@class, 'better')]")
    assert len(better) == 20
    assert [one.find("summary/b").text for one in better[:3]] == ["item 29", "item 28", "item 27"]
    first = " ".join(better[0].text_content().split())
    assert "Where does needle 29 point?" in first
    assert "north right after south before east west" in first
    assert "margin -2.90 to +1.00 nats" in first
    (worse,) = items[0].xpath(".//details[contains(@class, 'worse')]")
    assert "north right before south after" in " ".join(worse.text_content().split())


def test_scores_that_are_neither_right_nor_wrong_rise_and_fall(tmp_path: Path) -> None:
    def written(scores: list[float]) -> list:
        return [
            item("docs:rouge", n, score, metric="rouge", choices=(), answer=f"says {score}")
            for n, score in enumerate(scores)
        ]

    made = {
        "base": evaluation(tmp_path / "b", written([0.5, 0.2, 0.9]), test_sets=["docs"]),
        "candidate": evaluation(tmp_path / "c", written([0.6, 0.8, 0.7]), test_sets=["docs"]),
    }
    page = page_of(made)
    said = page.text("section[@id='items']/details")
    assert said.startswith("docs:rouge: 2 rose, 1 fell")
    assert said.index("rouge 0.20 to 0.80") < said.index("rouge 0.50 to 0.60")
    assert "base says 0.2 candidate says 0.8 reference north" in said
    assert [row[0] for row in page.rows("values")] == ["Test sets", "docs:rougerouge, 3 items"]


def test_the_margin_counts_as_its_metric_does() -> None:
    one = item("quiz", 0, 1.0, choices=("no", "a long way to the south", "x", "y"), target="no")
    likely = replace(one, log_likelihoods=(-4.0, -10.0, -30.0, -30.0))
    assert margin(likely) == pytest.approx(6.0)
    assert margin(replace(likely, metric="acc_norm")) == pytest.approx(-2.0 + 10 / 23)
    assert margin(replace(likely, target="another")) is None
    assert margin(replace(likely, choices=())) is None


def test_items_of_older_evaluations_are_shown_by_their_ids(tmp_path: Path) -> None:
    silent = {"question": "", "choices": (), "target": "", "answer": ""}
    made = {
        "base": evaluation(tmp_path / "b", [item("quiz", 7, 0.0, **silent)]),
        "candidate": evaluation(tmp_path / "c", [item("quiz", 7, 1.0, **silent)]),
    }
    said = page_of(made).text("section[@id='items']")
    assert "item 7" in said
    assert "kept no texts of their items" in said
    assert item("quiz", 7, 0.0).item_digest[:12] in said


def test_texts_of_one_evaluation_stand_in_for_the_others(tmp_path: Path) -> None:
    silent = {"question": "", "choices": (), "target": "", "answer": ""}
    made = {
        "base": evaluation(tmp_path / "b", [item("quiz", 7, 0.0, **silent)]),
        "candidate": evaluation(tmp_path / "c", [item("quiz", 7, 1.0)]),
    }
    assert "Where does needle 7 point?" in page_of(made).text("section[@id='items']")


def test_answers_to_samples_stand_beside_each_other(folders: dict[str, Path]) -> None:
    said = page_of(folders).text("section[@id='samples']")
    assert (
        "Where is <north>? base base: Up there. champion guide champion: Up there. "
        "candidate candidate: Up there. reference a reference"
    ) in said


def test_a_curve_is_drawn_for_each_stage_that_trained(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "merge").mkdir()
    stages = {
        "sft": trained(tmp_path / "sft"),
        "merge": tmp_path / "merge",
        "grpo": trained(tmp_path / "grpo", reward=0.25),
    }
    page = page_of(folders, trained=stages)
    drawn = page.tree.xpath("//section[@id='training']//figure")
    said = [" ".join(one.find("figcaption").text_content().split()) for one in drawn]
    assert said == [
        "sft held-out loss 3.000 to 2.500, kept at step 10",
        "grpo held-out reward 0.250 to 0.250, kept at step 10",
    ]
    for one in drawn:
        assert one.find("svg").get("role") == "img"
        assert one.find("svg").get("aria-label")


def win_rate(folder: Path, scores: tuple[float, ...], **values: float | None) -> Path:
    folder.mkdir()
    known = {"win_rate": 0.7, "low": 0.5, "high": 0.85, "first_preferred": 0.58}
    rate = WinRate(
        candidate="dpo",
        opponent="base",
        judge="model judge-7b",
        scores=scores,
        consistent=0.8,
        agreement=None,
        warnings=("only 20 prompts",),
        **{**known, **values},
    )
    rate.save(folder)
    return folder


def test_a_win_rate_names_its_judge_and_the_bias_of_position(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    scores = (1.0,) * 12 + (0.5,) * 4 + (0.0,) * 4
    said = page_of(folders, comparisons={"judge": win_rate(tmp_path / "judge", scores)}).text(
        "section[@id='preferences']"
    )
    for part in (
        "dpo against base",
        "0.700 (95% interval 0.500 to 0.850",
        "12 won, 4 tied, 4 lost",
        "model judge-7b",
        "shown first is preferred in 58%",
        "keeps its mind on 80%",
        "only 20 prompts",
    ):
        assert part in said


def test_sheets_that_nobody_has_filled_in_are_said_to_be_open(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    unknown = {"win_rate": None, "low": None, "high": None, "first_preferred": None}
    sheets = win_rate(tmp_path / "sheets", (), **unknown)
    said = page_of(folders, comparisons={"judge": sheets}).text("section[@id='preferences']")
    assert "Nobody has compared them yet" in said


def test_what_a_watch_found_is_told_in_brief(folders: dict[str, Path]) -> None:
    change = Change(
        name="reward", before=0.1, after=0.7, difference=0.6, low=0.5, high=None, n=60,
        p_value=0.001, shown=True, detectable=None, sentence="reward rose",
    )  # fmt: skip
    hacking = Hacking(
        flagged=True,
        audited=True,
        text="flagged: the reward rose while mmlu fell",
        step=40,
        confidence=0.95,
        reward=change,
        signals=(change.model_copy(update={"name": "mmlu", "difference": -0.1}),),
        style=(),
        warnings=("length: twice as long",),
    )
    watched = (Watched(step="ppo", hacking=hacking),)
    verdict = judge(folders["base"], folders["candidate"], CONFIG, watched)
    page = Page(gate_report(verdict, {n: folders[n] for n in ("base", "candidate")}, {}, {}))
    said = page.text("section[@id='watch']")
    assert "flagged: the reward rose while mmlu fell" in said
    assert "length: twice as long" in said
    assert [row[0] for row in page.rows("watch")] == ["reward", "mmlu"]


def test_only_perplexity_makes_a_page_without_tasks(tmp_path: Path) -> None:
    made = {
        "base": evaluation(tmp_path / "b", held_out=rows(3.0)),
        "candidate": evaluation(tmp_path / "c", held_out=rows(2.0)),
    }
    assert page_of(made).sections == ["perplexity", "settings", "reading"]


def test_only_tasks_make_a_page_without_perplexity(tmp_path: Path) -> None:
    made = {
        "base": evaluation(tmp_path / "b", quiz([1.0, 0.0, 1.0])),
        "candidate": evaluation(tmp_path / "c", quiz([1.0, 0.0, 1.0])),
    }
    page = page_of(made)
    assert page.sections == ["differences", "values", "items", "settings", "reading"]
    assert "0 became right, 0 became wrong" in page.text("section[@id='items']")


# Two models without a gate


def test_two_models_are_compared_without_a_verdict(folders: dict[str, Path]) -> None:
    page = Page(comparison_report({"old": folders["base"], "new": folders["candidate"]}))
    assert page.text("h1") == "new beside old"
    said = page.text("header")
    assert "quiz: +0.300" in said
    assert "new is higher" in said
    assert "95% intervals" in said
    assert not page.tree.xpath("//*[contains(@class, 'outcome')]")
    back = Page(comparison_report({"new": folders["candidate"], "old": folders["base"]}))
    assert "old is lower" in back.text("header")
    same = Page(comparison_report({"one": folders["base"], "other": folders["base"]}))
    assert "the two cannot be told apart" in same.text("header")


def test_models_that_were_asked_otherwise_are_not_compared(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "one", quiz([1.0, 0.0]))
    other = evaluation(tmp_path / "other", quiz([1.0, 0.0]), seed=7)
    with pytest.raises(DataError, match="seed: 0 and 7"):
        comparison_report({"one": one, "other": other})


# What it must never do


def test_the_same_inputs_give_the_same_bytes_without_paths(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copies = {
        name: Path(shutil.copytree(folder, elsewhere / name)) for name, folder in folders.items()
    }
    first, second = page_of(folders).source, page_of(copies).source
    assert first == second
    assert str(tmp_path) not in first
    for outside in ("http:", "https:", "src=", "<script", "@import", "url("):
        assert outside not in first


def hostile(tmp_path: Path) -> dict[str, Path]:
    texts = {"question": HOSTILE, "choices": (HOSTILE, "b", "c", "d"), "target": HOSTILE}
    task = f"task{HOSTILE}"
    made = {}
    for name, value in (("base", 0.0), ("candidate", 1.0)):
        answer = {"answer": HOSTILE if value else "b"}
        items = [item(task, n, value, **texts, **answer) for n in range(12)]
        items += [
            item("free", n, value, question=HOSTILE, choices=(), target=HOSTILE, answer=HOSTILE,
                 group=f"group{HOSTILE}{n % 2}")
            for n in range(12)
        ]  # fmt: skip
        made[name] = evaluation(
            tmp_path / name,
            items,
            rows(3.0, dataset=HOSTILE),
            samples={HOSTILE: HOSTILE},
        )
    return made


def test_hostile_text_is_shown_and_runs_nothing(tmp_path: Path) -> None:
    made = hostile(tmp_path)
    verdict = decided(made)
    label = f"candidate {HOSTILE}"
    page = Page(
        gate_report(
            verdict,
            {"base": made["base"], label: made["candidate"]},
            {HOSTILE: trained(tmp_path / "sft")},
            {},
        )
    )
    assert not page.tree.xpath("//script|//img|//*[@onerror]")
    assert page.tree.xpath("//title")[0].text == f"Gate: {verdict.verdict}"
    assert "<script>document.title='owned'</script><img src=x onerror=alert(1)> & \\x00\\u202e" in (
        page.text("section[@id='items']")
    )
    policy = page.tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_page_stays_below_two_megabytes(tmp_path: Path) -> None:
    long = "<&>'\"\u202e" * 4_000
    draw = np.random.default_rng(0)
    made = {}
    for name in ("base", "candidate"):
        items = [
            item(f"task {t}", n, float(draw.integers(2)), question=long, choices=(long, "b"),
                 target=long, answer=long)
            for t in range(12)
            for n in range(60)
        ]  # fmt: skip
        items += [
            item("mmlu", n, float(draw.integers(2)), group=f"mmlu_subject_{g}")
            for g in range(400)
            for n in range(3)
        ]
        samples = {f"{n}{long}": long for n in range(60)}
        made[name] = evaluation(tmp_path / name, items, rows(3.0), samples=samples)
    page = page_of(made)
    assert len(page.source.encode()) < 2_000_000
    shown = flips(Measured.read("base", made["base"]), Measured.read("new", made["candidate"]))
    assert all(one.shown_better and one.shown_worse for one in shown)
    assert "Shown are the 120" in page.text("section[@id='subjects']").replace("\n", " ")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_finds_nothing_to_complain_of_and_needs_no_sideways_scrolling(
    tmp_path: Path,
) -> None:
    made = hostile(tmp_path)
    report = gate_report(decided(made), made, {"sft": trained(tmp_path / "sft")}, {})
    (tmp_path / "report.html").write_text(report)
    # A page around it measures it: the report itself may run no script.
    (tmp_path / "frame.html").write_text(
        """<iframe src="report.html" style="width:420px;height:800px;border:0"></iframe><script>
        onload = () => {
          const page = document.querySelector("iframe").contentDocument;
          const style = (where) => page.defaultView.getComputedStyle(page.querySelector(where));
          document.body.textContent = JSON.stringify({
            title: page.title, width: page.documentElement.scrollWidth,
            active: page.querySelectorAll("script, img").length,
            size: parseFloat(style("h1").fontSize),
            drawn: page.querySelector("td.plot .bound").getBoundingClientRect().width,
          });
        };
        </script>"""
    )
    flags = (
        "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --dump-dom "
        "--enable-logging=stderr"
    )
    profile = f"--user-data-dir={tmp_path / 'browser'}"
    seen = subprocess.run(
        ["chromium", *flags.split(), profile, (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(re.search(r"\{.*\}", unescape(seen.stdout)).group())  # type: ignore[union-attr]
    assert found["title"].startswith("Gate: ")
    assert found["width"] <= 420
    assert found["active"] == 0
    assert found["size"] >= 28
    assert found["drawn"] > 0
    assert "CONSOLE" not in seen.stderr
