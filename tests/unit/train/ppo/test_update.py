import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.errors import ModelError
from posttrain.recipe.ppo import PpoConfig
from posttrain.train.ppo.update import Experience, Learner, Sample
from tests.unit.train.ppo.learners import (
    REWARD,
    disturb,
    make_config,
    make_exact_model,
    make_learner,
    make_prompts,
)

KINDS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, shared critic": {"critic": {"backbone": "shared"}},
    "lora": {"adapter": {"rank": 4, "dropout": 0.5}},
    "lora, shared critic": {"adapter": {"rank": 4}, "critic": {"backbone": "shared"}},
    "ia3": {"adapter": {"type": "ia3"}},
    "vera": {"adapter": {"type": "vera", "rank": 8}},
    "bottleneck": {"adapter": {"type": "bottleneck", "reduction": 4}},
}


@pytest.fixture(scope="module")
def exact_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exact_model(tmp_path_factory.mktemp("gpt2"), tiny_model)


def ask(learner: Learner, rollouts: Any, seed: int = 0) -> list[Sample]:
    return learner.ask(rollouts, make_prompts(), seed, REWARD)


def gradients(learner: Learner) -> dict[str, Tensor]:
    found = {}
    for name, parameter in (*learner.policy.items(), *learner.critic.items()):
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ratio_is_one_and_the_first_divergence_zero(kind: str, tiny_model: Path) -> None:
    config = make_config(**KINDS[kind], passes=1)
    learner, rollouts = make_learner(tiny_model, config)
    samples = ask(learner, rollouts)
    assert all(torch.equal(s.log_probs, s.reference) for s in samples)
    assert all(not s.values.any() for s in samples), "the head begins at zero"
    before = {name: p.data.clone() for name, p in learner.policy.items()}
    learned = learner.learn(samples, 0.05, 0)
    # Micro-batches are put together in another way than the batches that were scored.
    assert learned["update_kl"] == pytest.approx(0, abs=1e-9)
    assert learned["update_kl_k1"] == pytest.approx(0, abs=1e-6)
    assert learned["clip_fraction"] == 0
    # Whitened advantages sum to zero, and so does the loss at ratio one.
    assert learned["policy_loss"] == pytest.approx(0, abs=1e-6)
    assert any(not torch.equal(before[name], p) for name, p in learner.policy.items())
    later = ask(learner, rollouts)
    assert any(s.kl != 0 for s in later), "the reference does not move with the policy"


def test_with_an_adapter_there_is_one_copy_of_the_frozen_weights(tiny_model: Path) -> None:
    learner, _ = make_learner(tiny_model, make_config(adapter={"rank": 4}))
    models = learner.models
    assert models.reference is None
    assert models.backbone is not None
    policy = {p.data_ptr() for p in models.policy.parameters()}
    own = {p.data_ptr() for p in models.backbone.parameters()} - policy
    trained = {p.data_ptr() for name, p in learner.critic.items() if "backbone" in name}
    assert own == trained
    assert not trained & {p.data_ptr() for p in learner.policy.values()}


@pytest.mark.parametrize("kind", ["all weights", "all weights, shared critic"])
def test_gradients_do_not_depend_on_the_micro_batch(kind: str, exact_model: Path) -> None:
    rows = np.arange(8)
    found, measured = [], []
    for micro in (1, 2, 8):
        config = make_config(**KINDS[kind], batching={"batch_size": 8, "micro_batch_size": micro})
        learner, rollouts = make_learner(exact_model, config, torch.float64)
        samples = ask(learner, rollouts)
        disturb(learner, 0.01)
        experience = Experience.of(samples, config, 0.05)
        measured.append(learner.compute_gradients(samples, experience, rows))
        found.append(gradients(learner))
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12)
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)
    assert measured[2] == pytest.approx(measured[0], rel=1e-5)
    assert measured[0]["update_kl"] > 0


