"""`merge`: an adapter becomes part of its base, or several fine-tunes become one.

Folding an adapter in is proven to change nothing: logits before and after are compared, and those
of the model as it was written. A merge of several, or of a model and its base, is another model
than each of them, so all are measured on held-out rows of everything that they were trained on.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import DataError, ModelError
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.recipe.adapters import Quantization
from posttrain.recipe.merge import PROMPTS, SOURCE, MergeConfig
from posttrain.stages.program import StageContext, StageInput, StageResult, run_program
from posttrain.train.processes import prepare_libraries

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.evaluate.perplexity import EncodedRow
    from posttrain.train.merging import Difference

Context = StageContext[MergeConfig]
Perplexities = dict[str, dict[str, float]]
"""By dataset and model; the merged model's name is empty."""

BASE, TUNED = "base", "tuned"
"""What the two ends of an interpolation are called in metrics and messages."""
_MAX_LENGTH = 512
"""Tokens of a held-out row; the logits at its end depend on all of them."""
_BATCH_SIZE = 16
"""Rows of a forward pass while perplexity is measured, at most."""


def main(context: Context) -> StageResult:
    """Merge, save, and compare with what was written.

    Inputs: `model`, an adapter with its base, and `prompts`, a prepared dataset whose held-out
    rows are the check. Of several models: `model:NAME` for each, `prompts:NAME` for each dataset
    that they were trained on, `base` with TIES and DARE, and `model`, the adapters' base, where
    they become one adapter. Of an interpolation: `model`, `base`, and `prompts:NAME`.

    Raises:
        DataError: no held-out row to check on.
        ModelError: models that cannot be merged, or logits that differ by more than
            `max_logit_difference`.
    """
    prepare_libraries()
    if not context.config.models and not context.config.interpolates:
        return _fold(context)
    if context.config.into == "adapter":
        return _combine(context)
    return _merge(context)


# One adapter


def _fold(context: Context) -> StageResult:
    from posttrain.train.merging import compare_logits
    from posttrain.train.outputs import final_logits, max_difference, stored_dtype

    config, adapter = context.config, context.input("model")
    tokenizer = load_tokenizer(adapter)
    rows = _held_out(context, tokenizer)[""]
    prompts = _prompts(context, rows)
    metrics: dict[str, float] = {}
    if config.quantization is not None:
        context.events.phase("measuring the 4-bit model")
        quantized = _load_quantized(adapter, config.quantization)
        reference = final_logits(quantized, prompts)
        metrics["quantized_perplexity"] = _perplexity(context, quantized, tokenizer, rows)
        del quantized
    context.events.phase("merging")
    model, difference = _folded(context, adapter, prompts)
    merged = final_logits(model, prompts)
    stored = _save(context, model, tokenizer, stored_dtype(_weights(adapter)), prompts)
    metrics |= {
        "max_logit_difference": difference,
        "rounding_logit_difference": max_difference(merged, stored),
        "check_prompts": len(prompts),
    }
    apart = None
    if config.quantization is not None:
        apart = compare_logits(reference, stored)
        metrics |= {
            "quantized_logit_difference": apart.largest,
            "quantized_mean_logit_difference": apart.mean,
            "quantized_divergence": apart.divergence,
            "perplexity": _perplexity(context, model, tokenizer, rows),
        }
    return StageResult(headline=_fold_headline(config, metrics, apart), metrics=metrics)


def _folded(
    context: Context, adapter: StageInput, prompts: list[list[int]]
) -> tuple[PreTrainedModel, float]:
    """The adapter as part of its base in float32, and the largest change of a logit by that."""
    from posttrain.train.outputs import final_logits, max_difference

    bound = context.config.max_logit_difference
    if adapter.kind != "adapter" or adapter.base is None:
        raise ModelError("merge needs an adapter, and the stage before it left complete weights")
    model = load_causal_lm(adapter, "float32")
    before = final_logits(model, prompts)
    if not hasattr(model, "merge_and_unload"):
        raise ModelError(
            "this kind of adapter cannot become part of the weights; leave the merge out: "
            "`evaluate` takes adapters as they are"
        )
    model = model.merge_and_unload()
    difference = max_difference(before, final_logits(model, prompts))
    if difference > bound:
        raise ModelError(
            f"merging changes the model: logits differ by up to {difference:.2g} on "
            f"{len(prompts)} prompts, and `max_logit_difference` is {bound:g}"
        )
    return model, difference


def _load_quantized(adapter: StageInput, quantization: Quantization) -> PreTrainedModel:
    """The model that was trained: the adapter on its base in 4 bits, computing in float32."""
    from peft import PeftModel

    from posttrain.train.quantization import load_quantized

    base = StageInput(kind="model", path=str(_weights(adapter)), digest="")
    loaded = load_quantized(base, quantization, "float32")
    return PeftModel.from_pretrained(loaded, adapter.path).eval()


