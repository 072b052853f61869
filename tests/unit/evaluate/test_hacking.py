from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from posttrain.evaluate.hacking import Benchmark, find_hacking
from posttrain.evaluate.items import Item
from posttrain.evaluate.looks import Look
from posttrain.evaluate.results import Hacking

PROMPTS = 80
LEVEL = 0.05
LIMIT = LEVEL + 2 * (LEVEL * (1 - LEVEL) / 200) ** 0.5
"""Share of 200 draws at the level, and twice its standard error."""


def look(
    step: int,
    reward: Sequence[float] | np.ndarray,
    judge: Sequence[float] | np.ndarray | None = None,
    answers: Sequence[str] | None = None,
    tokens: Sequence[int] | np.ndarray | None = None,
    kl: float = 0.0,
) -> Look:
    count = len(reward)
    return Look(
        step=step,
        ids=tuple(f"{number:016x}" for number in range(count)),
        answers=tuple(answers or [f"the answer is {number}" for number in range(count)]),
        tokens=np.array(tokens if tokens is not None else [5] * count, np.int64),
        ended=np.ones(count, bool),
        kl=np.full(count, kl),
        reward=np.array(reward, np.float64),
        terms={},
        judge=None if judge is None else np.array(judge, np.float64),
    )


def benchmark(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    task: str = "quiz",
    higher_is_better: bool = True,
) -> Benchmark:
    def items(values: Sequence[float] | np.ndarray) -> list[Item]:
        return [
            Item(task, task, number, str(number), "acc", float(value), {}, ())
            for number, value in enumerate(values)
        ]

    pairs = list(zip(items(before), items(after), strict=True))
    return Benchmark(task, higher_is_better, pairs)


def judged(*args, **settings) -> Hacking:
    return find_hacking(*args, bootstrap_samples=500, **settings)


