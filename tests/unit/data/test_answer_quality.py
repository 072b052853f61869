from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.batch import RowBatch
from posttrain.data.operations.answer_quality import AnswerQualityFilter
from posttrain.data.rows import Chat, Document, KtoExample, Message, Preference, Row
from posttrain.errors import DataError
from posttrain.recipe.prepare import AnswerQuality

QUESTION = "What should I know about the tides?"

PROSE = (
    "Tides are caused by the pull of the moon and the sun on the sea. The moon pulls hardest on "
    "the side that faces it, and the water there rises. On the far side it rises as well, since "
    "the earth is pulled away from under it. Most coasts see two high tides a day."
)

POEM = """The harbour sleeps beneath the rain,
the boats go out, come home again,
and every lamp along the pier
says only this: the sea is near,
the sea is wide, the sea is deep,
and all who love it learn to keep
a little salt upon the tongue
and songs that better men have sung"""

LOOP = "I will check that for you and come back. " * 12


def chat(answer: str, question: str = QUESTION) -> Row:
    turns = (Message("user", question), Message("assistant", answer))
    return Chat(id="0", file="f", row=1, messages=turns)


def pair(chosen: str, rejected: str = "Ask a fisherman, he will know.") -> Row:
    return Preference(
        id="0",
        file="f",
        row=1,
        prompt=(Message("user", QUESTION),),
        chosen=(Message("assistant", chosen),),
        rejected=(Message("assistant", rejected),),
    )


def kto(completion: str, *, label: bool) -> Row:
    return KtoExample(
        id="0",
        file="f",
        row=1,
        prompt=(Message("user", QUESTION),),
        completion=(Message("assistant", completion),),
        label=label,
    )


def reason(row: Row, **settings: Any) -> str | None:
    family = {Chat: "chats", Preference: "preferences", KtoExample: "kto"}[type(row)]
    batch = RowBatch.of(family, [row])  # type: ignore[arg-type]
    drop = AnswerQualityFilter(AnswerQuality(**settings)).apply(batch).drops.get(0)
    return drop.reason if drop else None


# --- empty ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        *["...", " … ", "-", "——", "_____", '""', "\u200b \ufeff", "????"],
        *["N/A", "n/a.", "nan", "<nooutput>", "TODO"],
    ],
)
def test_an_answer_that_says_nothing_is_empty(answer: str) -> None:
    assert reason(chat(answer)) == "empty answer"


@pytest.mark.parametrize(
    "answer",
    ["✓", "🎉", "+", "*", "?", "[]", "{}", "... --- ...", "0", "B", "None", "否", "null", "No."],
)
def test_a_symbol_a_letter_or_a_word_can_be_the_whole_answer(answer: str) -> None:
    assert reason(chat(answer)) is None


def test_a_placeholder_that_the_question_asks_for_is_an_answer() -> None:
    assert reason(chat("N/A", "Give the phone number, or write n/a.")) is None


# --- truncation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending",
    [
        " In spring the difference is greatest because the",
        " In spring the difference is greatest, and it is",
        " The difference between high and low water is largest at full moon,",
        " The difference between high and low water is largest at (",
        " Where the coast narrows, the water is pressed toge",
    ],
)
def test_prose_that_stops_in_the_middle_of_a_sentence_is_truncated(ending: str) -> None:
    assert reason(chat(PROSE)) is None
    assert reason(chat(PROSE + ending)) == "truncated answer"


def test_a_short_answer_is_truncated_if_its_last_word_needs_another() -> None:
    assert reason(chat("The water rises twice a day on most coasts because the")) is not None
    assert reason(chat("Yes. The moon pulls on the sea and makes the water rise")) is None


def test_one_sentence_says_nothing_about_how_the_others_end() -> None:
    sentence = PROSE.replace(". ", ", and ")

    assert reason(chat(sentence + "\n\nA short guide to the tides of the northern coast")) is None


def test_a_paragraph_that_stops_is_known_from_the_ones_before_it() -> None:
    ending = "\n\nWhere a bay grows narrow the water is pressed together and rises toge"

    assert reason(chat(PROSE + ending)) == "truncated answer"


def test_a_list_item_that_stops_is_known_from_the_other_items() -> None:
    whole = "\n".join(f"{number}. {line}." for number, line in enumerate(PROSE.split(". "), 1))
    cut = "\n5. Look at the table of the harbour that you want to le"

    assert reason(chat(whole.replace("..", "."))) is None
    assert reason(chat(whole.replace("..", ".") + cut)) == "truncated answer"


