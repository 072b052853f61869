"""DPO by TRL, on pairs that are already tokenized (Rafailov et al., 2023, arXiv:2305.18290).

Importing this module imports TRL and torch: do it inside functions.
"""

from __future__ import annotations

import torch
from trl import DPOTrainer

from posttrain.train.preference_trainers import Batch, Recorder, ReferencedTrainer


class DpoStageTrainer(ReferencedTrainer, DPOTrainer):  # type: ignore[misc]  # trl is untyped
    """Learns to prefer the chosen answer of each pair."""

    REFERENCES = {
        "ref_chosen_logps": "reference_chosen_logp",
        "ref_rejected_logps": "reference_rejected_logp",
    }

    def score(self, model: torch.nn.Module, inputs: Batch) -> dict[str, torch.Tensor]:
        """Loss, and log-probabilities and rewards of both answers."""
        recorder = Recorder(model)
        with self.held_out_references():
            loss = self._compute_loss(recorder, inputs, return_outputs=False)
        chosen, rejected = recorder.log_probs.sum(1).chunk(2)
        references = [inputs[name] for name in self.REFERENCES]
        return {
            "loss": loss,
            "chosen_logp": chosen,
            "rejected_logp": rejected,
            **dict(zip(self.REFERENCES.values(), references, strict=True)),
            "chosen_reward": self.beta * (chosen - references[0]),
            "rejected_reward": self.beta * (rejected - references[1]),
        }
