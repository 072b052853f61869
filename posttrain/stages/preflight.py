"""`preflight`: tokenize a sample as training will, before the first long step."""

from __future__ import annotations

from itertools import islice

from posttrain.data.formats import read_rows
from posttrain.data.records import BadRecord
from posttrain.data.rows import Row
from posttrain.errors import DataError, RecipeError
from posttrain.models import load_tokenizer
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.preflight import PreflightConfig
from posttrain.stages.program import StageContext, StageInput, StageResult, run_program
from posttrain.store.files import write_json
from posttrain.train.rows import Encodings, encode_rows


def main(context: StageContext[PreflightConfig]) -> StageResult:
    """Read the first rows, tokenize them, and leave `report.json`.

    Inputs: `model`, a model folder of which only the tokenizer is loaded, and `rows`, a source.

    Raises:
        RecipeError: a name under `extra_args` is refused.
        DataError: no row can be read, or none has a token that would be trained on.
        ModelError: the rows are chats and the model's chat template is missing or cannot write
            them.
    """
    _check_extra_args(context.config.extra_args)
    rows = _sample(context.input("rows"), context.config.sample_rows)
    tokenizer = load_tokenizer(context.input("model"))
    encodings = encode_rows(tokenizer, rows, context.config.max_length)
    if not encodings.rows:
        raise DataError(
            f"{_source(context.input('rows'))}: none of the first {len(rows)} rows has a token to "
            "train on; are the answers in the assistant's turns?"
        )
    if encodings.untrainable:
        context.events.warning(
            f"{encodings.untrainable} of {len(rows)} rows have no token to train on and would be "
            "left out"
        )
    report = {
        "rows": len(rows),
        "untrainable_rows": encodings.untrainable,
        "truncated_rows": encodings.truncated,
        "longest_tokens": encodings.longest,
        "max_length": context.config.max_length,
        "trainable_share": round(encodings.trainable_share, 6),
    }
    write_json(context.output / "report.json", report)
    return StageResult(
        headline=_headline(len(rows), encodings),
        metrics={key: float(value) for key, value in report.items()},
    )


def _check_extra_args(names: tuple[str, ...]) -> None:
    if not names:
        return
    from posttrain.train.arguments import check_extra_args

    problems = check_extra_args(names)
    if problems:
        raise RecipeError(problems)


def _sample(rows: StageInput, count: int) -> list[Row]:
    """The first good rows of a source; bad ones are a matter for `prepare`."""
    spec = DatasetSpec.model_validate(rows.spec)
    good = (row for row in read_rows(spec) if not isinstance(row, BadRecord))
    sample = list(islice(good, count))
    if not sample:
        raise DataError(f"{_source(rows)}: there are no rows")
    return sample


def _source(rows: StageInput) -> str:
    return str(rows.path)


def _headline(rows: int, encodings: Encodings) -> str:
    truncated = f"{encodings.truncated} truncated" if encodings.truncated else "none truncated"
    return (
        f"{rows} rows: {encodings.trainable_share:.0%} of tokens trainable, "
        f"longest {encodings.longest}, {truncated}"
    )


if __name__ == "__main__":
    run_program(PreflightConfig, main)
