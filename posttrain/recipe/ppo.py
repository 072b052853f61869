"""`ppo`: proximal policy optimization with a critic, on answers that the model writes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from posttrain.recipe.adapters import AdaLoraConfig, PositiveFloat, PositiveInt
from posttrain.recipe.base import Strict
from posttrain.recipe.online import OnlineConfig

Share = Annotated[float, Field(ge=0, le=1)]


class KlPenalty(Strict):
    """The price of moving away from the model as it was."""

    coef: Annotated[float, Field(ge=0)] = 0.05
    """Reward lost for each nat of KL divergence, token by token; with a `target` to begin with."""
    target: PositiveFloat | None = None
    """KL divergence of an answer, in nats, that the coefficient is steered towards (Ziegler et al.,
    2019, arXiv:1909.08593, section 2.2). Default: the coefficient stays."""
    horizon: PositiveInt = 10_000
    """Answers over which the steering takes effect."""


class Critic(Strict):
    """What predicts the reward still to come, at each token."""

    backbone: Literal["own", "shared"] = "own"
    """`own`: the model once more, with a scalar head; where the policy is an adapter, another
    adapter on the same frozen weights. `shared`: a scalar head on the policy's last hidden states;
    less memory and time, and the two losses pull on the same weights."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of the critic. Default: the policy's."""


class Clipping(Strict):
    """How much one update may change."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The probability ratio counts within 1 plus or minus this (Schulman et al., 2017,
    arXiv:1707.06347, equation 7)."""
    value: PositiveFloat | None = 0.2
    """The critic's values count within the old ones plus or minus this; `null` switches it off."""
    max_update_kl: PositiveFloat | None = 0.1
    """Mean KL divergence a token, in nats, between the policy that wrote the answers and the
    updated one, at which the remaining passes over the answers are left out."""


class Shaping(Strict):
    """What is done to the rewards before they are learned from."""

    whiten_rewards: bool = False
    """Divide rewards by their standard deviation, without moving their mean."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Taken from the score of an answer that did not end by itself."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken from the score for each token of the answer."""


class PpoConfig(OnlineConfig):
    """PPO with a critic, as for language models (Huang et al., 2024, arXiv:2403.17031).

    An update writes `batching.batch_size` answers and learns from them in `passes` shuffled
    passes, each in `minibatches` optimizer steps. Steps are counted in updates.
    """

    trl_config: ClassVar[str | None] = None

    stage: Literal["ppo"] = "ppo"
    passes: PositiveInt = 4
    """Passes over the answers of an update."""
    minibatches: PositiveInt = 1
    """Optimizer steps a pass."""
    gamma: Share = 1.0
    """Discount of rewards to come, a token."""
    gae_lambda: Share = 0.95
    """Weight of longer looks ahead in the advantages (Schulman et al., 2016, arXiv:1506.02438)."""
    value_coef: PositiveFloat = 0.1
    """Weight of the critic's loss beside the policy's."""
    kl: KlPenalty = KlPenalty()
    """The price of moving away from the model as it was."""
    critic: Critic = Critic()
    """What predicts the reward still to come."""
    clip: Clipping = Clipping()
    """How much one update may change."""
    shaping: Shaping = Shaping()
    """What is done to the rewards first."""

    @model_validator(mode="after")
    def _ours_alone(self) -> Self:
        if self.extra_args:
            raise ValueError("`ppo` is no trainer of TRL and takes no `extra_args`: remove them")
        rows = self.batching.batch_size
        if rows % (self.minibatches * self.launch.world_size):
            raise ValueError(
                f"{rows} answers cannot be split into {self.minibatches} minibatches on "
                f"{self.launch.world_size} processes: batching.batch_size must be a multiple"
            )
        if self.launch.sharding is not None or self.launch.nodes > 1:
            raise ValueError(
                "`ppo` runs on one machine without sharding: remove `launch.sharding` and `nodes`"
            )
        if self.optimization.neftune_alpha is not None:
            raise ValueError(
                "noise would make another policy of the one that wrote the answers: remove "
                "`optimization.neftune_alpha`"
            )
        return self

    @model_validator(mode="after")
    def _adapter_has_an_off(self) -> Self:
        adapter = self.adapter
        if adapter is not None and (adapter.prompt_learning or isinstance(adapter, AdaLoraConfig)):
            raise ValueError(
                "`ppo` trains adapters that are added to the layers, of fixed ranks: write "
                "`adapter: {type: lora}`"
            )
        return self
