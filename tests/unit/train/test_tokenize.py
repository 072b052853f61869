from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from posttrain.data.rows import Message
from posttrain.errors import ModelError
from posttrain.train.tokenize import IGNORED, Encoded, encode_chat, encode_document

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last %}{{ message['content'] }}"
    "{% else %}{{ message['content'].split('</think>')[-1] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEMANDING = "{{ raise_exception('a system message is needed') }}"

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1).map(
    lambda text: "x" + text
)
exchanges = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def chat(*exchanges: tuple[str, str]) -> list[Message]:
    roles = [("user", question, answer) for question, answer in exchanges]
    return [
        message
        for _, question, answer in roles
        for message in (Message("user", question), Message("assistant", answer))
    ]


def trained_text(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> str:
    return str(tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(exchanges=exchanges, marked=st.booleans())
def test_what_is_trained_on_is_each_answer_and_its_end(
    tokenizer: PreTrainedTokenizerBase, exchanges: list[tuple[str, str]], marked: bool
) -> None:
    original = tokenizer.chat_template
    if marked:
        tokenizer.chat_template = MARKED
    encoded = encode_chat(tokenizer, chat(*exchanges), max_length=100_000)
    tokenizer.chat_template = original
    answers = "".join(f"{answer}<|im_end|>" for _, answer in exchanges)
    assert trained_text(tokenizer, encoded) == answers
    assert encoded.cut == 0


def test_the_whole_chat_is_read(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = chat(("Hello", "Hi"), ("Bye", "Later"))
    encoded = encode_chat(tokenizer, messages, 1000)
    plain = [{"role": m.role, "content": m.content} for m in messages]
    rendered = tokenizer.apply_chat_template(plain, tokenize=False)
    assert tokenizer.decode(encoded.input_ids) == rendered


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(question=st.integers(1, 300), answer=st.integers(1, 300), max_length=st.integers(8, 200))
def test_cutting_keeps_an_answer_and_half_of_the_room_for_each(
    tokenizer: PreTrainedTokenizerBase, question: int, answer: int, max_length: int
) -> None:
    messages = chat(("q " * question, "a " * answer))
    whole = encode_chat(tokenizer, messages, 100_000)
    encoded = encode_chat(tokenizer, messages, max_length)
    assert len(encoded.input_ids) == len(encoded.labels) == min(max_length, len(whole.input_ids))
    assert encoded.cut == len(whole.input_ids) - len(encoded.input_ids)
    prompt = len(encoded.labels) - encoded.trainable
    whole_prompt = len(whole.labels) - whole.trainable
    assert encoded.trainable >= min(whole.trainable, max_length // 2)
    assert prompt >= min(whole_prompt, max_length - max(max_length // 2, whole.trainable) - 1)
    # What remains of the answer is its beginning, unbroken.
    labels = [label for label in whole.labels if label != IGNORED]
    assert [label for label in encoded.labels if label != IGNORED] == labels[: encoded.trainable]


def test_a_cut_prompt_loses_its_oldest_tokens_and_keeps_the_first_special_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    messages = chat(("old " * 50 + "new", "yes"))
    encoded = encode_chat(tokenizer, messages, 24)
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert "new<|im_end|>\n<|im_start|>assistant\nyes" in tokenizer.decode(encoded.input_ids)


def test_a_template_that_rewrites_earlier_answers_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = FORGETFUL
    thinking = chat(("1+1?", "<think>easy</think>2"), ("2+2?", "4"))
    with pytest.raises(ModelError, match=r"turn 2 of 4.*generation"):
        encode_chat(tokenizer, thinking, 1000)
    assert "easy</think>2" in trained_text(
        tokenizer, encode_chat(tokenizer, thinking[:2], max_length=1000)
    )


def test_a_model_without_a_chat_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        encode_chat(tokenizer, chat(("a", "b")), 100)


def test_a_template_that_refuses_a_chat_is_named_with_the_turns(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = DEMANDING
    with pytest.raises(ModelError, match="user, assistant: a system message is needed"):
        encode_chat(tokenizer, chat(("a", "b")), 100)


def test_a_chat_without_an_answer_trains_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_chat(tokenizer, [Message("user", "hello " * 40)], 16).trainable == 0


def test_a_document_ends_with_the_end_token_unless_it_was_cut(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    whole = encode_document(tokenizer, "some words", 100)
    assert whole.input_ids[-1] == tokenizer.eos_token_id
    assert whole.labels == whole.input_ids
    cut = encode_document(tokenizer, "some words " * 20, 8)
    assert len(cut.input_ids) == 8
    assert cut.cut > 0