def noise(seed: int, count: int = PROMPTS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


RIGHT = (np.random.default_rng(5).random(200) < 0.6).astype(float)
"""A benchmark's items before training."""


def fewer(scores: np.ndarray, count: int) -> np.ndarray:
    out = scores.copy()
    out[np.flatnonzero(scores == 1)[:count]] = 0
    return out


def test_a_rising_reward_beside_falling_accuracy_is_flagged():
    found = judged(look(0, noise(0)), look(40, noise(1) + 1), [benchmark(RIGHT, fewer(RIGHT, 20))])
    assert found.flagged
    assert found.audited
    assert found.step == 40
    assert found.reward.shown
    [signal] = found.signals
    assert signal.name == "quiz"
    assert signal.difference == pytest.approx(-0.1)
    assert signal.low < signal.difference < signal.high < 0
    assert found.text.startswith("flagged: the reward rose while an independent signal got worse: ")
    assert "quiz" in found.text


def test_a_rising_reward_beside_a_falling_judge_is_flagged():
    taste = noise(2)
    found = judged(look(0, noise(0), taste), look(9, noise(1) + 1, taste - 0.4 + 0.3 * noise(3)))
    assert found.flagged
    assert [signal.name for signal in found.signals] == ["judge"]


def test_a_reward_and_signals_that_rise_together_are_not_flagged():
    before, after = look(0, noise(0), noise(2)), look(9, noise(1) + 1, noise(3) + 1)
    found = judged(before, after, [benchmark(fewer(RIGHT, 20), RIGHT)])
    assert not found.flagged
    assert found.audited
    assert found.text.startswith("not flagged: reward ")
    # What could have been missed is part of the answer.
    assert all(f"{one.detectable:.3f} in {one.name}" in found.text for one in found.signals)


def test_a_signal_that_falls_without_a_rising_reward_is_told_and_not_flagged():
    found = judged(look(0, noise(0)), look(9, noise(0)), [benchmark(RIGHT, fewer(RIGHT, 20))])
    assert not found.flagged
    assert found.signals[0].shown
    assert "a rise is not shown" in found.text
    assert found.signals[0].sentence in found.text


def test_without_an_independent_signal_nothing_is_audited():
    found = judged(look(0, noise(0)), look(9, noise(1) + 1))
    assert not found.flagged
    assert not found.audited
    assert found.text.startswith("not audited: no independent signal")


def test_a_handful_of_prompts_is_no_signal():
    few = np.arange(9.0)
    found = judged(look(0, few, few), look(9, few + 1, few - 1))
    assert not found.audited
    assert "fewer than 10 held-out prompts" in found.text
    assert found.reward.low is None
    assert not found.reward.shown


def test_where_lower_is_better_a_rise_counts_against_the_model():
    errors = benchmark(1 - RIGHT, 1 - fewer(RIGHT, 20), higher_is_better=False)
    found = judged(look(0, noise(0)), look(9, noise(1) + 1), [errors])
    assert found.flagged
    assert found.signals[0].difference == pytest.approx(0.1)


def test_one_weak_fall_among_many_signals_is_no_flag():
    weak = benchmark(RIGHT, fewer(RIGHT, 4), "weak")
    rising = look(0, noise(0)), look(9, noise(1) + 1)
    alone = judged(*rising, [weak])
    assert alone.flagged
    assert LEVEL / 8 < alone.signals[0].p_value < LEVEL
    others = [benchmark(RIGHT, RIGHT, f"task{number}") for number in range(7)]
    assert not judged(*rising, [weak, *others]).flagged


def test_no_more_flags_than_the_level_where_no_signal_has_fallen():
    # The reward rises every time; the answers, the judge and the items only differ by chance.
    flags = warnings = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        draws = rng.random((2, 100)) < 0.6
        reward, taste = rng.normal(size=60), rng.normal(size=60)
        found = find_hacking(
            look(0, reward, taste + 0.5 * rng.normal(size=60), tokens=rng.integers(20, 60, 60)),
            look(9, reward + 1, taste + 0.5 * rng.normal(size=60), tokens=rng.integers(20, 60, 60)),
            [benchmark(draws[0], draws[1])],
            bootstrap_samples=400,
            seed=seed,
        )
        assert found.reward.shown
        flags += found.flagged
        warnings += bool(found.warnings)
    assert 0 < flags <= 200 * LIMIT
    assert warnings <= 200 * LIMIT


def test_a_fall_that_matters_is_mostly_seen():
    seen = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        taste = rng.normal(size=PROMPTS)
        found = find_hacking(
            look(0, rng.normal(size=PROMPTS), taste),
            look(9, rng.normal(size=PROMPTS) + 1, taste - 0.5 + rng.normal(size=PROMPTS)),
            bootstrap_samples=400,
        )
        seen += found.flagged
    assert seen >= 45


def test_what_changes_in_the_form_of_the_answers_warns_and_is_no_flag():
    before = look(0, noise(0), noise(2))
    answers = ["I'm sorry, but I am not sure. no no no no no"] * PROMPTS
    after = look(9, noise(1) + 1, noise(2), answers, [50] * PROMPTS, kl=12.0)
    found = judged(before, after)
    assert not found.flagged
    names = {change.name for change in found.style if change.sentence in found.warnings}
    expected = {"length", "repetition", "longest run", "distinct-1", "distinct-2", "refusals"}
    assert names == {*expected, "hedges", "KL"}
    assert any(warning.startswith("length 5.000 -> 50.0 (+45.0") for warning in found.warnings)


def test_a_little_more_length_and_a_little_distance_do_not_warn():
    tokens = np.random.default_rng(0).integers(90, 110, PROMPTS)
    before = look(0, noise(0), noise(2), tokens=tokens)
    found = judged(before, look(9, noise(1), noise(2), tokens=tokens + 5, kl=2.0))
    shown = {change.name for change in found.style if change.shown}
    assert shown == {"length", "KL"}
    assert found.warnings == ()


def test_weights_that_are_kept_as_they_were_changed_nothing():
    start = look(0, noise(0), noise(1))
    found = judged(start, start, [benchmark(RIGHT, RIGHT)])
    assert not found.flagged
    assert found.warnings == ()
    assert not any(change.shown for change in (found.reward, *found.signals, *found.style))


def test_answers_to_other_prompts_are_refused():
    with pytest.raises(ValueError, match="same prompts"):
        judged(look(0, noise(0)), look(9, noise(1, 79)))


def test_a_finding_is_read_back_and_equal_findings_are_equal_bytes(tmp_path):
    args = look(0, noise(0), noise(1)), look(9, noise(2), noise(3)), [benchmark(RIGHT, RIGHT)]
    found = judged(*args)
    found.save(tmp_path)
    first = (tmp_path / "watch.json").read_bytes()
    assert Hacking.load(tmp_path) == found
    judged(*args).save(tmp_path)
    assert (tmp_path / "watch.json").read_bytes() == first
