"""ORPO by TRL, on pairs that are already tokenized (Hong et al., 2024, arXiv:2403.07691).

TRL keeps it among what is experimental. All that is posttrain's of it is in this module and in
`posttrain.stages.orpo`.

Importing this module imports TRL and torch: do it inside functions.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftModel
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

# That it is experimental is known here, and nobody else can do anything about it.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.orpo import ORPOTrainer

from posttrain.train.preference_trainers import AnswerTrainer, Batch, Recorder


class OrpoStageTrainer(AnswerTrainer, ORPOTrainer):  # type: ignore[misc]  # trl is untyped
    """Learns to write the chosen answers, and to prefer them, at once.

    Likelihood is that of the paper's equation 6: for each pair the mean over the tokens of prompt
    and chosen answer, and then the mean over pairs. TRL takes the mean over the tokens of a pass,
    which changes with the micro-batch. As in TRL, the odds are of the answers' mean log-probability
    alone.
    """

    def __init__(self, **arguments: Any) -> None:
        model, tokenizer = arguments["model"], arguments["processing_class"]
        collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        super().__init__(data_collator=collator, **arguments)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        add_fused_lm_head(base, outputs=("log_probs", "mean_logits"))

    def tokenize_row(self, feature: Batch, model: Any = None) -> Batch:
        """Nothing: rows come tokenized."""
        del feature, model
        return {}

    def concatenated_forward(self, model: Any, batch: Batch) -> tuple[torch.Tensor, ...]:
        """One pass over chosen and rejected sequences, without keeping their logits.

        Returns:
            As TRL's: mean log-probabilities of chosen and of rejected answers, both of shape
            [pairs], the mean logits of either, and the mean negative log-likelihood of the chosen
            sequences. For models of experts the auxiliary loss as well.
        """
        ids, attention = batch["input_ids"], batch["attention_mask"].bool()
        answers, pairs = batch["completion_mask"].bool(), len(ids) // 2
        scored = torch.cat([attention[:pairs], answers[pairs:]])
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        recorder = Recorder(model)
        out = recorder(
            input_ids=ids,
            attention_mask=batch["attention_mask"],
            labels=ids.masked_fill(~scored, -100),
            use_cache=False,
            fused_lm_head=True,
            **more,
        )
        log_probs, scored, answers = recorder.log_probs, scored[:, 1:], answers[:, 1:]
        means = (log_probs * answers).sum(1) / answers.sum(1)
        likelihood = (log_probs[:pairs].sum(1) / scored[:pairs].sum(1)).mean()
        logits = out.mean_logits[:, -log_probs.shape[1] :]
        chosen_logits, rejected_logits = (
            logits[half][scored[half]].mean() for half in (slice(pairs), slice(pairs, None))
        )
        found = (means[:pairs], means[pairs:], chosen_logits, rejected_logits, -likelihood)
        return (*found, out.aux_loss) if self.aux_loss_enabled else found

    def score(self, model: torch.nn.Module, inputs: Batch) -> dict[str, torch.Tensor]:
        """Loss, and log-probabilities and rewards of both answers."""
        recorder = Recorder(model)
        loss, _ = self.get_batch_loss_metrics(recorder, inputs, train_eval="eval")
        answers = inputs["completion_mask"][:, 1:]
        sums = (recorder.log_probs * answers).sum(1)
        chosen, rejected = sums.chunk(2)
        chosen_mean, rejected_mean = (sums / answers.sum(1)).chunk(2)
        return {
            "loss": loss,
            "chosen_logp": chosen,
            "rejected_logp": rejected,
            "chosen_mean_logp": chosen_mean,
            "rejected_mean_logp": rejected_mean,
            "chosen_reward": self.beta * chosen_mean,
            "rejected_reward": self.beta * rejected_mean,
        }

    def forget_numbers(self, mode: str) -> None:
        """TRL keeps them in `_stored_metrics`."""
        self._stored_metrics[mode].clear()
