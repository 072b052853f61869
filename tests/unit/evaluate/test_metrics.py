"""Task metrics against figures worked out by hand, against their libraries, and in general."""

from __future__ import annotations

import itertools
import json
import math
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from posttrain.errors import DataError
from posttrain.evaluate.metrics import Case, Scores, make_metric
from posttrain.evaluate.metrics.code import code_of, pass_at_k
from posttrain.evaluate.metrics.matching import last_number
from posttrain.evaluate.sandbox import SandboxError, check_sandbox
from posttrain.recipe.test_sets import (
    Bleu,
    Chrf,
    Code,
    ExactMatch,
    Json,
    Labels,
    MetricConfig,
    Numbers,
    Regex,
    Rouge,
)

SUMMARIES = [
    ("The cat sat on the mat.", "A cat sat on the mat."),
    ("It rained all day", "It rained heavily all day, and all night."),
    ("Nothing alike", "Something else entirely"),
]

OVERLAPS = [
    *(Rouge(type=kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")),  # type: ignore[arg-type]
    Rouge(stemmer=True),
    Bleu(),
    Bleu(tokenize="char"),
    Chrf(),
    Chrf(word_order=2),
]


def score(config: MetricConfig, *pairs: tuple[str, str]) -> Scores:
    cases = [Case((answer,), reference) for answer, reference in pairs]
    return make_metric(config).score(cases, lambda done, total: None)


def values(config: MetricConfig, *pairs: tuple[str, str]) -> list[float]:
    return list(score(config, *pairs).values)


# Exact match, numbers, patterns


def test_exact_match_counts_white_space_and_nothing_else_as_equal():
    pairs = [(" Paris\n", "Paris"), ("paris", "Paris"), ("Paris.", "Paris"), ("a  b", "a b")]
    assert values(ExactMatch(), *pairs) == [1, 0, 0, 1]
    assert values(ExactMatch(ignore_case=True), *pairs) == [1, 1, 0, 1]
    assert values(ExactMatch(ignore_punctuation=True), *pairs) == [1, 0, 1, 1]


def test_exact_match_knows_one_letter_written_in_two_ways():
    assert values(ExactMatch(), ("cafe\u0301", "caf\u00e9")) == [1]
    assert values(ExactMatch(ignore_case=True), ("STRASSE", "Straße")) == [1]


def test_exact_match_compares_what_is_extracted_last():
    config = ExactMatch(extract=r"Answer: (.*)")
    pairs = [
        ("Answer: 3? No.\nAnswer: 4", "4"),
        ("Answer: 4", "Because.\nAnswer: 4"),
        ("4", "4"),
        ("Answer: 5", "4"),
    ]
    assert values(config, *pairs) == [1, 1, 0, 0]
    assert score(config, *pairs).corpus == {"not_found": 0.25}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs $1,234.50.", "1234.50"),
        ("5-3", "3"),
        ("from 3 to -7 degrees", "-7"),
        ("minus: \u22122", "-2"),
        ("-$5", "-5"),
        ("1,2,3", "3"),
        ("12,345,678", "12345678"),
        ("1.5e3 metres", "1500"),
        (".5", "0.5"),
        ("50%", "50"),
        ("#### 42", "42"),
        ("version v2", None),
        ("none", None),
    ],
)
def test_the_last_number_is_found(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_any_integer_is_read_back_with_and_without_thousands(number):
    assert last_number(f"So it is {number}.") == number
    assert last_number(f"So it is {number:,}, I think") == number


def test_numbers_may_lie_apart_as_far_as_is_allowed():
    pairs = [("about 0.3", "0.25"), ("0.25", "1/4 = 0.25"), ("no idea", "0.25")]
    assert values(Numbers(), *pairs) == [0, 1, 0]
    # In decimals: in binary 0.3 and 0.25 are more than 0.05 apart.
    assert values(Numbers(tolerance=0.05), *pairs) == [1, 1, 0]
    assert score(Numbers(), *pairs).corpus == {"not_found": pytest.approx(1 / 3)}


def test_a_pattern_is_looked_for_in_the_answer_or_must_be_all_of_it():
    pairs = [("see TICKET-12", ""), ("TICKET-7\n", ""), ("ticket-7", "")]
    assert values(Regex(pattern=r"TICKET-\d+"), *pairs) == [1, 1, 0]
    assert values(Regex(pattern=r"TICKET-\d+", full=True), *pairs) == [0, 1, 0]
    assert values(Regex(pattern=r"TICKET-\d+", full=True, ignore_case=True), *pairs) == [0, 1, 1]


def test_a_pattern_that_would_search_for_ever_is_an_error():
    started = time.monotonic()
    with pytest.raises(DataError, match="takes more than 1 s"):
        values(Regex(pattern=r"(a|aa)+$"), ("a" * 60 + "b", ""))
    assert time.monotonic() - started < 20


# Labels


def test_a_label_is_found_in_whatever_stands_around_it():
    config = Labels(choices=("bug", "feature request", "feature"))
    pairs = [
        ("bug", "bug"),
        ("This is a **Bug**.", "bug"),
        ("A Feature\nrequest!", "feature request"),
        ("debugging", "bug"),
        ("humbug", "bug"),
        ("bug or feature", "bug"),
        ("", "feature"),
    ]
    found = score(config, *pairs)
    assert list(found.values) == [1, 1, 1, 0, 0, 0, 0]
    assert found.corpus["no_label"] == pytest.approx(4 / 7)


def test_precision_and_recall_are_those_worked_out_by_hand():
    config = Labels(choices=("flag", "pass"))
    answers = ["flag", "flag", "flag", "pass", "dunno", "pass"]
    references = ["flag", "flag", "pass", "flag", "flag", "pass"]
    corpus = score(config, *zip(answers, references, strict=True)).corpus
    # flag: 3 said, 2 right, 4 wanted. pass: 2 said, 1 right, 2 wanted.
    assert corpus["precision/flag"] == pytest.approx(2 / 3)
    assert corpus["recall/flag"] == 0.5
    assert corpus["f1/flag"] == pytest.approx(4 / 7)
    assert corpus["f1"] == pytest.approx((4 / 7 + 1 / 2) / 2)
    micro = score(
        config.model_copy(update={"average": "micro"}), *zip(answers, references, strict=True)
    )
    assert micro.corpus["precision"] == pytest.approx(3 / 5)
    assert micro.corpus["recall"] == pytest.approx(3 / 6)


def test_a_choice_that_does_not_occur_is_not_counted_as_missed():
    corpus = score(Labels(choices=("a", "b", "c")), ("a", "a"), ("a", "a")).corpus
    assert corpus["f1"] == 1
    assert "f1/b" not in corpus


def test_several_labels_are_scored_by_what_they_share():
    config = Labels(choices=("bug", "docs", "ui"), multi=True)
    found = score(config, ("bug, ui", "bug; docs"), ("docs", "docs"), ("none", "ui"))
    assert list(found.values) == [pytest.approx(1 / 2), 1, 0]
    assert found.corpus["no_label"] == pytest.approx(1 / 3)


def test_labels_are_extracted_where_the_recipe_says():
    config = Labels(choices=("bug", "feature"), extract=r"(?i)category:\s*(.*)")
    pairs = [
        ("No bug at all.\nCategory: feature", "feature"),
        ("category: bug", "bug"),
        ("bug", "bug"),
    ]
    found = score(config, *pairs)
    assert list(found.values) == [1, 1, 0]
    several = config.model_copy(update={"multi": True})
    assert values(several, ("category: bug\ncategory: feature", "bug, feature")) == [1]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", "?"]), st.sampled_from(["a", "b", "c"])),
        min_size=1,
    )
)
def test_micro_recall_is_the_share_of_right_answers(pairs):
    found = score(Labels(choices=("a", "b", "c"), average="micro"), *pairs)
    assert found.corpus["recall"] == pytest.approx(sum(found.values) / len(pairs))


