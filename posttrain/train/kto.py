"""KTO by TRL, on answers that are already tokenized (Ethayarajh et al., 2024, arXiv:2402.01306).

Its loss compares an answer's log-ratio with an estimate of how far the model has moved at all: the
mean log-ratio of answers to other prompts, at least zero (equation 7). TRL takes the mean over a
forward pass, and over the processes beside it. Here it is taken over the optimizer step, so that
the micro-batch and the number of processes change nothing. Of held-out rows it is taken over all.

Importing this module imports TRL and torch: do it inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from trl import KTOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from posttrain.recipe.kto import KtoConfig
from posttrain.train.preference_trainers import Batch, Recorder, ReferencedTrainer


def side_weights(config: KtoConfig, labels: Sequence[bool]) -> tuple[float, float]:
    """Weights of wanted and unwanted answers.

    Those that the recipe leaves open are 1 or, on the side with fewer answers, such that both sides
    count alike: weight times number is the same (the paper's equation 8).
    """
    wanted, unwanted = sum(labels), len(labels) - sum(labels)
    desirable, undesirable = config.desirable_weight, config.undesirable_weight
    if desirable is None:
        fewer = 0 < wanted < unwanted
        own = 1.0 if undesirable is None else undesirable
        desirable = own * unwanted / wanted if fewer else 1.0
    if undesirable is None:
        fewer = 0 < unwanted < wanted
        undesirable = desirable * wanted / unwanted if fewer else 1.0
    return desirable, undesirable


class KtoStageTrainer(ReferencedTrainer, KTOTrainer):  # type: ignore[misc]  # trl is untyped
    """Learns to make wanted answers likelier and unwanted ones less likely."""

    REFERENCES = {"ref_logps": "reference_logp", "ref_KL_logps": "reference_kl_logp"}

    def __init__(self, **arguments: Any) -> None:
        args = arguments["args"]
        # TRL refuses one row a pass, from which it could not estimate how far the model has moved.
        loss, args.loss_type = args.loss_type, "apo_zero_unpaired"
        super().__init__(**arguments)
        self.loss_type = args.loss_type = loss
        self.calculate_KL = loss == "kto"
        self._step: list[Batch] = []
        self._moved: torch.Tensor | None = None
        self._asked: Iterator[float] = iter(())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Fetch the micro-batches of an optimizer step and remember them for the estimate."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step, self._moved = samples, None
        return samples, num_items

    def prepare_scoring(self, model: torch.nn.Module) -> None:
        """Estimate from all held-out rows how far the model has moved."""
        super().prepare_scoring(model)
        if self.calculate_KL:
            own = self.over_held_out(
                lambda inputs: {
                    "moved": super(KtoStageTrainer, self)._compute_kl_logps(model, inputs)
                    - inputs["ref_KL_logps"]
                }
            )
            self._moved = torch.tensor(own["moved"].mean(), dtype=torch.float32)
            self.moved_of_held_out = max(0.0, float(self._moved))

    def score(self, model: torch.nn.Module, inputs: Batch) -> dict[str, torch.Tensor]:
        """Loss, log-probability, reward and label."""
        recorder = Recorder(model)
        with self.held_out_references():
            loss = self._compute_loss(recorder, inputs, return_outputs=False)
        logp = recorder.log_probs.sum(1)
        return {
            "loss": loss,
            "label": inputs["label"],
            "logp": logp,
            "reference_logp": inputs["ref_logps"],
            "reward": self.beta * (logp - inputs["ref_logps"]),
        }

    def evaluation_loop(self, *positional: Any, **named: Any) -> Any:
        """Add the estimate for the held-out rows to their numbers."""
        output = super().evaluation_loop(*positional, **named)
        if self.calculate_KL:
            prefix = named.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_kl"] = self.moved_of_held_out
        self._moved = None
        return output

    def loss_alone(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        """Loss of a batch that is a step of its own."""
        self._step, self._moved = [inputs], None
        loss = super().loss_alone(model, inputs)
        self._step, self._moved = [], None
        return loss

    def _compute_loss(self, model: Any, inputs: Batch, return_outputs: bool) -> Any:
        """TRL's, given the estimate instead of a pass to make it from."""
        if not self.calculate_KL:
            return super()._compute_loss(model, inputs, return_outputs)
        if self._moved is None:
            self._moved = self._estimate(model)
        inputs = {**inputs, "ref_KL_logps": torch.zeros_like(inputs["label"], dtype=torch.float32)}
        # Asked for the model's own and, unless rows bring it, the reference's log-probabilities.
        self._asked = iter((float(self._moved), 0.0))
        return super()._compute_loss(model, inputs, return_outputs)

    def _compute_kl_logps(self, model: Any, batch: Batch) -> torch.Tensor | None:
        if not self.calculate_KL:
            return None
        return torch.full(batch["label"].shape, next(self._asked), device=batch["label"].device)

    def _estimate(self, model: torch.nn.Module) -> torch.Tensor:
        """Mean log-ratio of the step's answers to other prompts, over all processes."""
        found = torch.zeros(2, dtype=torch.float64)
        for batch in self._step:
            inputs = self._prepare_inputs(batch)
            own = super()._compute_kl_logps(model, inputs)
            ratios = (own - self._reference_of_others(inputs)).double()
            found += torch.tensor([float(ratios.sum()), len(ratios)], dtype=torch.float64)
        total, count = self.sum_over_processes(found)
        return torch.tensor(total / count)

    def _reference_of_others(self, inputs: Batch) -> torch.Tensor:
        if self.precompute_ref_logps:
            brought: torch.Tensor = inputs["ref_KL_logps"]
            return brought
        kwargs = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, kwargs):
            if not isinstance(self.model, PeftModel):
                computed: torch.Tensor = super()._compute_kl_logps(self.ref_model, inputs)
                return computed
            with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
                return super()._compute_kl_logps(self.model, inputs)
