"""Each formula against numbers worked out by hand, and against loops over plain Python lists."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from posttrain.recipe.ppo import KlPenalty, Shaping
from posttrain.train.ppo import objective

Rows = list[list[float]]

numbers = st.floats(-3, 3, width=32)


@st.composite
def ragged(draw: st.DrawFn, columns: int) -> list[Rows]:
    """Several columns of numbers over the same answers, which differ in length."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    return [
        [draw(st.lists(numbers, min_size=n, max_size=n)) for n in lengths] for _ in range(columns)
    ]


def padded(rows: Rows, filler: float = 0.0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.float64)


def mask_of(rows: Rows) -> Tensor:
    return padded([[1.0] * len(row) for row in rows]).bool()


def unpadded(values: Tensor, rows: Rows) -> Rows:
    assert not values[~mask_of(rows)].any(), "padding must stay zero"
    return [line[: len(row)] for line, row in zip(values.tolist(), rows, strict=True)]


def flat(rows: Rows) -> list[float]:
    return [value for row in rows for value in row]


def approx(rows: Rows) -> list[object]:
    return [pytest.approx(row, abs=1e-9) for row in rows]


def test_advantages_of_three_tokens_as_worked_out_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0]])
    values = torch.tensor([[0.5, 1.0, 1.5]])
    # delta: 1 + .9 * 1 - .5 = 1.4; 0 + .9 * 1.5 - 1 = .35; 2 - 1.5 = .5. gamma lambda = .72:
    # A2 = .5; A1 = .35 + .72 * .5 = .71; A0 = 1.4 + .72 * .71 = 1.9112.
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = objective.estimate_advantages(rewards, values, mask, 0.9, 0.8)
    assert advantages.tolist() == [pytest.approx([1.9112, 0.71, 0.5])]
    assert returns.tolist() == [pytest.approx([2.4112, 1.71, 2.0])]


@given(ragged(2), st.floats(0, 1), st.floats(0, 1), numbers)
def test_advantages_are_the_sum_of_discounted_errors(
    columns: list[Rows], gamma: float, gae_lambda: float, filler: float
) -> None:
    rewards, values = columns
    expected = []
    for r, v in zip(rewards, values, strict=True):
        ahead = [*v[1:], 0.0]
        delta = [r[t] + gamma * ahead[t] - v[t] for t in range(len(r))]
        expected.append(
            [
                sum((gamma * gae_lambda) ** (s - t) * delta[s] for s in range(t, len(r)))
                for t in range(len(r))
            ]
        )
    # What stands on the padding must not matter.
    advantages, returns = objective.estimate_advantages(
        padded(rewards, filler), padded(values, filler), mask_of(rewards), gamma, gae_lambda
    )
    assert unpadded(advantages, rewards) == approx(expected)
    assert unpadded(returns, rewards) == approx(
        [[a + w for a, w in zip(x, y, strict=True)] for x, y in zip(expected, values, strict=True)]
    )


@given(ragged(2))
def test_without_discount_the_return_is_the_reward_to_come(columns: list[Rows]) -> None:
    rewards, values = columns
    _, returns = objective.estimate_advantages(
        padded(rewards), padded(values), mask_of(rewards), 1.0, 1.0
    )
    to_come = [[sum(row[t:]) for t in range(len(row))] for row in rewards]
    assert unpadded(returns, rewards) == approx(to_come)


@given(ragged(1), st.booleans())
def test_whitened_values_have_deviation_one_and_the_mean_that_was_asked_for(
    columns: list[Rows], shift_mean: bool
) -> None:
    (rows,) = columns
    every = flat(rows)
    mean = sum(every) / len(every)
    variance = sum((x - mean) ** 2 for x in every) / max(len(every) - 1, 1)
    scale = math.sqrt(variance + 1e-8)
    expected = [[(x - mean) / scale + (0 if shift_mean else mean) for x in row] for row in rows]
    whitened = objective.whiten(padded(rows, 7.0), mask_of(rows), shift_mean)
    assert unpadded(whitened, rows) == [pytest.approx(row, abs=1e-6) for row in expected]


def test_whitening_by_hand() -> None:
    values, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    # Mean 2, variance ((1)^2 + (1)^2) / 1 = 2.
    assert objective.whiten(values, mask).tolist() == [pytest.approx([-(0.5**0.5), 0.5**0.5, 0])]
    kept = objective.whiten(values, mask, shift_mean=False)
    assert kept.tolist() == [pytest.approx([2 - 0.5**0.5, 2 + 0.5**0.5, 0])]


