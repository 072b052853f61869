"""`preflight`: tokenize a sample as training will, before the first long step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from posttrain.data.formats import FAMILIES, read_rows
from posttrain.data.records import BadRecord
from posttrain.data.rows import Row, family_of
from posttrain.errors import DataError, Problem, RecipeError
from posttrain.models import load_tokenizer
from posttrain.recipe import STAGES, OnlineConfig, TrainingConfig
from posttrain.recipe.base import RowFamily
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.preflight import PreflightConfig
from posttrain.stages.program import StageContext, StageInput, StageResult, run_program
from posttrain.store.files import write_json
from posttrain.train.pairs import Marked, Pair, encode_marked, encode_pairs
from posttrain.train.prompts import encode_prompts
from posttrain.train.rows import encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNCUT = 1 << 40
"""No row is this long."""

_NOTHING: dict[RowFamily, str] = {
    "chats": "a token to train on; are the answers in the assistant's turns?",
    "documents": "a token to train on",
    "preferences": "two answers that differ as far as `batching.max_length` lets them be read",
    "kto": "an answer with a token to train on",
}
"""What no row of the sample has, where nothing would be trained."""


@dataclass(frozen=True)
class _Sample:
    """What training would make of a sample of the rows."""

    rows: int
    untrainable: int
    """Rows that would be left out."""
    truncated: int
    longest: int
    """Tokens of the longest sequence before it is cut."""
    trainable_share: float
    """Trained tokens a token."""


def main(context: StageContext[PreflightConfig]) -> StageResult:
    """Read the first rows, tokenize them as the method does, and leave `report.json`.

    Inputs: `model`, a model folder of which only the tokenizer is loaded, and `rows`, a source.

    Raises:
        RecipeError: a name under `extra_args` is refused.
        DataError: no row can be read, the method cannot read such rows, or none of them would be
            trained on.
        ModelError: the rows are chats and the model's chat template is missing or cannot write
            them.
    """
    config, source = context.config, context.input("rows")
    _check_extra_args(config)
    stage = STAGES[config.method]
    if not issubclass(stage, TrainingConfig):
        raise TypeError(f"{config.method} trains nothing")
    rows = _sample_rows(source, config.sample_rows)
    _check_family(source, family_of(rows[0]), stage)
    tokenizer = load_tokenizer(context.input("model"))
    if issubclass(stage, OnlineConfig):
        return _of_prompts(context, tokenizer, rows)
    sample = _encode(tokenizer, rows, stage.family, config.max_length)
    if sample.untrainable == sample.rows:
        what = _NOTHING[stage.family]
        raise DataError(f"{source.path}: none of the first {len(rows)} rows has {what}")
    if sample.untrainable:
        context.events.warning(
            f"{sample.untrainable} of {len(rows)} rows have no token to train on and would be "
            "left out"
        )
    report = {
        "rows": sample.rows,
        "untrainable_rows": sample.untrainable,
        "truncated_rows": sample.truncated,
        "longest_tokens": sample.longest,
        "max_length": config.max_length,
        "trainable_share": round(sample.trainable_share, 6),
    }
    return _leave(context, report, _headline(sample))


def _check_extra_args(config: PreflightConfig) -> None:
    if not config.extra_args:
        return
    from posttrain.train.arguments import check_extra_args

    if config.trl_config is None:
        message = f"`{config.method}` is no trainer of TRL's and has all its settings in the recipe"
        raise RecipeError(
            [Problem(f"extra_args.{name}", message, "remove it") for name in config.extra_args]
        )
    problems = check_extra_args(config.extra_args, trl_config=config.trl_config)
    if problems:
        raise RecipeError(problems)


def _sample_rows(rows: StageInput, count: int) -> list[Row]:
    """The first good rows of a source; bad ones are a matter for `prepare`."""
    spec = DatasetSpec.model_validate(rows.spec)
    good = (row for row in read_rows(spec) if not isinstance(row, BadRecord))
    sample = list(islice(good, count))
    if not sample:
        raise DataError(f"{rows.path}: there are no rows")
    return sample


def _check_family(source: StageInput, family: RowFamily, stage: type[TrainingConfig]) -> None:
    wanted = (stage.family, *sorted(stage.also_reads))
    if family not in wanted:
        formats = ", ".join(name for name, of in FAMILIES.items() if of in wanted)
        raise DataError(
            f"{source.path}: its rows are {family}, but {stage.model_fields['stage'].default} "
            f"needs {' or '.join(wanted)}; use rows in one of these formats: {formats}"
        )


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], family: RowFamily, max_length: int
) -> _Sample:
    if family in ("chats", "documents"):
        encodings = encode_rows(tokenizer, rows, max_length)
        return _Sample(
            len(rows),
            encodings.untrainable,
            encodings.truncated,
            encodings.longest,
            encodings.trainable_share,
        )
    if family == "preferences":
        pairs = encode_pairs(tokenizer, rows, max_length)
        longest = max(pair.longest for pair in encode_pairs(tokenizer, rows, _UNCUT))
        return _summed(pairs, {n for n, pair in enumerate(pairs) if pair.trainable}, rows, longest)
    answers = encode_marked(tokenizer, rows, max_length)
    longest = max(answer.tokens for answer in encode_marked(tokenizer, rows, _UNCUT))
    kept = {answer.row for answer in answers if answer.trainable}
    return _summed(answers, kept, rows, longest)


def _summed(
    entries: Sequence[Pair] | Sequence[Marked], kept: set[int], rows: Sequence[Row], longest: int
) -> _Sample:
    """The sample's numbers, from its pairs or marked answers and the rows that can be trained."""
    used = [entry for entry in entries if entry.trainable]
    tokens = sum(entry.tokens for entry in used)
    return _Sample(
        rows=len(rows),
        untrainable=len(rows) - len(kept),
        truncated=sum(entry.cut > 0 for entry in used),
        longest=longest,
        trainable_share=sum(entry.trained for entry in used) / tokens if tokens else 0.0,
    )


