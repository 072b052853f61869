"""`evaluate`: benchmarks, held-out perplexity, test sets and sample answers of one model.

Output: `results.json`, `items.parquet`, `perplexity.parquet`, `samples.json`; equal inputs give
equal bytes, whether or not some of the answers were known already.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import DataError, ModelError
from posttrain.evaluate.items import write_items, write_perplexity
from posttrain.evaluate.offline import stay_local
from posttrain.evaluate.results import (
    EvaluationResults,
    Settings,
    TaskSettings,
    three_digits,
)
from posttrain.hardware import resolve_dtype
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.stages.program import StageContext, StageInput, StageResult, run_program
from posttrain.store.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.prepared import PreparedDataset
    from posttrain.evaluate.harness import Benchmarks
    from posttrain.evaluate.language_models import RememberingLM, Weights

PERPLEXITY_MAX_LENGTH = 1024
"""Longest held-out row that is scored, in tokens, as far as the model reads that far."""


def main(context: StageContext[EvaluateConfig]) -> StageResult:
    """Measure the input model with every item kept.

    Raises:
        DataError: nothing to measure, or a benchmark or test set that cannot be asked.
        ModelError: the model cannot be loaded, or its chat template cannot write the rows.
    """
    config, events, source = context.config, context.events, context.input("model")
    stay_local(config.offline_root)
    from posttrain.evaluate import held_out_rows
    from posttrain.evaluate.harness import ask_benchmarks, load_benchmarks
    from posttrain.evaluate.language_models import Weights, check_backend
    from posttrain.evaluate.test_rows import load_test_sets
    from posttrain.evaluate.test_sets import MeasuredTests, run_test_sets
    from posttrain.models import load_tokenizer

    dataset, others = held_out_rows.open_held_out(context.job.inputs, config)
    datasets = [dataset, *others] if dataset else others
    if not config.tasks and not config.test_sets and not datasets:
        raise DataError("evaluate: nothing to measure; name `tasks`, `test_sets` or a `dataset`")
    # Before the model: a misspelt task should not cost the minutes that loading one takes.
    check_backend(config.backend, source)
    benchmarks = load_benchmarks(_benchmarks(context, dataset.dataset if dataset else None))
    test_sets = load_test_sets(context)
    dtype, max_length = resolve_dtype(config.dtype), _max_length(source)
    tokenizer, weights = load_tokenizer(source), Weights(source, dtype, events)

    rows = held_out_rows.score(datasets, weights, tokenizer, config, max_length, events)
    samples = held_out_rows.answer_samples(dataset, weights, tokenizer, config, events)
    tests = MeasuredTests((), (), ())
    if test_sets:
        tests = run_test_sets(context, weights.load(), tokenizer, test_sets)
    if config.tasks:
        events.phase(f"asking {', '.join(config.tasks)}")
    # Last, as vLLM takes the GPU's memory for itself.
    asked = ask_benchmarks(_language_model(context, weights, tokenizer, dtype), benchmarks)

    settings = _settings(config, tokenizer, dtype, max_length, asked.settings, tests.settings)
    perplexity, other_perplexities = held_out_rows.summaries(rows, dataset, others)
    results = EvaluationResults(
        tasks=(*asked.results, *tests.results),
        perplexity=perplexity,
        settings=settings,
        settings_digest=settings.digest,
        other_perplexities=other_perplexities,
    )
    results.save(context.output)
    write_items(context.output, [*asked.items, *tests.items])
    write_perplexity(context.output, rows)
    write_json(context.output / "samples.json", [sample.model_dump() for sample in samples])
    return StageResult(
        metrics=_metrics(results),
        headline=_headline(results),
        details=results.model_dump(mode="json"),
    )


def _benchmarks(
    context: StageContext[EvaluateConfig], dataset: PreparedDataset | None
) -> Benchmarks:
    """What lm-eval shall ask, with our own tasks written for it."""
    from posttrain.evaluate.harness import Benchmarks

    config = context.config
    folders = [Path(folder).resolve() for folder in config.task_folders]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise DataError(f"evaluate.task_folders: no folder at {', '.join(missing)}")
    own = _write_own_tasks(context, dataset)
    return Benchmarks(
        tasks=config.tasks,
        task_folders=(*folders, own) if own else tuple(folders),
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        chat_template=config.chat_template,
        offline_root=Path(config.offline_root).resolve() if config.offline_root else None,
        seed=config.seed,
    )


def _write_own_tasks(
    context: StageContext[EvaluateConfig], dataset: PreparedDataset | None
) -> Path | None:
    from posttrain.evaluate.python_docs_task import TASKS, write_tasks

    names = [name for name in dict.fromkeys(context.config.tasks) if name in TASKS]
    if not names:
        return None
    if dataset is None:
        raise DataError(
            f"evaluate.tasks: `{names[0]}` divides its items by what a prepared dataset contains; "
            "name that dataset as `dataset`"
        )
    from posttrain.data.python_docs import choices

    folder = context.stage_dir / "tasks"
    write_tasks(
        folder,
        names,
        choices(),
        trained={row.subject for row in dataset.train() if row.subject},
        held_out={
            row.subject
            for side in (dataset.validation(), dataset.test())
            for row in side
            if row.subject
        },
    )
    return folder


def _max_length(source: StageInput) -> int:
    from transformers import AutoConfig

    folder = source.base or source.path
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: its config.json cannot be read: {error}") from error
    window = getattr(config, "max_position_embeddings", None) or PERPLEXITY_MAX_LENGTH
    return min(PERPLEXITY_MAX_LENGTH, int(window))


def _language_model(
    context: StageContext[EvaluateConfig],
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
) -> RememberingLM:
    """Who answers the benchmarks, with what this model has answered before."""
    from posttrain.evaluate.item_cache import AnswerCache, Respondent
    from posttrain.evaluate.language_models import RememberingLM, load_transformers, load_vllm

    config, source, answers = context.config, context.input("model"), None
    if context.job.cache is not None:
        respondent = Respondent(
            model=source.digest,
            backend=config.backend,
            dtype=dtype,
            seed=config.seed,
            lm_eval=importlib.metadata.version("lm_eval"),
        )
        folder = Path(context.job.cache) / "answers"
        answers = AnswerCache(folder, respondent, context.events.warning)

    def load() -> Any:
        if config.backend == "vllm":
            weights.release()
            return load_vllm(source, dtype, config.seed)
        return load_transformers(config.backend, weights.load(), tokenizer, config.batch_size)

    return RememberingLM(load, context.events, seed=config.seed, answers=answers)


def _settings(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    max_length: int,
    tasks: tuple[TaskSettings, ...],
    test_sets: tuple[dict[str, Any], ...],
) -> Settings:
    template = str(tokenizer.chat_template) if tokenizer.chat_template else None
    return Settings(
        lm_eval=importlib.metadata.version("lm_eval"),
        tasks=tasks,
        limit=config.limit,
        seed=config.seed,
        dtype=dtype,
        questions_in_chat_template=config.chat_template,
        chat_template=hashlib.sha256(template.encode()).hexdigest() if template else None,
        perplexity_rows=config.max_perplexity_rows,
        perplexity_max_length=max_length,
        backend=config.backend,
        test_sets=test_sets,
    )


def _metrics(results: EvaluationResults) -> dict[str, float]:
    metrics = {task.task: task.value for task in results.tasks}
    if results.perplexity:
        metrics["perplexity"] = results.perplexity.perplexity
        metrics["bits_per_byte"] = results.perplexity.bits_per_byte
    for name, other in results.other_perplexities.items():
        metrics[f"perplexity_{name}"] = other.perplexity
        metrics[f"bits_per_byte_{name}"] = other.bits_per_byte
    return metrics


def _headline(results: EvaluationResults) -> str:
    parts = []
    for task in results.tasks:
        error = f" ± {task.standard_error:.3f}" if task.standard_error is not None else ""
        parts.append(f"{task.task} {task.value:.3f}{error} (n={task.n})")
    if results.perplexity:
        parts.append(f"perplexity {three_digits(results.perplexity.perplexity)}")
    for name, other in results.other_perplexities.items():
        parts.append(f"perplexity on {name} {three_digits(other.perplexity)}")
    return ", ".join(parts)


if __name__ == "__main__":
    run_program(EvaluateConfig, main)
