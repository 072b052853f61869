from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from posttrain.errors import ModelError
from posttrain.recipe.adapters import LoraConfig
from posttrain.recipe.online import Rollout
from posttrain.train.adapters import add_adapter
from posttrain.train.rollout import Answer, answer_log_probs, make_batch, make_rollouts

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17], [18, 19, 20, 21], [5, 6, 7]]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]] = PROMPTS,
    seed: int = 0,
    first: int = 0,
    **rollout: object,
) -> list[Answer]:
    settings = Rollout.model_validate({"max_new_tokens": 12, **rollout})
    return make_rollouts(model, tokenizer, settings).write(prompts, seed, first)


def test_answers_depend_on_seed_and_prompts_alone(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    answers = write(model, tokenizer)
    assert write(model, tokenizer, batch_size=2) == answers
    assert write(model, tokenizer, PROMPTS[3:], first=3) == answers[3:]
    assert write(model, tokenizer, seed=1) != answers
    assert answers[0] != answers[4], "the same prompt twice gets two answers"


def test_global_generators_and_the_model_stay_as_they_were(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist()
    settings = model.generation_config.to_dict()
    model.train()
    write(model, tokenizer)
    assert model.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.random.get_state()[1].tolist() == generators[1]
    assert model.generation_config.to_dict() == settings


def test_tokens_are_drawn_from_the_softmax_of_the_scaled_logits(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    count, temperature = 4_000, 0.05
    drawn = write(
        model, tokenizer, [PROMPTS[0]] * count,
        max_new_tokens=1, temperature=temperature, batch_size=count,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = torch.softmax(logits / temperature, -1).numpy()
    seen = np.bincount([answer.token_ids[0] for answer in drawn], minlength=len(expected)) / count
    assert 0.01 < expected.max() < 0.9, "neither all alike nor one alone"
    # Half the L1 distance of an empirical distribution is about sum(sqrt(p / (2 pi n))).
    assert abs(seen - expected).sum() / 2 < 1.5 * np.sqrt(expected / (2 * np.pi * count)).sum()


def test_the_models_own_generation_settings_do_not_leak_in(
    tiny_model: Path, tokenizer: Tokenizer, model: PreTrainedModel
) -> None:
    opinionated = AutoModelForCausalLM.from_pretrained(tiny_model)
    opinionated.generation_config.update(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0, min_p=0.5,
        no_repeat_ngram_size=1, max_length=3,
    )  # fmt: skip
    assert write(opinionated, tokenizer) == write(model, tokenizer)
    adapted = add_adapter(opinionated, LoraConfig(rank=2), 1)
    assert write(adapted, tokenizer) == write(model, tokenizer)


def test_an_answer_ends_with_the_token_that_ends_it(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    answers = write(model, tokenizer, PROMPTS * 20, max_new_tokens=200)
    end = tokenizer.eos_token_id
    assert {answer.ended for answer in answers} == {True, False}
    for answer in answers:
        assert answer.ended == (answer.token_ids[-1] == end)
        assert end not in answer.token_ids[:-1]
        assert answer.ended or len(answer.token_ids) == 200
        assert tokenizer.eos_token not in answer.text


def test_log_probabilities_are_those_of_each_answer_alone(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    answers = [answer.token_ids for answer in write(model, tokenizer)]
    answers[1], answers[2] = answers[1][:3], answers[2][:7]
    for batch_size in (1, 2, 5):
        found = answer_log_probs(model, PROMPTS, answers, 0.7, batch_size, 0)
        for prompt, answer, log_probs in zip(PROMPTS, answers, found, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0] / 0.7
            expected = [
                torch.log_softmax(logits[len(prompt) + place - 1], -1)[token].item()
                for place, token in enumerate(answer)
            ]
            assert log_probs.dtype == torch.float32
            assert log_probs.tolist() == pytest.approx(expected, abs=2e-5)


def test_padding_has_no_place_in_the_positions() -> None:
    batch = make_batch([[1], [2, 3, 4]], [[5, 6], [7]], pad_token_id=0)
    assert batch.input_ids.tolist() == [[0, 0, 1, 5, 6], [2, 3, 4, 7, 0]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.answer_mask.tolist() == [[True, True], [True, False]]
    assert batch.answers.tolist() == [[5, 6], [7, 0]]
    assert batch.inputs()["position_ids"].tolist()[0] == [0, 0, 0, 1, 2]


def test_a_backend_that_is_not_installed_is_named(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ModelError, match=r"`vllm` is not installed.*`backend: transformers`"):
        make_rollouts(model, tokenizer, Rollout(backend="vllm"))