def _of_prompts(
    context: StageContext[PreflightConfig], tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> StageResult:
    """For a method that writes the answers itself; `max_length` is its longest prompt."""
    longest_allowed = context.config.max_length
    prompts = [prompt for prompt in encode_prompts(tokenizer, rows, _UNCUT) if prompt is not None]
    short = [prompt for prompt in prompts if len(prompt.input_ids) <= longest_allowed]
    longest = max((len(prompt.input_ids) for prompt in prompts), default=0)
    left_out = len(rows) - len(short)
    if not short:
        raise DataError(
            f"{context.input('rows').path}: none of the first {len(rows)} rows has a prompt of at "
            f"most {longest_allowed} tokens (`rollout.max_prompt_tokens`); the longest has "
            f"{longest:,}"
        )
    if left_out:
        context.events.warning(
            f"{left_out} of {len(rows)} rows have no prompt, or one of more than "
            f"{longest_allowed} tokens (`rollout.max_prompt_tokens`), and would be left out"
        )
    report = {
        "rows": len(rows),
        "untrainable_rows": left_out,
        "truncated_rows": 0,
        "longest_tokens": longest,
        "max_length": longest_allowed,
    }
    said = f"{left_out} left out" if left_out else "none left out"
    return _leave(
        context, report, f"{len(rows)} rows: {len(short)} prompts, longest {longest}, {said}"
    )


def _leave(
    context: StageContext[PreflightConfig], report: Mapping[str, float], headline: str
) -> StageResult:
    write_json(context.output / "report.json", report)
    return StageResult(
        headline=headline, metrics={key: float(value) for key, value in report.items()}
    )


def _headline(sample: _Sample) -> str:
    truncated = f"{sample.truncated} truncated" if sample.truncated else "none truncated"
    return (
        f"{sample.rows} rows: {sample.trainable_share:.0%} of tokens trainable, "
        f"longest {sample.longest}, {truncated}"
    )


if __name__ == "__main__":
    run_program(PreflightConfig, main)
