"""What the adviser is told: how much data of which kind, for what, and on which hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from posttrain.advisor import memory
from posttrain.estimate.architecture import Architecture

Goal = Literal["format", "domain", "instructions", "alignment", "knowledge"]

GOALS: dict[Goal, str] = {
    "format": "answers in one form, style or tone",
    "domain": "the vocabulary and the ways of a domain",
    "instructions": "following instructions",
    "alignment": "answers that people prefer: helpful, safe, of the right tone",
    "knowledge": "facts that the base model does not have",
}
"""What fine-tuning may be for."""

CONSUMER_GPU_GB = 24.0
"""Largest memory of a consumer GPU by which guides to fine-tuning tell them from others."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """Data, goals and hardware. Every field and property can stand in a rule's condition.

    Raises:
        ValueError: a number is negative, or there is no goal, no GPU count or no model size.
    """

    goals: frozenset[Goal]
    rows: int | None = 0
    """Labelled examples: prompts with the answer wanted. None: there are some, unknown how many."""
    pairs: int | None = 0
    """Preference pairs: a prompt with a chosen and a rejected answer. None as for `rows`."""
    thumbs: int | None = 0
    """Answers marked good or bad, one by one. None as for `rows`."""
    documents: int | None = 0
    """Unlabelled texts. None as for `rows`."""
    tokens: int | None = None
    """Tokens of the documents, where they are known."""
    parameters: float = 7.0
    """Size of the base model in billions of parameters."""
    model: Architecture | None = None
    """The base model's sizes, where they are known. Default: a usual model of `parameters`."""
    gpu_gb: float = 0.0
    """Memory of one GPU in GiB; 0 means that there is none."""
    gpus: int = 1
    """GPUs that train together."""
    ram_gb: float = 16.0
    """Memory of the machine in GiB: what there is to train in without a GPU."""
    tasks: int = 1
    """Different tasks that the model shall do."""
    separate: bool = False
    """Whether the tasks are to be added, updated and served apart from each other."""
    structured: bool = False
    """Whether the answers have a complex structure: nested JSON, a language of one's own."""
    quality: bool = False
    """Whether the last points of quality matter more than the cost of training."""
    latency: bool = False
    """Whether every millisecond of an answer counts."""
    one_run: bool = False
    """Whether demonstrations and preferences shall be learnt in a single run."""

    def __post_init__(self) -> None:
        counts = (self.rows, self.pairs, self.thumbs, self.documents, self.tokens)
        if any(count is not None and count < 0 for count in counts):
            raise ValueError("counts of rows cannot be negative")
        if self.gpu_gb < 0 or self.ram_gb <= 0 or self.gpus < 1 or self.tasks < 1:
            raise ValueError("memory must be positive, and GPUs and tasks at least one")
        if self.parameters <= 0:
            raise ValueError("a model has more than 0 parameters")
        if not self.goals or not self.goals <= set(get_args(Goal)):
            raise ValueError(f"name at least one goal of: {', '.join(GOALS)}")

    @property
    def labelled(self) -> bool:
        """Whether there are labelled examples."""
        return self.rows != 0

    @property
    def paired(self) -> bool:
        """Whether there are preference pairs."""
        return self.pairs != 0

    @property
    def rated(self) -> bool:
        """Whether there are answers marked good or bad."""
        return self.thumbs != 0

    @property
    def corpus(self) -> bool:
        """Whether there are unlabelled texts."""
        return self.documents != 0 or bool(self.tokens)

    @property
    def skills(self) -> bool:
        """Whether one of the goals needs demonstrations: format, domain or instructions."""
        return bool(self.goals & {"format", "domain", "instructions"})

    @property
    def gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.gpu_gb > 0

    @property
    def consumer_gpu(self) -> bool:
        """Whether all there is is one consumer GPU."""
        return self.gpu and self.gpus == 1 and self.gpu_gb <= CONSUMER_GPU_GB

    @property
    def device(self) -> memory.Device:
        """What training runs on."""
        if not self.gpu:
            return memory.Device("cpu", self.ram_gb, 1)
        return memory.Device("gpu", self.gpu_gb, self.gpus)

    @property
    def memory_gb(self) -> float:
        """Memory of one device in GiB."""
        return self.device.gb

    @property
    def sizes(self) -> Architecture:
        """The base model's sizes, known or usual."""
        return self.model or memory.typical(self.parameters)

    @property
    def full_gb(self) -> float:
        """GiB a device that training all weights needs, divided over all devices by ZeRO-3."""
        return memory.need("full", self.sizes, self.device, sharded=self.device.count > 1)

    @property
    def lora_gb(self) -> float:
        """GiB a device that LoRA on an unquantized base needs, undivided."""
        return memory.need("lora", self.sizes, self.device)

    @property
    def qlora_gb(self) -> float:
        """GiB a device that QLoRA needs at one row a pass."""
        return memory.need("qlora", self.sizes, self.device, rows=1)

    @property
    def full_fits(self) -> bool:
        """Whether all weights can be trained with room to spare."""
        return memory.fits("full", self.sizes, self.device)

    @property
    def lora_fits(self) -> bool:
        """Whether LoRA on an unquantized base can be trained with room to spare."""
        return memory.fits("lora", self.sizes, self.device)

    @property
    def qlora_fits(self) -> bool:
        """Whether QLoRA can be trained at all."""
        return memory.fits("qlora", self.sizes, self.device)

    @property
    def largest(self) -> float:
        """Billions of parameters of the largest usual model that QLoRA fits."""
        return memory.largest_model(self.device)
