"""The processes of one training run, and the silence of the libraries in them.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def world_size() -> int:
    """Processes that torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def prepare_libraries(*, deepspeed: bool = False) -> None:
    """Keep the libraries quiet; call it before the first model is loaded.

    Args:
        deepspeed: Whether DeepSpeed divides the training state; else it is kept out.
    """
    import accelerate.utils.other
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Advice for those who call the library; whoever wrote the recipe can do nothing about it.
    libraries = r"(accelerate|datasets|peft|torch|transformers|trl)\."
    for category in (FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)
    if not deepspeed:
        # accelerate imports it, in 3 to 5 seconds, only to ask whether a model is its engine.
        accelerate.utils.other.is_deepspeed_available = lambda: False


def wait_for_all() -> None:
    """Return once every process of the run is here."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.barrier()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process. All processes must ask, at the same step."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return flag
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared)


def leave_process_group() -> None:
    """End torch's process group, if there is one; without it the process aborts at exit."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
