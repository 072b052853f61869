"""What the stages share that learn from answers which the model writes while it is trained."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from posttrain.recipe.adapters import PositiveFloat, PositiveInt
from posttrain.recipe.base import RowFamily, Strict, unhashed
from posttrain.recipe.training import Optimization, TrainingConfig

REWARD = "reward:"
"""Begins the names of the inputs that score answers; then comes the term's name."""

GIVEN = ("prompts", "answers", "references")
"""What a reward function is given if it has parameters of these names."""


class Rollout(Strict):
    """How the model writes answers."""

    temperature: PositiveFloat = 1.0
    """Tokens are drawn from softmax(logits / temperature), with nothing cut off."""
    max_prompt_tokens: PositiveInt = 256
    """Longer prompts are left out, and counted."""
    max_new_tokens: PositiveInt = 64
    """Longest answer, in tokens."""
    batch_size: PositiveInt = 32
    """Answers written at once, of prompts of about the same length."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What writes the answers; `vllm` is faster on a GPU where it is installed."""


class RewardTerm(Strict):
    """One of the scores that make up the reward."""

    model: str | None = None
    """Name of an earlier `reward` stage."""
    function: str | None = None
    """`FILE.py:NAME`: a Python function of prompts and answers that returns a score for each."""
    weight: float = 1.0
    """What its scores are multiplied by before they are added."""
    arguments: dict[str, JsonValue] = {}
    """Further keyword arguments of the function."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.model is None) == (self.function is None):
            raise ValueError("write either `model`, a reward stage, or `function`, FILE.py:NAME")
        if self.model is not None and self.arguments:
            raise ValueError("`arguments` are a function's: a model has none")
        if self.function is not None and ".py:" not in self.function:
            raise ValueError(f"`{self.function}` names no function: write FILE.py:NAME")
        for name in GIVEN:
            if name in self.arguments:
                raise ValueError(f"`{name}` is given to every function: remove it from `arguments`")
        return self

    @property
    def name(self) -> str:
        """Of the score, in metrics: the stage's or the function's."""
        return self.model or str(self.function).rpartition(":")[2]


class Watch(Strict):
    """Looking for a reward that rises while the answers get worse."""

    tasks: tuple[str, ...] = ()
    """Names of lm-eval tasks, asked before training and after: an independent signal."""
    limit: PositiveInt = 100
    """Items a task."""
    offline_root: str | None = unhashed(
        None, "Folder laid out like the Hub to read the tasks' items from instead of it."
    )
    judge: RewardTerm | None = None
    """A second reward model, trained on other rows, or a function: another independent signal."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """At which the independent signal must have fallen, paired by item, for a flag."""

    @field_validator("judge", mode="before")
    @classmethod
    def _judge_in_short(cls, value: Any) -> Any:
        return reward_terms(value)[0] if isinstance(value, str) else value


def reward_terms(value: Any) -> Any:
    """`reward: NAME`, `reward: FILE.py:NAME`, or a list of these and of terms, as terms."""
    items = [value] if isinstance(value, str | dict) else value
    if not isinstance(items, list | tuple):
        return value
    return tuple(
        ({"function": item} if ".py:" in item else {"model": item})
        if isinstance(item, str)
        else item
        for item in items
    )


class Annealed(Optimization):
    """How far and how fast the weights move: slower from step to step."""

    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Shape of the learning rate over the run."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps in which the learning rate rises from zero."""


class OnlineConfig(TrainingConfig):
    """Learns from the rewards of answers that the model itself writes to the dataset's prompts.

    Of chats, pairs and marked answers the prompt is read, and a document is a prompt as a whole.
    """

    family: ClassVar[RowFamily] = "chats"
    also_reads: ClassVar[frozenset[RowFamily]] = frozenset({"preferences", "kto", "documents"})
    accounts: ClassVar[frozenset[str]] = TrainingConfig.accounts | {
        "answers.parquet",
        "watch.html",
    }
    peak_learning_rate: ClassVar[float] = 1e-6

    reward: Annotated[tuple[RewardTerm, ...], Field(min_length=1)]
    """What is learned for: a `reward` stage's name, `FILE.py:NAME`, or a list of terms with
    weights."""
    rollout: Rollout = Rollout()
    """How answers are written."""
    watch: Watch = Watch()
    """Looking for reward hacking."""
    optimization: Annealed = Annealed()
    """Learning rate and what belongs to it."""

    @field_validator("reward", mode="before")
    @classmethod
    def _reward_in_short(cls, value: Any) -> Any:
        return reward_terms(value)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [term.name for term in self.reward]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(f"two terms of the reward are called {', '.join(sorted(repeated))}")
        return self

    @model_validator(mode="after")
    def _reference_is_the_base(self) -> Self:
        if getattr(self.adapter, "init", None) == "pissa":
            raise ValueError(
                "`init: pissa` changes the base, which with the adapter off is the reference that "
                "the model is kept close to: remove it"
            )
        return self

    @property
    def padding_free(self) -> bool:
        """Never: answers are written side by side, padded on the left."""
        return False

    @property
    def terms(self) -> tuple[RewardTerm, ...]:
        """The reward's terms and the watch's judge."""
        return (*self.reward, *([self.watch.judge] if self.watch.judge else []))