def test_the_score_is_paid_at_the_last_token_and_divergence_at_each() -> None:
    kl = torch.tensor([[0.5, -1.0, 9.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = objective.token_rewards(torch.tensor([10.0, 20.0]), kl, mask, 0.1)
    assert rewards.tolist() == [
        pytest.approx([-0.05, 10.1, 0.0]),
        pytest.approx([-0.1, -0.2, 19.7]),
    ]


def test_an_answer_without_an_end_and_a_long_one_pay_for_it() -> None:
    shaped = objective.shape_scores(
        torch.tensor([5.0, 5.0]),
        torch.tensor([True, False]),
        torch.tensor([10, 20]),
        Shaping(missing_eos_penalty=2.0, length_penalty=0.1),
    )
    assert shaped.tolist() == pytest.approx([4.0, 1.0])


@given(ragged(3), st.floats(0.05, 0.9))
def test_the_policy_loss_is_the_worse_of_the_ratio_and_the_clipped_one(
    columns: list[Rows], clip: float
) -> None:
    new, old, advantages = (flat(rows) for rows in columns)
    expected = []
    for p, q, a in zip(new, old, advantages, strict=True):
        ratio = math.exp(p - q)
        expected.append(max(-a * ratio, -a * min(max(ratio, 1 - clip), 1 + clip)))
    loss, _ = objective.policy_loss(
        *(torch.tensor(c).double() for c in (new, old, advantages)), clip
    )
    assert loss.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_clipping_takes_effect_where_the_policy_has_gone_far_enough() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss, clipped = objective.policy_loss(ratio.log(), torch.zeros(5), advantages, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -1.1])
    assert clipped.tolist() == [True, False, False, True, False]


def test_the_gradient_ends_where_clipping_begins() -> None:
    log_probs = torch.tensor([math.log(1.5), math.log(1.1)], requires_grad=True)
    loss, _ = objective.policy_loss(log_probs, torch.zeros(2), torch.ones(2), 0.2)
    loss.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([0.0, -1.1])


def test_the_value_loss_by_hand() -> None:
    values, old = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.9, 0.0])
    returns = torch.tensor([2.0, 2.0, 0.0])
    loss, clipped = objective.value_loss(values, old, returns, 0.2)
    # (0.2 - 2)^2 = 3.24 over (1 - 2)^2; within the bounds 1; (1 - 0)^2 over (0.2 - 0)^2.
    assert loss.tolist() == pytest.approx([1.62, 0.5, 0.5])
    assert clipped.tolist() == [True, False, False]
    free, never = objective.value_loss(values, old, returns, None)
    assert free.tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert not never.any()


def test_both_estimators_have_the_divergence_as_their_mean() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    kl = float((p * (p / q).log()).sum())
    k1, k3 = objective.k1(p.log(), q.log()), objective.k3(p.log(), q.log())
    assert float((p * k1).sum()) == pytest.approx(kl)
    assert float((p * k3).sum()) == pytest.approx(kl)
    assert k1.tolist() == pytest.approx([math.log(1.4), math.log(0.8), math.log(0.4)])
    assert k3.tolist() == pytest.approx(
        [5 / 7 - 1 + math.log(1.4), 1.25 - 1 + math.log(0.8), 2.5 - 1 + math.log(0.4)]
    )


@given(st.lists(numbers, min_size=1), st.lists(numbers, min_size=1))
def test_k3_is_never_negative(first: list[float], second: list[float]) -> None:
    size = min(len(first), len(second))
    k3 = objective.k3(torch.tensor(first[:size]), torch.tensor(second[:size]))
    assert (k3 >= 0).all()


def test_the_mean_is_over_tokens_and_not_over_answers() -> None:
    values = torch.tensor([[1.0, 50.0, 50.0], [4.0, 4.0, 4.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    assert objective.masked_mean(values, mask).item() == pytest.approx(13 / 4)


def test_the_kl_coefficient_is_steered_by_at_most_a_fifth() -> None:
    penalty = KlPenalty(coef=0.2, target=6.0, horizon=1000)
    assert objective.next_kl_coef(0.2, 6.6, 100, penalty) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert objective.next_kl_coef(0.2, 60.0, 100, penalty) == pytest.approx(0.2 * (1 + 0.2 * 0.1))
    assert objective.next_kl_coef(0.2, 0.0, 100, penalty) == pytest.approx(0.2 * (1 - 0.2 * 0.1))
    assert objective.next_kl_coef(0.2, 6.0, 100, penalty) == 0.2


def test_without_a_target_the_kl_coefficient_stays() -> None:
    assert objective.next_kl_coef(0.2, 60.0, 100, KlPenalty(coef=0.2)) == 0.2


def test_explained_variance_of_a_perfect_and_of_a_constant_critic() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 6.0, 0.0]]), torch.tensor([[True, True, True, False]])
    assert objective.explained_variance(returns, returns, mask).item() == pytest.approx(1.0)
    constant = torch.full_like(returns, 3.0)
    assert objective.explained_variance(constant, returns, mask).item() == pytest.approx(0.0)
    # Errors 0, 0, 3: variance 2; returns: variance 14/3.
    half = torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    assert objective.explained_variance(half, returns, mask).item() == pytest.approx(1 - 6 / 14)
