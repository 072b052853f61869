"""Sampling several answers to each prompt from a model, and scoring them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.rows import Message, Row, plain_messages
from posttrain.errors import DataError, UsageError
from posttrain.hardware import resolve_dtype
from posttrain.preferences.answers import AnswerFile, AnswerSet, SampledAnswer
from posttrain.preferences.key import turns_of
from posttrain.preferences.sources import Source
from posttrain.recipe.base import DType
from posttrain.recipe.online import Rollout
from posttrain.store.fingerprint import canonical_json
from posttrain.train.prompts import Prompt, encode_prompts, prompt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.train.rewards import Score
    from posttrain.train.rollout import Answer

_BATCHES_AT_ONCE = 2
"""Batches after which answers are kept: prompts of about the same length are found among as many
answers, and as many are lost to a kill."""

_SCORED_AT_ONCE = 256
"""Answers."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    rollout: Rollout
    answers: int
    """To each prompt."""
    seed: int
    dtype: DType = "auto"

    def digest(self, model: Source, rows: Sequence[Row]) -> str:
        """SHA-256 (hex) of all that the answers depend on."""
        settings = {
            "model": model.digest,
            "prompts": [plain_messages(prompt_of(row)) for row in rows],
            "rollout": self.rollout.model_dump(mode="json"),
            "answers": self.answers,
            "seed": self.seed,
            "dtype": resolve_dtype(self.dtype),
        }
        return hashlib.sha256(canonical_json(settings)).hexdigest()


def encode(model: Source, rows: Sequence[Row], sampling: Sampling) -> tuple[list[Prompt], int]:
    """The prompts as the model reads them, and how many rows have none or a longer one.

    Raises:
        DataError: no prompt is short enough.
        ModelError: the model has no chat template, or it cannot write a prompt.
    """
    tokenizer = _tokenizer(model)
    encoded = encode_prompts(tokenizer, rows, sampling.rollout.max_prompt_tokens)
    prompts = [prompt for prompt in encoded if prompt is not None]
    if not prompts:
        raise DataError(
            f"none of the {len(rows):,} prompts has {sampling.rollout.max_prompt_tokens:,} tokens "
            "or fewer; raise --max-prompt-tokens"
        )
    return prompts, len(rows) - len(prompts)


def sample(
    model: Source, prompts: Sequence[Prompt], sampling: Sampling, file: AnswerFile, tell: Progress
) -> list[AnswerSet]:
    """Several answers to each prompt, those that the file has already left as they are.

    Args:
        model: What answers; loaded only if an answer is missing.
        prompts: As `encode` gave them.
        sampling: How many answers, and how they are drawn.
        file: Where answers are kept as they come.
        tell: Told of progress, in answers.

    Returns:
        The answers to each prompt, in the order of the prompts.

    Raises:
        ModelError: the model cannot be loaded.
        UsageError: prompt and answer together are longer than the model reads.
    """
    done = file.read()
    tell("answers", len(done) * sampling.answers, len(prompts) * sampling.answers)
    if not all(index in done for index in range(len(prompts))):
        for sets in _missing(model, prompts, sampling, file.sampling, done):
            file.append(sets)
            done |= {one.index: one for one in sets}
            tell("answers", len(done) * sampling.answers, len(prompts) * sampling.answers)
    if file.partial.exists() or not file.path.exists():
        file.finish(done)
    return [done[index] for index in range(len(prompts))]


def score(
    reward: Source,
    prompts: Sequence[Prompt],
    sets: Sequence[AnswerSet],
    dtype: DType,
    tell: Progress,
) -> list[dict[str, float]]:
    """The score of each distinct answer that is not blank, by its text, for each prompt.

    Raises:
        RecipeError: there is no such judge function.
        UsageError: the function failed, or returned something else than a number an answer.
        ModelError: the reward model cannot be loaded.
    """
    scorer = load_scorer(reward, dtype)
    asked = [
        (position, text)
        for position, one in enumerate(sets)
        for text in dict.fromkeys(answer.text for answer in one.answers)
        if text
    ]
    scores: list[dict[str, float]] = [{} for _ in sets]
    for start in range(0, len(asked), _SCORED_AT_ONCE):
        part = asked[start : start + _SCORED_AT_ONCE]
        given = scorer([prompts[position] for position, _ in part], [text for _, text in part])
        for (position, text), value in zip(part, given, strict=True):
            scores[position][text] = float(value)
        tell("scores", start + len(part), len(asked))
    return scores


def load_scorer(reward: Source, dtype: DType) -> Score:
    """A judge function, or a reward model in memory; one number an answer."""
    if reward.function is not None:
        from posttrain.train.rewards import call_function, check_parameters, load_function

        term = reward.function
        function = load_function(str(term.function))
        check_parameters(function, term)
        return lambda prompts, answers: call_function(function, term, prompts, answers)
    from posttrain.train.reward_model import load_reward_model

    scoring = load_reward_model(reward.input, resolve_dtype(dtype))
    return lambda prompts, answers: scoring.scores(
        [
            (*prompt.messages, Message("assistant", answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    )


def _missing(
    model: Source,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    digest: str,
    done: dict[int, AnswerSet],
) -> Iterator[list[AnswerSet]]:
    """The answers that are not there yet, a few batches at a time."""
    from posttrain.models import load_causal_lm
    from posttrain.train.rollout import make_rollouts

    weights = load_causal_lm(model.input, resolve_dtype(sampling.dtype))
    _check_room(weights.config.get_text_config(), prompts, sampling.rollout)
    rollouts = make_rollouts(weights, _tokenizer(model), sampling.rollout)
    count = sampling.answers
    at_once = max(1, _BATCHES_AT_ONCE * sampling.rollout.batch_size // count)
    for start in range(0, len(prompts), at_once):
        block = range(start, min(start + at_once, len(prompts)))
        if all(index in done for index in block):
            continue
        ids = [prompts[index].input_ids for index in block for _ in range(count)]
        # What is drawn depends on the seed and on an answer's position: a run that goes on draws
        # what an uninterrupted one would have drawn.
        written = rollouts.write(ids, sampling.seed, first=start * count)
        yield [
            _answer_set(
                index,
                prompts[index],
                written[(index - start) * count : (index - start + 1) * count],
                model,
                digest,
            )
            for index in block
        ]


def _answer_set(
    index: int, prompt: Prompt, answers: Sequence[Answer], model: Source, digest: str
) -> AnswerSet:
    return AnswerSet(
        index=index,
        prompt=turns_of(prompt.messages),
        answers=tuple(
            SampledAnswer(text=one.text.strip(), tokens=len(one.token_ids), ended=one.ended)
            for one in answers
        ),
        source=f"{prompt.row.file}:{prompt.row.row}",
        model=model.label,
        sampling=digest,
    )


def _check_room(config: object, prompts: Sequence[Prompt], rollout: Rollout) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    asked = max(len(prompt.input_ids) for prompt in prompts) + rollout.max_new_tokens
    if longest is not None and asked > longest:
        raise UsageError(
            f"the longest prompt and its answer have {asked:,} tokens, and the model reads "
            f"{longest:,}; lower --max-prompt-tokens or --max-new-tokens"
        )


def _tokenizer(model: Source) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer where it has one, else its base's."""
    from posttrain.models import load_tokenizer

    source = model.input
    if source.base is not None and not Path(source.path, "tokenizer_config.json").exists():
        source = source.model_copy(update={"path": source.base})
    return load_tokenizer(source)
