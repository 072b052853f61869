"""Adapters: what is trained beside frozen weights. One class a method, told apart by `type`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.recipe.base import Strict

PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
TargetModules = tuple[str, ...] | Literal["all-linear"]


class AdapterConfig(Strict):
    """What all adapters share."""

    peak_learning_rate: ClassVar[float]
    """Default of `optimization.learning_rate` with this adapter."""
    mergeable: ClassVar[bool] = True
    """Whether the adapter can become part of the base's weights."""
    prompt_learning: ClassVar[bool] = False
    """Whether it puts virtual tokens before each sequence, so that rows cannot be laid flat."""


class LoraConfig(AdapterConfig):
    """Low-rank adapters beside frozen weights (Hu et al., 2021, arXiv:2106.09685)."""

    peak_learning_rate: ClassVar[float] = 2e-4

    type: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    """Rank of the update. 8-16 suits format and style, 32-64 harder adaptation."""
    alpha: PositiveFloat | None = None
    """Scale of the update is alpha/rank. Default: twice the rank."""
    dropout: Dropout | None = None
    """Dropout on the adapter's input during training. Default: 0.05; none with `init: pissa`, where
    it would drop the largest directions of the weights themselves."""
    target_modules: TargetModules = "all-linear"
    """Names of the linear layers to adapt, or all of them except the output head."""
    rank_stabilized: bool = False
    """rsLoRA: scale by alpha/sqrt(rank), so that high ranks learn as fast as low ones
    (Kalajdzievski, 2023, arXiv:2312.03732). With it `alpha` defaults to 2 * sqrt(rank)."""
    dora: bool = False
    """DoRA: train magnitude and direction of the weights apart (Liu et al., 2024,
    arXiv:2402.09353). Closer to full fine-tuning at low ranks, and slower."""
    init: Literal["zero", "pissa"] = "zero"
    """`zero`: the update starts at zero. `pissa`: it starts as the largest singular directions of
    the weights, which then are trained first (Meng et al., 2024, arXiv:2404.02948)."""

    @property
    def input_dropout(self) -> float:
        """`dropout`, or its default."""
        if self.dropout is not None:
            return self.dropout
        return 0.0 if self.init == "pissa" else 0.05

    @property
    def scale_alpha(self) -> float:
        """`alpha`, or its default: the update is then scaled by 2."""
        if self.alpha is not None:
            return self.alpha
        return 2 * self.rank**0.5 if self.rank_stabilized else 2.0 * self.rank


class AdaLoraConfig(AdapterConfig):
    """Low-rank adapters whose ranks move, while training, to the layers that need them.

    Zhang et al., 2023, arXiv:2303.10512.
    """

    peak_learning_rate: ClassVar[float] = 1e-3

    type: Literal["adalora"]
    rank: PositiveInt = 8
    """Mean rank at the end."""
    initial_rank: PositiveInt = 12
    """Rank of every layer at the start."""
    alpha: PositiveFloat | None = None
    """Scale of the update is alpha/rank. Default: twice the initial rank."""
    dropout: Dropout = 0.05
    """Dropout on the adapter's input during training."""
    target_modules: TargetModules = "all-linear"
    """Names of the linear layers to adapt, or all of them except the output head."""

    @model_validator(mode="after")
    def _ranks_can_move(self) -> Self:
        if self.rank >= self.initial_rank:
            raise ValueError(
                f"ranks fall from {self.initial_rank} to a mean of {self.rank}, so nothing would "
                "move: write an `initial_rank` above `rank`, half as much again is usual"
            )
        return self


class Ia3Config(AdapterConfig):
    """Learned factors on keys, values and feed-forward activations.

    Liu et al., 2022, arXiv:2205.05638. About a hundredth of LoRA's parameters.
    """

    peak_learning_rate: ClassVar[float] = 3e-3

    type: Literal["ia3"]
    target_modules: tuple[str, ...] | None = None
    """Names of the layers to scale. Default: keys, values and the feed-forward output."""
    feedforward_modules: tuple[str, ...] | None = None
    """Those among them whose input is scaled and not their output."""


