"""A run of PPO: updates, held-out evaluations, checkpoints, and the best weights at the end.

What an update does depends on the checkpoint before it and on its number alone: all that is random
is drawn anew from the seed and that number. So a killed run goes on as if it had not been.

Importing this module imports torch and transformers: do it inside functions.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import get_scheduler, set_seed

from posttrain.errors import ModelError
from posttrain.events import EventWriter
from posttrain.recipe.ppo import PpoConfig
from posttrain.store.files import write_json
from posttrain.train.arguments import Schedule
from posttrain.train.callbacks import EXIT_TERMINATED
from posttrain.train.checkpoints import drop_all_but, leave_checkpoint, newest_complete
from posttrain.train.history import History
from posttrain.train.ppo import objective
from posttrain.train.ppo.update import Learner, Sample
from posttrain.train.processes import any_process, wait_for_all
from posttrain.train.prompts import Prompt, prompt_order
from posttrain.train.rewards import Reward
from posttrain.train.rollout import Rollouts
from posttrain.train.watch import RewardWatch, Written

_WEIGHTS, _STATE = "training.pt", "state.json"


@dataclass
class State:
    """How far a run is: with weights and optimizer, all that the next update depends on."""

    kl_coef: float
    step: int = 0
    """Updates done."""
    ended: bool = False
    log: list[dict[str, float]] = field(default_factory=list)
    """Of every update and evaluation, as `History.from_log` reads it."""


@dataclass
class PpoTrainer:
    """Trains a policy; every process has one. It begins at the newest complete checkpoint."""

    config: PpoConfig
    schedule: Schedule
    """Its steps are updates."""
    learner: Learner
    rollouts: Rollouts
    reward: Reward
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    watch: RewardWatch
    """Scores the held-out answers, on rank 0."""
    accelerator: Accelerator
    events: EventWriter
    checkpoints: Path
    seconds: float = 0.0
    """Spent in updates by this process; evaluations are not counted."""
    tokens: int = 0
    """Of prompts and answers in these updates, over all processes."""

    def __post_init__(self) -> None:
        """Plan the updates, and go on where a checkpoint ends."""
        steps, optimization = self.schedule.steps, self.config.optimization
        rows = steps * self.config.batching.batch_size
        self.order = prompt_order(len(self.prompts), rows, self.config.seed)
        """Positions of the prompts that are asked, update after update."""
        # Detail: the learning rate is annealed to 0, by the recipe's default scheduler.
        self._scheduler = get_scheduler(
            optimization.scheduler,
            self.learner.optimizer,
            num_warmup_steps=math.ceil(optimization.warmup * steps),
            num_training_steps=steps,
        )
        self.state = State(kl_coef=self.config.kl.coef)
        newest = newest_complete(self.checkpoints)
        if newest is not None:
            self.state = State(**json.loads((newest / _STATE).read_bytes()))
            saved = torch.load(newest / _WEIGHTS, weights_only=True, map_location="cpu")
            _copy(saved["policy"], self.learner.policy)
            _copy(saved["critic"], self.learner.critic)
            self.learner.optimizer.load_state_dict(saved["optimizer"])
            self._scheduler.load_state_dict(saved["scheduler"])

    def run(self) -> History:
        """Train to the end, or early to where nothing improves any more, and keep the best.

        Raises:
            ModelError: a number of the training is not finite.
            SystemExit: 143, after SIGTERM and a checkpoint.
        """
        state, asked = self.state, []
        signal.signal(signal.SIGTERM, lambda number, _frame: asked.append(number))
        if not state.log:
            self._evaluate()
        while not state.ended:
            self._update()
            last = state.step == self.schedule.steps
            due = last or state.step % self.schedule.evaluate_every == 0
            if due:
                self._evaluate()
            state.ended = last or self._out_of_patience()
            stopping = any_process(bool(asked), self.accelerator.device)
            if due or stopping:
                self._save()
            if stopping and not state.ended:
                if self.accelerator.is_main_process:
                    said = f"stopped at step {state.step}; the next run goes on from here"
                    self.events.warning(said)
                sys.exit(EXIT_TERMINATED)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        history = History.from_log(state.log)
        best = self.checkpoints / f"checkpoint-{history.best.step}" / _WEIGHTS
        saved = torch.load(best, weights_only=True, map_location="cpu", mmap=True)
        _copy(saved["policy"], self.learner.policy)
        return history

    def _update(self) -> None:
        """Write answers to the next prompts, and learn from them."""
        began, state, rows = time.monotonic(), self.state, self.config.batching.batch_size
        step, rate = state.step + 1, self._scheduler.get_last_lr()[0]
        seed = self._seed(step)
        asked = [self.prompts[row] for row in self.order[state.step * rows : step * rows]]
        samples = self.learner.ask(self.rollouts, asked, seed, self.reward)
        written = time.monotonic()
        learned = self.learner.learn(samples, state.kl_coef, seed)
        entry = {
            "step": step,
            "learning_rate": rate,
            "kl_coef": state.kl_coef,
            **_measures(samples, self.config.kl.coef),
            **learned,
        }
        strange = {key: value for key, value in entry.items() if not math.isfinite(value)}
        if strange:
            raise ModelError(f"not finite in update {step}: {strange}; lower the learning rate")
        state.log.append(entry)
        state.step = step
        state.kl_coef = objective.next_kl_coef(state.kl_coef, entry["kl"], rows, self.config.kl)
        self._scheduler.step()
        self._report(entry, written - began, time.monotonic() - written)

    def _evaluate(self) -> None:
        """Answer the held-out prompts, with the same draws every time."""
        samples = self.learner.ask(self.rollouts, self.held_out, self._seed(0))
        seen: list[dict[str, float]] = [{}]
        if self.accelerator.is_main_process:
            written = [
                Written(s.answer.text, len(s.answer.token_ids), s.answer.ended, s.kl)
                for s in samples
            ]
            seen = [self.watch.look(self.state.step, written)]
        broadcast_object_list(seen)
        # The best checkpoint is the one with the most reward less the price of its divergence, as
        # the recipe states it: a coefficient that is steered would measure each differently.
        loss = self.config.kl.coef * seen[0]["eval_kl"] - seen[0]["eval_reward"]
        values = {"eval_loss": loss, **seen[0]}
        self.state.log.append({"step": self.state.step, **values})
        if self.accelerator.is_main_process:
            self.events.values(self.state.step, values)

    def _out_of_patience(self) -> bool:
        validation, best, worse = self.config.validation, math.inf, 0
        for entry in self.state.log:
            if "eval_loss" in entry:
                improved = entry["eval_loss"] < best - validation.min_delta
                best, worse = (entry["eval_loss"], 0) if improved else (best, worse + 1)
        return validation.patience is not None and worse >= validation.patience

    def _seed(self, step: int) -> int:
        """Seed every generator for an update, reward functions' draws included; 0 is held-out."""
        seed = int(np.random.SeedSequence([self.config.seed, step]).generate_state(1)[0])
        set_seed(seed)
        return seed

    def _report(self, entry: Mapping[str, float], rollout_s: float, learning_s: float) -> None:
        done, total, seconds = self.state.step, self.schedule.steps, rollout_s + learning_s
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + int(entry["tokens"])
        shown = done % self.config.launch.log_every_steps == 0 or done == total
        if self.accelerator.is_main_process and shown:
            values = {key: value for key, value in entry.items() if key != "step"} | {
                "answers_per_s": round(self.config.batching.batch_size / seconds, 2),
                "tokens_per_s": round(entry["tokens"] / seconds, 1),
                "rollout_share": round(rollout_s / seconds, 3),
            }
            eta_s = round(seconds * (total - done), 1)
            self.events.progress(done, total, unit="update", eta_s=eta_s, values=values)

    def _save(self) -> None:
        """Leave a checkpoint, and drop those that are too many."""
        wait_for_all()
        if self.accelerator.is_main_process:
            leave_checkpoint(self.checkpoints, self.state.step, self._write)
            history = History.from_log(self.state.log)
            best = history.best.step if len(history.held_out) > 1 else None
            drop_all_but(self.checkpoints, self.config.launch.keep_checkpoints, best)
        wait_for_all()

    def _write(self, folder: Path) -> None:
        saved = {
            "policy": {name: p.data for name, p in self.learner.policy.items()},
            "critic": {name: p.data for name, p in self.learner.critic.items()},
            "optimizer": self.learner.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
        }
        torch.save(saved, folder / _WEIGHTS)
        write_json(folder / _STATE, asdict(self.state))


def _measures(samples: Sequence[Sample], kl_coef: float) -> dict[str, float]:
    """Means over the answers of an update, as they were written."""
    log_probs, references, entropy = (
        torch.cat([getattr(sample, column) for sample in samples])
        for column in ("log_probs", "reference", "entropy")
    )
    columns: dict[str, list[float]] = {
        "reward": [s.score for s in samples],
        **{f"reward/{n}": [dict(s.terms)[n] for s in samples] for n, _ in samples[0].terms},
        "kl": [s.kl for s in samples],
        "length": [len(s.answer.token_ids) for s in samples],
        "ended": [s.answer.ended for s in samples],
    }
    means = {name: sum(column) / len(samples) for name, column in columns.items()}
    return {
        # What is to fall, in the unit of the held-out loss.
        "loss": kl_coef * means["kl"] - means["reward"],
        **means,
        "kl_k3": float(objective.k3(log_probs, references).sum()) / len(samples),
        "entropy": float(entropy.mean()),
        "tokens": len(entropy) + sum(len(s.prompt.input_ids) for s in samples),
        "trained_tokens": len(entropy),
    }


def _copy(saved: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
