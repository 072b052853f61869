"""The YAML on top of a card, which the Hub reads: base model, data, licence, results."""

from __future__ import annotations

from posttrain.model_card.facts import Facts


def header(facts: Facts, name: str, license: str | None) -> str:
    """Metadata in the form of the Hub's model cards, without the lines of dashes.

    Keys whose value is not known are left out. A base or a dataset that is not on the Hub has no
    id there, and is named in the text alone.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for task in facts.results.tasks if facts.results else ():
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=task.task.partition(":")[0],
                dataset_name=task.task,
                metric_type=task.metric,
                metric_value=round(task.value, 6),
                metric_args={"items": task.n},
            )
        )
    languages = sorted({code for one in facts.datasets for code in one.languages})
    data = ModelCardData(
        base_model=_one_or_many(facts.hub_bases),
        datasets=list(facts.hub_datasets) or None,
        eval_results=results or None,
        language=_one_or_many(tuple(languages)),
        library_name="transformers",
        license=license,
        model_name=name if results else None,
        pipeline_tag="text-generation",
        tags=sorted({"posttrain", *(one.manifest.stage for one in facts.trainings)}),
    )
    return str(data.to_yaml()).strip()


def _one_or_many(values: tuple[str, ...]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else list(values) or None
