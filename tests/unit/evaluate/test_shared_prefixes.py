"""Log-likelihoods with shared prefixes are those of lm-eval's own Hugging Face model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from posttrain.errors import DataError
from posttrain.evaluate.prefix_tree import Pass, PrefixTree, Query
from posttrain.evaluate.shared_prefixes import Request, SharedPrefixLM

VOCABULARY = 600
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Wide enough that a token seen or not seen changes every probability.
    "initializer_range": 0.4,
}
SMALL = {"vocab_size": VOCABULARY, "initializer_range": 0.4}
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **SMALL)
SHARING = {"llama": LlamaConfig(**SHAPE), "gpt2": GPT2, "qwen2": Qwen2Config(**SHAPE)}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def made(config: Any, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


LLAMA = made(SHARING["llama"])
"""Made once: the property below asks it many times."""


@pytest.fixture
def both(tokenizer: Any) -> Callable[..., tuple[SharedPrefixLM, HFLM]]:
    """`both(model, ...)`: ours and lm-eval's, with the same options."""

    def make(model: Any, tokens_per_pass: int | None = 48, **options: Any) -> Any:
        options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 3, **options}
        ours = SharedPrefixLM(tokens_per_pass=tokens_per_pass, **options)
        return ours, HFLM(**options)

    return make


