"""`judge`: two models answer the same held-out prompts, and somebody says whose answers are better.

Inputs: `model`, `opponent` and `dataset`; `judge`, where a local model or a reward model compares;
and the sheets that people filled in, as `ratings:N`.

Output: `comparison.json`, and `answers.parquet` with every answer and every vote; for people also
blind sheets in `sheets/`, and apart from them `key.json`. Equal inputs give equal bytes, as far as
an endpoint gives equal replies.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from posttrain.data.prepared import PreparedDataset
from posttrain.errors import DataError
from posttrain.evaluate.judging.answers import Answering, answer, draw_prompts, pair_answers
from posttrain.evaluate.judging.pairs import Pair, Vote, write_answers
from posttrain.evaluate.judging.people import make_sheets, read_votes, write_folder
from posttrain.evaluate.judging.win_rate import Tallied, tally
from posttrain.hardware import resolve_dtype
from posttrain.recipe.judge import JUDGE, OPPONENT, RATINGS, JudgeConfig, People
from posttrain.stages.program import StageContext, StageResult, run_program


def main(context: StageContext[JudgeConfig]) -> StageResult:
    """Have both models answer, have the answers compared, and count.

    Raises:
        DataError: the dataset holds no prompts that fit, or a filled sheet cannot be read.
        ModelError: a model cannot be loaded, or the endpoint gives no verdicts.
        UsageError: the endpoint's key is missing.
    """
    config = context.config
    _check_key(config)
    dataset = PreparedDataset.open(context.input("dataset").path)
    if dataset.family == "documents":
        raise DataError("judge.dataset: documents hold no prompts; name a dataset of chats")
    pairs = _answered(context, dataset)
    asked = [pair for pair in pairs if not pair.identical]
    votes, judge = _votes(context, asked)
    tallied = tally(
        pairs,
        votes,
        candidate=config.model or "candidate",
        opponent=config.against,
        judge=judge,
        average=config.by.model is not None and config.by.model.when_orders_disagree == "average",
        remarks=_remarks(context, pairs),
        seed=config.seed,
    )
    for warning in tallied.win_rate.warnings:
        context.events.warning(warning)
    write_answers(context.output, pairs, votes, tallied.scores)
    tallied.win_rate.save(context.output)
    return StageResult(
        metrics=tallied.metrics,
        headline=_headline(config, tallied, len(asked)),
        details=tallied.win_rate.model_dump(mode="json"),
    )


def _check_key(config: JudgeConfig) -> None:
    """Before the minutes that answers take."""
    if config.by.endpoint is not None:
        from posttrain.evaluate.judging.endpoint import api_key

        api_key(config.by.endpoint)


def _answered(context: StageContext[JudgeConfig], dataset: PreparedDataset) -> list[Pair]:
    config = context.config
    answering = Answering(
        config.max_prompt_tokens,
        config.max_new_tokens,
        resolve_dtype(config.dtype),
        config.batch_size,
    )
    model, opponent = context.input("model"), context.input(OPPONENT)
    rows = draw_prompts(dataset.unseen(), [model, opponent], answering, config.prompts, config.seed)
    both = []
    for name, source in ((config.model or "the candidate", model), (config.against, opponent)):
        context.events.phase(f"{name} answers {len(rows)} prompts")
        tell = _tell(context, "answer")
        both.append(answer(source, rows, answering, _memory(context) / "answers", tell))
    return pair_answers(rows, *both)


def _votes(context: StageContext[JudgeConfig], pairs: list[Pair]) -> tuple[list[Vote], str]:
    """What was said of the pairs, and by whom."""
    by = context.config.by
    if by.people is not None:
        return _of_people(context, by.people, pairs)
    dtype = resolve_dtype(context.config.dtype)
    context.events.phase(f"comparing {len(pairs)} pairs of answers")
    if by.model is not None:
        from posttrain.evaluate.judging.local import judge_locally

        tell = _tell(context, "vote")
        votes = judge_locally(context.input(JUDGE), pairs, by.model, dtype, tell)
        return votes, f"model {_short(by.model.model)}"
    if by.reward is not None:
        from posttrain.evaluate.judging.reward import judge_by_reward

        votes = judge_by_reward(context.input(JUDGE), pairs, by.reward.margin, dtype)
        return votes, f"reward {by.reward.reward}"
    if by.endpoint is None:
        raise ValueError("nobody to compare")
    from posttrain.evaluate.judging.endpoint import judge_by_endpoint

    memory, tell = _memory(context) / "votes", _tell(context, "vote")
    return judge_by_endpoint(pairs, by.endpoint, memory, tell), f"endpoint {by.endpoint.model}"


def _of_people(
    context: StageContext[JudgeConfig], people: People, pairs: list[Pair]
) -> tuple[list[Vote], str]:
    key = make_sheets(pairs, people, context.config.seed)
    write_folder(context.output, key)
    names = [name for name in context.job.inputs if name.startswith(RATINGS)]
    names.sort(key=lambda name: int(name.removeprefix(RATINGS)))
    votes = read_votes([Path(context.input(name).path) for name in names], key, pairs)
    raters = {vote.rater for vote in votes}
    # Nobody need be asked about answers that are all identical.
    return votes, f"people ({len(raters)})" if raters or not pairs else ""


def _memory(context: StageContext[JudgeConfig]) -> Path:
    """Where answers and replies are kept: beside the artifacts, else for this stage alone."""
    return Path(context.job.cache) / "judging" if context.job.cache else context.checkpoints


def _tell(context: StageContext[JudgeConfig], unit: str) -> Callable[[int, int], None]:
    return lambda done, total: context.events.progress(done, total, unit=unit)


def _remarks(context: StageContext[JudgeConfig], pairs: list[Pair]) -> list[str]:
    """What is known before anybody has compared."""
    config, said = context.config, []
    if len(pairs) < config.prompts:
        said.append(
            f"the dataset has only {len(pairs)} held-out prompts that fit, and {config.prompts} "
            "were to be asked"
        )
    if config.by.model is not None:
        judge = context.input(JUDGE).digest
        if judge in (context.input("model").digest, context.input(OPPONENT).digest):
            said.append("the judge is one of the two models: models favour their own answers")
    return said


def _headline(config: JudgeConfig, tallied: Tallied, asked: int) -> str:
    if tallied.win_rate.judge:
        return tallied.headline
    raters = config.by.people.raters if config.by.people else 0
    sheets = "sheet" if raters == 1 else "sheets"
    return f"no ratings yet: {asked} prompts wait on {raters} {sheets} in sheets/"


def _short(reference: str) -> str:
    """A model as a person calls it: results carry no paths of this machine."""
    path = Path(reference).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else reference


if __name__ == "__main__":
    run_program(JudgeConfig, main)