# Overlap


def test_rouge_is_what_is_worked_out_by_hand():
    # Of 3 words all are among the reference's 6; they are 3 of its 6.
    found = score(Rouge(type="rougeL"), ("the cat sat", "the cat sat on the mat"))
    assert found.values == (pytest.approx(2 / 3),)
    assert found.also["rouge_l_precision"] == (1,)
    assert found.also["rouge_l_recall"] == (0.5,)
    # Pairs: 2 of 2, and 2 of 5.
    assert values(Rouge(type="rouge2"), ("the cat sat", "the cat sat on the mat")) == [
        pytest.approx(2 * 1 * 0.4 / 1.4)
    ]


WORDS = st.sampled_from(["the", "The", "its", "cats", "running", "a_b", "7", "-", ".\n"])
ASCII = st.lists(WORDS, max_size=12).map(" ".join)


@settings(deadline=None, max_examples=150)
@example(answer="The cats", reference="the cats", stemmer=False)
@example(answer="the ads", reference="the ad", stemmer=True)
@given(ASCII, ASCII, st.booleans())
def test_on_ascii_rouge_is_the_librarys(answer, reference, stemmer):
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    theirs = RougeScorer(kinds, use_stemmer=stemmer).score(reference, answer)
    if answer.strip() == reference.strip():
        return
    for kind in kinds:
        mine = values(Rouge(type=kind, stemmer=stemmer), (answer, reference))  # type: ignore[arg-type]
        assert mine == [pytest.approx(theirs[kind].fmeasure)]


