"""How much memory a training run took, beside what was estimated for it.

`resources.json` of a trained artifact holds both. Two runs of the same thing differ in it, so it is
an account and no part of the artifact's content.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from posttrain.errors import ModelError
from posttrain.estimate.activations import Pass
from posttrain.estimate.architecture import read_architecture
from posttrain.estimate.device import GIB, Device, present_device
from posttrain.estimate.memory import MemoryEstimate, estimate_memory
from posttrain.estimate.rows import Layout
from posttrain.estimate.stage import training_of
from posttrain.recipe.training import TrainingConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.store.files import write_json
from posttrain.train.tables import TrainingTable

Config = TypeVar("Config", bound=TrainingConfig)

RESOURCES = "resources.json"
"""File of a trained artifact with estimated and measured memory."""

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Resources:
    """Watches one training run's memory from before the model is loaded."""

    estimate: MemoryEstimate | None
    """None for a model whose sizes cannot be read."""
    before: int
    """Bytes of the process when it had loaded its libraries and rows, and no model."""
    micro_batch_size: int

    @classmethod
    def watch(cls, context: StageContext[Config], table: TrainingTable) -> Resources:
        """Estimate the stage, and forget the memory that was needed up to here."""
        forget_peak()
        config = context.config
        micro = config.micro_batch_size
        estimate = estimate_run(config, Path(context.input("model").path), table, micro)
        return cls(estimate, resident(), micro)

    def leave(self, output: Path, result: StageResult) -> StageResult:
        """Write `resources.json`; the result with its two figures among the metrics."""
        peak = peak_memory()
        metrics = {"memory_peak_gib": peak / GIB}
        record: dict[str, object] = {
            "memory_peak_gib": peak / GIB,
            "memory_before_model_gib": self.before / GIB,
            "micro_batch_size": self.micro_batch_size,
            "device": present_device().name,
        }
        if self.estimate is not None:
            metrics["memory_estimate_gib"] = self.estimate.gib
            record["memory_estimate_gib"] = self.estimate.in_gib()
            record["moment"] = self.estimate.moment
        write_json(output / RESOURCES, record)
        return result.model_copy(update={"metrics": {**result.metrics, **metrics}})


def estimate_run(
    config: TrainingConfig,
    model: Path,
    table: TrainingTable,
    micro_batch_size: int,
    device: Device | None = None,
) -> MemoryEstimate | None:
    """What a stage's process needs for rows that are known; None where the model's sizes are not.

    Args:
        config: The stage.
        model: Folder of the base model.
        table: Its training rows.
        micro_batch_size: Entries a pass.
        device: By default the present one.
    """
    try:
        sizes = read_architecture(model)
    except ModelError:
        return None
    widest = widest_pass(config, table, micro_batch_size)
    layout = Layout(len(table), int(table.tokens.sum()), 0.0, widest)
    training = training_of(config, layout, device or present_device(), micro_batch_size)
    return estimate_memory(sizes, training)


def widest_pass(config: TrainingConfig, table: TrainingTable, micro_batch_size: int) -> Pass:
    """The pass with the most tokens that the order of the rows could bring."""
    entries = table.tokens[table.longest[:micro_batch_size]]
    virtual = getattr(config.adapter, "virtual_tokens", 0) if config.adapter else 0
    longest = max(max(lengths) for lengths in table.dataset["seq_lengths"]) + virtual
    if config.padding_free:
        return Pass(int(entries.sum()), longest, flat=True)
    padded = len(entries) > 1 and bool(np.ptp(table.tokens))
    return Pass(len(entries) * longest, longest, flat=False, padded=padded)


def peak_memory() -> int:
    """Bytes of this process at most: of the GPU where there is one, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved()) + _cuda_context()
    return _status("VmHWM") or _ever()


def resident() -> int:
    """Bytes of this process's resident memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def forget_peak() -> None:
    """Start a new peak, where the system allows it; else it counts from the program's start."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return


def _cuda_context() -> int:
    """Bytes that the driver has given this process beyond torch's allocator, all of it if alone."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return max(0, int(total - free - torch.cuda.memory_reserved()))


def _status(name: str) -> int:
    """A size in /proc/self/status, in bytes; 0 where there is none."""
    try:
        text = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _ever() -> int:
    """Most resident memory since the process began; macOS counts in bytes and Linux in KiB."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
