"""Models that a stage holds in memory beside the one that it trains: reference, reward, critic."""

from __future__ import annotations

from posttrain.estimate.activations import FLOAT32
from posttrain.estimate.architecture import Architecture
from posttrain.estimate.memory import ADAM_STATES, Training, parameter_bytes
from posttrain.estimate.trainable import trainable_parameters
from posttrain.recipe.dpo import DpoConfig
from posttrain.recipe.grpo import GroupConfig
from posttrain.recipe.kto import KtoConfig
from posttrain.recipe.online import OnlineConfig
from posttrain.recipe.ppo import PpoConfig
from posttrain.recipe.training import TrainingConfig


def bytes_beside(sizes: Architecture, config: TrainingConfig, training: Training) -> float:
    """Bytes of the other models, each taken to be as large as the one that is trained.

    With an adapter the reference is the same weights with the adapter off, and costs nothing.
    """
    frozen = sizes.parameters * training.computation.width
    copies = int(asks_reference(config) and config.adapter is None)
    if isinstance(config, OnlineConfig):
        copies += sum(term.model is not None for term in config.terms)
    critic = 0.0
    if isinstance(config, PpoConfig) and config.critic.backbone == "own":
        trained = trainable_parameters(sizes, config.adapter)
        # With an adapter the critic is a second one, on the same frozen weights.
        weights = parameter_bytes(sizes, training) if config.adapter is None else trained * FLOAT32
        critic = weights + trained * FLOAT32 * (ADAM_STATES + 1)  # and a gradient
    return copies * frozen + critic


def asks_reference(config: TrainingConfig) -> bool:
    """Whether the stage computes log-probabilities of the model as it was."""
    match config:
        case DpoConfig() | KtoConfig():
            return config.reference == "computed"
        case GroupConfig():
            return config.beta > 0
        case _:
            return isinstance(config, PpoConfig)
