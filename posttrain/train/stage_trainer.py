"""What every trainer of a stage adds to TRL's: token counts, exact checkpoints, restored weights.

Importing this module imports TRL and torch: do it inside functions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput

from posttrain.train.adapter_training import ExactAdapterCheckpoints
from posttrain.train.adapters import keep_dtypes
from posttrain.train.head import prefer_plain_head
from posttrain.train.sharding import remember_division


class StageTrainer(ExactAdapterCheckpoints):
    """For a class that is one of TRL's trainers, too, and comes before it among the bases."""

    args: Any
    state: Any
    accelerator: Any

    def __init__(self, **arguments: Any) -> None:
        """Make the trainer; `arguments` are TRL's."""
        prefer_plain_head()
        self._step_tokens = 0
        self._step_trained_tokens = 0
        with keep_dtypes(arguments["model"]):
            super().__init__(**arguments)
        # Progress goes to events.jsonl.
        self.remove_callback(PrinterCallback)  # type: ignore[attr-defined]

    @abstractmethod
    def count_tokens(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Tokens of a micro-batch that are no padding, and those of them that are trained on."""

    @abstractmethod
    def measure_held_out(self, dataloader: DataLoader[Any], prefix: str) -> dict[str, float]:
        """What is held out, measured over all of it and over all processes.

        Args:
            dataloader: Of the held-out rows, in the trainer's batches.
            prefix: Of the names of the measures.
        """

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure what is held out, in transformers' form."""
        del description, prediction_loss_only, ignore_keys  # the signature is transformers'
        measures = self.measure_held_out(dataloader, metric_key_prefix)
        none = np.empty(0)
        return EvalLoopOutput(none, none, measures, num_samples=len(dataloader.dataset))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Fetch the micro-batches of an optimizer step and count their tokens."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        counts = [self.count_tokens(batch) for batch in samples]
        summed = torch.tensor(counts, dtype=torch.float64).reshape(-1, 2).sum(0)
        total, trained = self.sum_over_processes(summed)
        self._step_tokens, self._step_trained_tokens = int(total), int(trained)
        return samples, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's token counts to what is logged, and so to the history."""
        if "loss" in logs:
            logs["tokens"] = self._step_tokens
            logs["trained_tokens"] = self._step_trained_tokens
        super().log(logs, start_time)  # type: ignore[misc]

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """Save a checkpoint, whose folder is there before transformers looks for the best one.

        Under FSDP it would be made too late: the best checkpoint would be the one before, and not
        the same one on every process.
        """
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        folder.mkdir(parents=True, exist_ok=True)
        remember_division(self, folder)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def create_model_card(self, *_args: object, **_kwargs: object) -> None:
        """None: a card is written from the manifest, not by the trainer."""

    def restore_best(self) -> None:
        """Load the weights of the best checkpoint that the trainer's state names."""
        if self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def sum_over_processes(self, values: torch.Tensor) -> list[float]:
        """Sums of a tensor's numbers over the processes, on each of them."""
        summed = self.accelerator.reduce(values.to(self.args.device), reduction="sum")
        numbers: list[float] = summed.tolist()
        return numbers