def test_rouge_reads_other_scripts():
    # The library's tokenizer finds no word in either, and says 0.
    assert values(Rouge(type="rouge1"), ("Привет, мир", "привет мир!")) == [1]
    assert values(Rouge(type="rouge1"), ("你好吗", "你好啊")) == [pytest.approx(2 / 3)]
    assert values(Rouge(type="rouge1"), ("हिन्दी भाषा", "हिन्दी")) == [pytest.approx(2 / 3)]


def test_stems_count_as_equal_where_asked():
    pair = ("he was running", "he runs")
    assert values(Rouge(type="rouge1", stemmer=True), pair) == [pytest.approx(4 / 5)]
    assert values(Rouge(type="rouge1"), pair) == [pytest.approx(2 / 5)]


def test_bleu_and_chrf_over_all_are_sacrebleus():
    import sacrebleu

    answers, references = zip(*SUMMARIES, strict=True)
    bleu = score(Bleu(), *SUMMARIES)
    expected = sacrebleu.corpus_bleu(answers, [references]).score / 100
    assert bleu.corpus["corpus_bleu"] == pytest.approx(expected)
    assert bleu.corpus["corpus_bleu"] != pytest.approx(sum(bleu.values) / 3, abs=0.01)
    chrf = score(Chrf(word_order=2), *SUMMARIES)
    expected = sacrebleu.corpus_chrf(answers, [references], word_order=2).score / 100
    assert chrf.corpus["corpus_chrf"] == pytest.approx(expected)


def test_bleu_of_one_item_is_what_is_worked_out_by_hand():
    # 6 words, of which 5 match, 4 of 5 pairs less one: 1-grams 5/6, 2-grams 3/5, 3-grams 2/4,
    # 4-grams 1/3; equal lengths, so no brevity penalty.
    pair = ("the cat sat on the mat", "the cat sat on a mat")
    expected = (Fraction(5, 6) * Fraction(3, 5) * Fraction(1, 2) * Fraction(1, 3)) ** 0.25
    assert values(Bleu(), pair) == [pytest.approx(float(expected))]


def test_an_answer_shorter_than_four_words_still_has_a_bleu():
    # 1 of 1 pairs and 2 of 2 words match; two words against three: brevity penalty exp(1 - 3/2).
    assert values(Bleu(), ("the cat", "the cat sat")) == [pytest.approx(math.exp(-0.5))]


@pytest.mark.parametrize("config", OVERLAPS, ids=lambda config: config.model_dump_json())
def test_equal_texts_score_one_and_any_text_between_nought_and_one(config):
    metric = make_metric(config)

    @settings(deadline=None, max_examples=40)
    @given(st.text(min_size=1), st.text())
    def check(reference: str, answer: str) -> None:
        cases = [Case((reference,), reference), Case((answer,), reference)]
        found = metric.score(cases, lambda done, total: None)
        assert found.values[0] == 1
        every = itertools.chain(found.values, *found.also.values(), found.corpus.values())
        assert all(0 <= value <= 1 for value in every)

    check()


