"""TRL's RewardTrainer with held-out measures that no batch shape can change.

Importing this module imports TRL and torch: do it inside functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from trl import RewardTrainer

from posttrain.train.pairs import AnswerTable
from posttrain.train.reward_data import HeldOutPairs
from posttrain.train.stage_trainer import StageTrainer


class PairwiseTrainer(StageTrainer, RewardTrainer):  # type: ignore[misc]  # trl is untyped
    """Bradley-Terry's loss on pairs that are already tokenized.

    TRL averages the held-out loss over batches, and adds to it what is asked for in training:
    margins and centring. Here it is the negative log-likelihood of the order that people chose, in
    nats a pair over all pairs, so that it says the same whatever is trained for.
    """

    def __init__(self, *, held_out: HeldOutPairs, **arguments: Any) -> None:
        super().__init__(eval_dataset=held_out.table.dataset, **arguments)
        self._held_out = held_out

    def measure_held_out(self, dataloader: DataLoader[Any], prefix: str) -> dict[str, float]:
        """Loss, accuracy and margin over all held-out pairs; their scores are kept apart."""
        scores = self._scores(dataloader, len(self._held_out.table))
        if self.is_world_process_zero():
            self._held_out.keep(scores, Path(self.args.output_dir), self.state.global_step)
        return self._held_out.measures(scores, prefix)

    def score(self, table: AnswerTable) -> np.ndarray:
        """Scores of the pairs of a table, without those that fill it up: all processes must ask.

        Returns:
            float64 of shape (pairs, 2): of the chosen and of the rejected answer.
        """
        return self._scores(self.get_eval_dataloader(table.dataset), len(table))[: table.distinct]

    def count_tokens(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Tokens that are no padding, and the positions that are scored: one a sequence."""
        return int(batch["attention_mask"].sum()), len(batch["input_ids"])

    def _scores(self, dataloader: DataLoader[Any], entries: int) -> np.ndarray:
        model = self._wrap_model(self.model, training=False)
        model.eval()
        scores = torch.zeros(entries, 2, dtype=torch.float64)
        width, own = self.args.per_device_eval_batch_size, self.accelerator.process_index
        for number, batch in enumerate(dataloader):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = score_sequences(model, inputs)
            first = (number * self.accelerator.num_processes + own) * width
            # The collator puts the chosen sequences first, then the rejected ones.
            scores[first : first + width] = logits.double().cpu().reshape(2, -1).T
        return np.array(self.sum_over_processes(scores))


def sum_of_scores(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """A loss that needs as much memory as the pairs' own, for the probe before the first step."""
    return score_sequences(model, inputs).sum()


def score_sequences(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Scores of shape [sequences] of a collated batch."""
    out = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    )
    scores: torch.Tensor = out.logits[:, 0]
    return scores