def test_gradients_do_not_depend_on_padding(exact_model: Path) -> None:
    """The shortest answer alone, and beside a prompt and an answer that are far longer."""
    config = make_config()
    learner, rollouts = make_learner(exact_model, config, torch.float64)
    samples = ask(learner, rollouts)
    shorter = replace(samples[2], answer=replace(samples[2].answer, token_ids=[7, 8]))
    cut = {c: getattr(shorter, c)[:2] for c in ("log_probs", "reference", "values", "entropy")}
    samples[2] = replace(shorter, **cut)
    disturb(learner, 0.01)
    experience = Experience.of(samples, config, 0.05)
    learner.compute_gradients(samples, experience, np.array([2]))
    alone = gradients(learner)
    # Without an advantage and an error the other answer has no gradient of its own.
    experience.advantages[1] = 0
    experience.returns[1] = torch.nan
    with torch.no_grad():
        batch = learner.batch([(samples[1].prompt, samples[1].answer)])
        values = learner.models.policy_and_values(batch)[1][0]
    experience.returns[1, : len(values)] = values
    experience.values[1, : len(values)] = values
    learner.compute_gradients(samples, experience, np.array([1, 2]))
    share = 2 / (2 + len(values))
    for name, gradient in gradients(learner).items():
        torch.testing.assert_close(gradient, share * alone[name], rtol=1e-7, atol=1e-10)


def slow_loss(learner: Learner, samples: list[Sample], config: PpoConfig, kl_coef: float) -> float:
    """PPO's loss as the papers write it: an answer at a time, in loops, nothing padded."""
    model, temperature = learner.models.policy, config.rollout.temperature
    advantages, returns = [], []
    for sample in samples:
        score = sample.score
        if not sample.answer.ended:
            score -= config.shaping.missing_eos_penalty
        score -= config.shaping.length_penalty * len(sample.answer.token_ids)
        rewards = [
            -kl_coef * float(p - q) for p, q in zip(sample.log_probs, sample.reference, strict=True)
        ]
        rewards[-1] += score
        values = [*sample.values.tolist(), 0.0]
        ahead, mine = 0.0, []
        for t in reversed(range(len(rewards))):
            delta = rewards[t] + config.gamma * values[t + 1] - values[t]
            ahead = delta + config.gamma * config.gae_lambda * ahead
            mine.insert(0, ahead)
        advantages.append(mine)
        returns.append([a + v for a, v in zip(mine, values, strict=False)])
    every = [a for mine in advantages for a in mine]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / (len(every) - 1) + 1e-8)
    total = 0.0
    for number, sample in enumerate(samples):
        prompt, answer = sample.prompt.input_ids, sample.answer.token_ids
        ids = torch.tensor([[*prompt, *answer]])
        out = model(ids, output_hidden_states=True)
        hidden = out.hidden_states[-1]
        if learner.models.backbone is not None:
            hidden = learner.models.backbone(ids)[0]
        for t, token in enumerate(answer):
            place = len(prompt) + t - 1
            log_probs = torch.log_softmax(out.logits[0, place] / temperature, -1)
            ratio = math.exp(float(log_probs[token]) - float(sample.log_probs[t]))
            a = (advantages[number][t] - mean) / deviation
            bound = config.clip.ratio
            total += max(-a * ratio, -a * min(max(ratio, 1 - bound), 1 + bound))
            value, old = float(learner.models.head(hidden[0, place])), float(sample.values[t])
            near = old + min(max(value - old, -config.clip.value), config.clip.value)
            r = returns[number][t]
            total += config.value_coef * 0.5 * max((value - r) ** 2, (near - r) ** 2)
    return total / len(every)


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_the_gradient_is_that_of_the_loss_by_finite_differences(
    critic: str, exact_model: Path
) -> None:
    config = make_config(
        critic={"backbone": critic},
        rollout={"max_new_tokens": 6, "temperature": 0.8},
        clip={"ratio": 0.1, "value": 0.05},
        shaping={"length_penalty": 0.05},
        gamma=0.95,
        gae_lambda=0.9,
        value_coef=0.5,
    )
    learner, rollouts = make_learner(exact_model, config, torch.float64)
    disturb(learner, 0.02)  # so that values are not zero
    samples = ask(learner, rollouts)
    disturb(learner, 0.02)  # and ratios not one: some are clipped
    kl_coef = 0.3
    experience = Experience.of(samples, config, kl_coef)
    measured = learner.compute_gradients(samples, experience, np.arange(8))
    assert 0 < measured["clip_fraction"] < 1
    assert 0 < measured["value_clip_fraction"] < 1
    found = gradients(learner)
    loss = measured["policy_loss"] + config.value_coef * measured["value_loss"]
    with torch.no_grad():
        assert loss == pytest.approx(slow_loss(learner, samples, config, kl_coef), rel=1e-5)
        parameters = {**learner.policy, **learner.critic}
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            direction = {
                name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
                for name, p in parameters.items()
            }
            slope = sum(float((found[name] * d).sum()) for name, d in direction.items())
            step = 1e-6
            ends = []
            for sign in (1, -2):
                for name, p in parameters.items():
                    p += sign * step * direction[name]
                ends.append(slow_loss(learner, samples, config, kl_coef))
            for name, p in parameters.items():
                p += step * direction[name]
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_passes_end_where_an_update_has_gone_too_far(tiny_model: Path) -> None:
    far = {"optimization": {"learning_rate": 0.05}, "passes": 4}
    steps = {}
    for bound in (None, 0.01):
        config = make_config(**far, clip={"max_update_kl": bound})
        learner, rollouts = make_learner(tiny_model, config)
        learned = learner.learn(ask(learner, rollouts), 0.05, 0)
        steps[bound] = learned["steps_taken"]
    # The first pass begins where the answers were written; the second sees what it did.
    assert steps == {None: 4, 0.01: 1}
    assert all(p.grad is None or not p.grad.any() for p in learner.policy.values())


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_the_critic_learns_what_comes(critic: str, tiny_model: Path) -> None:
    config = make_config(
        critic={"backbone": critic, "learning_rate": 3e-3},
        optimization={"learning_rate": 1e-6},
        clip={"value": None, "max_update_kl": None},
        passes=20,
        value_coef=1.0,
    )
    learner, rollouts = make_learner(tiny_model, config)
    samples = ask(learner, rollouts)
    first = learner.learn(samples, 0.0, 0)
    assert first["explained_variance"] == pytest.approx(0, abs=1e-6), "all values are zero"
    # The same answers, of a policy that has hardly moved.
    again = learner.learn(ask(learner, rollouts), 0.0, 1)
    assert again["explained_variance"] > 0.5
    assert again["value_loss"] < 0.5 * first["value_loss"]


