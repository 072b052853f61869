"""TRL's SFTTrainer with a held-out loss and token counts that no batch shape can change.

Importing this module imports TRL and torch: do it inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from posttrain.train.tokenize import IGNORED


class TokenWeightedTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """Supervised trainer on rows that are already tokenized.

    Transformers averages the held-out loss over batches, so that it changes with their size and
    with the number of processes. Here it is nats per trained token over all rows.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)  # progress goes to events.jsonl
        self._step_tokens = 0
        self._step_trained_tokens = 0

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Total negative log-likelihood of the labelled tokens over their number."""
        del description, prediction_loss_only, ignore_keys  # the signature is transformers'
        model = self._wrap_model(self.model, training=False)
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            tokens = _predicted(inputs["labels"])
            with torch.no_grad(), self.compute_loss_context_manager():
                mean = self.compute_loss(model, inputs)
            sums += torch.tensor([float(mean) * tokens, tokens], dtype=torch.float64)
        total, count = self._sum_over_processes(sums)
        none = np.empty(0)
        loss = {f"{metric_key_prefix}_loss": total / count}
        return EvalLoopOutput(none, none, loss, num_samples=self.num_examples(dataloader))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Fetch the micro-batches of an optimizer step and count their tokens."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [
            sum(int(batch["attention_mask"].sum()) for batch in samples),
            sum(_predicted(batch["labels"]) for batch in samples),
        ]
        total, trained = self._sum_over_processes(torch.tensor(counts, dtype=torch.float64))
        self._step_tokens, self._step_trained_tokens = int(total), int(trained)
        return samples, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's token counts to what is logged, and so to the history."""
        if "loss" in logs:
            logs["tokens"] = self._step_tokens
            logs["trained_tokens"] = self._step_trained_tokens
        super().log(logs, start_time)

    def create_model_card(self, *_args: object, **_kwargs: object) -> None:
        """None: a card is written from the manifest, not by the trainer."""

    def restore_best(self) -> None:
        """Load the weights of the best checkpoint that the trainer's state names."""
        if self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def _sum_over_processes(self, values: torch.Tensor) -> list[float]:
        summed = self.accelerator.reduce(values.to(self.args.device), reduction="sum")
        numbers: list[float] = summed.tolist()
        return numbers


def _predicted(labels: torch.Tensor) -> int:
    """Labels that some position predicts; of shape [rows, length], the first column is not."""
    return int((labels[:, 1:] != IGNORED).sum())
