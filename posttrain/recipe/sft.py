"""`sft`: supervised fine-tuning on chats, loss on the assistant's turns only."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from posttrain.recipe.base import ArtifactKind, DType, StageConfig, Strict, unhashed

PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]


class LoraConfig(Strict):
    """Low-rank adapters beside frozen weights (Hu et al., 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    """Rank of the update. 8-16 suits format and style, 32-64 harder adaptation."""
    alpha: PositiveFloat | None = None
    """Scale of the update is alpha/rank. Default: twice the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on the adapter's input during training."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers to adapt, or all of them except the output head."""


class Optimization(Strict):
    """How far and how fast the weights move."""

    learning_rate: PositiveFloat | None = None
    """Peak learning rate. Default: 2e-4 with an adapter, 2e-5 for all weights."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate over the run."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""


class Batching(Strict):
    """How rows become optimizer steps."""

    batch_size: PositiveInt = 8
    """Rows an optimizer step, over all devices. This, not the micro-batch, shapes the result."""
    micro_batch_size: PositiveInt | None = None
    """Rows a forward pass and device; the rest is gradient accumulation. Default: what divides
    `batch_size`, at most 8."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest sequence in tokens; longer answers are cut, prompts never lose their answer."""


class Validation(Strict):
    """Watching the held-out loss, and stopping when it no longer falls."""

    every_steps: PositiveInt | None = None
    """Evaluate, and save a checkpoint, every so many steps. Default: ten times a run."""
    patience: PositiveInt | None = 3
    """Stop after this many evaluations without improvement; `null` never stops early."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Improvement in nats a token below which an evaluation counts as none."""
    max_rows: PositiveInt = 200
    """Held-out rows used for the loss during training; the first ones by content order."""


class Launch(Strict):
    """Processes and checkpoints. Nothing in here changes what is learned."""

    num_processes: PositiveInt = 1
    """Processes on this machine; more than one starts torchrun."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept beside the best one while training."""
    log_every_steps: PositiveInt = 1
    """Steps between two progress events."""


class SftConfig(StageConfig):
    """Trains on the assistant's turns of chats, by an adapter or over all weights."""

    produces: ClassVar[ArtifactKind] = "adapter"
    accounts: ClassVar[frozenset[str]] = frozenset({"rows.parquet"})

    stage: Literal["sft"] = "sft"
    dataset: str
    """Name of a dataset of chats, as written under `datasets`."""
    model: str | None = None
    """Name of an earlier stage to start from. Default: the model of the stage before."""
    adapter: LoraConfig | None = LoraConfig()
    """What is trained: an adapter, or `null` for all weights."""
    epochs: PositiveFloat = 1.0
    """Passes over the training rows. Two to four is usual; more overfits small data."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    optimization: Optimization = Optimization()
    """Learning rate and what belongs to it."""
    batching: Batching = Batching()
    """Batch size and sequence length."""
    validation: Validation = Validation()
    """Held-out loss, early stopping, best checkpoint."""
    dtype: DType = "auto"
    """Precision of the frozen or trained weights. `auto`: bfloat16 where the hardware is fast at
    it, else float32."""
    seed: int = 0
    """Seed of data order, dropout and initialisation."""
    launch: Launch = unhashed(Launch(), "Processes and checkpoints; changes no result.")
    extra_args: dict[str, Any] = {}
    """Further fields of TRL's SFTConfig by name, checked against the real class."""

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        rows, processes = self.batching.batch_size, self.launch.num_processes
        if rows % processes:
            raise PydanticCustomError(
                "batch_size",
                "a batch of {rows} rows on {processes} processes: batch_size must be a multiple of "
                "launch.num_processes",
                {"rows": rows, "processes": processes},
            )
        micro = self.batching.micro_batch_size
        if micro and (rows // processes) % min(micro, rows // processes):
            raise PydanticCustomError(
                "batch_size",
                "{share} rows a step and process cannot be split into passes of {micro}: "
                "batching.micro_batch_size must divide them",
                {"share": rows // processes, "micro": micro},
            )
        return self

    @property
    def learning_rate(self) -> float:
        """The stated peak learning rate, or the default of the method."""
        return self.optimization.learning_rate or (2e-4 if self.adapter else 2e-5)

    @property
    def micro_batch_size(self) -> int:
        """Rows a forward pass on one device; divides `batch_size` per process."""
        rows = self.batching.batch_size // self.launch.num_processes
        if self.batching.micro_batch_size:
            return min(self.batching.micro_batch_size, rows)
        return max(size for size in range(1, min(rows, 8) + 1) if rows % size == 0)
