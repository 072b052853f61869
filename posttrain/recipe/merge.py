"""`merge`: an adapter folded into its base, several models as one, or a step back to the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from posttrain.recipe.adapters import PositiveInt, Quantization
from posttrain.recipe.base import ArtifactKind, StageConfig, Strict

SOURCE = "model:"
"""Begins the names of the inputs that are merged, where there are several."""
PROMPTS = "prompts:"
"""Begins the names of the prepared datasets on whose held-out rows several models are measured."""

Method = Literal[
    "linear",
    "slerp",
    "ties",
    "dare_linear",
    "dare_ties",
    "svd",
    "cat",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "interpolate",
]

_OF_MODELS: tuple[Method, ...] = ("linear", "slerp", "ties", "dare_linear", "dare_ties")
_OF_ADAPTERS: tuple[Method, ...] = (
    "linear",
    "svd",
    "cat",
    "ties",
    "dare_linear",
    "dare_ties",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
)
_OF_SEVERAL = ("method", "base", "t", "rank", "into", "normalize", "seed")
"""Keys that mean nothing where one adapter is folded into its base."""


class MergeSource(Strict):
    """One of the models that are merged; `- sft` is short for `- {model: sft}`."""

    model: str
    """Name of an earlier stage, or `base`: the recipe's base model."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Its share relative to the other models' weights. Give every model a weight or none; without
    any they count the same."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of TIES and DARE: share of its changes to the base that is kept. Default: 0.5."""

    @model_validator(mode="before")
    @classmethod
    def _name_in_short(cls, data: Any) -> Any:
        return {"model": data} if isinstance(data, str) else data

    @property
    def share(self) -> float:
        """The stated weight, or 1."""
        return 1.0 if self.weight is None else self.weight

    @property
    def kept(self) -> float:
        """The stated density, or its default."""
        return 0.5 if self.density is None else self.density