def _fold_headline(
    config: MergeConfig, metrics: dict[str, float], quantized: Difference | None
) -> str:
    from posttrain.evaluate.results import three_digits

    count, rounding = int(metrics["check_prompts"]), metrics["rounding_logit_difference"]
    text = (
        f"merged; logits differ by at most {metrics['max_logit_difference']:.1e} on {count} "
        f"{'prompt' if count == 1 else 'prompts'} (bound {config.max_logit_difference:g})"
    )
    if rounding:
        text += f"; rounding to 16 bits adds {rounding:.2g}"
    if quantized is not None:
        text += (
            f"; from the 4-bit model that was trained by at most {quantized.largest:.2g} (mean "
            f"{quantized.mean:.2g}, divergence {quantized.divergence:.2g} nats a token), "
            f"perplexity {three_digits(metrics['perplexity'])} "
            f"(4-bit {three_digits(metrics['quantized_perplexity'])})"
        )
    return text


# Several models


def _merge(context: Context) -> StageResult:
    from posttrain.train.merging import check_alike
    from posttrain.train.outputs import stored_dtype

    sources = _sources(context)
    compared = dict(sources)
    if context.config.needs_base:
        compared["base"] = context.input("base")
    tokenizers = {name: load_tokenizer(source) for name, source in compared.items()}
    check_alike({name: _weights(source) for name, source in compared.items()}, tokenizers)
    first = next(iter(sources))
    tokenizer = tokenizers[first]
    for name in sources:
        if tokenizers[name].chat_template != tokenizer.chat_template:
            context.events.warning(f"`{name}` has another chat template; the merge has `{first}`'s")
    held_out = _held_out(context, tokenizer)
    prompts = _prompts(context, next(iter(held_out.values())))
    measured: Perplexities = {dataset: {} for dataset in held_out}
    dtype = stored_dtype(_weights(sources[BASE if context.config.interpolates else first]))
    with _scratch(context) as scratch:
        folders = []
        for name, source in sources.items():
            context.events.phase(f"measuring {name}")
            model = _complete(context, source, prompts)
            _measure(context, model, name, tokenizer, held_out, measured)
            folder = Path(source.path)
            if source.kind == "adapter":
                folder = scratch / f"folded-{name}"
                model.save_pretrained(folder)
            folders.append(folder)
            del model
        context.events.phase("merging")
        merged = _mixed(context, folders, scratch, dtype)
    _save(context, merged, tokenizer, dtype, prompts)
    _measure(context, merged, "", tokenizer, held_out, measured)
    return _result_of_several(context, measured)


def _mixed(
    context: Context, folders: list[Path], scratch: Path, dtype: torch.dtype
) -> PreTrainedModel:
    from posttrain.train.interpolation import interpolate_weights
    from posttrain.train.merging import merge_weights

    config = context.config
    if config.interpolates:
        tuned, base = folders
        return interpolate_weights(base, tuned, config.part, scratch, dtype)
    changed_from = _weights(context.input("base")) if config.needs_base else None
    return merge_weights(config, folders, changed_from, scratch, dtype)


def _combine(context: Context) -> StageResult:
    from posttrain.train.merging import adapter_name, combine_adapters
    from posttrain.train.outputs import final_logits, max_difference, save_adapter

    config, base, sources = context.config, context.input("model"), _sources(context)
    tokenizer = load_tokenizer(next(iter(sources.values())))
    held_out = _held_out(context, tokenizer)
    prompts = _prompts(context, next(iter(held_out.values())))
    measured: Perplexities = {dataset: {} for dataset in held_out}
    context.events.phase("merging")
    folders = [Path(source.path) for source in sources.values()]
    model = combine_adapters(config, load_causal_lm(base, "float32"), folders)
    _measure(context, model, "", tokenizer, held_out, measured)
    expected = final_logits(model, prompts)
    for number, name in enumerate(sources):
        context.events.phase(f"measuring {name}")
        model.set_adapter(adapter_name(number))
        _measure(context, model, name, tokenizer, held_out, measured)
        model.delete_adapter(adapter_name(number))
    context.events.phase("saving and checking")
    model.set_adapter("default")
    save_adapter(model, tokenizer, context.output, base_digest=base.digest)
    written = StageInput(kind="adapter", path=str(context.output), digest="", base=base.path)
    difference = max_difference(expected, final_logits(load_causal_lm(written, "float32"), prompts))
    if difference > config.max_logit_difference:
        raise ModelError(
            f"the saved adapter is not the one in memory: logits differ by {difference:.2g} "
            f"(bound {config.max_logit_difference:g})"
        )
    return _result_of_several(context, measured)


def _complete(context: Context, source: StageInput, prompts: list[list[int]]) -> PreTrainedModel:
    """One of several models with all its weights, in float32."""
    if source.kind == "adapter":
        return _folded(context, source, prompts)[0]
    return load_causal_lm(source, "float32")