# JSON


def test_json_is_what_a_strict_parser_takes():
    answers = ['{"a": 1}', " [1, 2]\n", "NaN", "{'a': 1}", '{"a": 1} Done.', "", "3"]
    assert values(Json(), *((answer, "") for answer in answers)) == [1, 1, 0, 0, 0, 0, 1]


def test_a_code_block_is_opened_only_where_allowed():
    fenced = ('Here:\n```json\n{"a": 1}\n```\nDone.', "")
    assert values(Json(), fenced) == [0]
    assert values(Json(allow_fence=True), fenced, ("{}", "")) == [1, 1]


def test_a_schema_is_conformed_to_or_not():
    schema = {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"$ref": "#/$defs/kind"}},
        "$defs": {"kind": {"enum": ["bug", "feature"]}},
    }
    found = score(
        Json(schema=schema),  # type: ignore[call-arg]
        ('{"kind": "bug"}', ""),
        ('{"kind": "else"}', ""),
        ("{", ""),
    )
    assert list(found.values) == [1, 0, 0]
    assert found.also == {"json_schema_valid": (1, 1, 0)}


def test_an_endlessly_nested_answer_conforms_to_nothing():
    schema = {"type": "array", "items": {"$ref": "#"}}
    deep = "[" * 900 + "]" * 900
    assert values(Json(schema=schema), (deep, ""), ("[[]]", "")) == [0, 1]  # type: ignore[call-arg]


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=9))
def test_whatever_python_writes_as_json_is_valid(value):
    assert values(Json(), (json.dumps(value), "")) == [1]


# Code


@settings(deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_at_k_is_the_share_of_choices_of_k_with_one_that_passes(drawn):
    n, passed = drawn
    for k in range(1, n + 1):
        choices = list(itertools.combinations(range(n), k))
        share = sum(min(choice) < passed for choice in choices) / len(choices)
        assert pass_at_k(n, passed, k) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("Sure:\n```python\nx = 1\n```\nor\n```python\nx = 2\n```", "x = 1\n"),
        ("```\nls\n```\n```py\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\ny =", "x = 1\ny ="),
    ],
)
def test_code_is_found_in_markdown(text, code):
    assert code_of(text) == code


def test_answers_are_run_with_their_tests():
    try:
        check_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    config = Code(k=1, samples=4, timeout_s=1, setup="import math")
    right, wrong = "def f(x): return math.floor(x)", "def f(x): return 7"
    cases = [
        Case((right, wrong, right, "while True: pass"), "assert f(2.5) == 2"),
        Case((wrong,) * 4, "```python\nassert f(2.5) == 2\n```"),
    ]
    found = make_metric(config).score(cases, lambda done, total: None)
    assert list(found.values) == [0.5, 0]
    assert found.also == {"pass@1_passed": (0.5, 0)}
    assert found.corpus == {"timeouts": 1 / 8}


# References


@pytest.mark.parametrize(
    ("config", "reference", "why"),
    [
        (ExactMatch(ignore_punctuation=True), "...", "has no text"),
        (Numbers(), "many", "has no number"),
        (Labels(choices=("bug", "ui")), "crash", "names none of the choices: bug, ui"),
        (Labels(choices=("bug", "ui")), "bug, ui", "write `multi: true`"),
        (Labels(choices=("bug", "ui"), multi=True), "bug, ui", None),
        (Rouge(), " ", "has no text"),
        (Bleu(), "x", None),
        (Regex(pattern="x"), "", None),
        (Json(), "", None),
    ],
)
def test_a_reference_that_cannot_be_used_is_refused(config, reference, why):
    refused = make_metric(config).refuse(reference)
    assert (refused is None) if why is None else (refused is not None and why in refused)


def test_tests_that_are_no_python_are_refused():
    try:
        metric = make_metric(Code())
    except SandboxError as error:
        pytest.skip(str(error))
    assert "is no Python" in str(metric.refuse("assert f(1 == 2"))
    assert metric.refuse("assert f(1) == 2") is None
