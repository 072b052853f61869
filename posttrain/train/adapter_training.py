"""What an adapter needs of the training loop: exact checkpoints, and AdaLoRA's ranks.

Importing this module imports peft, torch and transformers: do it inside functions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.errors import ModelError

_STATE = "adapter_state.safetensors"
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
"""What AdaLoRA's allocator remembers of each parameter: importance and its uncertainty."""

_ORTHOGONALITY = 0.5
"""Weight of AdaLoRA's penalty on singular vectors that are not orthogonal; peft's default."""


class ExactAdapterCheckpoints:
    """For a class that is a Trainer, too: checkpoints with the adapter just as it is trained.

    What peft writes into a checkpoint is for use, not to go on from: it leaves out the ranks that
    AdaLoRA has set to zero for now, and the network that computes a prefix, and loading it back
    fails. So each checkpoint of one process also has every trained tensor and AdaLoRA's averages.
    Under DeepSpeed and FSDP, whose own checkpoints are complete, nothing is added.
    """

    model: torch.nn.Module

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with warnings.catch_warnings():
            if isinstance(self.model, PeftModel) and _allocator(self.model) is not None:
                # Said of a layer that has no rank left for now.
                warnings.filterwarnings("ignore", message="Adapter .* have invalid shape")
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]
        if isinstance(self.model, PeftModel) and output_dir is not None and not sharded:
            save_state(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not load_state(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        if not load_state(self.model, Path(best)):
            super()._load_best_model()  # type: ignore[misc]


class AllocateRanks(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """AdaLoRA's part of each step (Zhang et al., 2023, arXiv:2303.10512, algorithm 1).

    The penalty that keeps the singular vectors orthogonal goes into the gradients and not into the
    loss, so that the losses stay those of the rows, and the result does not depend on how many
    micro-batches a step has.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Refuse what keeps its own copy of the weights, where setting ranks to zero is lost."""
        if args.deepspeed or args.fsdp:
            raise ModelError(
                "adapter: adalora changes weights between steps, which DeepSpeed and FSDP would "
                "undo; remove `launch.sharding`, or write `type: lora`"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Add the gradient of the penalty."""
        vectors = [
            (parameter, ".lora_A." in name)
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and (".lora_A." in name or ".lora_B." in name)
        ]
        penalty = _ORTHOGONALITY * _distance_from_orthogonal(vectors)
        parameters = [parameter for parameter, _ in vectors]
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(penalty, parameters), strict=True
        ):
            if parameter.grad is not None:
                parameter.grad += gradient

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Measure what each rank contributes, and set the least important ones to zero.

        It needs the gradients of the step, and comes after the optimizer, which would move the
        zeros again. Steps are counted from 1, so that the last one is `total_step`.
        """
        self._model.base_model.update_and_allocate(state.global_step + 1)


def save_state(model: PeftModel, folder: Path) -> None:
    """Write every trained tensor, and what AdaLoRA remembers, into a checkpoint."""
    tensors = {name: parameter.data for name, parameter in _trained(model).items()}
    metadata = {}
    allocator = _allocator(model)
    if allocator is not None:
        for average in _AVERAGES:
            values = getattr(allocator, average)
            tensors |= {f"{average}/{name}": value for name, value in values.items()}
        metadata["rank_pattern"] = json.dumps(allocator.peft_config.rank_pattern)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / _STATE, metadata)


def load_state(model: torch.nn.Module, folder: Path) -> bool:
    """Restore what `save_state` wrote; False where the checkpoint has nothing of the kind.

    Raises:
        ModelError: the checkpoint is of another adapter.
    """
    path = folder / _STATE
    if not isinstance(model, PeftModel) or not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    trained = _trained(model)
    if {name: parameter.shape for name, parameter in trained.items()} != {
        name: tensor.shape for name, tensor in tensors.items() if "/" not in name
    }:
        raise ModelError(f"{folder}: a checkpoint of another adapter than the recipe's")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    allocator = _allocator(model)
    if allocator is not None:
        _restore(allocator, tensors, metadata, trained)
    return True


def _restore(
    allocator: Any,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    trained: dict[str, torch.nn.Parameter],
) -> None:
    allocator.peft_config.rank_pattern = json.loads(metadata["rank_pattern"])
    for average in _AVERAGES:
        prefix = f"{average}/"
        values = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        # The averages' names leave out what peft puts around the model.
        device = next(iter(trained.values())).device
        setattr(allocator, average, {name: value.to(device) for name, value in values.items()})
    # The last importance itself is computed anew at each step; its names say which are averaged.
    allocator.ipt = {name: torch.zeros_like(t) for name, t in allocator.exp_avg_ipt.items()}


def _trained(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _allocator(model: PeftModel) -> Any:
    """AdaLoRA's rank allocator, or None with another method."""
    return vars(model.base_model).get("rankallocator")


def _distance_from_orthogonal(
    vectors: Sequence[tuple[torch.nn.Parameter, bool]],
) -> torch.Tensor:
    """Mean Frobenius norm of P P' - I over the matrices; a flag says that vectors are rows."""
    norms = []
    for matrix, rows in vectors:
        products = matrix @ matrix.T if rows else matrix.T @ matrix
        identity = torch.eye(len(products), dtype=products.dtype, device=products.device)
        norms.append(torch.linalg.matrix_norm(products - identity))
    return torch.stack(norms).mean()
