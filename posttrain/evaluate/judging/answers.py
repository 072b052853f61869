"""Greedy answers of two models to the same held-out prompts, kept so that none is written twice.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.rows import Messages, Row, plain_messages
from posttrain.errors import DataError
from posttrain.evaluate.judging.pairs import Pair, Written
from posttrain.hardware import ResolvedDType, gpu_names
from posttrain.preferences.answers import AnswerFile, AnswerSet, SampledAnswer
from posttrain.preferences.key import turns_of
from posttrain.stages.program import StageInput
from posttrain.store.fingerprint import canonical_json
from posttrain.train.prompts import Prompt, encode_prompts, prompt_of

if TYPE_CHECKING:
    from posttrain.train.rollout import Answer

Tell = Callable[[int, int], None]
"""Told how many answers there are, of how many."""


@dataclass(frozen=True)
class Answering:
    """How prompts are answered."""

    max_prompt_tokens: int
    max_new_tokens: int
    dtype: ResolvedDType
    batch_size: int

    def digest(self, model: StageInput, prompts: Sequence[Messages]) -> str:
        """SHA-256 (hex) of all that the answers depend on.

        With the batches, since a row's rounding may depend on the rows beside it.
        """
        settings = {
            "model": model.digest,
            "prompts": [plain_messages(prompt) for prompt in prompts],
            "max_new_tokens": self.max_new_tokens,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "gpu": bool(gpu_names()),
        }
        return hashlib.sha256(canonical_json(settings)).hexdigest()


def draw_prompts(
    rows: Sequence[Row], models: Sequence[StageInput], answering: Answering, count: int, seed: int
) -> list[Row]:
    """Rows whose prompts all models can answer, each prompt once, drawn with the seed.

    The order follows from the seed and each prompt's own content: a prompt that is added to the
    dataset moves no other one.

    Args:
        rows: Held-out ones.
        models: All must have room for prompt and answer.
        answering: What bounds the prompts.
        count: Rows wanted; fewer are returned where there are no more.
        seed: Of the draw.

    Raises:
        DataError: there is no such row.
        ModelError: a model has no chat template, or it cannot write a prompt.
    """
    unlike: dict[str, Row] = {}
    for row in rows:
        if prompt_of(row):
            content = canonical_json([seed, plain_messages(prompt_of(row))])
            unlike.setdefault(hashlib.sha256(content).hexdigest(), row)
    drawn = [unlike[key] for key in sorted(unlike)]
    for model in models:
        drawn = [prompt.row for prompt in _encode(model, drawn, answering) if prompt is not None]
    if not drawn:
        raise DataError(
            f"none of the {len(rows):,} held-out rows has a prompt of at most "
            f"{answering.max_prompt_tokens:,} tokens that leaves room for an answer of "
            f"{answering.max_new_tokens:,}; change `max_prompt_tokens` or `max_new_tokens`"
        )
    return drawn[:count]


def pair_answers(
    rows: Sequence[Row], candidate: Sequence[Written], opponent: Sequence[Written]
) -> list[Pair]:
    """The answers to each row's prompt, side by side."""
    return [
        Pair(
            id=row.id,
            source=f"{row.file}:{row.row}",
            prompt=prompt_of(row),
            candidate=one,
            opponent=other,
        )
        for row, one, other in zip(rows, candidate, opponent, strict=True)
    ]


def answer(
    model: StageInput, rows: Sequence[Row], answering: Answering, folder: Path, tell: Tell
) -> list[Written]:
    """The model's greedy answer to each row's prompt.

    Args:
        model: Loaded only if an answer is missing, and let go afterwards.
        rows: As `draw_prompts` gives them.
        answering: Precision, batches, longest answer.
        folder: Where answers are kept, in one file for all that they depend on; a killed run goes
            on after the last whole batch.
        tell: Told of progress.

    Raises:
        ModelError: the model cannot be loaded.
    """
    digest = answering.digest(model, [prompt_of(row) for row in rows])
    file = AnswerFile(folder / f"{digest}.jsonl", digest)
    done = file.read()
    tell(len(done), len(rows))
    if len(done) < len(rows):
        prompts = [prompt for prompt in _encode(model, rows, answering) if prompt is not None]
        for sets in _missing(model, prompts, answering, done, digest):
            file.append(sets)
            done |= {one.index: one for one in sets}
            tell(len(done), len(rows))
        file.finish(done)
    found = [done[index].answers[0] for index in range(len(rows))]
    return [Written(one.text, one.tokens, one.ended) for one in found]


def _encode(model: StageInput, rows: Sequence[Row], answering: Answering) -> list[Prompt | None]:
    from posttrain.models import load_tokenizer

    room = min(answering.max_prompt_tokens, _window(model) - answering.max_new_tokens)
    return encode_prompts(load_tokenizer(model), rows, room)


def _window(model: StageInput) -> int:
    """Tokens that the model reads, prompt and answer together."""
    from transformers import AutoConfig

    folder = model.base if model.kind == "adapter" and model.base else model.path
    config = AutoConfig.from_pretrained(folder).get_text_config()
    return getattr(config, "max_position_embeddings", None) or 2**31


def _missing(
    model: StageInput,
    prompts: Sequence[Prompt],
    answering: Answering,
    done: dict[int, AnswerSet],
    digest: str,
) -> Iterator[list[AnswerSet]]:
    """The answers that are not there yet, a batch at a time; always the same batches."""
    from posttrain.evaluate.greedy import write_greedily
    from posttrain.models import load_causal_lm, load_tokenizer
    from posttrain.train.rollout import batches_by_length

    tokenizer = load_tokenizer(model)
    weights = load_causal_lm(model, answering.dtype)
    lengths = [len(prompt.input_ids) for prompt in prompts]
    for batch in batches_by_length(lengths, answering.batch_size):
        if all(index in done for index in batch):
            continue
        ids = [prompts[index].input_ids for index in batch]
        written = write_greedily(weights, tokenizer, ids, answering.max_new_tokens, len(ids))
        yield [
            AnswerSet(
                index=index,
                prompt=turns_of(prompts[index].messages),
                answers=(sampled(one),),
                source=f"{prompts[index].row.file}:{prompts[index].row.row}",
                model=model.digest,
                sampling=digest,
            )
            for index, one in zip(batch, written, strict=True)
        ]
    # Before the next model is loaded.
    del weights
    gc.collect()


def sampled(one: Answer) -> SampledAnswer:
    """An answer as it is kept, and as judges see it."""
    return SampledAnswer(text=one.text.strip(), tokens=len(one.token_ids), ended=one.ended)
