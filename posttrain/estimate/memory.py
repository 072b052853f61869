"""What lies in a device's memory at the moment when it is fullest.

Parameters, gradients and optimizer states and how ZeRO divides them are those of Rajbhandari et
al., 2020 (arXiv:1910.02054, section 3.1 and figure 1); four-bit weights those of Dettmers et al.,
2023 (arXiv:2305.14314, section 3); activations are in `posttrain.estimate.activations`.

Not everything exists at once, so three moments of a training step are computed and the fullest
counts:

    loss      all activations and the head's tiles; gradients only of earlier passes of the step
    backward  all gradients; with gradient checkpointing also one layer's activations
    step      gradients and optimizer states, no activations

On a CPU the C library's heap keeps what it once had, and the files of the weights lie on top of it:
their pages are mapped when weights are quantized, and when the best checkpoint is restored.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from posttrain.estimate.activations import (
    FLOAT32,
    Computation,
    Pass,
    during_backward,
    head,
    kept_for_backward,
    one_layer,
)
from posttrain.estimate.architecture import Architecture
from posttrain.estimate.device import GIB, Device
from posttrain.estimate.trainable import frozen_parameters_added, trainable_parameters
from posttrain.hardware import ResolvedDType
from posttrain.recipe.adapters import AdapterConfig, Quantization
from posttrain.recipe.training import Sharding

Moment = Literal["loss", "backward", "step"]

ADAM_STATES = 2
"""AdamW keeps a mean and a variance of each gradient, in float32."""
CPU_RUNTIME = 0.57 * GIB
"""Resident memory of a training program without a model: Python, its libraries (torch 2.13,
transformers 5.23, trl 1.16, peft 0.21, datasets 5.2) and what they load at the first step, by
`benchmarks/memory.py`."""
TOKENIZER_ENTRY = 1024
"""Bytes that a word of a tokenizer's vocabulary takes in its tables, by the same."""
CUDA_RUNTIME = 0.75 * GIB
"""CUDA context, cuBLAS workspace and loaded kernels on a GPU. Half a gigabyte is usual for the
context; assumed, not measured here."""
HEAP_SLACK = 1 / 3
"""Holes in the C library's heap, as a share of what a pass takes and gives back: freed blocks
between kept ones. A mean over models, methods and lengths by `benchmarks/memory.py`."""
CUDA_SLACK = 0.05
"""Holes in torch's CUDA allocator, the same share: assumed, not measured here."""
BLOCK, SECOND_BLOCK = 64, 256
"""Weights that share a constant in four-bit types, and constants that share one of theirs."""
REDUCE_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once by default (`reduce_bucket_size`)."""
LIVE_PARAMETERS = 1_000_000_000
"""Gathered elements that ZeRO-3 keeps at most by default (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Training:
    """What memory depends on, beside the model: one training stage as one device sees it."""

    adapter: AdapterConfig | None
    quantization: Quantization | None
    dtype: ResolvedDType
    batch: Pass
    accumulation: int
    """Passes an optimizer step."""
    checkpointing: bool
    """Gradient checkpointing: recompute activations instead of keeping them."""
    cuda: bool
    varlen_kernel: bool = False
    """FlashAttention is installed and used."""
    world_size: int = 1
    sharding: Sharding | None = None

    @property
    def computation(self) -> Computation:
        """How passes are computed."""
        width = FLOAT32 if self.dtype == "float32" else 2
        return Computation(width, self.cuda, self.checkpointing, self.varlen_kernel)

    @property
    def stage(self) -> int:
        """ZeRO stage; FSDP2 divides what stage 3 divides. 0 where every process has everything."""
        if self.sharding is None:
            return 0
        return 3 if self.sharding.fsdp else (self.sharding.zero or 2)

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed holds the optimizer."""
        return self.sharding is not None and not self.sharding.fsdp


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, on the device where there is least room, at the fullest moment."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    """Output head and loss."""
    communication: float
    """Gathered parameters and reduced gradients on their way."""
    runtime: float
    """Libraries, or the CUDA context."""
    allocator: float
    """Holes between tensors."""
    files: float
    """Pages of weight files that are mapped, on a CPU; the kernel takes them back when it must."""
    host: float
    """In the machine's memory beside the device: offloaded states, of one process."""
    moment: Moment
    beside: float = 0.0
    """Models beside the one that is trained: reference, reward models, critic with its states."""

    @property
    def total(self) -> float:
        """Bytes of one process on its device."""
        parts = [f.name for f in fields(self) if f.name not in ("host", "moment")]
        return float(sum(getattr(self, name) for name in parts))

    @property
    def tensors(self) -> float:
        """Bytes of tensors alone."""
        return self.total - self.runtime - self.allocator - self.files

    @property
    def gib(self) -> float:
        """`total` in GiB."""
        return self.total / GIB

    def fits(self, device: Device, processes: int = 1) -> bool:
        """Whether `processes` of them fit on a machine: one a GPU, or all into one memory."""
        here = self.total if device.kind == "cuda" else self.total * processes
        return here <= device.memory and self.host * processes <= device.host_memory

    def in_gib(self) -> dict[str, float]:
        """Every part and the total in GiB, rounded, for JSON."""
        names = [f.name for f in fields(self) if f.name != "moment"]
        parts = {name: round(getattr(self, name) / GIB, 4) for name in names}
        return {**parts, "total": round(self.gib, 4)}


def estimate_memory(sizes: Architecture, training: Training) -> MemoryEstimate:
    """Memory of one process on its device while it trains."""
    trained = trainable_parameters(sizes, training.adapter)
    kept = parameter_bytes(sizes, training)
    gradients = gradient_bytes(trained, training)
    optimizer, host = optimizer_bytes(trained, training)
    if training.sharding is not None and training.sharding.offload == "all":
        kept, host = 0.0, host + kept
    communication = communication_bytes(sizes, trained, training)
    passing = _moments(sizes, training, gradients)
    moment = max(passing, key=lambda name: sum(passing[name]))
    gradients, activations, loss = passing[moment]
    cuda = training.cuda
    return MemoryEstimate(
        parameters=kept,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        head=loss,
        communication=communication,
        runtime=CUDA_RUNTIME if cuda else CPU_RUNTIME + TOKENIZER_ENTRY * sizes.vocab,
        # The heap never shrinks, so holes stay when the pass that made them is over.
        allocator=(CUDA_SLACK if cuda else HEAP_SLACK) * sum(passing["loss"][1:]),
        files=0.0 if cuda else _mapped_files(sizes, trained, training),
        host=host,
        moment=moment,
    )


def parameter_bytes(sizes: Architecture, training: Training) -> float:
    """Bytes of all weights.

    Trained weights are float32 and autocast keeps 16-bit copies of the matrices beside them until
    their backward pass; under DeepSpeed they are 16 bits wide and float32 in the optimizer. A
    frozen base has `dtype`, or 4 bits and their constants; its adapter is float32.
    """
    width = training.computation.width
    divided = training.world_size if training.stage == 3 else 1
    if training.adapter is None:
        if training.deepspeed:
            return sizes.parameters * width / divided
        copies = 2 * sizes.matrix_parameters if width == 2 and not training.checkpointing else 0
        return FLOAT32 * sizes.parameters / divided + copies
    trained = trainable_parameters(sizes, training.adapter)
    base = sizes.parameters + frozen_parameters_added(sizes, training.adapter)
    if training.quantization is None:
        return (base * width + trained * FLOAT32) / divided
    packed = sizes.linear_parameters
    packed_bytes = packed * four_bit_bytes(training.quantization)
    return packed_bytes + (base - packed) * width + trained * FLOAT32


def four_bit_bytes(quantization: Quantization) -> float:
    """Bytes a weight: four bits, and a constant for each 64 of them.

    A constant is float32; with double quantization it has 8 bits and shares a float32 with 255
    others: 0.127 bits a weight instead of 0.5 (Dettmers et al., 2023, section 3).
    """
    constant = 1 + FLOAT32 / SECOND_BLOCK if quantization.double else FLOAT32
    return 0.5 + constant / BLOCK


def gradient_bytes(trained: int, training: Training) -> float:
    """Bytes of the gradients of trained weights, as wide as these; divided from ZeRO-2 on."""
    width = (
        training.computation.width if training.deepspeed and training.adapter is None else FLOAT32
    )
    return trained * width / (training.world_size if training.stage >= 2 else 1)


def optimizer_bytes(trained: int, training: Training) -> tuple[float, float]:
    """Bytes of AdamW's states on the device and in the machine's memory; divided from ZeRO-1 on.

    DeepSpeed holds float32 weights of its own beside them.
    """
    a_weight = FLOAT32 * (ADAM_STATES + (1 if training.deepspeed else 0))
    share = trained * a_weight / (training.world_size if training.stage >= 1 else 1)
    if training.sharding is not None and training.sharding.offload is not None:
        # Gradients come to where the states are.
        return 0.0, share + trained * FLOAT32 / training.world_size
    return share, 0.0


def communication_bytes(sizes: Architecture, trained: int, training: Training) -> float:
    """Bytes of buffers between processes.

    Without sharding, DistributedDataParallel copies gradients into buckets. ZeRO reduces buckets of
    half a billion elements, two at a time because communication overlaps; ZeRO-3 keeps gathered
    parameters up to a billion; FSDP2 gathers a layer while it computes another, or the embeddings.
    """
    if training.world_size == 1:
        return 0.0
    if training.stage == 0:
        return FLOAT32 * trained
    if not training.deepspeed:
        layer = 2 * sizes.linear_parameters / sizes.layers
        return FLOAT32 * max(layer, sizes.embedding_parameters)
    width = training.computation.width
    buckets = 2 * min(REDUCE_BUCKET, trained) * width
    gathered = min(LIVE_PARAMETERS, sizes.parameters) * width if training.stage == 3 else 0
    return buckets + gathered


def _moments(
    sizes: Architecture, training: Training, gradients: float
) -> dict[Moment, tuple[float, float, float]]:
    """Gradients, activations and head at each moment of the step's last pass."""
    batch, how = training.batch, training.computation
    kept = kept_for_backward(sizes, training.adapter, batch, how)
    passing = during_backward(sizes, batch, how)
    # The embedding's gradient, and the head's, are computed whole before they are added.
    table = FLOAT32 * sizes.embedding_parameters if training.adapter is None else 0
    # Earlier passes of the step have left gradients; so have buckets that are reduced at the end.
    earlier = gradients if training.accumulation > 1 else 0.0
    layer = one_layer(sizes, training.adapter, batch, how) if training.checkpointing else 0.0
    loss = head(sizes, batch, how) + table
    return {
        "loss": (earlier, kept + max(0.0, layer + passing - loss), loss),
        "backward": (gradients, layer + passing, table),
        "step": (gradients, 0.0, 0.0),
    }


def _mapped_files(sizes: Architecture, trained: int, training: Training) -> float:
    """Bytes of weight files whose pages are mapped at the end of training.

    The best checkpoint is mapped when it is restored. A file that weights were quantized from stays
    mapped as long as embeddings and norms are views of it: if they are computed with as they are
    stored. The embeddings themselves are counted as parameters.
    """
    best = FLOAT32 * trained if training.stage == 0 else 0.0
    if training.quantization is None or sizes.dtype != training.dtype:
        return best
    return best + sizes.linear_parameters * training.computation.width
