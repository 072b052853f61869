from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.batch import RowBatch
from posttrain.data.operations.language import CODES, TOO_SHORT, LanguageFilter, identify
from posttrain.data.rows import Chat, Document, KtoExample, Message, Preference
from posttrain.errors import DataError
from posttrain.recipe.prepare import Language

SENTENCES = {
    "en": "The library opens at nine, and the children usually wait outside until it does.",
    "de": "Die Bibliothek öffnet um neun Uhr, und die Kinder warten meistens schon davor.",
    "fr": "La bibliothèque ouvre à neuf heures, et les enfants attendent souvent devant la porte.",
    "es": "La biblioteca abre a las nueve, y los niños casi siempre esperan delante de la puerta.",
    "it": "La biblioteca apre alle nove, e i bambini di solito aspettano davanti alla porta.",
    "ru": "Библиотека открывается в девять часов, и дети обычно ждут у входа.",  # noqa: RUF001
    "hi": "पुस्तकालय नौ बजे खुलता है और बच्चे आमतौर पर बाहर इंतज़ार करते हैं।",
    "zh": "图书馆早上九点开门，孩子们通常会提前来到门口等候，"  # noqa: RUF001
    "然后一起进去看书和做作业，一直到下午五点才回家吃饭。",  # noqa: RUF001
}


def documents(*texts: str) -> RowBatch:
    rows = [
        Document(id=f"{i:016x}", file="f", row=i + 1, text=text) for i, text in enumerate(texts)
    ]
    return RowBatch.of("documents", list(rows))


def dropped(batch: RowBatch, **settings: Any) -> dict[int, str]:
    decisions = LanguageFilter(Language(**settings)).apply(batch)
    return {position: drop.reason for position, drop in decisions.drops.items()}


def turns(question: str, answer: str) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", answer)


def preference(prompt: str, chosen: str, rejected: str) -> RowBatch:
    row = Preference(
        id="0",
        file="f",
        row=1,
        prompt=(Message("user", prompt),),
        chosen=(Message("assistant", chosen),),
        rejected=(Message("assistant", rejected),),
    )
    return RowBatch.of("preferences", [row])


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_is_kept_where_its_language_is_wanted_and_nowhere_else(code: str) -> None:
    batch = documents(SENTENCES[code])
    other = "en" if code != "en" else "de"

    assert dropped(batch, keep=(code,)) == {}
    assert dropped(batch, keep=(other,)) == {0: "wrong language"}


def test_rows_are_counted_by_language_whether_they_stay_or_not() -> None:
    batch = documents(*SENTENCES.values(), "Yes.")

    found = LanguageFilter(Language(keep=("en",))).apply(batch).found

    assert found == dict.fromkeys(SENTENCES, 1) | {TOO_SHORT: 1}


def test_short_texts_are_kept_unseen() -> None:
    text = SENTENCES["de"][:39]

    assert dropped(documents(text)) == {}
    assert dropped(documents(text), min_characters=10) == {0: "wrong language"}


def test_a_text_without_a_letter_is_kept_whatever_its_length() -> None:
    assert dropped(documents("2 + 2 = 4; " * 50, ""), min_characters=0) == {}


def test_a_mixture_is_uncertain_unless_all_its_languages_are_wanted() -> None:
    batch = documents(f"{SENTENCES['fr']} {SENTENCES['de']}")

    assert dropped(batch, keep=("fr",), min_confidence=0.9) == {0: "uncertain language"}
    assert dropped(batch, keep=("fr", "de"), min_confidence=0.9) == {}


def test_code_is_not_taken_for_a_language() -> None:
    code = "```python\nfor index in range(10):\n    print(index, end='')\n```"
    answer = f"{SENTENCES['de']}\n\n{code * 8}"

    assert dropped(documents(answer), keep=("de",)) == {}
    assert dropped(documents(code * 8), keep=("de",)) == {}


def test_digits_tables_and_addresses_do_not_make_an_english_text_uncertain() -> None:
    table = "| 2000 | 6.12 |\n" * 30
    text = f"Create a chart of the world's population.\n{table}See https://a.example/x?y=1&z=qq"

    assert dropped(documents(text), min_characters=20) == {}


