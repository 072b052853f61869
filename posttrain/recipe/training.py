"""What the training stages share: how far, how fast, on which rows and on which devices."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from posttrain.recipe.adapters import (
    AdaLoraConfig,
    AnyAdapter,
    LoraConfig,
    PositiveFloat,
    PositiveInt,
    PrefixTuningConfig,
    Quantization,
)
from posttrain.recipe.base import ArtifactKind, DType, RowFamily, StageConfig, Strict, unhashed

SFT_RATE = 2e-5
"""Usual peak learning rate of supervised fine-tuning over all weights."""


class Optimization(Strict):
    """How far and how fast the weights move."""

    learning_rate: PositiveFloat | None = None
    """Peak learning rate. Default: by method, such as 2e-4 with LoRA and 2e-5 for all weights."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate over the run."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    neftune_alpha: PositiveFloat | None = None
    """Uniform noise on the embeddings while training, scaled by alpha / sqrt(length * width); 5 is
    usual (Jain et al., 2023, arXiv:2310.05914). Helps answers' style on small instruction data."""


class Batching(Strict):
    """How rows become optimizer steps."""

    batch_size: PositiveInt = 8
    """Rows an optimizer step, over all devices; blocks of `max_length` tokens with `packing`, pairs
    of answers, or answers that the model writes. This, not the micro-batch, shapes the result."""
    micro_batch_size: PositiveInt | None = None
    """Rows a forward pass and device; the rest is gradient accumulation. Default: what divides
    `batch_size`, at most 8."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest sequence in tokens, and with `packing` the length of a block. Longer answers are cut,
    prompts never lose their answer; longer documents go on in a block of their own."""
    packing: bool = False
    """Fill blocks of `max_length` tokens with whole rows, best fit first, so that every step has
    about as many tokens. No row sees another one."""
    padding_free: bool = True
    """Lay the rows of a pass end to end instead of padding them to the longest. Computes the same
    in less time: no row sees another one."""

    @model_validator(mode="after")
    def _blocks_have_no_padding(self) -> Self:
        if self.packing and not self.padding_free:
            raise ValueError("`packing` lays rows end to end: remove `padding_free: false`")
        return self


class Validation(Strict):
    """Watching the held-out loss, and stopping when it no longer falls."""

    every_steps: PositiveInt | None = None
    """Evaluate, and save a checkpoint, every so many steps. Default: ten times a run."""
    patience: PositiveInt | None = 3
    """Stop after this many evaluations without improvement; `null` never stops early."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Improvement in nats a token below which an evaluation counts as none."""
    max_rows: PositiveInt = 200
    """Held-out rows used for the loss during training; the first ones by content order. Of a mix:
    of each of its datasets."""


class Sharding(Strict):
    """Parameters, gradients and optimizer state divided over the processes."""

    zero: Literal[1, 2, 3] | None = None
    """DeepSpeed ZeRO (Rajbhandari et al., 2020, arXiv:1910.02054): 1 divides the optimizer's
    state, 2 the gradients too, 3 the parameters too."""
    offload: Literal["optimizer", "all"] | None = None
    """Keep the optimizer's state, or with ZeRO-3 also the parameters, in the machine's memory."""
    config: str | None = None
    """A DeepSpeed configuration file instead of `zero` and `offload`, such as
    configs/deepspeed/zero3.json. What the recipe says itself must not be in it."""
    fsdp: bool = False
    """PyTorch's fully sharded data parallel, version 2, instead of DeepSpeed."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [self.zero is not None, self.config is not None, self.fsdp]
        if sum(ways) != 1:
            raise ValueError("name one of `zero`, `config` and `fsdp`")
        if self.offload is not None and self.zero is None:
            raise ValueError("`offload` belongs to `zero`: write `zero: 2` or `zero: 3` beside it")
        if self.offload == "all" and self.zero != 3:
            raise ValueError("`offload: all` moves parameters, which only `zero: 3` divides")
        return self


class Launch(Strict):
    """Processes and checkpoints. Nothing in here changes what is learned."""

    num_processes: PositiveInt = 1
    """Processes on each machine; more than one starts torchrun."""
    nodes: PositiveInt = 1
    """Machines."""
    rendezvous: Annotated[str, Field(pattern=r"^[^:\s]+:\d+$")] | None = None
    """`HOST:PORT` of the machine where the processes of several machines meet."""
    sharding: Sharding | None = None
    """How the training state is divided over the processes. Default: every one has all of it."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept beside the best one while training."""
    log_every_steps: PositiveInt = 1
    """Steps between two progress events."""

    @model_validator(mode="after")
    def _machines_meet(self) -> Self:
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError("several `nodes` need a `rendezvous`, such as `node0:29500`")
        return self

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.num_processes * self.nodes

    @property
    def distributed(self) -> bool:
        """Whether torchrun starts the program."""
        return self.world_size > 1 or self.sharding is not None


