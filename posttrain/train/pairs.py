"""Pairs and marked answers as token ids, and the table of them that a trainer reads.

An answer is what the assistant would write after the prompt, with the token that ends its turn, as
`posttrain.train.tokenize` finds it: the same tokens that supervised fine-tuning trains on. Where a
reply has several turns, those between the assistant's belong to the answer.

    prompt_ids + chosen_ids      the prompt with the chosen answer, as the chat template writes them
    prompt_ids + rejected_ids    the same with the rejected one; the prompt's tokens are the same

Cutting to `max_length` follows `tokenize`: an answer gets what the prompt leaves, and half of the
length at least. A prompt of up to half the length is never cut; a longer one loses its oldest
tokens as far as the longer answer needs room (a leading beginning-of-sequence token stays), the
same ones for both answers; then each answer is cut from the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.rows import KtoExample, Messages, Preference, Row, family_of
from posttrain.errors import DataError, ModelError
from posttrain.train.tables import TrainingTable
from posttrain.train.tokenize import IGNORED, encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNCUT = 1 << 62
"""No sequence is this long."""


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers, the first better than the second."""

    prompt_ids: list[int]
    """Up to where the answers begin; the same tokens before both."""
    chosen_ids: list[int]
    rejected_ids: list[int]
    cut: int
    """Tokens left out, of both sequences together, to stay within the longest sequence."""
    trainable: bool
    """Whether both answers have a token and, as far as they are read, differ."""

    @property
    def tokens(self) -> int:
        """Tokens of both sequences: the prompt's count twice."""
        return 2 * len(self.prompt_ids) + self.trained

    @property
    def trained(self) -> int:
        """Tokens of both answers."""
        return len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longer sequence."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the sequence with the chosen answer, and of that with the rejected one."""
        return [len(self.prompt_ids) + len(ids) for ids in (self.chosen_ids, self.rejected_ids)]


@dataclass(frozen=True)
class Marked:
    """A prompt with one answer that is wanted or not."""

    row: int
    """Position of the row among those given."""
    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool
    """Whether the answer is wanted."""
    cut: int
    """Tokens left out to stay within the longest sequence."""
    trainable: bool
    """Whether the answer has a token and is not, of a pair, the other answer as well."""

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def trained(self) -> int:
        """Tokens of the answer."""
        return len(self.completion_ids)


@dataclass(frozen=True)
class AnswerTable(TrainingTable):
    """A table for TRL's collators of answers, filled up to whole batches.

    The entries that fill it up repeat the first ones. Without them the last batch of an epoch would
    repeat as many rows as there are processes, and what is learned would depend on their number.
    """

    parts: list[int]
    """Which of its row's answers each entry holds: 0, or of a pair apart 0 (wanted) and 1."""
    distinct: int
    """Entries before the first repeated one."""

    def passes_by_row(self, passes: np.ndarray, rows: int) -> np.ndarray:
        """How often all of a row was read, of shape (rows,).

        An answer that stands in several entries was read as often as all of them together; a row
        whose answers stand apart as often as the less read of them.

        Args:
            passes: How often each entry was read, int64 of shape (entries,).
            rows: Number of rows.
        """
        read: dict[tuple[int, int], int] = {}
        for entry, (members, part) in enumerate(zip(self.rows, self.parts, strict=True)):
            for row in members:
                read[row, part] = read.get((row, part), 0) + int(passes[entry])
        fewest = np.zeros(rows, np.int64)
        for row, parts in groupby(sorted(read), key=lambda found: found[0]):
            fewest[row] = min(read[part] for part in parts)
        return fewest


@dataclass(frozen=True)
class Answers:
    """Rows as a table, and what became of each of them, those left out included."""

    table: AnswerTable
    tokens: np.ndarray
    """Tokens of each row's sequences: int64 of shape (rows,)."""
    cut: np.ndarray
    """Tokens left out of each row's to stay within the longest sequence: int64 of shape (rows,)."""

    @property
    def untrainable(self) -> int:
        """Rows without a place in the table."""
        return len(self.tokens) - len({row for members in self.table.rows for row in members})


def read_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int, multiple_of: int
) -> Answers:
    """Pairs as a table; see `encode_pairs` and `pair_table`."""
    pairs = encode_pairs(tokenizer, rows, max_length)
    return Answers(
        pair_table(pairs, multiple_of),
        np.array([pair.tokens for pair in pairs], np.int64),
        np.array([pair.cut for pair in pairs], np.int64),
    )