def test_minibatches_are_steps_of_their_own(tiny_model: Path) -> None:
    config = make_config(passes=2, minibatches=4, clip={"max_update_kl": None})
    learner, rollouts = make_learner(tiny_model, config)
    assert learner.learn(ask(learner, rollouts), 0.05, 0)["steps_taken"] == 8


def test_rewards_are_whitened_where_asked_for(tiny_model: Path) -> None:
    learner, rollouts = make_learner(tiny_model, make_config())
    samples = ask(learner, rollouts)
    shaping = {"missing_eos_penalty": 0.0}
    plain = Experience.of(samples, make_config(gae_lambda=1.0, shaping=shaping), 0.05)
    config = make_config(gae_lambda=1.0, shaping={**shaping, "whiten_rewards": True})
    whitened = Experience.of(samples, config, 0.05)
    # At first there is no divergence: all the reward of an answer is its score, at its end.
    assert plain.returns[:, 0].tolist() == pytest.approx([s.score for s in samples])
    rewards = torch.zeros_like(plain.returns)
    for row, sample in enumerate(samples):
        rewards[row, len(sample.answer.token_ids) - 1] = sample.score
    tokens = rewards[plain.mask]
    scaled = (rewards - tokens.mean()) / tokens.std() + tokens.mean()
    assert whitened.returns[:, 0].tolist() == pytest.approx(
        (scaled * plain.mask).sum(1).tolist(), rel=1e-4
    )


def test_a_gradient_that_is_no_number_ends_the_run(tiny_model: Path) -> None:
    learner, rollouts = make_learner(tiny_model, make_config())
    samples = [replace(s, score=math.inf) for s in ask(learner, rollouts)]
    with pytest.raises(ModelError, match=r"grad_norm is nan; lower `optimization.learning_rate`"):
        learner.learn(samples, 0.05, 0)
