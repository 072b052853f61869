from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from posttrain.data.formats import read_rows
from posttrain.data.rows import Message, Preference
from posttrain.errors import DataError, ModelError
from posttrain.recipe.datasets import DatasetSpec
from posttrain.train.pairs import (
    encode_marked,
    encode_pairs,
    marked_table,
    pair_table,
    read_marked,
)
from posttrain.train.tokenize import encode_chat
from tests.unit.train.pair_programs import make_marked, make_pairs
from tests.unit.train.programs import make_chats

LONG = 10_000


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def said(*turns: str) -> tuple[Message, ...]:
    """Turns that begin with the user's."""
    roles = ("user", "assistant")
    return tuple(Message(roles[n % 2], text) for n, text in enumerate(turns))  # type: ignore[arg-type]


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(
        id="0" * 16,
        file="pairs.jsonl",
        row=7,
        prompt=said(prompt),
        chosen=(Message("assistant", chosen),),
        rejected=(Message("assistant", rejected),),
    )


def test_prompt_and_answer_are_the_template_and_the_answer_ends_its_turn(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (found,) = encode_pairs(tokenizer, [pair("Is it red?", "Yes, red.", "No.")], LONG)
    prompt = "<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found.prompt_ids) == prompt
    assert tokenizer.decode(found.chosen_ids) == "Yes, red.<|im_end|>"
    assert tokenizer.decode(found.rejected_ids) == "No.<|im_end|>"
    assert found.trainable
    assert found.cut == 0


def test_the_answer_is_what_supervised_fine_tuning_would_train_on(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """In the last turn of a longer chat, too, whose earlier answers are part of the prompt."""
    earlier = said("What is blue?", "The sea.", "And red?")
    row = replace(pair("", "The door.", "Nothing."), prompt=earlier)
    (found,) = encode_pairs(tokenizer, [row], LONG)
    chat = encode_chat(tokenizer, earlier + row.chosen, LONG)
    sequence = found.prompt_ids + found.chosen_ids
    assert sequence == chat.input_ids[: len(sequence)]
    trained = [n for n, label in enumerate(chat.labels) if label != -100]
    assert trained[-len(found.chosen_ids) :] == list(range(len(found.prompt_ids), len(sequence)))
    assert "The sea." in tokenizer.decode(found.prompt_ids)


def test_long_prompts_lose_their_oldest_tokens_the_same_for_both_answers(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = pair("old " * 30 + "new " * 30, "yes " * 3, "no " * 9)
    (whole,) = encode_pairs(tokenizer, [row], LONG)
    (found,) = encode_pairs(tokenizer, [row], 64)
    assert max(found.lengths) == 64
    assert found.chosen_ids == whole.chosen_ids
    assert found.rejected_ids == whole.rejected_ids
    assert found.prompt_ids[0] == tokenizer.bos_token_id
    assert found.prompt_ids[1:] == whole.prompt_ids[-(len(found.prompt_ids) - 1) :]
    assert found.cut == whole.tokens - found.tokens


def test_long_answers_are_cut_from_the_right_and_leave_half_of_the_length_to_the_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = pair("short?", "yes " * 200, "no " * 3)
    (whole,) = encode_pairs(tokenizer, [row], LONG)
    (found,) = encode_pairs(tokenizer, [row], 64)
    assert found.prompt_ids == whole.prompt_ids
    assert found.chosen_ids == whole.chosen_ids[: 64 - len(whole.prompt_ids)]
    assert found.rejected_ids == whole.rejected_ids


def test_answers_that_are_equal_as_far_as_they_are_read_train_nothing(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    same = "word " * 100
    rows = [pair("?", same + "a", same + "b"), *make_pairs(2)]
    assert [found.trainable for found in encode_pairs(tokenizer, rows, LONG)] == [True] * 3
    pairs = encode_pairs(tokenizer, rows, 40)
    assert [found.trainable for found in pairs] == [False, True, True]
    assert pair_table(pairs, 1).rows == [[1], [2]]
    answers = read_marked(tokenizer, rows, 40, 1)
    assert answers.untrainable == 1
    assert answers.table.rows == [[1], [1], [2], [2]]


def test_other_rows_and_a_missing_template_are_refused_with_the_row(
    tokenizer: PreTrainedTokenizerBase, tiny_model: Path
) -> None:
    with pytest.raises(DataError, match=r"chats\.jsonl:1: this stage reads pairs.*chats"):
        encode_pairs(tokenizer, make_chats(1), LONG)
    with pytest.raises(DataError, match=r"chats\.jsonl:1: this stage reads marked answers"):
        encode_marked(tokenizer, make_chats(1), LONG)
    bare = AutoTokenizer.from_pretrained(tiny_model)
    bare.chat_template = None
    with pytest.raises(ModelError, match=r"pairs\.jsonl:1: .*no chat template"):
        encode_pairs(bare, make_pairs(1), LONG)


def test_a_table_is_filled_up_with_its_first_entries(tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = encode_pairs(tokenizer, make_pairs(5), LONG)
    table = pair_table(pairs, 4)
    assert table.rows == [[0], [1], [2], [3], [4], [0], [1], [2]]
    assert table.dataset["chosen_ids"][5] == pairs[0].chosen_ids
    assert table.distinct == 5
    few = pair_table(pairs[:2], 8)
    assert [row for (row,) in few.rows] == [0, 1] * 4


def test_a_row_was_read_as_often_as_all_of_its_entries(tokenizer: PreTrainedTokenizerBase) -> None:
    table = pair_table(encode_pairs(tokenizer, make_pairs(3), LONG), 4)
    assert table.passes_by_row(np.array([1, 2, 0, 1]), 3).tolist() == [2, 2, 0]


def test_of_a_pair_taken_apart_the_less_read_answer_counts(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    table = marked_table(encode_marked(tokenizer, make_pairs(2), LONG), LONG, 4)
    assert table.parts == [0, 1, 0, 1]
    assert table.passes_by_row(np.array([1, 0, 3, 2]), 2).tolist() == [0, 2]


def test_pairs_can_be_read_as_a_wanted_and_an_unwanted_answer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = make_pairs(2)
    answers = encode_marked(tokenizer, rows, LONG)
    pairs = encode_pairs(tokenizer, rows, LONG)
    assert [(answer.row, answer.label) for answer in answers] == [
        (0, True),
        (0, False),
        (1, True),
        (1, False),
    ]
    assert answers[2].completion_ids == pairs[1].chosen_ids
    assert answers[3].completion_ids == pairs[1].rejected_ids
    assert sum(answer.tokens for answer in answers[:2]) == pairs[0].tokens


def test_exchanged_answers_come_from_another_prompt_and_from_no_batch(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    answers = encode_marked(tokenizer, make_pairs(3), LONG)
    tables = [marked_table(answers, LONG, size) for size in (2, 4)]
    exchanged = tables[0].dataset["KL_completion_ids"][:]
    assert exchanged == tables[1].dataset["KL_completion_ids"][:6]
    ids = [answer.completion_ids for answer in answers]
    assert exchanged == [ids[5], ids[5], ids[1], ids[1], ids[3], ids[3]]
    short = marked_table(encode_marked(tokenizer, make_pairs(3), 40), 40, 1).dataset
    for prompt, other in zip(short["prompt_ids"], short["KL_completion_ids"], strict=True):
        assert len(other) > 0
        assert len(prompt) + len(other) <= 40


def test_counts_are_those_of_the_batches_that_trl_makes(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    pairs = pair_table(encode_pairs(tokenizer, make_pairs(4), 48), 4)
    batch = DataCollatorForPreference(0)([pairs.dataset[n] for n in range(4)])
    assert batch["attention_mask"].sum() == pairs.tokens.sum()
    assert batch["completion_mask"][:, 1:].sum() == pairs.trained.sum()
    marked = marked_table(encode_marked(tokenizer, make_marked(4), 48), 48, 4)
    batch = DataCollatorForUnpairedPreference(0)([marked.dataset[n] for n in range(4)])
    assert batch["attention_mask"].sum() == marked.tokens.sum()
    assert batch["completion_mask"][:, 1:].sum() == marked.trained.sum()
    assert marked.longest[0] == int(np.argmax(marked.tokens))


def test_real_pairs_and_marked_answers_fit_the_length(
    tokenizer: PreTrainedTokenizerBase, real_data: Path
) -> None:
    pairs = list(read_rows(DatasetSpec(source=str(real_data / "dpo_en_demo.json"), limit=50)))
    found = encode_pairs(tokenizer, pairs, 256)
    assert all(max(pair.lengths) <= 256 for pair in found)
    assert all(pair.chosen_ids and pair.rejected_ids for pair in found)
    assert sum(pair.trainable for pair in found) >= 45
    marked = list(read_rows(DatasetSpec(source=str(real_data / "kto_en_demo.json"), limit=50)))
    answers = encode_marked(tokenizer, marked, 256)
    assert len(answers) == 50
    assert {answer.label for answer in answers} == {True, False}