def read_marked(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int, multiple_of: int
) -> Answers:
    """Marked answers as a table; see `encode_marked` and `marked_table`."""
    answers = encode_marked(tokenizer, rows, max_length)
    tokens, cut = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for answer in answers:
        tokens[answer.row] += answer.tokens
        cut[answer.row] += answer.cut
    return Answers(marked_table(answers, max_length, multiple_of), tokens, cut)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int
) -> list[Pair]:
    """Each row's prompt and two answers as tokens, in the rows' order.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        rows: Of the family `preferences`.
        max_length: Longest sequence, prompt and answer, in tokens.

    Raises:
        DataError: a row is of another family.
        ModelError: the chat template is missing or cannot write a row; it says which.
    """
    return [_encode_pair(tokenizer, row, max_length) for row in rows]


def encode_marked(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int
) -> list[Marked]:
    """Each answer with its mark, in the rows' order; a pair is a wanted and an unwanted answer.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        rows: Of the families `kto` or `preferences`.
        max_length: Longest sequence, prompt and answer, in tokens.

    Raises:
        DataError: a row is of another family.
        ModelError: the chat template is missing or cannot write a row; it says which.
    """
    return [
        answer
        for number, row in enumerate(rows)
        for answer in _encode_marked(tokenizer, row, number, max_length)
    ]


def pair_table(pairs: Sequence[Pair], multiple_of: int) -> AnswerTable:
    """A table of the pairs that can be trained on.

    Columns `prompt_ids`, `chosen_ids` and `rejected_ids`, and `seq_lengths`, those of both
    sequences.
    """
    kept = [(number, pair) for number, pair in enumerate(pairs) if pair.trainable]
    return answer_table(
        {
            "prompt_ids": [pair.prompt_ids for _, pair in kept],
            "chosen_ids": [pair.chosen_ids for _, pair in kept],
            "rejected_ids": [pair.rejected_ids for _, pair in kept],
            "seq_lengths": [pair.lengths for _, pair in kept],
        },
        rows=[number for number, _ in kept],
        tokens=[pair.tokens for _, pair in kept],
        trained=[pair.trained for _, pair in kept],
        multiple_of=multiple_of,
    )


def marked_table(answers: Sequence[Marked], max_length: int, multiple_of: int) -> AnswerTable:
    """A table of the marked answers that can be trained on.

    Columns `prompt_ids`, `completion_ids`, `KL_completion_ids` and `label`, and `seq_lengths`, that
    of the one sequence.

    KTO estimates how far the model has moved from answers to other prompts. Each entry's is the
    answer of the nearest entry before it that has another prompt, as far as `max_length` leaves
    room; before the first comes the last. TRL turns the answers round within each forward pass;
    here they depend on the rows alone, so that neither the batch nor the number of processes
    changes them, and what the reference says of them can be kept.
    """
    kept = [answer for answer in answers if answer.trainable]
    others = [
        kept[other].completion_ids[: max_length - len(answer.prompt_ids)]
        for answer, other in zip(kept, _mismatched(kept), strict=True)
    ]
    return answer_table(
        {
            "prompt_ids": [answer.prompt_ids for answer in kept],
            "completion_ids": [answer.completion_ids for answer in kept],
            "KL_completion_ids": others,
            "label": [answer.label for answer in kept],
            "seq_lengths": [[answer.tokens] for answer in kept],
        },
        rows=[answer.row for answer in kept],
        tokens=[answer.tokens for answer in kept],
        trained=[answer.trained for answer in kept],
        multiple_of=multiple_of,
    )


def answer_table(
    columns: Mapping[str, Sequence[object]],
    rows: Sequence[int],
    tokens: Sequence[int],
    trained: Sequence[int],
    multiple_of: int,
) -> AnswerTable:
    """A table of any columns, filled up to a multiple of `multiple_of` entries.

    Args:
        columns: Values of each entry, by the names that a collator wants.
        rows: Position of the row that each entry holds; of a pair's two answers both entries' is
            the same.
        tokens: Tokens of each entry.
        trained: Tokens of each entry's answers.
        multiple_of: Entries an optimizer step, or a forward pass over all processes.
    """
    from datasets import Dataset

    size = len(rows)
    order = [entry % size for entry in range(size + -size % multiple_of)] if size else []
    seen: dict[int, int] = {}
    parts = []
    for row in rows:
        parts.append(seen.get(row, 0))
        seen[row] = parts[-1] + 1
    return AnswerTable(
        dataset=Dataset.from_dict(
            {name: [values[entry] for entry in order] for name, values in columns.items()}
        ),
        rows=[[rows[entry]] for entry in order],
        tokens=np.array([tokens[entry] for entry in order], np.int64),
        trained=np.array([trained[entry] for entry in order], np.int64),
        parts=[parts[entry] for entry in order],
        distinct=size,
    )