def _sources(context: Context) -> dict[str, StageInput]:
    """The models to merge, by the recipe's names, in its order; of an interpolation its ends."""
    if context.config.interpolates:
        return {TUNED: context.input("model"), BASE: context.input("base")}
    names = [source.model for source in context.config.models]
    return {name: context.input(SOURCE + name) for name in names}


def _result_of_several(context: Context, measured: Perplexities) -> StageResult:
    from posttrain.evaluate.results import three_digits

    metrics, texts = {}, []
    for dataset, perplexities in measured.items():
        for name, perplexity in perplexities.items():
            key = "/".join(filter(None, ("perplexity", dataset, name)))
            # MLflow takes fewer characters in a metric's name than a recipe in a dataset's.
            metrics[re.sub(r"[^\w./-]", "_", key)] = perplexity
        merged = perplexities[""]
        others = {name: value for name, value in perplexities.items() if name}
        if merged > max(others.values()):
            context.events.warning(f"on {dataset} the merge is worse than each of its models")
        each = ", ".join(f"{name} {three_digits(value)}" for name, value in others.items())
        texts.append(f"{dataset} {three_digits(merged)} ({each})")
    return StageResult(
        headline=f"{_what(context.config)}; perplexity on " + ", on ".join(texts),
        metrics=metrics,
        details={
            "perplexity": {d: {n or "merged": v for n, v in m.items()} for d, m in measured.items()}
        },
    )


def _what(config: MergeConfig) -> str:
    if config.interpolates:
        return f"interpolated, {config.part:g} of the way from base to tuned"
    return f"{config.method} of {len(config.models)}"


# What they share


def _save(
    context: Context,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    prompts: list[list[int]],
) -> list[torch.Tensor]:
    """Write the model, check what was written, and return the logits of what was written.

    In the precision of what was merged: merging makes no file bigger. Afterwards the model has
    the rounded weights, in float32.
    """
    import torch

    from posttrain.train.outputs import cast_weights, check_reload, final_logits, save_model

    context.events.phase("saving and checking")
    cast_weights(model, dtype)
    save_model(model, tokenizer, context.output)
    cast_weights(model, torch.float32)
    if torch.cuda.is_available():
        model.cuda()
    logits = final_logits(model, prompts)
    check_reload(context.output, logits, prompts, context.config.max_logit_difference)
    return logits


def _weights(model: StageInput) -> Path:
    """Folder of a model's complete weights; of an adapter, its base's."""
    return Path(model.base if model.kind == "adapter" and model.base else model.path)


def _held_out(context: Context, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[EncodedRow]]:
    """Held-out rows, answers included, by dataset; that of a single adapter has no name."""
    from posttrain.data.prepared import PreparedDataset
    from posttrain.data.rows import wanted_text
    from posttrain.evaluate.perplexity import EncodedRow
    from posttrain.train.rows import encode_rows
    from posttrain.train.tokenize import Encoded

    config = context.config
    folds = not config.models and not config.interpolates
    measured = not folds or config.quantization is not None
    limit = max(config.check_prompts, config.perplexity_rows if measured else 0)
    found = {}
    for key, dataset in context.job.inputs.items():
        if key != PROMPTS.removesuffix(":") and not key.startswith(PROMPTS):
            continue
        held_out = PreparedDataset.open(Path(dataset.path)).validation(limit)
        rows = [wanted_text(row) for row in held_out]
        sequences = encode_rows(tokenizer, rows, _MAX_LENGTH).every
        kept = [
            EncodedRow(row.id, Encoded(one.input_ids[:_MAX_LENGTH], one.labels[:_MAX_LENGTH]))
            for row, one in zip(rows, sequences, strict=True)
        ]
        name = key.partition(":")[2]
        found[name] = [row for row in kept if row.encoded.trainable]
        if not found[name]:
            where = f"the dataset `{name}`" if name else "the dataset"
            raise DataError(f"{where} has no held-out row on which the merge can be checked")
    return found


def _prompts(context: Context, rows: list[EncodedRow]) -> list[list[int]]:
    return [row.encoded.input_ids for row in rows[: context.config.check_prompts]]


def _measure(
    context: Context,
    model: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    held_out: dict[str, list[EncodedRow]],
    measured: Perplexities,
) -> None:
    """Note a model's perplexity on each dataset."""
    for dataset, rows in held_out.items():
        measured[dataset][name] = _perplexity(context, model, tokenizer, rows)


def _perplexity(
    context: Context,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[EncodedRow],
) -> float:
    from posttrain.evaluate.perplexity import score_rows, summarise

    return summarise(score_rows(model, tokenizer, rows, _BATCH_SIZE, context.events)).perplexity


@contextmanager
def _scratch(context: Context) -> Iterator[Path]:
    """A folder for weights in between, beside the output; what a killed run left is removed."""
    folder = context.stage_dir / "scratch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_program(MergeConfig, main)
