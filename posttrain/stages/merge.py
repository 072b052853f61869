"""`merge`: fold an adapter into its base and prove that nothing else changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.prepared import PreparedDataset
from posttrain.errors import DataError, ModelError
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.recipe.merge import MergeConfig
from posttrain.stages.program import StageContext, StageInput, StageResult, run_program
from posttrain.train.processes import prepare_libraries
from posttrain.train.rows import encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_LENGTH = 512
"""Tokens of a check prompt; the logits at its end depend on all of them."""


def main(context: StageContext[MergeConfig]) -> StageResult:
    """Merge in float32, compare logits with the adapter's, save, and compare again from disk.

    Inputs: `model`, an adapter with its base, and `prompts`, a prepared dataset whose held-out
    rows are the check.

    Raises:
        DataError: no held-out row to check on.
        ModelError: not an adapter, or logits that differ by more than `max_logit_difference`.
    """
    import torch

    from posttrain.train.outputs import (
        cast_weights,
        check_reload,
        final_logits,
        max_difference,
        save_model,
        stored_dtype,
    )

    prepare_libraries()
    adapter, bound = context.input("model"), context.config.max_logit_difference
    base = _base_of(adapter)
    tokenizer = load_tokenizer(adapter)
    prompts = _prompts(context, tokenizer)
    context.events.phase("merging")
    model = load_causal_lm(adapter, "float32")
    before = final_logits(model, prompts)
    model = model.merge_and_unload()
    merged = final_logits(model, prompts)
    difference = max_difference(before, merged)
    if difference > bound:
        raise ModelError(
            f"merging changes the model: logits differ by up to {difference:.2g} on "
            f"{len(prompts)} prompts, and `max_logit_difference` is {bound:g}"
        )
    context.events.phase("saving and checking")
    # In its base's precision: merging makes no file bigger.
    cast_weights(model, stored_dtype(base))
    save_model(model, tokenizer, context.output)
    cast_weights(model, torch.float32)
    stored = final_logits(model, prompts)
    check_reload(context.output, stored, prompts, bound)
    return _result(len(prompts), bound, difference, max_difference(merged, stored))


def _base_of(adapter: StageInput) -> Path:
    if adapter.kind != "adapter" or adapter.base is None:
        raise ModelError("merge needs an adapter, and the stage before it left complete weights")
    return Path(adapter.base)


def _prompts(
    context: StageContext[MergeConfig], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Held-out rows as the model reads them, answers included."""
    prepared = PreparedDataset.open(Path(context.input("prompts").path))
    rows = prepared.validation(context.config.check_prompts)
    encodings = encode_rows(tokenizer, rows, _MAX_LENGTH)
    if not encodings.rows:
        raise DataError("the dataset has no held-out row on which the merged model can be checked")
    return [row.input_ids for row in encodings.rows]


def _result(prompts: int, bound: float, difference: float, rounding: float) -> StageResult:
    noun = "prompt" if prompts == 1 else "prompts"
    rounded = f"; rounding to 16 bits adds {rounding:.2g}" if rounding else ""
    return StageResult(
        headline=(
            f"merged; logits differ by at most {difference:.1e} on {prompts} {noun} "
            f"(bound {bound:g}){rounded}"
        ),
        metrics={
            "max_logit_difference": difference,
            "rounding_logit_difference": rounding,
            "check_prompts": prompts,
        },
    )


if __name__ == "__main__":
    run_program(MergeConfig, main)
