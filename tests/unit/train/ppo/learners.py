"""Learners on tiny models, and rewards of tokens, for the tests of PPO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from posttrain.data.rows import Document
from posttrain.recipe.ppo import PpoConfig
from posttrain.train.adapters import add_adapter
from posttrain.train.ppo.models import Models
from posttrain.train.ppo.update import Learner
from posttrain.train.prompts import Prompt
from posttrain.train.rewards import Reward
from posttrain.train.rollout import Rollouts, make_rollouts

PAD = 0
LENGTHS = (3, 9, 1, 4, 6, 2, 7, 5)


def make_config(**settings: Any) -> PpoConfig:
    """A recipe's stage over all weights, with small batches."""
    return PpoConfig.model_validate(
        {
            "dataset": "prompts",
            "reward": "reward.py:letters",
            "adapter": None,
            "optimization": {"learning_rate": 1e-3},
            "batching": {"batch_size": 8},
            "rollout": {"max_new_tokens": 10, "batch_size": 4},
            "dtype": "float32",
            **settings,
        }
    )


def make_prompts(lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    """Prompts of random tokens."""
    draw = np.random.default_rng(0)
    return [
        Prompt(
            row=Document(id=f"{row:016}", file="prompts.txt", row=row, text=""),
            messages=(),
            input_ids=draw.integers(3, 500, size=length).tolist(),
            reference=None,
        )
        for row, length in enumerate(lengths, 1)
    ]


def make_exact_model(folder: Path, tiny_model: Path) -> Path:
    """A GPT-2: it computes in float64 throughout, and knows absolute positions, unlike a Llama."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def letters(prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
    """One for each letter e."""
    return np.array([float(answer.count("e")) for answer in answers])


REWARD = Reward({"letters": letters}, {"letters": 1.0})


def make_learner(
    model: Path, config: PpoConfig, dtype: torch.dtype = torch.float32
) -> tuple[Learner, Rollouts]:
    """A learner on a fresh copy of the model, and what writes its answers."""
    torch.manual_seed(config.seed)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if config.adapter is not None:
        policy = add_adapter(policy, config.adapter, 10)
    policy.to(dtype)
    models = Models.make(policy, config.critic.backbone)
    models.head.to(dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    learner = Learner(config, models, Accelerator(cpu=True), PAD)
    return learner, make_rollouts(policy, tokenizer, config.rollout)


def disturb(learner: Learner, scale: float) -> None:
    """Move all trained weights a little, as updates would."""
    generator = torch.Generator().manual_seed(0)
    for parameter in (*learner.policy.values(), *learner.critic.values()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += scale * noise