class TrainingConfig(StageConfig):
    """A stage that trains: by an adapter, or over all weights.

    `full: {zero: 3, offload: optimizer}` is short for `adapter: null` with that
    `launch.sharding`, and `full: {}` for `adapter: null`.
    """

    produces: ClassVar[ArtifactKind] = "adapter"
    accounts: ClassVar[frozenset[str]] = frozenset(
        {"rows.parquet", "held_out.parquet", "loss.html", "resources.json"}
    )
    family: ClassVar[RowFamily]
    """Rows that the method learns from."""
    also_reads: ClassVar[frozenset[RowFamily]] = frozenset()
    """Further kinds of rows that hold what it needs."""
    peak_learning_rate: ClassVar[float]
    """Default of `optimization.learning_rate` when all weights are trained."""
    trl_config: ClassVar[str | None] = "SFTConfig"
    """TRL's class that `extra_args` are fields of, below `trl`; None for a method of ours."""

    dataset: str
    """Name of a dataset, as written under `datasets`, or of a `mix`."""
    model: str | None = None
    """Name of an earlier stage to start from. Default: the model of the stage before."""
    adapter: AnyAdapter | None = LoraConfig()
    """What is trained: an adapter, or `null` for all weights."""
    quantization: Quantization | None = None
    """Hold the frozen base in 4 bits: QLoRA. Default: in `dtype`."""
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
    """Further fields of the method's config class in TRL by name, such as SFTConfig's, checked
    against the real class."""

    @model_validator(mode="before")
    @classmethod
    def _full_in_short(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "full" not in data:
            return data
        full = data["full"]
        rest = {key: value for key, value in data.items() if key != "full"}
        if rest.get("adapter") is not None:
            raise ValueError("`full` trains all weights, and `adapter` does not: remove one")
        if not isinstance(full, dict):
            raise ValueError("write `full: {}`, or how to divide it: `full: {zero: 3}`")
        rest["adapter"] = None
        if full:
            launch = rest.get("launch") or {}
            if isinstance(launch, dict) and launch.get("sharding") is not None:
                raise ValueError("`full` and `launch.sharding` both say how to shard: keep one")
            rest["launch"] = {**launch, "sharding": full}
        return rest

    @model_validator(mode="after")
    def _quantized_is_frozen(self) -> Self:
        if self.quantization is not None and self.adapter is None:
            raise ValueError(
                "`quantization` freezes the weights, and without an adapter nothing is left to "
                "train: write `adapter: {type: lora}`"
            )
        if self.quantization is not None and getattr(self.adapter, "init", None) == "pissa":
            raise ValueError(
                "`init: pissa` changes the weights that `quantization` freezes: remove one"
            )
        return self

    @model_validator(mode="after")
    def _adapter_can_be_divided(self) -> Self:
        sharding, adapter = self.launch.sharding, self.adapter
        if sharding is None or adapter is None:
            return self
        if isinstance(adapter, AdaLoraConfig):
            raise ValueError(
                "AdaLoRA moves ranks between layers, which `sharding` divides: remove one, or use "
                "`adapter: {type: lora}`"
            )
        bare_prefix = isinstance(adapter, PrefixTuningConfig) and adapter.projection_size is None
        if bare_prefix and sharding.zero == 3:
            raise ValueError(
                "a prefix cannot be divided by ZeRO-3: write `zero: 2`, or a `projection_size`"
            )
        return self

    @model_validator(mode="after")
    def _prompts_are_learned_by_row(self) -> Self:
        if self.batching.packing and self.adapter is not None and self.adapter.prompt_learning:
            raise ValueError(
                "virtual tokens stand before each row, so rows cannot be packed: write "
                "`batching: {packing: false}`"
            )
        return self

    @model_validator(mode="after")
    def _quantized_is_whole(self) -> Self:
        sharding = self.launch.sharding
        if self.quantization is not None and sharding and (sharding.zero == 3 or sharding.fsdp):
            raise ValueError(
                "`quantization` packs weights into bytes, which ZeRO-3 and FSDP cannot divide: "
                "write `sharding: {zero: 2}`"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        rows, processes = self.batching.batch_size, self.launch.world_size
        if rows % processes:
            raise PydanticCustomError(
                "batch_size",
                "a batch of {rows} rows on {processes} processes: batch_size must be a multiple of "
                "launch.num_processes * launch.nodes",
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
        return self.optimization.learning_rate or self.usual_learning_rate

    @property
    def usual_learning_rate(self) -> float:
        """The method's default of the peak learning rate."""
        if self.adapter is None:
            return self.peak_learning_rate
        # An adapter's own rate is that of SFT. A method that moves all weights more gently than SFT
        # does moves an adapter as much more gently.
        return self.adapter.peak_learning_rate * min(1.0, self.peak_learning_rate / SFT_RATE)

    @property
    def padding_free(self) -> bool:
        """Whether rows are laid end to end: never where each row has virtual tokens before it."""
        prompt_learning = self.adapter is not None and self.adapter.prompt_learning
        return self.batching.padding_free and not prompt_learning

    @property
    def sequences_a_row(self) -> int:
        """Sequences that go through the model for one row: two for a pair of answers."""
        return 2 if self.family == "preferences" else 1

    @property
    def micro_batch_size(self) -> int:
        """Rows a forward pass on one device; divides `batch_size` per process."""
        rows = self.batching.batch_size // self.launch.world_size
        if self.batching.micro_batch_size:
            return min(self.batching.micro_batch_size, rows)
        return max(size for size in range(1, min(rows, 8) + 1) if rows % size == 0)
