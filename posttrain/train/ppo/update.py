"""One update: answers are written and scored, then learned from in several passes.

Every process holds the whole update and computes its share of each minibatch; sums are divided by
the tokens of the minibatch over all processes. So neither the number of processes nor the size of
a micro-batch changes what is learned.

Importing this module imports torch: do it inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain.errors import ModelError
from posttrain.recipe.ppo import PpoConfig
from posttrain.train.ppo import objective
from posttrain.train.ppo.models import Models
from posttrain.train.prompts import Prompt
from posttrain.train.rewards import Reward
from posttrain.train.rollout import (
    Answer,
    Batch,
    Rollouts,
    batches_by_length,
    chosen_log_probs,
    make_batch,
)

_MEASURES = (
    "policy_loss",
    "value_loss",
    "clip_fraction",
    "value_clip_fraction",
    "update_kl_k1",
    "update_kl",
)
"""What is measured at each token while learning, in this order."""


@dataclass(frozen=True)
class Sample:
    """An answer and what was said of it before anything was learned from it."""

    prompt: Prompt
    answer: Answer
    log_probs: Tensor
    """Of its tokens: of shape [tokens] and on the CPU, as the next three."""
    reference: Tensor
    """Log-probabilities without training."""
    values: Tensor
    entropy: Tensor
    score: float = 0.0
    """What the reward says of it, nothing added or taken."""
    terms: tuple[tuple[str, float], ...] = ()
    """The scores that make it up, by name, before their weights."""

    @property
    def kl(self) -> float:
        """Sum over its tokens of log pi - log reference, in nats."""
        return float(objective.k1(self.log_probs, self.reference).sum())


@dataclass(frozen=True)
class Experience:
    """The samples of an update side by side, of shape [answers, tokens] each, on the CPU."""

    mask: Tensor
    log_probs: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    """Whitened."""
    returns: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], config: PpoConfig, kl_coef: float) -> Experience:
        """Turn scores and divergence into rewards, and these into advantages and returns."""
        columns = ("log_probs", "reference", "values")
        log_probs, reference, values = (
            pad_sequence([getattr(sample, column) for sample in samples], batch_first=True)
            for column in columns
        )
        lengths = torch.tensor([len(sample.answer.token_ids) for sample in samples])
        mask = torch.arange(log_probs.shape[1]) < lengths[:, None]
        scores = objective.shape_scores(
            torch.tensor([sample.score for sample in samples], dtype=log_probs.dtype),
            torch.tensor([sample.answer.ended for sample in samples]),
            lengths,
            config.shaping,
        )
        kl = objective.k1(log_probs, reference)
        rewards = objective.token_rewards(scores, kl, mask, kl_coef)
        if config.shaping.whiten_rewards:
            # Detail: rewards are whitened without a shift of their mean.
            rewards = objective.whiten(rewards, mask, shift_mean=False)
        advantages, returns = objective.estimate_advantages(
            rewards, values, mask, config.gamma, config.gae_lambda
        )
        # Detail: advantages are whitened, with a shift of their mean.
        advantages = objective.whiten(advantages, mask)
        return cls(mask, log_probs, reference, values, advantages, returns)


class Learner:
    """Policy and critic, and the optimizer that moves them."""

    def __init__(
        self, config: PpoConfig, models: Models, accelerator: Accelerator, pad_token_id: int
    ) -> None:
        self.models = models
        self.policy, self.critic = models.trained()
        self._config = config
        self._accelerator = accelerator
        self._pad_token_id = pad_token_id
        critic_rate = config.critic.learning_rate or config.learning_rate
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.policy.values()), "lr": config.learning_rate},
                {"params": list(self.critic.values()), "lr": critic_rate},
            ],
            # Detail: Adam's epsilon is 1e-5, as in PPO's own code; with less, first steps grow.
            eps=1e-5,
            weight_decay=config.optimization.weight_decay,
        )
        self._prepared = accelerator.prepare_optimizer(self.optimizer)

    def ask(
        self,
        rollouts: Rollouts,
        prompts: Sequence[Prompt],
        seed: int,
        reward: Reward | None = None,
    ) -> list[Sample]:
        """Answers to prompts, scored if there is a reward.

        Each process writes and scores its part; all of them return all.
        """
        accelerator = self._accelerator
        shares = np.array_split(np.arange(len(prompts)), accelerator.num_processes)
        own = [prompts[row] for row in shares[accelerator.process_index]]
        first = sum(map(len, shares[: accelerator.process_index]))
        with accelerator.autocast():
            answers = rollouts.write([prompt.input_ids for prompt in own], seed, first)
        looked = self._look(own, answers)
        samples: list[Sample] = gather_object(_scored(looked, reward) if reward else looked)
        return samples

    def learn(self, samples: Sequence[Sample], kl_coef: float, seed: int) -> dict[str, float]:
        """Take the optimizer steps of an update.

        Args:
            samples: All of the update, scored.
            kl_coef: Price of divergence from the reference.
            seed: Of the order of the passes.

        Returns:
            Means over the steps that were taken, by name.

        Raises:
            ModelError: a loss or gradient is not a number.
        """
        config = self._config
        experience = Experience.of(samples, config, kl_coef)
        draws = np.random.default_rng(seed)
        steps: list[dict[str, float]] = []
        for _ in range(config.passes):
            # Detail: each pass goes over the answers in another order.
            order = draws.permutation(len(samples))
            for rows in np.split(order, config.minibatches):
                measured = self.compute_gradients(samples, experience, rows)
                bound = config.clip.max_update_kl
                if bound is not None and measured["update_kl"] > bound:
                    self._prepared.zero_grad()
                    return _means(steps, experience)
                steps.append(measured | self._step())
        return _means(steps, experience)

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is untyped
    def _look(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Sample]:
        """What policy, critic and reference say of answers."""
        pairs = list(zip(prompts, answers, strict=True))
        found: dict[int, Sample] = {}
        temperature = self._config.rollout.temperature
        for rows in batches_by_length(_lengths(pairs), self._config.rollout.batch_size):
            batch = self.batch([pairs[row] for row in rows])
            with self._accelerator.autocast():
                logits, values = self.models.policy_and_values(batch)
            log_probs = chosen_log_probs(logits, batch.answers, temperature)
            entropy = torch.special.entr(torch.softmax(logits.float() / temperature, -1)).sum(-1)
            del logits  # the largest tensor of all; the reference has as large a one
            with self._accelerator.autocast():
                logits = self.models.reference_logits(batch)
            reference = chosen_log_probs(logits, batch.answers, temperature)
            columns = (log_probs, reference, values, entropy)
            lines = zip(*(column.cpu() for column in columns), strict=True)
            for row, line in zip(rows, lines, strict=True):
                length = len(pairs[row][1].token_ids)
                found[row] = Sample(*pairs[row], *(column[:length].clone() for column in line))
        return [found[row] for row in range(len(pairs))]

    def compute_gradients(
        self, samples: Sequence[Sample], experience: Experience, rows: np.ndarray
    ) -> dict[str, float]:
        """Add up the gradients of a minibatch over micro-batches and processes.

        Args:
            samples: All of the update.
            experience: The same as tensors.
            rows: Positions of the minibatch, over all processes.

        Returns:
            Means over its tokens, by `_MEASURES`.
        """
        accelerator = self._accelerator
        own = rows[accelerator.process_index :: accelerator.num_processes]
        pairs = [(samples[row].prompt, samples[row].answer) for row in own]
        # Detail: losses are means over all tokens of the minibatch, not over each answer's.
        tokens = int(experience.mask[rows].sum())
        sums = torch.zeros(len(_MEASURES), device=accelerator.device)
        with self.models.recomputing():
            for micro in batches_by_length(_lengths(pairs), self._config.micro_batch_size):
                batch = self.batch([pairs[row] for row in micro])
                losses = self._losses(batch, experience, own[micro])
                coef = self._config.value_coef
                accelerator.backward((losses[0].sum() + coef * losses[1].sum()) / tokens)
                sums += torch.stack([loss.detach().float().sum() for loss in losses])
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums)
            for parameter in (*self.policy.values(), *self.critic.values()):
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad)
        return dict(zip(_MEASURES, (sums / tokens).tolist(), strict=True))

    def _losses(self, batch: Batch, experience: Experience, rows: np.ndarray) -> list[Tensor]:
        """The `_MEASURES` of each token, zero on padding: of shape [rows, answer] each."""
        config, mask = self._config, batch.answer_mask

        def of(column: Tensor) -> Tensor:
            return column[rows, : mask.shape[1]].to(mask.device)

        with self._accelerator.autocast():
            logits, values = self.models.policy_and_values(batch)
        log_probs = chosen_log_probs(logits, batch.answers, config.rollout.temperature)
        old = of(experience.log_probs)
        policy, clipped = objective.policy_loss(
            log_probs, old, of(experience.advantages), config.clip.ratio
        )
        value, value_clipped = objective.value_loss(
            values, of(experience.values), of(experience.returns), config.clip.value
        )
        update_kl = objective.k1(old, log_probs), objective.k3(old, log_probs)
        measures = (policy, value, clipped, value_clipped, *update_kl)
        return [torch.where(mask, measure, 0) for measure in measures]

    def _step(self) -> dict[str, float]:
        """Move the weights along the gradients; returns the norms that these had."""
        norms = {}
        self._accelerator.unscale_gradients()
        for name, group in (("grad_norm", self.policy), ("critic_grad_norm", self.critic)):
            # Each by its own norm: a critic's large gradients must not silence the policy.
            most = self._config.optimization.max_grad_norm
            norm = torch.nn.utils.clip_grad_norm_(group.values(), most)
            if math.isfinite(norm):
                norms[name] = float(norm)
            elif self._accelerator.scaler is None:
                raise ModelError(
                    f"{name} is {float(norm)}; lower `optimization.learning_rate`, or train in "
                    "float32 (`dtype: float32`)"
                )
            else:
                norms[name] = 0.0  # float16's scaler tries its bounds and skips the step
        self._prepared.step()
        self._prepared.zero_grad()
        return norms

    def batch(self, pairs: Sequence[tuple[Prompt, Answer]]) -> Batch:
        """Prompts and their answers as tensors on the device."""
        prompts = [prompt.input_ids for prompt, _ in pairs]
        answers = [answer.token_ids for _, answer in pairs]
        return make_batch(prompts, answers, self._pad_token_id, self._accelerator.device)


def _scored(samples: Sequence[Sample], reward: Reward) -> list[Sample]:
    """The samples with their scores."""
    scores = reward([s.prompt for s in samples], [s.answer.text for s in samples])
    return [
        replace(
            sample,
            score=float(scores.total[row]),
            terms=tuple((name, float(values[row])) for name, values in scores.terms.items()),
        )
        for row, sample in enumerate(samples)
    ]


def _lengths(pairs: Sequence[tuple[Prompt, Answer]]) -> list[int]:
    return [len(prompt.input_ids) + len(answer.token_ids) for prompt, answer in pairs]


def _means(steps: Sequence[dict[str, float]], experience: Experience) -> dict[str, float]:
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    values, returns, mask = experience.values, experience.returns, experience.mask
    return means | {
        "steps_taken": float(len(steps)),
        "explained_variance": float(objective.explained_variance(values, returns, mask)),
        "value": float(objective.masked_mean(values, mask)),
        "return": float(objective.masked_mean(returns, mask)),
    }