class MergeConfig(StageConfig):
    """Folds an adapter into its base, merges several models, or goes part of the way to one.

    Folding compares logits before and after. Of several, and of an interpolation's two ends, each
    and the result are measured on held-out rows.
    """

    produces: ClassVar[ArtifactKind] = "model"
    code_version: ClassVar[int] = 2

    stage: Literal["merge"] = "merge"
    model: str | None = None
    """Name of an earlier stage whose adapter is folded in, or whose model is interpolated. Default:
    the stage before."""
    models: tuple[MergeSource, ...] = ()
    """The models to merge, by earlier stages' names. An adapter is folded into its base first."""
    method: Method | None = None
    """How several models become one. `linear`: their weighted mean (Wortsman et al., 2022,
    arXiv:2203.05482). `slerp`: a point on the arc between two. `ties`: the largest changes to the
    base, of those with the sign that prevails (Yadav et al., 2023, arXiv:2306.01708).
    `dare_linear`, `dare_ties`: changes dropped at random, the rest scaled up (Yu et al., 2023,
    arXiv:2311.03099). With `into: adapter` no `slerp`, but `svd`, `cat` (exact; the ranks add up),
    `ties_svd`, `dare_linear_svd`, `dare_ties_svd`. `interpolate` is of one model, not of several:
    base + weight * (model - base), so that less of the base is forgotten (WiSE-FT: Wortsman et al.,
    2022, arXiv:2109.01903)."""
    weight: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of `interpolate`: 0 is the base, 1 the tuned model; beyond them nothing was trained. Default:
    0.5."""
    into: Literal["model", "adapter"] = "model"
    """`model`: complete weights. `adapter`: LoRA adapters of one base become one adapter."""
    base: str | None = None
    """Of TIES, DARE and `interpolate`: name of the stage, or `base`, whose model the changes are
    measured from. Default: the last complete model that `models`, or `model`, come from."""
    t: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of SLERP: 0 is the first model, 1 the second. Default: 0.5."""
    normalize: bool = True
    """Divide by the sum of the weights (TIES: of those whose sign prevails), so that only their
    ratio counts. `false` adds the changes up with the weights as written: task arithmetic."""
    rank: PositiveInt | None = None
    """Of the methods that end in `svd`: rank of the adapter. Default: the largest of the ranks."""
    seed: int = 0
    """Of DARE: decides which changes are dropped."""
    quantization: Quantization | None = None
    """Not for recipes: filled in from the stage that trained the adapter, so that the merged model
    is compared with the 4-bit model that was trained."""
    check_prompts: Annotated[int, Field(ge=1, le=64)] = 4
    """Held-out rows on which adapter and merged model must agree."""
    perplexity_rows: PositiveInt = 64
    """Held-out rows, of each dataset, for the perplexity of each of several models and of their
    merge, or of the 4-bit model and of the merged one."""
    max_logit_difference: Annotated[float, Field(gt=0)] = 1e-3
    """Largest absolute difference of a logit that still counts as agreement, in float32."""

    @property
    def sparsifies(self) -> bool:
        """Whether the method keeps only a part of each model's changes."""
        return self.method is not None and self.method.startswith(("ties", "dare"))

    @property
    def interpolates(self) -> bool:
        """Whether one model is taken a part of the way from its base."""
        return self.method == "interpolate"

    @property
    def needs_base(self) -> bool:
        """Whether the method works on changes to a base, which then is an input."""
        return self.sparsifies and self.into == "model"

    @property
    def takes_any_ranks(self) -> bool:
        """Whether the method combines adapters of different ranks."""
        return self.method is not None and self.method.endswith(("svd", "cat"))

    @property
    def position(self) -> float:
        """The stated `t`, or its default."""
        return 0.5 if self.t is None else self.t

    @property
    def part(self) -> float:
        """The stated `weight`, or its default."""
        return 0.5 if self.weight is None else self.weight

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.interpolates:
            return self._one_and_its_base()
        if self.weight is not None:
            where = "beside each of `models`" if self.models else "with that method"
            raise ValueError(f"`weight` belongs to `method: interpolate`: write it {where}")
        if self.models and self.model is not None:
            raise ValueError("`model` folds one adapter and `models` merges several: remove one")
        if self.models and self.method is None:
            known = ", ".join(_OF_ADAPTERS if self.into == "adapter" else _OF_MODELS)
            raise ValueError(f"`models` need a `method`: one of {known}")
        if not self.models:
            stated = self._stated(_OF_SEVERAL)
            if stated:
                raise ValueError(
                    f"`{stated[0]}` is for merging several models: name them as `models`, such as "
                    "`models: [sft-a, sft-b]`"
                )
        return self

    def _one_and_its_base(self) -> Self:
        if self.models:
            raise ValueError(
                "`interpolate` lies between one model and its base: write `model` and `base` "
                "instead of `models`, or leave both out; of several models `linear` is the mean"
            )
        stated = self._stated([key for key in _OF_SEVERAL if key not in ("method", "base")])
        if stated:
            raise ValueError(
                f"`{stated[0]}` is for merging several models: `interpolate` takes `weight`, "
                "`model` and `base`"
            )
        return self

    def _stated(self, keys: Sequence[str]) -> list[str]:
        """Which of these keys say something other than their default."""
        stated = [key for key in keys if key in self.model_fields_set]
        return [key for key in stated if getattr(self, key) != _default(key)]

    @model_validator(mode="after")
    def _enough_models(self) -> Self:
        names = [source.model for source in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"`{name}` occurs twice: name it once, with a `weight`")
        if self.method == "slerp" and len(names) != 2:
            raise ValueError(
                f"slerp lies between two models, and `models` names {len(names)}: name two, or "
                "write `method: linear`"
            )
        if len(names) == 1 and not self.needs_base:
            raise ValueError(f"`models` names `{names[0]}` alone: name at least two")
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        if self.method is None or self.interpolates:
            return self
        known = _OF_ADAPTERS if self.into == "adapter" else _OF_MODELS
        if self.method not in known:
            raise ValueError(
                f"`{self.method}` does not merge into {_a(self.into)}; the methods that do are "
                f"{', '.join(known)}"
            )
        if self.t is not None and self.method != "slerp":
            raise ValueError("`t` belongs to `method: slerp`; write a `weight` beside each model")
        if self.base is not None and not self.needs_base:
            raise ValueError(
                f"`base` belongs to TIES and DARE of models, and this is `{self.method}` into "
                f"{_a(self.into)}: remove it, or name that model under `models`"
            )
        if self.rank is not None and not self.method.endswith("svd"):
            raise ValueError("`rank` belongs to the methods that end in `svd`")
        return self

    @model_validator(mode="after")
    def _weights_are_clear(self) -> Self:
        weighted = [source.model for source in self.models if source.weight is not None]
        bare = [source.model for source in self.models if source.weight is None]
        if weighted and self.method == "slerp":
            raise ValueError("slerp has no weights: write `t`, 0 for the first model, 1 the second")
        if weighted and bare:
            raise ValueError(f"`{bare[0]}` has no `weight`: give every model one, or none")
        dense = [source.model for source in self.models if source.density is not None]
        if dense and not self.sparsifies:
            raise ValueError(f"`density` belongs to TIES and DARE, and this is `{self.method}`")
        if self.into == "adapter" and len({source.kept for source in self.models}) > 1:
            raise ValueError(
                "adapters are combined with one density: give every model the same `density`"
            )
        return self


def _default(key: str) -> Any:
    return MergeConfig.model_fields[key].default


def _a(kind: str) -> str:
    return "an adapter" if kind == "adapter" else "a model"