def tree_requests(seed: int = 0, questions: int = 5, length: int = 30) -> list[Request]:
    """Questions that begin with the same examples, each with four choices, in a mixed order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        drawn = torch.randint(VOCABULARY, (count,), generator=generator)
        return [int(token) for token in drawn]

    examples, said = draw(length), draw(2)
    contexts = [examples + draw(4 + number) for number in range(questions)]
    choices = [draw(1), draw(1), said + draw(3), said + draw(6)]
    requests: list[Request] = [(None, one, other) for one in contexts for other in choices]
    return [requests[number] for number in torch.randperm(len(requests), generator=generator)]


def check_equal(ours: HFLM, theirs: HFLM, requests: Sequence[Request], near: float) -> None:
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx(
        [score for score, _ in expected], abs=near, rel=0
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


# ---------------------------------------------------------------------------------- the tree

ALPHABET = st.lists(st.integers(0, 2), min_size=1, max_size=9)


@st.composite
def drawn_requests(draw: st.DrawFn) -> list[Request]:
    """Few stems, long and short, and few tokens, so that much is shared by chance."""
    stems = draw(st.lists(st.integers(0, 80).map(lambda size: [size % 3] * size), min_size=1,
                          max_size=2))  # fmt: skip
    rows = st.tuples(st.sampled_from(stems), ALPHABET, ALPHABET)
    drawn = draw(st.lists(rows, min_size=1, max_size=14))
    return [(None, stem + context, continuation) for stem, context, continuation in drawn]


def as_queries(requests: Sequence[Request]) -> list[Query]:
    return [
        Query(index, tuple((context + continuation)[:-1]), tuple(continuation))
        for index, (_, context, continuation) in enumerate(requests)
    ]


def read(passes: Iterator[Pass]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """What a model sees before each target: query, target, and all tokens in view."""
    kept: tuple[int, ...] = ()
    for step in passes:
        assert len(kept) >= step.past
        for row in step.rows:
            for target in row.targets:
                seen = [
                    column
                    for column in range(target.column + 1)
                    if target.column < row.ends[column]
                ]
                positions = [row.positions[column] for column in seen]
                assert positions == list(range(step.past, step.past + len(seen)))
                text = kept[: step.past] + tuple(row.tokens[column] for column in seen)
                yield target.index, target.token, text
        if step.keep:
            assert len(step.rows) == 1
            kept = kept[: step.past] + step.rows[0].tokens


@given(drawn_requests(), st.integers(1, 120))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_each_target_is_asked_for_once_after_exactly_its_own_text(
    requests: list[Request], budget: int
) -> None:
    queries = as_queries(requests)

    found = sorted(read(PrefixTree(queries, budget).passes()))

    expected = [
        (query.index, token, query.tokens[: query.first_scored + place + 1])
        for query in queries
        for place, token in enumerate(query.targets)
    ]
    assert found == sorted(expected)


@given(drawn_requests(), st.integers(1, 120))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_pass_exceeds_the_budget(requests: list[Request], budget: int) -> None:
    passes = list(PrefixTree(as_queries(requests), budget).passes())

    assert max(len(step.rows) * step.width for step in passes) <= budget


@pytest.mark.parametrize("budget", [50, 1000])
def test_examples_of_many_questions_are_read_once(budget: int) -> None:
    queries = as_queries(tree_requests(questions=20, length=45))

    read_tokens = [
        len(row.tokens) for step in PrefixTree(queries, budget).passes() for row in step.rows
    ]

    contexts = sum(4 + number for number in range(20))
    choices = 20 * (2 + 2 + 5)
    assert sum(read_tokens) <= 45 + contexts + choices


def test_a_short_beginning_that_many_questions_share_makes_no_pass_of_its_own() -> None:
    requests: list[Request] = [(None, [7, *range(number, 40)], [1]) for number in range(8)]

    passes = list(PrefixTree(as_queries(requests), budget=100).passes())

    assert not any(step.keep for step in passes)


# --------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", SHARING)
def test_log_likelihoods_are_those_of_lm_eval(kind: str, attention: str, both: Any) -> None:
    ours, theirs = both(made(SHARING[kind], attention))

    check_equal(ours, theirs, tree_requests(), near=1e-4)
    assert ours.fallback_reason is None


@pytest.mark.parametrize("kind", SHARING)
def test_log_likelihoods_in_float64_are_those_of_lm_eval(kind: str, both: Any) -> None:
    ours, theirs = both(made(SHARING[kind]).double())

    # Llama's norms are computed in float32 whatever the model is.
    check_equal(ours, theirs, tree_requests(), near=1e-5)
    assert ours.fallback_reason is None


@given(drawn_requests(), st.integers(1, 120), st.sampled_from([12, 128]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_requests_get_the_log_likelihoods_of_lm_eval(
    tokenizer: Any, requests: list[Request], budget: int, max_length: int
) -> None:
    options = {"pretrained": LLAMA, "tokenizer": tokenizer, "max_length": max_length}
    ours = SharedPrefixLM(tokens_per_pass=budget, **options)
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = HFLM(**options)._loglikelihood_tokens(requests, disable_tqdm=True)

    assert ours.fallback_reason is None
    for (score, greedy), (their_score, their_greedy) in zip(found, expected, strict=True):
        assert score == pytest.approx(their_score, abs=1e-4, rel=0)
        assert greedy == their_greedy


@pytest.mark.parametrize("batch_size", [1, 2, 64, "auto"])
@pytest.mark.parametrize("tokens_per_pass", [None, 5, 31, 160, 10_000])
def test_the_size_of_batches_changes_no_log_likelihood(
    batch_size: Any, tokens_per_pass: int | None, tokenizer: Any, both: Any
) -> None:
    options = {"pretrained": LLAMA, "tokenizer": tokenizer, "batch_size": batch_size}
    ours = SharedPrefixLM(tokens_per_pass=tokens_per_pass, **options)
    _, theirs = both(LLAMA)

    # At 160 tokens, several rows stand on the examples, and fewer in the last pass.
    check_equal(ours, theirs, tree_requests(questions=16), near=1e-4)


def test_long_continuations_that_begin_alike_are_scored_each_to_its_end(both: Any) -> None:
    ours, theirs = both(LLAMA, tokens_per_pass=400)
    alike = [(7 * number) % VOCABULARY for number in range(100)]
    requests: list[Request] = [(None, [3, 4], [*alike, other, 9]) for other in (5, 6, 7)]

    check_equal(ours, theirs, requests, near=1e-3)


def test_a_continuation_is_greedy_only_if_each_of_its_tokens_is(both: Any) -> None:
    ours, theirs = both(LLAMA)
    said = [11, 12, 13]
    for _ in range(3):
        said.append(int(LLAMA(torch.tensor([said])).logits[0, -1].argmax()))
    first, second, third = said[3:]
    after_another = int(LLAMA(torch.tensor([[11, 12, 13, 0]])).logits[0, -1].argmax())
    endings = [[first, second, third], [first, 0, third], [first, second, 0], [0, after_another]]
    requests: list[Request] = [(None, said[:3], ending) for ending in endings]

    check_equal(ours, theirs, requests, near=1e-4)
    greedy = [greedy for _, greedy in ours._loglikelihood_tokens(requests, disable_tqdm=True)]
    assert greedy == [True, False, False, False]


def test_passes_keep_within_the_tokens_allowed_and_the_cache_within_one_sequence(
    both: Any,
) -> None:
    model = made(SHARING["llama"])
    ours, _ = both(model, tokens_per_pass=40)
    assert ours.fallback_reason is None
    requests = tree_requests(questions=12, length=90)
    passes: list[tuple[int, int]] = []

    def watch(module: Any, args: Any, given: dict[str, Any]) -> None:
        cache = given["past_key_values"]
        passes.append((given["input_ids"].numel(), cache.get_seq_length() if cache else 0))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    ours._loglikelihood_tokens(requests, disable_tqdm=True)

    assert max(tokens for tokens, _ in passes) <= 40
    longest = max(len(context) + len(continuation) for _, context, continuation in requests)
    assert 90 <= max(past for _, past in passes) <= longest


def test_batch_size_bounds_the_tokens_of_a_pass(tokenizer: Any) -> None:
    sizes = {
        size: SharedPrefixLM(pretrained=LLAMA, tokenizer=tokenizer, batch_size=size).tokens_per_pass
        for size in (1, 2, 16)
    }

    assert sizes == {1: 512, 2: 1024, 16: 1024}


def test_texts_too_long_for_the_model_lose_their_beginning(both: Any) -> None:
    ours, theirs = both(LLAMA, max_length=20)

    check_equal(ours, theirs, tree_requests(length=60), near=1e-4)


def test_a_continuation_as_long_as_the_model_can_read_is_scored(both: Any) -> None:
    ours, theirs = both(LLAMA, max_length=20)

    check_equal(ours, theirs, [(None, [5, 6], list(range(20)))], near=1e-4)


@pytest.mark.parametrize("continuation", [[], [1] * 21])
def test_a_continuation_that_cannot_be_scored_is_named(continuation: list[int], both: Any) -> None:
    ours, _ = both(LLAMA, max_length=20)

    with pytest.raises(DataError, match=r"'Is it\?', ' Yes'"):
        ours._loglikelihood_tokens([(("Is it?", " Yes"), [1, 2], continuation)])


# --------------------------------------------------------------------------- lm-eval's contract


def instances(pairs: Sequence[tuple[str, ...]], kind: Any = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]


QUESTIONS = [
    ("The os module: what is path? ", "a string"),
    ("", "no context at all"),
    ("The os module", " is portable"),
    ("The os module: what is path?", " a"),
    ("The os module: what is path?", " a module"),
    ("The os module: what is path?", " a string"),
    ("", "no context at all"),
    ("a" * 300, " long"),
]


class Hook:
    """Stands where lm-eval keeps answers."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any, Any]] = []

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.told.append((attr, req, res))