def test_capitals_are_no_other_language() -> None:
    assert dropped(documents(SENTENCES["en"].upper())) == {}


def test_the_middle_of_a_long_text_counts_as_well_as_its_beginning() -> None:
    batch = documents(f"{SENTENCES['en']}\n" + f"{SENTENCES['fr']}\n" * 200)

    assert dropped(batch, keep=("en",)) == {0: "wrong language"}


def test_a_system_prompt_says_nothing_about_a_chat() -> None:
    system = Message("system", f"{SENTENCES['en']} " * 5)
    chat = Chat(
        id="0", file="f", row=1, messages=(system, *turns("Wann öffnet sie?", SENTENCES["de"]))
    )

    assert dropped(RowBatch.of("chats", [chat]), keep=("de",)) == {}


def test_a_pair_may_be_there_to_reject_another_language() -> None:
    kept = preference(SENTENCES["de"], SENTENCES["de"], SENTENCES["en"] * 4)
    bad = preference("Wann?", SENTENCES["en"] * 4, SENTENCES["de"])

    assert dropped(kept, keep=("de",)) == {}
    assert dropped(bad, keep=("de",)) == {0: "wrong language"}


@pytest.mark.parametrize("label", [True, False])
def test_an_unwanted_answer_may_be_unwanted_for_its_language(label: bool) -> None:
    prompt, completion = turns(SENTENCES["de"], SENTENCES["en"] * 6)
    row = KtoExample(
        id="0", file="f", row=1, prompt=(prompt,), completion=(completion,), label=label
    )

    assert bool(dropped(RowBatch.of("kto", [row]), keep=("de",))) is label


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("english", "en"),
        ("EN", "en"),
        ("zh-CN", "zh"),
        ("jp", "ja"),
        ("deu", "de"),
        ("Germna", "de"),
    ],
)
def test_an_unknown_code_is_refused_with_the_one_that_was_meant(wrong: str, right: str) -> None:
    with pytest.raises(DataError, match=f"no language '{wrong}'; write `{right}`"):
        LanguageFilter(Language(keep=(wrong,)))


def test_a_code_that_is_like_no_other_is_refused_too() -> None:
    with pytest.raises(DataError, match="ISO 639-1"):
        LanguageFilter(Language(keep=("en", "qqqq")))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(SENTENCES.values())) | st.text(max_size=80), max_size=6))
def test_the_decision_about_a_row_does_not_depend_on_its_batch(texts: list[str]) -> None:
    together = LanguageFilter(Language()).apply(documents(*texts)).drops

    alone = [LanguageFilter(Language()).apply(documents(text)).drops.get(0) for text in texts]

    assert [together.get(position) for position in range(len(texts))] == alone


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_whatever_the_text_only_known_codes_come_back(text: str) -> None:
    scores = identify(text)

    if scores is not None:
        assert set(scores) <= CODES
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_the_filter_works_after_pickling() -> None:
    used = LanguageFilter(Language())
    used.apply(documents(SENTENCES["en"]))

    again = pickle.loads(pickle.dumps(used))

    assert again.apply(documents(SENTENCES["de"])).drops[0].reason == "wrong language"


def test_nothing_is_downloaded(tmp_path: Path) -> None:
    program = (
        "from posttrain.data.operations.language import identify\n"
        f"print(next(iter(identify({SENTENCES['it']!r}))))"
    )
    nowhere = {"FTLANG_CACHE": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}

    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        check=True,
    )

    assert run.stdout.strip() == "it"
    assert list(tmp_path.iterdir()) == []


def test_a_megabyte_without_a_space_is_identified_in_no_time() -> None:
    assert dropped(documents("a" * 1_000_000 + "@ <" + "b" * 1_000_000), min_confidence=0) == {}


def test_english_instructions_are_kept(real_data: Path) -> None:
    records = json.loads((real_data / "alpaca_en_demo.json").read_text())
    texts = [f"{record['instruction']}\n{record['output']}" for record in records]

    lost = dropped(documents(*texts))

    assert "wrong language" not in lost.values()
    assert len(lost) <= 0.01 * len(texts)
