"""What a user writes: frozen pydantic models, one file a stage kind.

This package imports nothing heavy: reading a recipe takes milliseconds.
"""

from posttrain.recipe.base import RowFamily, RowFormat, StageConfig, result_config
from posttrain.recipe.contamination import ContaminationConfig
from posttrain.recipe.convert import ConvertConfig
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.dpo import DpoConfig
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.recipe.gate import GateConfig
from posttrain.recipe.grpo import GrpoConfig
from posttrain.recipe.judge import JudgeConfig
from posttrain.recipe.kto import KtoConfig
from posttrain.recipe.merge import MergeConfig
from posttrain.recipe.mix import MixConfig
from posttrain.recipe.online import OnlineConfig, RewardTerm
from posttrain.recipe.orpo import OrpoConfig
from posttrain.recipe.ppo import PpoConfig
from posttrain.recipe.preflight import PreflightConfig
from posttrain.recipe.prepare import PrepareConfig
from posttrain.recipe.pretrain import PretrainConfig
from posttrain.recipe.recipe import STAGES, Recipe
from posttrain.recipe.reference import ReferenceConfig
from posttrain.recipe.register import RegisterConfig
from posttrain.recipe.reward import RewardConfig
from posttrain.recipe.rloo import RlooConfig
from posttrain.recipe.sft import SftConfig
from posttrain.recipe.test_sets import TestSet
from posttrain.recipe.training import TrainingConfig

__all__ = [
    "STAGES",
    "ContaminationConfig",
    "ConvertConfig",
    "DatasetSpec",
    "DpoConfig",
    "EvaluateConfig",
    "GateConfig",
    "GrpoConfig",
    "JudgeConfig",
    "KtoConfig",
    "MergeConfig",
    "MixConfig",
    "OnlineConfig",
    "OrpoConfig",
    "PpoConfig",
    "PreflightConfig",
    "PrepareConfig",
    "PretrainConfig",
    "Recipe",
    "ReferenceConfig",
    "RegisterConfig",
    "RewardConfig",
    "RewardTerm",
    "RlooConfig",
    "RowFamily",
    "RowFormat",
    "SftConfig",
    "StageConfig",
    "TestSet",
    "TrainingConfig",
    "result_config",
]
