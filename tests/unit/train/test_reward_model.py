import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, spearmanr
from transformers import AutoTokenizer

from posttrain.data.rows import Message, Messages
from posttrain.errors import DataError, ModelError
from posttrain.stages.program import StageInput
from posttrain.train.reward_head import ScoreHead, choose_padding, load_body, start_head
from posttrain.train.reward_model import RewardModel, RewardRecord, load_reward_model
from posttrain.train.reward_page import write_reward_page
from posttrain.train.reward_report import (
    HeldOutScores,
    calibration,
    length_bias,
    report_metrics,
    report_of,
    report_warnings,
    wilson,
)


def chat(question: str, answer: str) -> Messages:
    return (Message("user", question), Message("assistant", answer))


@pytest.fixture(scope="module")
def scorer(tiny_model: Path) -> RewardModel:
    """A random reward model that reads up to 64 tokens."""
    source = StageInput(kind="model", path=str(tiny_model), digest="")
    model = load_body(source, "float32")
    start_head(model, 0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    choose_padding(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    record = RewardRecord(max_length=64, mean=0.25, std=1.0, pairs=1)
    return RewardModel(model.eval(), tokenizer, record)


def test_a_score_does_not_depend_on_what_else_is_scored(scorer: RewardModel) -> None:
    chats = [chat(f"Is it {n}?", "Yes. " * (n % 7 + 1)) for n in range(40)]
    together = scorer.scores(chats)
    alone = np.concatenate([scorer.scores([one]) for one in chats])
    assert together.dtype == np.float64
    assert together.shape == (40,)
    assert np.ptp(together) > 0.1
    assert together == pytest.approx(alone, abs=1e-5)
    assert scorer.scores(chats[::-1]) == pytest.approx(together[::-1], abs=1e-5)
    assert scorer.scores([]).shape == (0,)


def score_at_the_end(scorer: RewardModel, text: str) -> float:
    """The head's product with the body's last hidden state."""
    ids = torch.tensor([scorer.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        states = scorer.model.model(ids).last_hidden_state[0, -1]
    return float(states @ scorer.model.score.weight[0].detach())


def test_a_score_is_read_at_the_token_that_ends_the_answer(scorer: RewardModel) -> None:
    """The end-of-turn token, which in many models is the padding token as well."""
    question, answer = "Is it red?", "It is red."
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    expected = score_at_the_end(scorer, text)
    assert scorer.scores([chat(question, answer)])[0] == pytest.approx(expected - 0.25, abs=1e-5)


def test_a_long_prompt_loses_its_beginning_and_the_answer_nothing(scorer: RewardModel) -> None:
    one, other = (f"{begin} " + "word " * 60 + "Is it red?" for begin in ("Once", "Never"))
    scores = scorer.scores([chat(one, "It is."), chat(other, "It is."), chat(other, "It was.")])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert abs(scores[1] - scores[2]) > 1e-3


def test_an_answer_that_loses_its_end_is_said_in_the_log(
    scorer: RewardModel, caplog: pytest.LogCaptureFixture
) -> None:
    scorer.scores([chat("?", "short")])
    assert not caplog.records
    scorer.scores([chat("?", "short"), chat("?", "long " * 80)])
    assert "1 of 2 answers are scored without their end" in caplog.text


BARE = "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}{% endfor %}"


def test_an_empty_answer_has_a_score(scorer: RewardModel) -> None:
    text = "<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    expected = score_at_the_end(scorer, text)
    assert scorer.scores([chat("Is it red?", "")])[0] == pytest.approx(expected - 0.25, abs=1e-5)


def test_an_empty_answer_has_a_score_where_the_template_leaves_no_trace_of_it(
    scorer: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    monkeypatch.setattr(scorer.tokenizer, "chat_template", BARE + generate)
    expected = score_at_the_end(scorer, "user:Is it red?assistant:")
    assert scorer.scores([chat("Is it red?", "")])[0] == pytest.approx(expected - 0.25, abs=1e-5)


def test_a_chat_without_an_answer_is_refused(scorer: RewardModel) -> None:
    with pytest.raises(DataError, match="chat 2 does not end with an answer"):
        scorer.scores([chat("?", "!"), (Message("user", "?"),)])


def test_padding_is_a_token_that_ends_no_answer(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    choose_padding(tokenizer)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.padding_side == "right"


def test_padding_stays_where_there_is_no_other_special_token(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for name in ("pad_token", "bos_token", "unk_token"):
        setattr(tokenizer, name, tokenizer.eos_token)
    choose_padding(tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token


def test_the_head_computes_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head = ScoreHead(8, 1, bias=False)
    states = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(states)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, states @ head.weight.T)


@pytest.mark.parametrize("missing", ["reward.json", "base"])
def test_what_is_no_reward_model_is_refused(missing: str, tmp_path: Path, tiny_model: Path) -> None:
    if missing == "base":
        RewardRecord(max_length=64, mean=0.0, std=1.0, pairs=1).write(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
        (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"without the model|not what a `reward` stage leaves"):
        load_reward_model(StageInput(kind="reward", path=str(tmp_path), digest=""), "float32")


def scores_of(
    chosen: Any, rejected: Any, chosen_tokens: Any = None, rejected_tokens: Any = None
) -> HeldOutScores:
    count = len(chosen)
    return HeldOutScores(
        ids=[str(n) for n in range(count)],
        tasks=["pairs"] * count,
        chosen=np.array(chosen, float),
        rejected=np.array(rejected, float),
        chosen_tokens=np.array(chosen_tokens if chosen_tokens is not None else [5] * count),
        rejected_tokens=np.array(rejected_tokens if rejected_tokens is not None else [5] * count),
    )


@pytest.mark.parametrize(("successes", "cases"), [(0, 1), (3, 10), (10, 10), (70, 100)])
def test_wilsons_interval_is_scipys(successes: int, cases: int) -> None:
    expected = binomtest(successes, cases).proportion_ci(method="wilson")
    share = wilson(successes, cases)
    assert (share.low, share.high) == pytest.approx((expected.low, expected.high))


def test_a_tie_is_half_right() -> None:
    report = report_of(scores_of([1, 0, 2, 0], [0, 1, 2, 0]))
    assert report.accuracy.value == 0.5


def test_guessing_has_the_loss_and_brier_score_of_a_coin() -> None:
    report = report_of(scores_of([1.0] * 4, [1.0] * 4))
    assert report.loss == pytest.approx(math.log(2))
    assert report.brier == pytest.approx(0.25)
    assert report.calibration_error == pytest.approx(0)
    assert report.length.spearman is None, "no score and no length differs"
    assert report.length.people is None


def test_calibration_by_hand() -> None:
    """Four pairs with a confidence of 0.75, of which three are right; one of 0.98 that is wrong."""
    sure, unsure = math.log(49), math.log(3)
    margins = np.array([unsure, unsure, unsure, -unsure, -sure])
    bins = calibration(margins)
    assert [(one.pairs, one.accuracy) for one in bins] == [(4, 0.75), (1, 0.0)]
    assert [one.confidence for one in bins] == pytest.approx([0.75, 0.98])
    report = report_of(scores_of(margins, np.zeros(5)))
    assert report.calibration_error == pytest.approx((0 * 4 + 0.98 * 1) / 5)
    brier = (3 * 0.25**2 + 0.75**2 + 0.98**2) / 5
    assert report.brier == pytest.approx(brier)
    assert report.loss == pytest.approx((3 * -math.log(0.75) - math.log(0.25) - math.log(0.02)) / 5)


def test_calibration_of_scores_that_are_probabilities_is_good() -> None:
    draw = np.random.default_rng(0)
    margins = draw.normal(size=20_000) * 2
    right = draw.random(20_000) < 1 / (1 + np.exp(-np.abs(margins)))
    report = report_of(scores_of(np.where(right, 1, -1) * np.abs(margins), np.zeros(20_000)))
    assert report.calibration_error < 0.01


def test_very_large_margins_are_no_error() -> None:
    report = report_of(scores_of([1e4, -1e4], [0, 0]))
    assert report.loss == pytest.approx(5e3)
    assert report.calibration_error == pytest.approx(0.5)


def test_preference_for_length_is_told_from_peoples() -> None:
    """Scores are lengths; people choose the longer answer in half of the pairs."""
    draw = np.random.default_rng(1)
    short, long = draw.integers(5, 20, 40), draw.integers(30, 60, 40)
    first = np.arange(40) % 2 == 0
    chosen, rejected = np.where(first, long, short), np.where(first, short, long)
    scores = scores_of(chosen / 10, rejected / 10, chosen, rejected)
    bias = length_bias(scores)
    both = np.concatenate([chosen, rejected])
    assert bias.pearson == pytest.approx(1)
    assert bias.spearman == pytest.approx(spearmanr(both / 10, both).statistic)
    assert bias.people is not None
    assert (bias.people.value, bias.model) == (0.5, 1.0)
    said = report_warnings(report_of(scores))
    assert any("prefers the longer answer in 100%" in warning for warning in said)
    metrics = report_metrics(report_of(scores))
    assert metrics["longer_chosen_by_people"] == 0.5
    assert metrics["longer_chosen_by_model"] == 1.0


def test_a_model_as_fond_of_length_as_people_is_not_warned_of() -> None:
    short, long = np.arange(5, 45), np.arange(50, 90)
    assert report_warnings(report_of(scores_of(long / 10, short / 10, long, short))) == []


def test_a_weak_model_is_warned_of() -> None:
    margins = np.where(np.arange(100) < 59, 1.0, -1.0)
    (said,) = report_warnings(report_of(scores_of(margins, np.zeros(100))))
    assert "59% of the held-out pairs (95% interval 49% to 68%)" in said
    assert report_warnings(report_of(scores_of(np.abs(margins), np.zeros(100)))) == []


@pytest.mark.parametrize("pairs", [1, 300])
def test_the_page_is_whole_without_anything_from_elsewhere(pairs: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    scores = scores_of(
        draw.normal(size=pairs),
        draw.normal(size=pairs),
        draw.integers(1, 90, pairs),
        draw.integers(1, 90, pairs),
    )
    write_reward_page(scores, report_of(scores), "reward <1>", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 3
    assert "reward &lt;1&gt;" in page
    assert page.count("<circle") >= 2 * pairs
    assert "nan" not in page
    for outside in ("http:", "https:", "src=", "<script", "@import"):
        assert outside not in page
