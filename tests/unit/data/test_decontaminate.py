from __future__ import annotations

import pickle
import random
import re
from collections import Counter
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Decisions
from posttrain.data.operations.decontaminate import DecontaminationFilter, NgramIndex
from posttrain.data.rows import Chat, Document, KtoExample, Message, Preference, Row
from posttrain.data.words import hash_words
from posttrain.errors import DataError
from posttrain.evaluate.contamination import EvaluationItem, evaluation_items
from posttrain.evaluate.harness import Benchmarks

QUESTION = (
    "When the keeper of Skerry Point counted eleven herring boats beyond the reef at dusk, "
    "how many of them carried a second lantern?"
)
ANSWER = "Seven carried one, because the harbour master had bought no more oil since the storm."
FILLER = "Bread needs time more than anything else; let the dough rise until it has doubled."


def item(*texts: str, benchmark: str = "lamps", leaf: str = "", number: int = 0) -> EvaluationItem:
    return EvaluationItem(benchmark, leaf or benchmark, number, texts[0], texts)


def quiz(question: str = QUESTION, answer: str = ANSWER, **place: object) -> EvaluationItem:
    return item(question, answer, f"{question}\n{answer}", **place)  # type: ignore[arg-type]


def document(text: str, number: int = 1) -> Document:
    return Document(id=f"{number:016x}", file="f.txt", row=number, text=text)


@pytest.fixture
def decontaminate(tmp_path):
    """`decontaminate(items, rows)` decides on rows with an index of these items."""

    def decontaminate(
        items: list[EvaluationItem], rows: list[Row] | list[str], ngram: int = 13, short: int = 8
    ) -> Decisions:
        NgramIndex.build(items, ngram, short).save(tmp_path / "index")
        made = [document(row, n) if isinstance(row, str) else row for n, row in enumerate(rows, 1)]
        family = {Chat: "chats", Preference: "preferences", KtoExample: "kto"}.get(
            type(made[0]), "documents"
        )
        batch = RowBatch.of(family, made)
        # A path of its own for every index, since a process opens a path once.
        path = tmp_path / f"index-{len(list(tmp_path.iterdir()))}"
        (tmp_path / "index").rename(path)
        return DecontaminationFilter(path, ngram, short).apply(batch)

    return decontaminate


# --- what is found ----------------------------------------------------------------------------


@pytest.mark.parametrize("leak", [QUESTION, ANSWER, f"{QUESTION} {ANSWER}"])
def test_question_answer_and_both_are_found_anywhere_in_a_row(decontaminate, leak):
    rows = [leak, f"{FILLER} {leak}", f"{leak} {FILLER}", f"{FILLER}\n{leak}\n{FILLER}", FILLER]
    assert set(decontaminate([quiz()], rows).drops) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda text: re.sub(" ", "\n\t", text),
        lambda text: re.sub(r"(\w+)", r"*\1*,", text),
        lambda text: text.replace("e", "e\u0301"),
    ],
    ids=["case", "spacing", "punctuation", "decomposed"],
)
def test_case_spacing_punctuation_and_unicode_form_do_not_matter(decontaminate, change):
    items = [quiz(QUESTION.replace("e", "\u00e9") if change("e") == "e\u0301" else QUESTION)]
    assert set(decontaminate(items, [change(QUESTION), FILLER]).drops) == {0}


def test_the_smallest_overlap_is_the_ngram(decontaminate):
    words = QUESTION.split()
    rows = [" ".join([*words[4:17], "sank"]), " ".join([*words[4:16], "sank"])]
    assert set(decontaminate([quiz()], rows).drops) == {0}


def test_a_short_text_is_found_whole_and_not_in_part(decontaminate):
    short = "Which keeper lit the lamp at Skerry Point first?"
    rows = [f"{FILLER} {short} {FILLER}", short.replace("first", "last"), short[6:]]
    assert set(decontaminate([quiz(short)], rows).drops) == {0}


def test_a_text_below_short_ngram_is_not_looked_for_alone(decontaminate):
    question, answer = "Who lit the lamp?", "The keeper of Skerry Point."
    items = [quiz(question, answer)]
    assert set(decontaminate(items, [f"{question} {answer}", question, answer]).drops) == {0}
    items.append(quiz("Who lit the lamp at Skerry Point on Sundays?"))
    assert NgramIndex.build(items, 13, 8).too_short == {"lamps": 1}


def test_items_in_which_nothing_is_long_enough_are_counted():
    index = NgramIndex.build([quiz("Two?", "Yes."), quiz(), quiz(FILLER)], 13, 8)
    assert index.items == {"lamps": 3}
    assert index.unseen == {"lamps": 1}


