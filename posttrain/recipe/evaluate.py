"""`evaluate`: benchmarks, held-out perplexity and sample answers, every item kept."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.base import ArtifactKind, DType, StageConfig, Strict, unhashed
from posttrain.recipe.test_sets import TestSet

OTHER = "dataset:"
"""Begins the inputs that hold a further prepared dataset; then comes its name."""


class Samples(Strict):
    """Greedy answers to held-out prompts, to be read by a person."""

    count: Annotated[int, Field(ge=0)] = 2
    """Prompts answered."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 48
    """Longest answer, in tokens."""


class EvaluateConfig(StageConfig):
    """Measures the current model, and the base on the same items, with the same settings."""

    produces: ClassVar[ArtifactKind] = "evaluation"
    code_version: ClassVar[int] = 2

    stage: Literal["evaluate"] = "evaluate"
    model: str | None = None
    """Name of an earlier stage to evaluate. Default: the model of the stage before."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval tasks (`mmlu`, `hellaswag`, ...) or of ours (`python_docs_held_out`,
    `python_docs_trained`)."""
    task_folders: tuple[str, ...] = ()
    """Folders with lm-eval task YAMLs of your own."""
    dataset: str | None = None
    """Dataset whose held-out rows give perplexity and sample prompts. Default: the one last
    trained on."""
    other_datasets: tuple[str, ...] = ()
    """Further datasets whose held-out rows give a perplexity each, such as general text that must
    not be forgotten."""
    test_sets: tuple[TestSet, ...] = ()
    """Prompts of your own with reference answers, and what is measured of the model's answers."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Items a task (a subject, for groups such as MMLU), drawn with a fixed seed. Default: all."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question. Default: what the task says."""
    chat_template: bool = False
    """Wrap questions in the model's chat template."""
    max_perplexity_rows: Annotated[int, Field(ge=1)] = 200
    """Held-out rows used for perplexity; the first ones by content order."""
    samples: Samples = Samples()
    """Answers to look at."""
    dtype: DType = "auto"
    """Precision of the weights while evaluating."""
    backend: Literal["shared_prefixes", "hf", "vllm"] = "shared_prefixes"
    """Who answers lm-eval. `shared_prefixes`: reads the part that several questions share once,
    with the same log-likelihoods. `hf`: lm-eval's own, for models without a standard cache. `vllm`:
    lm-eval's, on GPUs, where vLLM is installed."""
    batch_size: Annotated[int, Field(ge=1)] = unhashed(16, "Sequences a forward pass.")
    offline_root: str | None = unhashed(
        None,
        "Folder laid out like the Hub (`cais/mmlu/...`) to read benchmarks from instead of it.",
    )
    seed: int = 0
    """Seed of the items drawn under `limit` and of few-shot examples."""

    def names(self) -> tuple[str, ...]:
        """What a gate may name: the tasks, and `DATASET:METRIC` for the metrics of test sets."""
        own = (f"{one.dataset}:{metric.title}" for one in self.test_sets for metric in one.metrics)
        return (*dict.fromkeys(self.tasks), *own)