def test_texts_are_answered_in_their_order_and_each_is_told_to_the_cache_hook(both: Any) -> None:
    ours, theirs = both(LLAMA)
    ours.cache_hook, theirs.cache_hook = Hook(), Hook()

    found = ours.loglikelihood(instances(QUESTIONS), disable_tqdm=True)
    expected = theirs.loglikelihood(instances(QUESTIONS), disable_tqdm=True)

    assert [score for score, _ in found] == pytest.approx(
        [score for score, _ in expected], abs=1e-4, rel=0
    )
    assert [type(part) for part in found[0]] == [float, bool]
    assert sorted(ours.cache_hook.told) == sorted(
        ("loglikelihood", pair, answer) for pair, answer in zip(QUESTIONS, found, strict=True)
    )
    assert sorted(pair for _, pair, _ in theirs.cache_hook.told) == sorted(QUESTIONS)


def test_rolling_log_likelihoods_and_generated_texts_stay_those_of_lm_eval(both: Any) -> None:
    ours, theirs = both(LLAMA, max_length=64)
    texts = instances([("The os module is portable. " * 12,), ("Short",)], "loglikelihood_rolling")
    asked = instances([("The os", {"until": ["."], "max_gen_toks": 6})], "generate_until")

    found = ours.loglikelihood_rolling(texts, disable_tqdm=True)

    assert found == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3)
    assert ours.generate_until(asked, True) == theirs.generate_until(asked, True)


