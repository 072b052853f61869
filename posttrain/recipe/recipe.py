"""The recipe: all that a user writes, as one frozen model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_serializer
from pydantic_core import PydanticCustomError

from posttrain.recipe.base import StageConfig, Strict, unhashed
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.dpo import DpoConfig
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.recipe.gate import GateConfig
from posttrain.recipe.grpo import GrpoConfig
from posttrain.recipe.judge import JudgeConfig
from posttrain.recipe.kto import KtoConfig
from posttrain.recipe.merge import MergeConfig
from posttrain.recipe.mix import MixConfig
from posttrain.recipe.orpo import OrpoConfig
from posttrain.recipe.ppo import PpoConfig
from posttrain.recipe.prepare import PrepareConfig
from posttrain.recipe.pretrain import PretrainConfig
from posttrain.recipe.register import RegisterConfig
from posttrain.recipe.reward import RewardConfig
from posttrain.recipe.rloo import RlooConfig
from posttrain.recipe.sft import SftConfig

STAGES: dict[str, type[StageConfig]] = {
    "prepare": PrepareConfig,
    "mix": MixConfig,
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "ppo": PpoConfig,
    "grpo": GrpoConfig,
    "rloo": RlooConfig,
    "dpo": DpoConfig,
    "orpo": OrpoConfig,
    "kto": KtoConfig,
    "merge": MergeConfig,
    "evaluate": EvaluateConfig,
    "judge": JudgeConfig,
    "gate": GateConfig,
    "register": RegisterConfig,
}
"""Stage kinds that a recipe may name, in the order in which they usually stand."""


def _tag_stage(entry: Any) -> Any:
    """Turn `{sft: {...}}`, as written, into `{stage: sft, ...}`, as validated."""
    if isinstance(entry, StageConfig):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise PydanticCustomError(
            "stage_shape", "a stage is one key with its settings, such as `- merge: {{}}`"
        )
    kind, body = next(iter(entry.items()))
    if kind not in STAGES:
        raise PydanticCustomError(
            "stage_kind",
            "there is no stage `{kind}`; the stages are {known}",
            {"kind": str(kind), "known": ", ".join(STAGES)},
        )
    if body is not None and not isinstance(body, dict):
        raise PydanticCustomError(
            "stage_body", "the settings of `{kind}` must be keys and values", {"kind": kind}
        )
    return {**(body or {}), "stage": kind}


AnyStage = Annotated[
    Annotated[
        PrepareConfig
        | MixConfig
        | PretrainConfig
        | SftConfig
        | RewardConfig
        | PpoConfig
        | GrpoConfig
        | RlooConfig
        | DpoConfig
        | OrpoConfig
        | KtoConfig
        | MergeConfig
        | EvaluateConfig
        | JudgeConfig
        | GateConfig
        | RegisterConfig,
        Field(discriminator="stage"),
    ],
    BeforeValidator(_tag_stage),
]


class Tracking(Strict):
    """Where runs are recorded. Changes no result."""

    experiment: str | None = None
    """MLflow experiment. Default: the recipe's name."""
    enabled: bool = True
    """Record runs in MLflow."""
    log_level: str = "INFO"
    """Level of the stage programs' logs."""


class Recipe(Strict):
    """Base model, datasets, stages."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the pipeline, in Prefect, MLflow and the store."""
    model: str
    """Base model: Hub id (`OWNER/NAME` or `OWNER/NAME@REVISION`), folder, `gguf:FILE`,
    `package:NAME` for a GGUF file inside an installed Python package, or `artifact:NAME` for a
    model that another recipe left in the store."""
    datasets: dict[str, DatasetSpec] = {}
    """Named datasets, for the stages to refer to."""
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1)]
    """Stages in order; each takes the model of the stage before it unless it names another."""
    tracking: Tracking = unhashed(Tracking(), "Where runs are recorded; changes no result.")

    def made_of(self, dataset: str) -> tuple[str, ...]:
        """Names under `datasets` that a dataset's rows come from: its own, or all that it mixes."""
        behind: dict[str, tuple[str, ...]] = {}
        for stage in self.stages:
            if isinstance(stage, MixConfig):
                names = [name for part in stage.datasets for name in behind.get(part, (part,))]
                behind[stage.name] = tuple(dict.fromkeys(names))
        return behind.get(dataset, (dataset,))

    @model_serializer(mode="wrap")
    def _as_written(self, handler: Any) -> dict[str, Any]:
        """Write stages back as a person writes them: `{sft: {...}}`."""
        data: dict[str, Any] = handler(self)
        if "stages" in data:
            data["stages"] = [
                {stage.stage: {key: value for key, value in entry.items() if key != "stage"}}
                for stage, entry in zip(self.stages, data["stages"], strict=True)
            ]
        return data