def test_words_of_scripts_without_spaces_are_characters(decontaminate):
    question = "天王星の衛星のうち最も大きいものはどれですか"
    row = f"前置きの文です。{question}。それはチタニアです。"
    drops = decontaminate([item(question)], [row, "前置きの文です。それはチタニアです。"]).drops
    assert set(drops) == {0}
    assert drops[0].detail == f'lamps item 0: "{question}"'


# --- what is no item's own --------------------------------------------------------------------


def test_the_template_of_a_task_is_not_an_item(decontaminate):
    template = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request."
    )
    subjects = ["bees", "tides", "yeast", "chess"]
    items = [
        item(f"{template} Say how {subject} differ from one another.", number=number)
        for number, subject in enumerate(subjects)
    ]
    rows = [f"{template} Name three colours of the rainbow.", items[2].texts[0]]
    assert set(decontaminate(items, rows).drops) == {1}


def test_a_passage_of_a_few_items_is_looked_for(decontaminate):
    asked = [f"{QUESTION} Part {n} asks what {n} of the boats had caught." for n in range(20)]
    items = [item(text, number=n) for n, text in enumerate(asked[:3])]
    items += [item(f"{ANSWER} Item {n} stands alone.", number=n) for n in range(3, 20)]
    assert set(decontaminate(items, [QUESTION, ANSWER]).drops) == {0}


def test_what_more_than_ten_items_of_a_large_task_share_is_not_an_item(decontaminate):
    def large(sharing: int) -> list[EvaluationItem]:
        texts = [f"{QUESTION} {n}" if n < sharing else f"{FILLER} {n}" for n in range(60)]
        return [item(text, number=number) for number, text in enumerate(texts)]

    assert not decontaminate(large(11), [QUESTION]).drops
    assert set(decontaminate(large(10), [QUESTION]).drops) == {0}


def test_a_short_text_of_two_items_is_ignored_unless_they_are_the_same_item(decontaminate):
    common = "Which of the following statements about it is true?"
    others = [quiz(f"{QUESTION} {n}", f"{ANSWER} {n}", number=n) for n in range(2, 9)]
    other = [quiz(common, "Lamps burn oil."), quiz(common, "Boats carry herring."), *others]
    same = [quiz(common, "Lamps burn oil."), quiz(common, "Lamps burn oil.", leaf="again")]
    assert not decontaminate(other, [common]).drops
    assert set(decontaminate(same, [common]).drops) == {0}


def test_repetitions_of_few_words_are_ignored(decontaminate):
    matrix = "1 0 0 0 1 0 0 0 1 0 0 0 1 0 0 0 1"
    rows = [matrix, f"What is the rank of this matrix of numbers: {matrix}"]
    items = [item(f"What is the rank of this matrix of numbers: {matrix}")]
    assert set(decontaminate(items, rows).drops) == {1}


# --- rows -------------------------------------------------------------------------------------


def chat(*turns: tuple[str, str]) -> Chat:
    messages = tuple(Message(role, content) for role, content in turns)  # type: ignore[arg-type]
    return Chat(id="0" * 16, file="f", row=1, messages=messages)


def test_a_question_in_one_turn_and_its_answer_in_the_next_are_found(decontaminate):
    items = [quiz("Who lit the lamp first?", "The keeper of Skerry Point.")]
    rows = [
        chat(("user", "Who lit the lamp first"), ("assistant", "The keeper of Skerry Point")),
        chat(("user", "Who lit the lamp first"), ("assistant", "A stranger from the mainland")),
    ]
    assert set(decontaminate(items, rows).drops) == {0}


def test_an_example_in_a_system_prompt_is_found(decontaminate):
    rows = [chat(("system", QUESTION), ("user", "Hello"), ("assistant", "Good day"))]
    assert set(decontaminate([quiz()], rows).drops) == {0}


def test_each_continuation_of_a_preference_stands_after_the_prompt(decontaminate):
    def preference(chosen: str, rejected: str) -> Preference:
        prompt = (Message("user", "Who lit the lamp first?"),)
        answers = [(Message("assistant", text),) for text in (chosen, rejected)]
        return Preference(
            id="0" * 16, file="f", row=1, prompt=prompt, chosen=answers[0], rejected=answers[1]
        )

    right, wrong = "The keeper of Skerry Point.", "A stranger from the mainland."
    items = [quiz("Who lit the lamp first?", right)]
    rows = [preference(right, wrong), preference(wrong, right), preference(wrong, wrong)]
    assert set(decontaminate(items, rows).drops) == {0, 1}


