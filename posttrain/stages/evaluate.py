"""`evaluate`: benchmarks, held-out perplexity and sample answers of one model.

Output: `results.json`, `items.parquet`, `perplexity.parquet`, `samples.json`; equal inputs give
equal bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import DataError
from posttrain.evaluate.items import PerplexityRow, write_items, write_perplexity
from posttrain.evaluate.offline import stay_local
from posttrain.evaluate.results import (
    EvaluationResults,
    PerplexityResult,
    Settings,
    TaskSettings,
    three_digits,
)
from posttrain.hardware import resolve_dtype
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.store.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.data.prepared import PreparedDataset
    from posttrain.evaluate.harness import Benchmarks
    from posttrain.evaluate.perplexity import EncodedRow

PERPLEXITY_MAX_LENGTH = 1024
"""Longest held-out row that is scored, in tokens, as far as the model reads that far."""


def main(context: StageContext[EvaluateConfig]) -> StageResult:
    """Measure the input model with every item kept.

    Raises:
        DataError: nothing to measure, or a benchmark that cannot be asked.
        ModelError: the model cannot be loaded, or its chat template cannot write the rows.
    """
    config = context.config
    stay_local(config.offline_root)
    dataset = _open_dataset(context)
    if not config.tasks and dataset is None:
        raise DataError("evaluate: nothing to measure; name `tasks`, a `dataset`, or both")
    from posttrain.evaluate.harness import load_benchmarks, run_benchmarks
    from posttrain.models import load_causal_lm, load_tokenizer

    # Before the model: a misspelt task should not cost the minutes that loading one takes.
    benchmarks = load_benchmarks(_benchmarks(context, dataset))
    context.events.phase("loading the model")
    dtype = resolve_dtype(config.dtype)
    tokenizer = load_tokenizer(context.input("model"))
    model = load_causal_lm(context.input("model"), dtype)
    max_length = _max_length(model)

    rows = _measure_rows(context, model, tokenizer, dataset, max_length)
    _write_samples(context, model, tokenizer, dataset)
    if config.tasks:
        context.events.phase(f"asking {', '.join(config.tasks)}")
    measured = run_benchmarks(model, tokenizer, benchmarks, config.batch_size, context.events)

    write_items(context.output, measured.items)
    write_perplexity(context.output, rows)
    settings = _settings(config, tokenizer, dtype, max_length, measured.settings)
    results = EvaluationResults(
        tasks=measured.results,
        perplexity=_summary(rows),
        settings=settings,
        settings_digest=settings.digest,
    )
    results.save(context.output)
    return StageResult(
        metrics=_metrics(results),
        headline=_headline(results),
        details=results.model_dump(mode="json"),
    )


def _open_dataset(context: StageContext[EvaluateConfig]) -> PreparedDataset | None:
    if "dataset" not in context.job.inputs:
        return None
    from posttrain.data.prepared import PreparedDataset

    return PreparedDataset.open(Path(context.input("dataset").path))


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


def _max_length(model: PreTrainedModel) -> int:
    window = getattr(model.config, "max_position_embeddings", None) or PERPLEXITY_MAX_LENGTH
    return min(PERPLEXITY_MAX_LENGTH, int(window))


def _measure_rows(
    context: StageContext[EvaluateConfig],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PreparedDataset | None,
    max_length: int,
) -> list[PerplexityRow]:
    """Score the held-out rows; none without a dataset of chats or documents."""
    from posttrain.evaluate.perplexity import score_rows

    if dataset is None:
        return []
    if dataset.family not in ("chats", "documents"):
        context.events.warning(f"no perplexity: rows of {dataset.family} have no one right text")
        return []
    context.events.phase("scoring held-out rows")
    rows = _encode(tokenizer, dataset, context.config.max_perplexity_rows, max_length)
    scored = score_rows(model, tokenizer, rows, context.config.batch_size, context.events)
    if len(scored) < len(rows):
        context.events.warning(f"{len(rows) - len(scored)} held-out rows have no token to score")
    return scored


def _encode(
    tokenizer: PreTrainedTokenizerBase, dataset: PreparedDataset, limit: int, max_length: int
) -> list[EncodedRow]:
    from posttrain.data.rows import Chat, Document
    from posttrain.evaluate.perplexity import EncodedRow
    from posttrain.train.tokenize import encode_chat, encode_document

    rows = []
    for row in dataset.unseen(limit):
        if isinstance(row, Chat):
            rows.append(EncodedRow(row.id, encode_chat(tokenizer, row.messages, max_length)))
        elif isinstance(row, Document):
            rows.append(EncodedRow(row.id, encode_document(tokenizer, row.text, max_length)))
    return rows


def _write_samples(
    context: StageContext[EvaluateConfig],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PreparedDataset | None,
) -> None:
    from posttrain.data.rows import Chat, Document
    from posttrain.evaluate.samples import answer_prompts

    wanted = context.config.samples
    rows = dataset.unseen(wanted.count) if dataset and wanted.count else []
    answerable = [row for row in rows if isinstance(row, Chat | Document)]
    if answerable:
        context.events.phase("answering sample prompts")
    samples = answer_prompts(model, tokenizer, answerable, wanted.max_new_tokens)
    write_json(context.output / "samples.json", [sample.model_dump() for sample in samples])


def _settings(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    max_length: int,
    tasks: tuple[TaskSettings, ...],
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
    )


def _summary(rows: list[PerplexityRow]) -> PerplexityResult | None:
    from posttrain.evaluate.perplexity import summarise

    return summarise(rows) if rows else None


def _metrics(results: EvaluationResults) -> dict[str, float]:
    metrics = {task.task: task.value for task in results.tasks}
    if results.perplexity:
        metrics["perplexity"] = results.perplexity.perplexity
        metrics["bits_per_byte"] = results.perplexity.bits_per_byte
    return metrics


def _headline(results: EvaluationResults) -> str:
    parts = []
    for task in results.tasks:
        error = f" ± {task.standard_error:.3f}" if task.standard_error is not None else ""
        parts.append(f"{task.task} {task.value:.3f}{error} (n={task.n})")
    if results.perplexity:
        parts.append(f"perplexity {three_digits(results.perplexity.perplexity)}")
    return ", ".join(parts)


if __name__ == "__main__":
    run_program(EvaluateConfig, main)
