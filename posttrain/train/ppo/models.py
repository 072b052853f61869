"""Policy, critic and reference: what each computes, and which weights they share.

Importing this module imports torch: do it inside functions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.train.rollout import Batch


@dataclass(frozen=True)
class Models:
    """All that an update computes with, in evaluation mode.

    With an adapter, policy, critic and reference are one copy of the frozen weights: the critic
    has an adapter of its own, the reference is the policy with its adapter switched off. Where all
    weights are trained, each of them is a copy.
    """

    policy: PreTrainedModel
    """A causal language model, or a PeftModel around one."""
    backbone: nn.Module | None
    """The critic's own; None where it reads the policy's hidden states."""
    head: nn.Linear
    """From a hidden state to a value."""
    reference: PreTrainedModel | None
    """None: the policy without its adapter."""

    @classmethod
    def make(cls, policy: PreTrainedModel, critic: Literal["own", "shared"]) -> Models:
        """Build critic and reference from the policy, before its first step.

        The critic begins as the policy and not as the reward model: the reward may be a function
        or a sum of models, and only a copy of the policy can share its frozen weights.
        """
        # Detail: dropout is off, or the first ratios would not be 1.
        causal = _causal(policy.eval())
        if causal.device.type == "cuda":
            causal.gradient_checkpointing_enable({"use_reentrant": False})
        tensors = chain(policy.parameters(), policy.buffers())
        shared = {id(tensor): tensor for tensor in tensors if not tensor.requires_grad}
        head = nn.Linear(causal.config.get_text_config().hidden_size, 1, device=causal.device)
        # Values begin at 0. (Detail, reward-head initialisation: the paper's critic takes over the
        # reward model's head, which the stage `reward` draws as the paper says.)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(
            policy=policy,
            backbone=copy.deepcopy(causal.base_model, shared) if critic == "own" else None,
            head=head,
            reference=None
            if hasattr(policy, "disable_adapter")
            else copy.deepcopy(policy).requires_grad_(False),
        )

    def trained(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Parameters with a gradient, of the policy and of the critic, by name."""
        critic = nn.ModuleDict({"head": self.head})
        if self.backbone is not None:
            critic["backbone"] = self.backbone
        policy, values = (
            {name: p for name, p in module.named_parameters() if p.requires_grad}
            for module in (self.policy, critic)
        )
        return policy, values

    def policy_and_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is said before each token of the answers.

        Returns:
            Logits of shape [rows, answer, vocabulary] and values of shape [rows, answer].
        """
        inputs, seen = batch.inputs(), []
        base = _causal(self.policy).base_model
        with base.register_forward_hook(lambda _module, _inputs, out: seen.append(out[0])):
            logits = self.policy(**inputs).logits[:, :-1]
        kept = inputs.pop("logits_to_keep")
        hidden = seen[0] if self.backbone is None else self.backbone(**inputs)[0]
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.head(hidden[:, -kept:-1].to(self.head.weight.dtype)).squeeze(-1)
        return logits, values

    def reference_logits(self, batch: Batch) -> Tensor:
        """Logits of the model as it was, of shape [rows, answer, vocabulary]."""
        if self.reference is not None:
            return self.reference(**batch.inputs()).logits[:, :-1]
        with self.policy.disable_adapter():
            return self.policy(**batch.inputs()).logits[:, :-1]

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Recompute activations in between, on a GPU, whose memory is short.

        Transformers does so in training mode alone. The flag is set on the layers and not on their
        children, so that dropout stays off.
        """
        layers: list[Any] = [
            module
            for model in (self.policy, self.backbone)
            if model is not None and self.head.weight.is_cuda
            for module in model.modules()
            if isinstance(module, GradientCheckpointingLayer)
        ]
        for layer in layers:
            layer.training = True
        yield
        for layer in layers:
            layer.training = False


def _causal(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