def test_a_kto_example_is_searched_whatever_its_label(decontaminate):
    prompt = (Message("user", "Say something."),)
    rows = [
        KtoExample(
            id="0" * 16,
            file="f",
            row=1,
            prompt=prompt,
            completion=(Message("assistant", ANSWER),),
            label=label,
        )
        for label in (True, False)
    ]
    assert set(decontaminate([quiz()], rows).drops) == {0, 1}


# --- what is said -----------------------------------------------------------------------------


def test_a_drop_names_benchmark_task_item_and_the_words_as_the_row_writes_them(decontaminate):
    items = [quiz(), quiz(f"{ANSWER} {FILLER}", benchmark="sea", leaf="sea_boats", number=4)]
    row = "Of dough: BREAD needs time,\n more than anything else; let the dough rise until it has!"
    drop = decontaminate(items, [row]).drops[0]

    assert drop.reason == "in sea"
    quote = "BREAD needs time, more than anything else; let the dough rise until it has"
    assert drop.detail == f'sea_boats item 4: "{quote}"'


def test_the_quote_is_right_where_words_are_not_ascii(decontaminate):
    drop = decontaminate([quiz()], [f"Où être? Ça! C\u0327a! {QUESTION}"]).drops[0]
    assert drop.detail is not None
    assert drop.detail.endswith(f'"{QUESTION.rstrip("?")}"')


def test_the_longest_of_several_shared_runs_is_quoted(decontaminate):
    part = " ".join(QUESTION.split()[:14])
    rows = [f"{part} sank. {ANSWER}", f"{ANSWER} Then {part}"]
    for drop in decontaminate([quiz()], rows).drops.values():
        assert drop.detail == f'lamps item 0: "{ANSWER.rstrip(".")}"'


def test_a_long_quote_is_cut(decontaminate):
    long = " ".join(f"word{number}" for number in range(100))
    drop = decontaminate([item(long)], [long]).drops[0]
    assert drop.detail is not None
    assert drop.detail.endswith('word39 ..."')


def test_rows_are_counted_for_every_benchmark_they_share_words_with(decontaminate):
    items = [quiz(), quiz(FILLER, benchmark="bread")]
    found = decontaminate(items, [QUESTION, f"{QUESTION} {FILLER}", "Nothing."]).found
    assert found == {"lamps": 2, "bread": 1}


def test_of_two_items_with_one_passage_the_one_asked_is_named(decontaminate):
    passage = f"{QUESTION} {FILLER}"
    items = [
        item(f"{passage} What did the {who} do about all this in the end?", number=n)
        for n, who in enumerate(["baker", "harbour master", "keeper", "fisherman"])
    ]
    items += [item(f"{ANSWER} {n}", number=n) for n in range(4, 10)]
    drop = decontaminate(items, [items[2].texts[0]]).drops[0]
    assert drop.detail is not None
    assert drop.detail.startswith("lamps item 2:")


# --- the index --------------------------------------------------------------------------------

WORDS = st.lists(
    st.sampled_from(["oil", "lamp", "reef", "boat", "keeper", "dusk", "tide"]), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(item_words=WORDS, rows=st.lists(WORDS, min_size=1, max_size=6))
def test_what_is_shared_is_what_a_search_by_hand_finds(item_words, rows):
    ngram, short = 6, 3
    index = NgramIndex.build([item(" ".join(item_words))], ngram, short)
    shared = index.shared(hash_words([" ".join(row) for row in rows]))
    got = set(zip(shared.texts.tolist(), shared.starts.tolist(), strict=True))

    length = min(len(item_words), ngram)
    if length < short:
        wanted = set()
    else:
        runs = [item_words[i : i + length] for i in range(len(item_words) - length + 1)]
        wanted = {tuple(run) for run in runs if 4 * len(set(run)) > length}
    by_hand = {
        (text, start)
        for text, row in enumerate(rows)
        for start in range(len(row) - length + 1)
        if tuple(row[start : start + length]) in wanted
    }
    assert got == by_hand


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.sampled_from([QUESTION, ANSWER, FILLER, "", "Bread.", "水"]), max_size=8))
def test_a_row_gets_the_same_decision_in_any_batch(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("index")
    NgramIndex.build([quiz()], 13, 8).save(path)
    operation = DecontaminationFilter(path, 13, 8)
    rows = [document(text, number) for number, text in enumerate(texts)]
    together = operation.apply(RowBatch.of("documents", rows)).drops
    for position, row in enumerate(rows):
        alone = operation.apply(RowBatch.of("documents", [row])).drops
        assert together.get(position) == alone.get(0)


def test_no_items_drop_nothing(decontaminate):
    assert not decontaminate([], [QUESTION, ""]).drops


def test_the_filter_pickles_small(tmp_path):
    NgramIndex.build([quiz()] * 100, 13, 8).save(tmp_path)
    operation = DecontaminationFilter(tmp_path, 13, 8)
    batch = RowBatch.of("documents", [document(QUESTION)])
    before = operation.apply(batch)
    pickled = pickle.dumps(operation)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).apply(batch) == before