@pytest.mark.parametrize(
    "answer",
    [
        "Paris",
        "the",
        "Apples, pears and",
        "The moon, mostly, and to a lesser degree the sun",
        POEM,
        "Dear Ms Moss,\n\n" + PROSE + "\n\nKind regards,\nTheo",
        "Dear Ms Moss,\n\n" + PROSE + "\n\nSincerely yours,",
        PROSE + "\n\nSources: https://tides.example/guide to all of the tides in Europe today",
        PROSE + "\n\n#tides #moon #sun #sea #coast #harbour #fishing #sailing #weather",
        PROSE + "\n\n| high water | low water | at new and at full moon on this coast",
        "- " + PROSE.replace(".", "").replace(" The", "\n- The").replace(" On", "\n- On"),
        "def tide(hour):\n    return rising(hour, moon, sun, coast, bay, wind, sea_level, depth,",
        PROSE + "\n\n```python\nprint(tide)\n```",
        PROSE + "\n\n````\n```python\nprint(tide)\n```\n````",
        "````\n```\nprint(tide)\n````\nThat is all.",
        "```markdown\n```python\nprint(tide)\n```\n```\nThat is all.",
        PROSE + "\n\n```",
        "SELECT name, height FROM tides WHERE height > 3 AND coast = 'north' OR moon",
    ],
)
def test_what_needs_no_full_stop_is_not_truncated(answer: str) -> None:
    assert reason(chat(answer)) is None


@pytest.mark.parametrize("fence", ["```python", "~~~", "  ```"])
def test_a_code_block_without_an_end_is_truncated(fence: str) -> None:
    assert reason(chat(f"Like this:\n\n{fence}\nprint(tide)")) == "truncated answer"


@given(st.text(max_size=40).filter(lambda text: "`" not in text and "~" not in text))
def test_a_few_words_are_never_truncated(answer: str) -> None:
    assert reason(chat(" ".join(answer.split()[:7]))) != "truncated answer"


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but I can’t help you with that request.",  # noqa: RUF001
        "I cannot fulfill this request.",
        "Sorry! I am not able to engage in such a conversation. Ask me another.",
        "Unfortunately, I am unable to provide medical advice.",
        "I apologize, but I cannot share personal information about anybody.",
        "As an AI language model, I have no opinion, but the first one is nicer.",
        "Thank you for asking. As an AI, I don't have a house.",
        "I'm just an AI, and it is my duty to be careful.",
        "Als KI-Sprachmodell habe ich dazu keine Meinung.",
        "作为一个人工智能语言模型，我没有个人意见。",  # noqa: RUF001
    ],
)
def test_refusals_and_boilerplate_are_dropped(answer: str) -> None:
    assert reason(chat(answer)) == "refusal"


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't come to your party on Friday.",
        "Unfortunately, I cannot determine the angle from two sides alone.",
        "I'm sorry, but you did not send the lyrics. Could you add them?",
        "I can't give you a refund without the number of your order.",
        'A model may begin with "As an AI language model, I cannot help with that".',
        "Dear Mr Moss, I am unable to provide such content for your magazine.",
        "As an AI researcher, she teaches machines to read.",
        "As an AI assistant, I would read the page aloud to a blind customer.",
        PROSE + " I cannot assist with that.",
    ],
)
def test_an_answer_that_only_sounds_like_a_refusal_stays(answer: str) -> None:
    assert reason(chat(answer)) is None


def test_an_assistant_may_say_what_it_is_when_asked() -> None:
    answer = "As an AI language model, I answer questions about tides."

    assert reason(chat(answer, "Who are you?")) is None
    assert reason(chat(answer, "What is high tide?")) == "refusal"


# --- echo -------------------------------------------------------------------------------------


def test_an_answer_that_is_the_question_again_is_dropped() -> None:
    assert reason(chat("what should I know\nabout the TIDES?")) == "answer repeats question"
    assert reason(chat("What should I know about the tide tables?")) is None


def test_a_greeting_may_be_returned() -> None:
    assert reason(chat("Good morning!", "Good morning!")) is None


def test_a_pair_whose_answers_differ_in_white_space_alone_is_dropped() -> None:
    assert reason(pair("Twice a day.", "Twice  a day.\n")) == "same answers"
    assert reason(pair("Twice a day.", "twice a day.")) is None


# --- repetition -------------------------------------------------------------------------------


