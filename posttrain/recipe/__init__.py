"""What a user writes: frozen pydantic models, one file a stage kind.

This package imports nothing heavy: reading a recipe takes milliseconds.
"""

from posttrain.recipe.base import RowFamily, RowFormat, StageConfig, result_config
from posttrain.recipe.contamination import ContaminationConfig
from posttrain.recipe.convert import ConvertConfig
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.recipe.gate import GateConfig
from posttrain.recipe.merge import MergeConfig
from posttrain.recipe.mix import MixConfig
from posttrain.recipe.preflight import PreflightConfig
from posttrain.recipe.prepare import PrepareConfig
from posttrain.recipe.pretrain import PretrainConfig
from posttrain.recipe.recipe import STAGES, Recipe
from posttrain.recipe.sft import SftConfig
from posttrain.recipe.training import TrainingConfig

__all__ = [
    "STAGES",
    "ContaminationConfig",
    "ConvertConfig",
    "DatasetSpec",
    "EvaluateConfig",
    "GateConfig",
    "MergeConfig",
    "MixConfig",
    "PreflightConfig",
    "PrepareConfig",
    "PretrainConfig",
    "Recipe",
    "RowFamily",
    "RowFormat",
    "SftConfig",
    "StageConfig",
    "TrainingConfig",
    "result_config",
]