def test_a_folder_without_an_index_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} holds no n-gram index"):
        NgramIndex.open(tmp_path)


def test_an_index_for_other_ngrams_is_refused(tmp_path):
    NgramIndex.build([quiz()], 13, 8).save(tmp_path)
    with pytest.raises(DataError, match=r"n-grams of \(13, 8\) words, not \(10, 8\)"):
        DecontaminationFilter(tmp_path, 10, 8).apply(RowBatch.of("documents", [document("x")]))


# --- real benchmarks --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_items(real_data) -> list[EvaluationItem]:
    tasks = ("mmlu_anatomy", "mmlu_professional_law", "mmlu_high_school_us_history", "hellaswag")
    return evaluation_items(Benchmarks(tasks, offline_root=real_data / "hub"))


@pytest.fixture(scope="module")
def real_filter(real_items, tmp_path_factory) -> DecontaminationFilter:
    path = tmp_path_factory.mktemp("real-index")
    NgramIndex.build(real_items, 13, 8).save(path)
    return DecontaminationFilter(path, 13, 8)


def test_the_loader_gives_every_item_of_the_real_benchmarks(real_data, real_items):
    def lines(path: str) -> list[dict[str, object]]:
        return [orjson.loads(line) for line in (real_data / "hub" / path).read_bytes().splitlines()]

    anatomy = lines("cais/mmlu/anatomy/test.jsonl")
    counts = Counter(item.leaf for item in real_items)
    assert counts["mmlu_anatomy"] == len(anatomy)
    assert counts["hellaswag"] == len(lines("Rowan/hellaswag/validation.jsonl"))
    items = [item for item in real_items if item.leaf == "mmlu_anatomy"]
    for raw, item in zip(anatomy, items, strict=True):
        right = raw["choices"][raw["answer"]]  # type: ignore[index]
        assert item.question == str(raw["question"]).strip()
        assert item.texts[-1] == f"{item.question}\n{right}"


def web_pages(real_data: Path) -> list[str]:
    lines = (real_data / "c4_demo.jsonl").read_bytes().splitlines()
    return [orjson.loads(line)["text"] for line in lines]


def ascii_upper(text: str) -> str:
    """Some letters are not what they were after upper and lower case, such as the micro sign."""
    return re.sub("[a-z]+", lambda match: match.group().upper(), text)


@pytest.mark.parametrize("part", ["question", "answer", "both", "prompt"])
def test_real_items_of_enough_words_are_all_found_in_real_pages(
    real_data, real_items, real_filter, part
):
    draw = random.Random(part)
    pages = web_pages(real_data)
    items = draw.sample(real_items, 600)
    leaks = {
        "question": [item.question for item in items],
        "answer": [item.texts[-1].removeprefix(item.question) for item in items],
        "both": [item.texts[-1] for item in items],
        "prompt": [item.texts[0] for item in items],
    }[part]
    leaks = [leak for leak, words in zip(leaks, hash_words(leaks).counts, strict=True) if words > 7]
    # What several items say, such as "which of the following is correct", is no item's own.
    said = [text for item in real_items for text in (item.question, *item.texts[1:2])]
    leaks = [leak for leak in leaks if len(leak.split()) > 12 or said.count(leak.strip()) < 3]
    rows = []
    for number, leak in enumerate(leaks):
        words = draw.choice(pages).split(" ")
        at = draw.randrange(len(words) + 1)
        changed = draw.choice([ascii_upper, lambda t: "\n ".join(t.split()), str.strip])(leak)
        rows.append(document(" ".join([*words[:at], changed, *words[at:]]), number))

    drops = real_filter.apply(RowBatch.of("documents", rows)).drops
    assert [leak for number, leak in enumerate(leaks) if number not in drops] == []
    assert len(leaks) > 200


def test_real_pages_and_instructions_share_nothing_with_the_benchmarks(real_data, real_filter):
    answers = orjson.loads((real_data / "alpaca_en_demo.json").read_bytes())
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in answers]
    rows = [document(text, n) for n, text in enumerate(web_pages(real_data) + texts)]
    assert not real_filter.apply(RowBatch.of("documents", rows)).drops