# --------------------------------------------------------------------------------- other models


def lora(kind: str = "LORA") -> Any:
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    configs = {
        "LORA": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "PROMPT": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "PREFIX": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    torch.manual_seed(1)
    return get_peft_model(made(SHARING["llama"]), configs[kind]).eval()


def test_a_model_with_a_lora_adapter_shares_prefixes(both: Any) -> None:
    ours, theirs = both(lora())

    check_equal(ours, theirs, tree_requests(), near=1e-4)
    assert ours.fallback_reason is None


def windowed() -> PreTrainedModel:
    return made(Gemma2Config(**SHAPE, head_dim=8, sliding_window=16), "eager")


def stretched() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    return made(LlamaConfig(**SHAPE, rope_parameters=rope))


def without_positions() -> PreTrainedModel:
    return made(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL), "eager")


def recurrent() -> PreTrainedModel:
    return made(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **SMALL), "eager")


class CausalWhateverTheMask(LlamaForCausalLM):
    """Accepts a mask and does not heed it."""

    def forward(self, *args: Any, attention_mask: Any = None, **options: Any) -> Any:
        return super().forward(*args, **options)


def heedless() -> PreTrainedModel:
    torch.manual_seed(0)
    return CausalWhateverTheMask(SHARING["llama"]).eval()


FALLING_BACK = {
    "sliding window": (windowed, "not all layers attend to the whole text"),
    "rope by length": (stretched, "rotary embeddings of type `dynamic`"),
    "alibi": (without_positions, "the model refuses|would differ"),
    "recurrent": (recurrent, "recurrent|not all layers"),
    "mask not heeded": (heedless, "would differ by"),
    "prompt tuning": (lambda: lora("PROMPT"), "the adapter adds to the text"),
    "prefix tuning": (lambda: lora("PREFIX"), "the adapter adds to the text"),
}


@pytest.mark.parametrize("case", FALLING_BACK)
def test_a_model_that_cannot_share_prefixes_is_asked_in_the_way_of_lm_eval(
    case: str, both: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, reason = FALLING_BACK[case]
    ours, theirs = both(model())
    requests = tree_requests()

    with caplog.at_level(logging.WARNING, logger="posttrain"):
        found = ours._loglikelihood_tokens(requests, disable_tqdm=True)

    assert found == theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    assert re.search(reason, str(ours.fallback_reason))
    assert [record.getMessage() for record in caplog.records].count(
        f"prefixes are not shared: {ours.fallback_reason}"
    ) == 1


def test_in_16_bit_prefixes_are_shared_and_probabilities_not_rounded(both: Any) -> None:
    ours, _ = both(made(SHARING["llama"]).to(torch.bfloat16))
    _, exact = both(made(SHARING["llama"]).to(torch.bfloat16).float())
    requests = tree_requests()

    found = [score for score, _ in ours._loglikelihood_tokens(requests, disable_tqdm=True)]
    expected = [score for score, _ in exact._loglikelihood_tokens(requests, disable_tqdm=True)]

    assert ours.fallback_reason is None
    assert found == pytest.approx(expected, rel=0.05)
    assert any(score != float(torch.tensor(score, dtype=torch.bfloat16)) for score in found)
