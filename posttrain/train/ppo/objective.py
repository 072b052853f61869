"""Rewards, advantages, losses and the price of divergence: functions of tensors alone.

Tensors are of shape [answers, tokens] unless it is said otherwise, padded on the right; `mask` is
True on the tokens of an answer, its end included.

Importing this module imports torch: do it inside functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.recipe.ppo import KlPenalty, Shaping


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of all answers: every token weighs the same."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Divide by the standard deviation over all tokens; 0 where there is no token.

    Args:
        values: What to whiten.
        mask: Tokens that count; at least two.
        shift_mean: Whether the mean becomes 0, or stays what it was.
    """
    mean = masked_mean(values, mask)
    variance = ((values - mean) ** 2 * mask).sum() / (mask.sum() - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def k1(log_probs: Tensor, others: Tensor) -> Tensor:
    """Log p - log q of samples of p: its mean is KL(p || q), in nats; a token's may be negative."""
    return log_probs - others


def k3(log_probs: Tensor, others: Tensor) -> Tensor:
    """(q/p - 1) - log(q/p) of samples of p: the same mean, never negative, less spread.

    Schulman (2020), "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
    """
    difference = others - log_probs
    return torch.expm1(difference) - difference


def shape_scores(scores: Tensor, ended: Tensor, lengths: Tensor, shaping: Shaping) -> Tensor:
    """Scores less what an answer pays for having no end, and for its length; of shape [answers]."""
    # Detail: the EOS trick. An answer that was cut off has not been seen whole by the reward.
    return scores - shaping.missing_eos_penalty * ~ended.bool() - shaping.length_penalty * lengths


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
    """r_t = -coef * kl_t, and at the last token of an answer its score besides.

    Args:
        scores: Of shape [answers].
        kl: `k1` of policy and reference.
        mask: Tokens of the answers.
        coef: Reward lost for each nat.
    """
    # Detail: the KL penalty is a reward of each token, by the k1 estimator.
    rewards = -coef * kl * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def estimate_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al., 2016, arXiv:1506.02438, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}; behind the last
    token both V and A are 0, also of an answer that was cut off.

    Returns:
        Advantages, and returns A_t + V_t, which the critic learns.
    """
    values = values * mask
    ahead = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for token in reversed(range(values.shape[1])):
        following = values[:, token + 1] if token + 1 < values.shape[1] else 0.0
        delta = rewards[:, token] + gamma * following - values[:, token]
        ahead = (delta + gamma * gae_lambda * ahead) * mask[:, token]
        advantages[:, token] = ahead
    return advantages, (advantages + values) * mask


def policy_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = pi / pi_old (Schulman et al., 2017, eq. 7).

    Returns:
        The loss of each token, and whether its clipped ratio took effect.
    """
    ratio = torch.exp(log_probs - old)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2.

    Returns:
        The loss of each token, and whether its clipped value took effect.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (torch.clamp(values, old - clip, old + clip) - returns) ** 2
    # Detail: value clipping, and the factor 0.5.
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over tokens: 1 is a perfect critic, 0 one that knows the mean."""
    error, outcome = (returns - values)[mask], returns[mask]
    return 1 - error.var(unbiased=False) / outcome.var(unbiased=False).clamp(min=1e-8)


def next_kl_coef(coef: float, kl: float, answers: int, penalty: KlPenalty) -> float:
    """The coefficient after an update; without a target it stays.

    coef (1 + clip(kl / target - 1, -0.2, 0.2) answers / horizon): Ziegler et al., 2019,
    arXiv:1909.08593, section 2.2.

    Args:
        coef: The present one.
        kl: Mean divergence of an answer from the reference in the update, in nats.
        answers: Answers of the update.
        penalty: The recipe's target and horizon.
    """
    if penalty.target is None:
        return coef
    error = min(max(kl / penalty.target - 1, -0.2), 0.2)
    return coef * (1 + error * answers / penalty.horizon)
