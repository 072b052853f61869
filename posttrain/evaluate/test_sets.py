"""Test sets of the user's own: their prompts answered, and each answer scored by each metric."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.errors import DataError
from posttrain.evaluate.items import Item
from posttrain.evaluate.metrics import Case, Metric, Scores
from posttrain.evaluate.results import TaskResult
from posttrain.evaluate.shares import mean, standard_error
from posttrain.evaluate.test_rows import LoadedTestSet, load_test_sets
from posttrain.events import EventWriter
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.recipe.test_sets import Code, MetricConfig, TestSet
from posttrain.stages.program import StageContext
from posttrain.store.fingerprint import files_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.train.rollout import Answer

CUT_OFF_WARNED = 0.05
"""Share of answers without an end from which on a person is told."""


@dataclass(frozen=True)
class MeasuredTests:
    """What one model makes of all test sets."""

    results: tuple[TaskResult, ...]
    """A task each metric of each test set."""
    items: tuple[Item, ...]
    settings: tuple[dict[str, Any], ...]
    """Each test set as in the recipe, with the digest of its rows: equal for equal questions."""


@dataclass(frozen=True)
class _Answered:
    """What a model wrote to the questions of a test set."""

    answers: Sequence[Answer]
    """The greedy one to each; an empty one where the prompt is too long for the model."""
    samples: Mapping[tuple[int, float], Sequence[Sequence[Answer]]]
    """Several to each, by their number and temperature, for the metrics that ask for them."""
    too_long: frozenset[int]
    """Questions that the model cannot read, as places among the questions."""


def run_test_sets(
    context: StageContext[EvaluateConfig],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Sequence[LoadedTestSet] | None = None,
) -> MeasuredTests:
    """Answer the prompts of all test sets and score the answers.

    Args:
        context: Of the stage; its inputs `tests:NAME` are the rows.
        model: What answers.
        tokenizer: The model's, with a chat template.
        loaded: From `load_test_sets`, where the caller has them; read here if not.

    Raises:
        DataError: as `load_test_sets`, or a metric that cannot be applied to an answer.
        ModelError: the chat template is missing or cannot write a prompt.
        SandboxError: code would have to be run, and this system does not allow that safely.
    """
    results: list[TaskResult] = []
    items: list[Item] = []
    settings: list[dict[str, Any]] = []
    for tests in load_test_sets(context) if loaded is None else loaded:
        answered = _answer(context, tests, model, tokenizer)
        context.events.phase(f"scoring the answers to {tests.config.dataset}")
        scores = [_score(context.events, metric, tests, answered) for metric in tests.metrics]
        for number, (config, _) in enumerate(tests.metrics):
            items += _items(tests, answered, config, scores, number)
            results.append(_summarise(tests, answered, config, scores[number]))
        settings.append(_settings(tests))
    return MeasuredTests(tuple(results), tuple(items), tuple(settings))


# Answers


def _answer(
    context: StageContext[EvaluateConfig],
    tests: LoadedTestSet,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> _Answered:
    from posttrain.evaluate.greedy import write_greedily
    from posttrain.train.prompts import encode_prompts
    from posttrain.train.rollout import Answer

    config, events, name = context.config, context.events, tests.config.dataset
    context.events.phase(f"answering the test set {name}")
    room = _room(model, tests.config)
    encoded = encode_prompts(tokenizer, [question.chat for question in tests.questions], room)
    asked = {place: prompt.input_ids for place, prompt in enumerate(encoded) if prompt is not None}
    too_long = frozenset(range(len(encoded))) - asked.keys()
    if too_long:
        events.warning(
            f"{name}: {len(too_long):,} of {len(encoded):,} prompts are longer than the "
            f"{room:,} tokens that the model reads beside an answer; they count as wrong"
        )

    def put_back(answers: Sequence[Answer]) -> list[Answer]:
        found = dict(zip(asked, answers, strict=True))
        return [found.get(place, Answer([], "", ended=True)) for place in range(len(encoded))]

    prompts, longest = list(asked.values()), tests.config.max_new_tokens
    tell = _progress(events, "answer")
    greedy = put_back(write_greedily(model, tokenizer, prompts, longest, config.batch_size, tell))
    samples = {}
    for wanted in _sampled(tests):
        columns = _sample(context, model, tokenizer, prompts, wanted, longest)
        samples[wanted] = list(zip(*(put_back(column) for column in columns), strict=True))
    answered = _Answered(greedy, samples, too_long)
    _warn_of_cut_off(events, tests, answered)
    return answered


def _warn_of_cut_off(events: EventWriter, tests: LoadedTestSet, answered: _Answered) -> None:
    every = [
        *answered.answers,
        *(one for rows in answered.samples.values() for row in rows for one in row),
    ]
    endless = sum(not answer.ended for answer in every)
    if endless > CUT_OFF_WARNED * len(every):
        events.warning(
            f"{tests.config.dataset}: {endless:,} of {len(every):,} answers reach `max_new_tokens` "
            f"({tests.config.max_new_tokens:,}) without an end; what is missing counts as wrong"
        )


def _room(model: PreTrainedModel, tests: TestSet) -> int:
    """Most tokens of a prompt that leave room for an answer.

    Raises:
        DataError: there is none.
    """
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return 1 << 30
    if tests.max_new_tokens >= window:
        raise DataError(
            f"evaluate.test_sets: `{tests.dataset}` asks for answers of {tests.max_new_tokens:,} "
            f"tokens, and the model reads {window:,} with the prompt; lower `max_new_tokens`"
        )
    return int(window) - tests.max_new_tokens


def _sampled(tests: LoadedTestSet) -> list[tuple[int, float]]:
    """Number and temperature of each set of samples that a metric asks for."""
    found = [_samples_of(config) for config, _ in tests.metrics]
    return list(dict.fromkeys(wanted for wanted in found if wanted))


def _samples_of(config: MetricConfig) -> tuple[int, float] | None:
    if isinstance(config, Code) and config.samples > 1:
        return config.samples, config.temperature
    return None


def _sample(
    context: StageContext[EvaluateConfig],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    wanted: tuple[int, float],
    max_new_tokens: int,
) -> list[list[Answer]]:
    """One list of answers to all prompts for each sample."""
    from posttrain.recipe.online import Rollout
    from posttrain.train.rollout import make_rollouts

    count, temperature = wanted
    batch_size = context.config.batch_size
    rollout = Rollout(
        temperature=temperature,
        max_prompt_tokens=max(map(len, prompts), default=1),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    rollouts = make_rollouts(model, tokenizer, rollout)
    seed, total = context.config.seed % 2**32, count * len(prompts)
    tell = _progress(context.events, "sample")
    columns = []
    for number in range(count):
        # What is drawn depends on the seed and on the answer's number among all.
        first = number * len(prompts)
        columns.append(rollouts.write(prompts, seed, first=first))
        tell(first + len(prompts), total)
    return columns


def _progress(events: EventWriter, unit: str) -> Callable[[int, int], None]:
    """Tells progress with the time that is left, every two seconds at most, and the end."""
    started = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if done == total or now - told >= 2:
            told = now
            left_s = (now - started) / done * (total - done) if done else None
            events.progress(done, total, unit=unit, eta_s=left_s)

    return tell


# Scores


def _score(
    events: EventWriter,
    metric: tuple[MetricConfig, Metric],
    tests: LoadedTestSet,
    answered: _Answered,
) -> Scores:
    config, scorer = metric
    wanted = _samples_of(config)
    texts = (
        [tuple(answer.text for answer in row) for row in answered.samples[wanted]]
        if wanted
        else [(answer.text,) for answer in answered.answers]
    )
    cases = [
        Case(answers, question.reference)
        for answers, question in zip(texts, tests.questions, strict=True)
    ]
    scores = scorer.score(cases, _progress(events, "score"))
    # Some patterns match nothing at all; a question that was not asked is not answered right.
    values = tuple(
        0.0 if place in answered.too_long else value for place, value in enumerate(scores.values)
    )
    return Scores(values, scores.also, scores.corpus)


def _items(
    tests: LoadedTestSet,
    answered: _Answered,
    config: MetricConfig,
    scores: Sequence[Scores],
    number: int,
) -> list[Item]:
    task = f"{tests.config.dataset}:{config.title}"
    wanted = _samples_of(config)
    shown = [row[0] for row in answered.samples[wanted]] if wanted else answered.answers
    items = []
    for place, question in enumerate(tests.questions):
        every: dict[str, float] = {}
        for (other, _), found in zip(tests.metrics, scores, strict=True):
            every[other.title] = found.values[place]
            every |= {name: values[place] for name, values in found.also.items()}
        items.append(
            Item(
                task=task,
                group=task,
                item_id=question.position,
                item_digest=question.digest[:16],
                metric=config.title,
                value=scores[number].values[place],
                metrics=every,
                log_likelihoods=(),
                question=question.prompt[-1].content,
                target=question.reference,
                answer=shown[place].text.strip(),
            )
        )
    return items


def _summarise(
    tests: LoadedTestSet, answered: _Answered, config: MetricConfig, scores: Scores
) -> TaskResult:
    wanted = _samples_of(config)
    written = (
        [answer for row in answered.samples[wanted] for answer in row]
        if wanted
        else answered.answers
    )
    metrics = {config.title: mean(scores.values)}
    metrics |= {name: mean(values) for name, values in scores.also.items()}
    metrics |= scores.corpus
    metrics["cut_off"] = mean([float(not answer.ended) for answer in written])
    if answered.too_long:
        metrics["too_long"] = len(answered.too_long) / len(tests.questions)
    return TaskResult(
        task=f"{tests.config.dataset}:{config.title}",
        metric=config.title,
        value=mean(scores.values),
        standard_error=standard_error(scores.values),
        n=len(scores.values),
        higher_is_better=True,
        metrics=metrics,
        groups={},
    )


def _settings(tests: LoadedTestSet) -> dict[str, Any]:
    """All that must be equal for two evaluations of a test set to be comparable."""
    packages = sorted({name for _, metric in tests.metrics for name in metric.packages})
    versions = {name: importlib.metadata.version(name) for name in packages}
    if any(isinstance(config, Code) for config, _ in tests.metrics):
        versions["python"] = platform.python_version()
    digests = [(str(question.position), question.digest) for question in tests.questions]
    return {
        **tests.config.model_dump(mode="json", exclude={"run_code"}),
        "asked": len(tests.questions),
        "rows": files_digest(digests),
        "versions": versions,
    }