def _encode_pair(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Pair:
    if not isinstance(row, Preference):
        raise DataError(
            f"{row.file}:{row.row}: this stage reads pairs, and the row is of the family "
            f"{family_of(row)}"
        )
    sequences = [_split(tokenizer, row, row.prompt, reply) for reply in (row.chosen, row.rejected)]
    # A token that spans the border, as few templates allow, belongs to the answers.
    shared = _common_start(*(prompt for prompt, _ in sequences))
    prompt = sequences[0][0][:shared]
    chosen, rejected = (own[shared:] + answer for own, answer in sequences)
    begins = prompt[:1] == [tokenizer.bos_token_id]
    kept, answers = _cut(prompt, (chosen, rejected), max_length, begins)
    whole = 2 * len(prompt) + len(chosen) + len(rejected)
    empty = not all(answer for _, answer in sequences)
    return Pair(
        prompt_ids=kept,
        chosen_ids=answers[0],
        rejected_ids=answers[1],
        cut=whole - 2 * len(kept) - len(answers[0]) - len(answers[1]),
        trainable=bool(prompt) and not empty and answers[0] != answers[1],
    )


def _encode_marked(
    tokenizer: PreTrainedTokenizerBase, row: Row, number: int, max_length: int
) -> list[Marked]:
    if isinstance(row, Preference):
        pair = _encode_pair(tokenizer, row, max_length)
        left_out = pair.cut // 2
        return [
            Marked(number, pair.prompt_ids, pair.chosen_ids, True, left_out, pair.trainable),
            Marked(
                number,
                pair.prompt_ids,
                pair.rejected_ids,
                False,
                pair.cut - left_out,
                pair.trainable,
            ),
        ]
    if not isinstance(row, KtoExample):
        raise DataError(
            f"{row.file}:{row.row}: this stage reads marked answers or pairs, and the row is of "
            f"the family {family_of(row)}"
        )
    prompt, answer = _split(tokenizer, row, row.prompt, row.completion)
    begins = prompt[:1] == [tokenizer.bos_token_id]
    kept, (cut_answer,) = _cut(prompt, (answer,), max_length, begins)
    left_out = len(prompt) + len(answer) - len(kept) - len(cut_answer)
    trainable = bool(prompt and answer)
    return [Marked(number, kept, cut_answer, row.label, left_out, trainable)]


def _split(
    tokenizer: PreTrainedTokenizerBase, row: Row, prompt: Messages, reply: Messages
) -> tuple[list[int], list[int]]:
    """Tokens before the answer, and those from its first trained token to its last.

    Both are empty where a turn of the assistant's, there or in the prompt, has no token of its own.
    """
    try:
        encoded = encode_chat(tokenizer, prompt + reply, _UNCUT)
    except ModelError as error:
        raise ModelError(f"{row.file}:{row.row}: {error}") from error
    turns = _runs(encoded.labels)
    answered = sum(message.role == "assistant" for message in prompt)
    expected = answered + sum(message.role == "assistant" for message in reply)
    if len(turns) != expected:
        return [], []
    first, last = turns[answered][0], turns[-1][1]
    return encoded.input_ids[:first], encoded.input_ids[first:last]


def _runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Where each stretch of labelled tokens begins and ends."""
    runs, position = [], 0
    for labelled, group in groupby(labels, key=lambda label: label != IGNORED):
        length = sum(1 for _ in group)
        if labelled:
            runs.append((position, position + length))
        position += length
    return runs


def _common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the beginning that are the same."""
    shared = 0
    for own, other in zip(first, second, strict=False):
        if own != other:
            break
        shared += 1
    return shared


def _cut(
    prompt: list[int], answers: Sequence[list[int]], max_length: int, begins: bool
) -> tuple[list[int], list[list[int]]]:
    """Prompt and answers within `max_length`; `begins` says that the first token must stay."""
    longest = max(len(answer) for answer in answers)
    room = max(max_length // 2, max_length - longest)
    kept = prompt
    if len(prompt) > room:
        kept = [*prompt[:1], *prompt[len(prompt) - room + 1 :]] if begins else prompt[-room:]
    return kept, [answer[: max_length - len(kept)] for answer in answers]


def _mismatched(answers: Sequence[Marked]) -> list[int]:
    """For each answer the nearest one before it, in a circle, that has another prompt.

    Where all prompts are the same there is none, and it is the one before.
    """
    found: list[int] = []
    for position, answer in enumerate(answers):
        before = (position - back for back in range(1, len(answers)))
        other = (n for n in before if answers[n].prompt_ids != answer.prompt_ids)
        found.append(next(other, position - 1) % len(answers))
    return found