def test_an_answer_stuck_in_a_loop_is_dropped() -> None:
    assert reason(chat(LOOP)) == "repetitive answer"
    assert reason(chat("我不知道你在说什么。" * 12)) == "repetitive answer"


def test_words_count_as_repeated_from_their_second_five_gram_on() -> None:
    answer = " ".join(f"w{number}" for number in [*range(30), *range(10)])

    assert reason(chat(answer), max_repetition=0.24) == "repetitive answer"
    assert reason(chat(answer), max_repetition=0.25) is None


def test_a_short_answer_may_repeat_itself() -> None:
    assert reason(chat("na " * 19)) is None
    assert reason(chat("na " * 20)) == "repetitive answer"


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=20, max_size=60))
def test_an_answer_said_twice_is_at_least_half_repeated(words: list[str]) -> None:
    assert reason(chat(" ".join(words + words)), max_repetition=0.49, truncated=False) is not None


# --- what is judged ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("empty", "..."),
        ("truncated", PROSE + " And where the"),
        ("refusals", "I'm sorry, but I can't assist with that."),
        ("echo", QUESTION),
        ("max_repetition", LOOP),
    ],
)
def test_every_rule_can_be_switched_off(key: str, answer: str) -> None:
    off: Any = None if key == "max_repetition" else False

    assert reason(chat(answer)) is not None
    assert reason(chat(answer), **{key: off}) is None


BAD = ["...", PROSE + " And where the", "I'm sorry, but I can't assist with that.", LOOP]


@pytest.mark.parametrize("answer", BAD)
def test_only_what_the_model_learns_to_write_is_judged(answer: str) -> None:
    assert reason(pair(answer)) == reason(kto(answer, label=True)) == reason(chat(answer))
    assert reason(pair(PROSE, answer)) is None
    assert reason(kto(answer, label=False)) is None


@pytest.mark.parametrize("answer", BAD)
def test_every_answer_of_a_chat_counts_and_no_other_turn(answer: str) -> None:
    def conversation(first: str, question: str) -> Row:
        turns = (
            Message("system", answer),
            Message("user", answer + " Please!"),
            Message("assistant", first),
            Message("user", question),
            Message("assistant", PROSE),
        )
        return Chat(id="0", file="f", row=1, messages=turns)

    assert reason(conversation("Gladly.", answer)) is None
    assert reason(conversation(answer, "And then?")) == reason(chat(answer))


def test_documents_are_refused_with_the_operation_that_suits_them() -> None:
    batch = RowBatch.of("documents", [Document(id="0", file="f", row=1, text=PROSE)])

    with pytest.raises(DataError, match="document_quality"):
        AnswerQualityFilter(AnswerQuality()).apply(batch)


def test_pairs_that_stay_are_counted_by_their_longer_answer() -> None:
    rows = [
        pair(PROSE),
        pair(POEM),
        pair("Yes."),
        pair("One two three.", "Four five six."),
        pair("..."),
    ]

    found = AnswerQualityFilter(AnswerQuality()).apply(RowBatch.of("preferences", rows)).found

    assert found == {"chosen longer": 2, "rejected longer": 1, "equal length": 1}


ANSWERS = st.sampled_from([PROSE, POEM, LOOP, "Paris", *BAD]) | st.text(max_size=60)


@settings(max_examples=50)
@given(st.lists(ANSWERS, max_size=8))
def test_the_decision_about_a_row_does_not_depend_on_its_batch(answers: list[str]) -> None:
    rows = [chat(answer) for answer in answers]

    together = AnswerQualityFilter(AnswerQuality()).apply(RowBatch.of("chats", rows)).drops

    assert [
        together[position].reason if position in together else None for position in range(len(rows))
    ] == [reason(row) for row in rows]


def test_the_filter_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(AnswerQualityFilter(AnswerQuality(echo=False))))

    assert again.config == AnswerQuality(echo=False)
    assert again.name == "answer_quality"


def test_few_real_answers_are_dropped_and_most_of_them_as_boilerplate(real_data: Path) -> None:
    records = json.loads((real_data / "alpaca_en_demo.json").read_text())
    rows = [chat(record["output"], record["instruction"]) for record in records]

    drops = AnswerQualityFilter(AnswerQuality()).apply(RowBatch.of("chats", rows)).drops
    reasons = [drop.reason for drop in drops.values()]

    assert 20 <= reasons.count("refusal") <= 30
    assert len(reasons) - reasons.count("refusal") <= 8
