"""TRL's GRPOTrainer and RLOOTrainer on posttrain's prompts, rollouts and rewards.

TRL has the losses, the advantages and the numbers of each step. What is done here instead of there:

- prompts are those of `encode_prompts`, asked in the order of `prompt_order`, so that none is
  dropped at the end of a pass and a resumed run asks what an uninterrupted one would have;
- answers are written by `rollout`, with draws that depend on seed, step and position alone: not on
  the generators' states, on batches or on the number of processes;
- the reference of an adapter is the base with the adapter off, where TRL would copy the adapter;
- an evaluation is one answer to each held-out prompt, judged by what the stage is to gain.

Importing this module imports TRL and torch: do it inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel
from trl import GRPOTrainer, RLOOTrainer
from trl.models import unwrap_model_for_generation

from posttrain.recipe.grpo import GroupConfig
from posttrain.train.prompts import Prompt, prompt_order
from posttrain.train.rewards import Reward, Score
from posttrain.train.rollout import Answer, Rollouts, answer_log_probs, make_rollouts
from posttrain.train.stage_trainer import StageTrainer
from posttrain.train.watch import RewardWatch, Written


@dataclass(frozen=True)
class Asking:
    """What is asked, and what the answers are worth."""

    config: GroupConfig
    prompts: Sequence[Prompt]
    """To learn from."""
    held_out: Sequence[Prompt]
    reward: Reward
    watch: RewardWatch
    steps: int
    """Optimizer steps of the run."""
    load_reference: Callable[[], PreTrainedModel]
    """Loads the model as it was before this stage."""

    @cached_property
    def order(self) -> np.ndarray:
        """Positions of the prompts, int64 of shape (times answers are written, prompts a time)."""
        times = -(-self.steps // self.config.passes)
        at_once = self.config.batching.batch_size // self.config.answers
        order = prompt_order(len(self.prompts), times * at_once, self.config.seed)
        return order.reshape(times, at_once)

    def asked_at(self, step: int) -> list[Prompt]:
        """The prompts whose answers optimizer step `step`, from 1, learns from."""
        return [self.prompts[n] for n in self.order[(step - 1) // self.config.passes]]


class GroupTrainer(StageTrainer):
    """For a class that is TRL's GRPOTrainer or RLOOTrainer, too, and comes before it."""

    model: Any
    model_wrapped: Any
    ref_model: Any
    processing_class: Any
    is_world_process_zero: Callable[[], bool]
    use_vllm: bool
    beta: float
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, *, asking: Asking, **arguments: Any) -> None:
        """Make the trainer.

        Args:
            asking: What is asked, and what the answers are worth.
            arguments: TRL's, without data and rewards.
        """
        self._asking = asking
        self._answer_tokens = (0, 0)
        args, beta = arguments["args"], arguments["args"].beta
        adapted = isinstance(arguments["model"], PeftModel)
        # Given a model with an adapter, TRL takes the adapter for trained already and keeps a copy
        # of it as the reference. Ours is new: with it off, the model is the one before.
        args.beta = 0.0 if adapted else beta
        scores = asking.reward.scores
        super().__init__(
            reward_funcs=[_for_trl(name, scores[name], asking.prompts) for name in scores],
            train_dataset=_numbers(len(asking.prompts)),
            eval_dataset=_numbers(len(asking.held_out)),
            **arguments,
        )
        args.beta = self.beta = beta
        if not (adapted and self.model.active_peft_config.is_prompt_learning):
            self.model.register_forward_pre_hook(_count_positions, with_kwargs=True)
        if self.ref_model is not None:
            self.ref_model.register_forward_pre_hook(_count_positions, with_kwargs=True)

    # What is asked

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        del dataset  # there is one
        return _RunSampler(
            self._asking.order,
            self._asking.config.answers,
            self._asking.config.passes * self.args.steps_per_generation,
        )

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The token ids of prompts that are named by their numbers."""
        return [self._asking.prompts[int(number)].input_ids for number in prompts], None, {}

    # What is answered

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *others: Any, **more: Any
    ) -> tuple[list[list[int]], None] | list[list[int]]:
        """An answer to each of this process's prompts; GRPO also wants the log-probabilities."""
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *others, **more)  # type: ignore[misc, no-any-return]
        seed = _seed(self.args.seed, 1 + self.state.global_step)
        first = self.accelerator.process_index * len(prompt_ids)
        written = [answer.token_ids for answer in self._write(prompt_ids, seed, first)]
        return (written, None) if isinstance(self, GRPOTrainer) else written

    def _write(self, prompt_ids: Sequence[list[int]], seed: int, first: int) -> list[Answer]:
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self.accelerator.autocast(),
        ):
            return self._rollouts(model).write(prompt_ids, seed, first)

    def _rollouts(self, model: PreTrainedModel) -> Rollouts:
        # TRL's own engine writes the answers to learn from; a second one would not fit beside it.
        rollout = self._asking.config.rollout.model_copy(update={"backend": "transformers"})
        return make_rollouts(model, self.processing_class, rollout)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Write and score the answers of the next steps, and count their tokens."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        counts = [output[f"{part}_mask"].sum() for part in ("prompt", "completion")]
        asked, answered = self.sum_over_processes(torch.stack(counts).double())
        self._answer_tokens = (int(asked + answered), int(answered))
        return output

    def count_tokens(self, batch: dict[str, Any]) -> tuple[int, int]:
        """None yet: when a batch is fetched its answers are not written."""
        del batch
        return 0, 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log tokens of the answers, and no times: those are the machine's."""
        self._step_tokens, self._step_trained_tokens = self._answer_tokens
        self._metrics["train"].pop("step_time", None)
        super().log(logs, start_time)

    # What it is worth

    def measure_held_out(self, dataloader: DataLoader[Any], prefix: str) -> dict[str, float]:
        """One answer to each held-out prompt: `eval_loss` is beta * KL - reward, an answer.

        The draws are the same at every evaluation. KL is summed over an answer's tokens.
        """
        del dataloader, prefix
        self.model.eval()
        number, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = np.array_split(np.arange(len(self._asking.held_out)), processes)[number]
        found: list[Written] = gather_object(self._answer_held_out(mine))
        values: list[dict[str, float]] = [{}]
        if self.is_world_process_zero():
            values = [self._asking.watch.look(self.state.global_step, found)]
        [metrics] = broadcast_object_list(values)
        price = self.beta * metrics["eval_kl"] if self.beta else 0.0
        return {"eval_loss": price - metrics["eval_reward"], **metrics}

    def _answer_held_out(self, positions: Sequence[int]) -> list[Written]:
        if len(positions) == 0:
            return []
        prompts = [self._asking.held_out[n].input_ids for n in positions]
        answers = self._write(prompts, _seed(self.args.seed, 0), int(positions[0]))
        divergences = self._divergences(prompts, answers)
        return [
            Written(answer.text, len(answer.token_ids), answer.ended, kl)
            for answer, kl in zip(answers, divergences, strict=True)
        ]

    def _divergences(self, prompts: Sequence[list[int]], answers: Sequence[Answer]) -> list[float]:
        """Log-ratio of each answer to the reference, in nats."""
        if self.state.global_step == 0:
            return [0.0] * len(answers)
        policy = self.accelerator.unwrap_model(self.model)
        now = self._log_probs(policy, prompts, answers)
        with self._reference(policy) as reference:
            before = self._log_probs(reference, prompts, answers)
        return [float((a.double() - b.double()).sum()) for a, b in zip(now, before, strict=True)]

    @contextmanager
    def _reference(self, policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The model as it was before this stage."""
        if isinstance(policy, PeftModel):
            with policy.disable_adapter():
                yield policy
        elif self.ref_model is not None:
            yield self.ref_model
        else:
            # What costs nothing while it is learned from is loaded only to be measured.
            yield self._asking.load_reference()

    def _log_probs(
        self, model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[Answer]
    ) -> list[torch.Tensor]:
        with self.accelerator.autocast():
            return answer_log_probs(
                model,
                prompts,
                [answer.token_ids for answer in answers],
                self._asking.config.rollout.temperature,
                self.args.per_device_eval_batch_size,
                self.processing_class.pad_token_id,
            )


class GrpoTrainer(GroupTrainer, GRPOTrainer):  # type: ignore[misc]  # trl is untyped
    """Group relative policy optimization (Shao et al., 2024, arXiv:2402.03300)."""


class RlooTrainer(GroupTrainer, RLOOTrainer):  # type: ignore[misc]  # trl is untyped
    """REINFORCE leave-one-out (Ahmadian et al., 2024, arXiv:2402.14740)."""


class _RunSampler(Sampler[int]):  # type: ignore[misc]  # untyped to mypy
    """The prompts of a whole run, in the form in which TRL's trainers read them.

    For each set of prompts that is asked at once: every prompt as often as it has answers, and all
    of that as often as its answers are used. The run is one epoch, so that transformers skips to
    the right place when it is resumed: TRL's own sampler would begin with its first order again.
    """

    def __init__(self, order: np.ndarray, answers: int, repeats: int) -> None:
        self._order, self._answers, self._repeats = order, answers, repeats

    def __len__(self) -> int:
        return int(self._order.size) * self._answers * self._repeats

    def __iter__(self) -> Iterator[int]:
        for together in self._order:
            yield from np.tile(np.repeat(together, self._answers), self._repeats).tolist()


def _numbers(count: int) -> Dataset:
    """A table of prompts that are named by their numbers: TRL would tokenize texts itself."""
    return Dataset.from_dict({"prompt": [str(number) for number in range(count)]})


def _for_trl(name: str, score: Score, prompts: Sequence[Prompt]) -> Callable[..., list[float]]:
    """A term of the reward as TRL calls it; its name is that of the metrics."""

    def function(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        asked = [known[int(number)] for number in prompts]
        scores: list[float] = score(asked, completions).tolist()
        return scores

    known = prompts
    function.__name__ = name
    return function


def _seed(seed: int, time: int) -> int:
    """A seed of its own for each time that answers are written."""
    return int(np.random.default_rng([seed, time]).integers(2**63))


def _count_positions(
    module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Count positions from a prompt's first token, as when the answer was written.

    TRL leaves them to the model, which counts the padding before the prompt as well: models with
    learned positions would have other log-probabilities than those the answer was drawn from.
    """
    del module
    mask = keywords.get("attention_mask")
    given = any(keywords.get(name) is not None for name in ("position_ids", "past_key_values"))
    if mask is not None and mask.dim() == 2 and not given:
        keywords["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return arguments, keywords