class VeraConfig(AdapterConfig):
    """Vectors that scale random low-rank matrices shared by all layers.

    Kopiczko et al., 2023, arXiv:2310.11454. A tenth of LoRA's parameters at a far higher rank.
    """

    peak_learning_rate: ClassVar[float] = 4e-3

    type: Literal["vera"]
    rank: PositiveInt = 256
    """Rank of the shared random matrices."""
    dropout: Dropout = 0.0
    """Dropout on the adapter's input during training."""
    target_modules: TargetModules = "all-linear"
    """Names of the linear layers to adapt, or all of them except the output head."""


class PrefixTuningConfig(AdapterConfig):
    """Learned keys and values before those of each sequence, in every layer.

    Li and Liang, 2021, arXiv:2101.00190.
    """

    peak_learning_rate: ClassVar[float] = 1e-2
    mergeable: ClassVar[bool] = False
    prompt_learning: ClassVar[bool] = True

    type: Literal["prefix"]
    virtual_tokens: PositiveInt = 20
    """Positions that are learned. They count against the model's longest sequence."""
    projection_size: PositiveInt | None = None
    """Width of the network that computes the prefix while training. Default: none, the prefix
    itself is trained."""


class PromptTuningConfig(AdapterConfig):
    """Learned embeddings before each sequence.

    Lester et al., 2021, arXiv:2104.08691. Needs a large model to be worth it.
    """

    peak_learning_rate: ClassVar[float] = 3e-2
    mergeable: ClassVar[bool] = False
    prompt_learning: ClassVar[bool] = True

    type: Literal["prompt"]
    virtual_tokens: PositiveInt = 20
    """Positions that are learned. They count against the model's longest sequence."""
    init_text: Annotated[str, Field(min_length=1)] | None = None
    """Text whose embeddings they start from. Default: random words of the vocabulary."""


class BottleneckConfig(AdapterConfig):
    """Small networks after each block: down-projection, nonlinearity, up-projection.

    Houlsby et al., 2019, arXiv:1902.00751; Pfeiffer et al., 2021, arXiv:2005.00247.
    """

    peak_learning_rate: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = False

    type: Literal["bottleneck"]
    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """`pfeiffer`: after the feed-forward block. `houlsby`: after attention as well."""
    reduction: PositiveInt = 16
    """The bottleneck is this many times narrower than the model."""
    nonlinearity: Literal["relu", "gelu", "silu"] = "relu"
    """Between the two projections."""
    dropout: Dropout = 0.0
    """Dropout on the adapter's input during training."""


def _lora_by_default(value: Any) -> Any:
    """`{rank: 8}` means LoRA."""
    return {"type": "lora", **value} if isinstance(value, dict) and "type" not in value else value


ADAPTERS: dict[str, type[AdapterConfig]] = {
    "lora": LoraConfig,
    "adalora": AdaLoraConfig,
    "ia3": Ia3Config,
    "vera": VeraConfig,
    "prefix": PrefixTuningConfig,
    "prompt": PromptTuningConfig,
    "bottleneck": BottleneckConfig,
}
"""Adapters by what a recipe writes as `type`."""

AnyAdapter = Annotated[
    Annotated[
        LoraConfig
        | AdaLoraConfig
        | Ia3Config
        | VeraConfig
        | PrefixTuningConfig
        | PromptTuningConfig
        | BottleneckConfig,
        Field(discriminator="type"),
    ],
    BeforeValidator(_lora_by_default),
]


class Quantization(Strict):
    """The frozen base in 4 bits, as QLoRA has it (Dettmers et al., 2023, arXiv:2305.14314)."""

    type: Literal["nf4", "fp4"] = "nf4"
    """Four-bit data type: `nf4` has its levels at the quantiles of a normal distribution."""
    double: bool = True
    """Quantize the quantization constants as well: 0.37 bits a parameter less."""
