"""TRL's SFTTrainer with a held-out loss and token counts that no batch shape can change.

Importing this module imports TRL and torch: do it inside functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from trl import SFTTrainer

from posttrain.train.held_out import HeldOut
from posttrain.train.stage_trainer import StageTrainer
from posttrain.train.tokenize import IGNORED


class TokenWeightedTrainer(StageTrainer, SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """Next-token prediction on rows that are already tokenized.

    Transformers averages the held-out loss over batches, so that it changes with their size and
    with the number of processes. Here it is nats per trained token over all rows, in all and by
    task, and kept by row.
    """

    def __init__(self, *, held_out: HeldOut, **arguments: Any) -> None:
        super().__init__(eval_dataset=held_out.table.dataset, **arguments)
        self._held_out = held_out

    def measure_held_out(self, dataloader: DataLoader[Any], prefix: str) -> dict[str, float]:
        """Negative log-likelihood of the labelled tokens over their number; rows are kept apart."""
        model = self._wrap_model(self.model, training=False)
        model.eval()
        likelihoods = torch.zeros(len(self._held_out.table), dtype=torch.float64)
        width, own = self.args.per_device_eval_batch_size, self.accelerator.process_index
        for number, batch in enumerate(dataloader):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                out = model(**inputs, use_cache=False, fused_lm_head=True)
            first = (number * self.accelerator.num_processes + own) * width
            likelihoods[first : first + width] = -_by_sequence(out.log_probs, inputs).cpu()
        summed = np.array(self.sum_over_processes(likelihoods))
        if self.is_world_process_zero():
            self._held_out.keep(summed, Path(self.args.output_dir), self.state.global_step)
        return self._held_out.losses(summed, prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Leave out what TRL logs beside the loss: the plain head does not compute it."""
        for measured in self._metrics.values():
            measured.pop("entropy", None)
            measured.pop("mean_token_accuracy", None)
        super().log(logs, start_time)

    def count_tokens(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Tokens that are no padding, and those that some position is trained to predict."""
        return _tokens(batch), _predicted(batch["labels"])


def _by_sequence(log_probs: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """Sums over sequences of what is zero at every position that is not trained on.

    Args:
        log_probs: Of shape [rows, length - 1]: of the token after each position.
        inputs: With `cu_seq_lens_q` where the rows lie end to end.

    Returns:
        float64 of shape [rows].
    """
    log_probs = log_probs.double()
    bounds = inputs.get("cu_seq_lens_q")
    if bounds is None:
        return log_probs.sum(1)
    # A row's first token is never predicted: the position before it, in another row, is zero.
    flat = torch.nn.functional.pad(log_probs[0], (1, 0))
    return torch.stack([part.sum() for part in flat.split(bounds.diff().tolist())])


def _tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens that are no padding; a batch without a mask has none."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def _predicted(labels: torch.Tensor) -> int:
    """Labels that some position predicts; of shape [rows, length], the first column is not."""
    return int((labels[:, 1:] != IGNORED).sum())
