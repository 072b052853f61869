"""That PPO finds what is known to be best, and learns a reward within its divergence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoTokenizer

from posttrain.evaluate.looks import read_looks
from posttrain.recipe.ppo import PpoConfig
from posttrain.stages.ppo import main
from posttrain.stages.program import StageContext, StageInput
from posttrain.train.rewards import Reward
from tests.unit.train.ppo.learners import make_config, make_learner, make_prompts
from tests.unit.train.programs import history_of, make_dataset, make_stage_dir


def test_a_bandit_reaches_its_known_optimum(tiny_model: Path) -> None:
    """One-token answers: sum_a pi(a) (r(a) - beta log pi(a) / ref(a)) is at its most, beta log
    sum_a ref(a) exp(r(a) / beta), where pi is in proportion to ref(a) exp(r(a) / beta)."""
    answers, updates, beta, rate = 64, 80, 0.5, 5e-4
    config = make_config(
        rollout={"max_new_tokens": 1, "batch_size": answers},
        batching={"batch_size": answers, "micro_batch_size": answers},
        optimization={"learning_rate": rate},
        shaping={"missing_eos_penalty": 0.0},
    )
    learner, rollouts = make_learner(tiny_model, config)
    (prompt,) = make_prompts([4])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def log_probs() -> Tensor:
        with torch.no_grad():
            logits = learner.models.policy(torch.tensor([prompt.input_ids])).logits[0, -1]
        return torch.log_softmax(logits.double(), -1)

    reference = log_probs()
    texts = tokenizer.batch_decode(
        [[token] for token in range(len(reference))], skip_special_tokens=True
    )
    worth = torch.tensor([float("e" in text) for text in texts]).double()
    best = float(beta * torch.logsumexp(reference + worth / beta, 0))

    def objective() -> float:
        now = log_probs()
        return float((now.exp() * (worth - beta * (now - reference))).sum())

    before = objective()
    reward = Reward({"e": lambda _, said: np.array([float("e" in s) for s in said])}, {"e": 1.0})
    for update in range(updates):
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * (1 - update / updates)
        samples = learner.ask(rollouts, [prompt] * answers, update, reward)
        learner.learn(samples, beta, update)
    assert best - before > 0.15, "there is something to gain"
    assert before + 0.9 * (best - before) < objective() <= best


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_reward_rises_while_divergence_stays_under_its_target(
    seed: int, tiny_model: Path, tmp_path: Path
) -> None:
    function = tmp_path / "rewards.py"
    function.write_text("def letters(answers):\n    return [a.count('e') / 2 for a in answers]\n")
    dataset = make_dataset(tmp_path / "data", train=64, held_out=32)
    target = 6.0
    settings: dict[str, Any] = {
        "dataset": "chats",
        "reward": f"{function}:letters",
        "adapter": None,
        "max_steps": 50,
        "optimization": {"learning_rate": 1e-3},
        "batching": {"batch_size": 32, "micro_batch_size": 32},
        "rollout": {"max_new_tokens": 16},
        "kl": {"coef": 0.4, "target": target, "horizon": 2000},
        "shaping": {"missing_eos_penalty": 0.0},
        "validation": {"every_steps": 25, "patience": None},
        "dtype": "float32",
        "seed": seed,
    }
    inputs = {
        "model": StageInput(kind="model", path=str(tiny_model), digest="base"),
        "dataset": StageInput(kind="dataset", path=str(dataset), digest="data"),
        "reward:letters": StageInput(kind="source", path=str(function), digest="code"),
    }
    stage_dir = make_stage_dir(tmp_path / "run", "ppo", settings, inputs)
    context = StageContext(stage_dir, PpoConfig)
    context.output.mkdir()
    main(context)
    looks = {look.step: look for look in read_looks(stage_dir / "checkpoints")}
    rise = stats.ttest_rel(looks[50].reward, looks[0].reward, alternative="greater")
    assert rise.pvalue < 0.001
    history = history_of(stage_dir)
    assert np.mean([step.values["kl"] for step in history.steps[-10:]]) < target
    assert all(look.values["kl"] < target for look in history.held_out)
    first, last = (np.mean([s.values["reward"] for s in part]) for part in
                   (history.steps[:5], history.steps[-5:]))  # fmt: skip
    assert last > 1.5 * first
