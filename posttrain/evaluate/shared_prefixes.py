"""lm-eval's Hugging Face model, reading what several questions share only once.

The answers to a multiple-choice question share its text, and few-shot questions their examples.
`SharedPrefixLM` scores all requests of a call as one tree of tokens (`prefix_tree`): each branch is
read once, several branches in one row behind a 4-D attention mask, and what is too large for one
forward pass stands on a KV cache. Logits are computed only where a token is scored.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from posttrain.errors import DataError
from posttrain.evaluate.prefix_tree import Pass, PrefixTree, Query

LOG = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's: what the cache hook is told (nothing for rolling windows), context, continuation."""
Answer = tuple[float, bool]
"""Summed log-likelihood, and whether greedy decoding would have said the same."""

_TOKENS_A_SEQUENCE = 512
"""What `batch_size` counts in: few questions are longer."""
_MOST_TOKENS_ON_CPU = 1024
"""Enough to keep the cores busy: of a 135M model on two cores 512 and 1,024 took the same time."""
_MASKED_ATTENTION = ("eager", "sdpa")
"""Attention that takes any mask; flash kernels know only causal ones."""
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that change with the length of what is read, and so with what is shared."""
_LOGITS_AT_ONCE = 64
"""Positions whose probabilities are computed together, which bounds the memory of it."""


class SharedPrefixLM(HFLM):  # type: ignore[misc]
    """`HFLM` with the same log-likelihoods in less time.

    Requests come back in lm-eval's order and each finished one is told to `cache_hook`, as `HFLM`
    does. In 16 bit, probabilities are computed from the model's logits in float32 unless
    `softmax_dtype` says otherwise; `HFLM` would round them to the model's precision.

    Args:
        tokens_per_pass: most tokens of a forward pass, padding included; the keys and values of one
            sequence are kept beside them. Default: 512 for each of `batch_size`, at most 1024 on a
            CPU.
        **options: those of `HFLM`, such as `pretrained`, `tokenizer` and `batch_size`.
    """

    def __init__(self, *, tokens_per_pass: int | None = None, **options: Any) -> None:
        self._tokens_per_pass = tokens_per_pass
        # A question is encoded with each of its choices, and each time on its own too.
        self._encode = lru_cache(maxsize=8)(super().tok_encode)
        super().__init__(**options)

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        """Tokens of a text, as `HFLM` has them."""
        return list(self._encode(string, *args, **options))

    @property
    def tokens_per_pass(self) -> int:
        """Most tokens of a forward pass."""
        if self._tokens_per_pass is not None:
            return self._tokens_per_pass
        sequences = 16 if self.batch_size == "auto" else int(self.batch_size)
        tokens = sequences * _TOKENS_A_SEQUENCE
        return min(tokens, _MOST_TOKENS_ON_CPU) if self.device.type == "cpu" else tokens

    @cached_property
    def fallback_reason(self) -> str | None:
        """Why this model is asked in `HFLM`'s way; None if prefixes are shared.

        Found when first asked for: by what the model is, and by scoring an example both ways.
        """
        reason = _unfit(self.model, self.backend) or self._differs()
        if reason:
            LOG.warning("prefixes are not shared: %s", reason)
        return reason

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """Score continuations of contexts, in the order of `requests`.

        Raises:
            DataError: an empty context or continuation, or one longer than the model can read.
        """
        if self.fallback_reason:
            answers: list[Answer] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
            return answers
        bar = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        )
        with bar:
            return self._score(requests, self.tokens_per_pass, bar)

    def _score(self, requests: Sequence[Request], budget: int, bar: tqdm[Any]) -> list[Answer]:
        queries = [self._query(index, request) for index, request in enumerate(requests)]
        tallies = [_Tally(len(query.targets)) for query in queries]
        kept: DynamicCache | None = None
        for step in PrefixTree(queries, budget).passes():
            logits, cache = self._read(step, kept)
            kept = cache if step.keep else kept
            for index, log_likelihood, greedy in self._scored(step, logits):
                tally = tallies[index]
                tally.add(log_likelihood, greedy)
                if tally.left:
                    continue
                bar.update(1)
                if (texts := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, tally.answer)
        return [tally.answer for tally in tallies]

    def _query(self, index: int, request: Request) -> Query:
        """The tokens that `HFLM` would read: cut on the left, and without the last one."""
        texts, context, continuation = request
        if not context or not 0 < len(continuation) <= self.max_length:
            raise DataError(
                f"evaluate.tasks: {texts!r} has {len(context)} tokens of context and "
                f"{len(continuation)} of continuation; there must be some of each, and at most "
                f"{self.max_length} of continuation"
            )
        whole = (context + continuation)[-(self.max_length + 1) :]
        return Query(index, tuple(whole[:-1]), tuple(continuation))

    def _read(
        self, step: Pass, kept: DynamicCache | None
    ) -> tuple[torch.Tensor, DynamicCache | None]:
        """Logits `[scored positions, vocabulary]`, row by row, and the cache of the pass if any."""
        shape = (len(step.rows), step.width)
        tokens = torch.zeros(shape, dtype=torch.long)
        positions = torch.zeros(shape, dtype=torch.long)
        # Padding attends to padding: a query without any key would give NaN.
        ends = torch.full(shape, step.width)
        scored = torch.zeros(shape, dtype=torch.bool)
        for number, row in enumerate(step.rows):
            length = len(row.tokens)
            tokens[number, :length] = torch.tensor(row.tokens)
            positions[number, :length] = torch.tensor(row.positions)
            ends[number, :length] = torch.tensor(row.ends)
            scored[number, [target.column for target in row.targets]] = True
        cache = self._branch(kept, step) if step.past or step.keep else None
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, self.mixed_precision_dtype, bool(self.mixed_precision_dtype)
            ),
        ):
            output = self.model(
                input_ids=tokens.to(self.device),
                attention_mask=self._mask(ends.to(self.device), step.past),
                position_ids=positions.to(self.device),
                past_key_values=cache,
                use_cache=cache is not None,
                # Indexes tensors of any device, so it may stay where it is.
                logits_to_keep=scored,
            )
        return output.logits, cache

    def _branch(self, kept: DynamicCache | None, step: Pass) -> DynamicCache:
        """The first `past` tokens of the kept cache, for each row; the kept one does not change."""
        if kept is None or not step.past:
            return DynamicCache(config=self.model.config)
        branch = copy.copy(kept)
        branch.layers = [copy.copy(layer) for layer in kept.layers]
        for layer in branch.layers:
            layer.keys = layer.keys[..., : step.past, :].expand(len(step.rows), -1, -1, -1)
            layer.values = layer.values[..., : step.past, :].expand(len(step.rows), -1, -1, -1)
        return branch

    def _mask(self, ends: torch.Tensor, past: int) -> torch.Tensor:
        """What may be attended to, `[rows, 1, width, past + width]`, from `[rows, width]`.

        As transformers makes it itself: true or false for `sdpa`, else added to the scores.
        """
        rows, width = ends.shape
        columns = torch.arange(width, device=ends.device)
        below = (columns[:, None] >= columns) & (columns[:, None] < ends[:, None, :])
        seen = torch.cat([below.new_ones(rows, width, past), below], dim=-1)[:, None]
        if self.model.config._attn_implementation == "sdpa":
            return seen
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
            ~seen, torch.finfo(dtype).min
        )

    def _scored(self, step: Pass, logits: torch.Tensor) -> list[tuple[int, float, bool]]:
        """Of each target: its query, log-probability, and whether no token is more probable."""
        targets = [target for row in step.rows for target in row.targets]
        if not targets:
            return []
        spots = [
            (number, target.column)
            for number, row in enumerate(step.rows)
            for target in row.targets
        ]
        place = {spot: number for number, spot in enumerate(dict.fromkeys(spots))}
        where = torch.tensor([place[spot] for spot in spots], device=logits.device)
        asked = torch.tensor([target.token for target in targets], device=logits.device)
        scores, best = self._log_probabilities(logits, where, asked)
        greedy = best == asked
        return [
            (target.index, score, hit)
            for target, score, hit in zip(targets, scores.tolist(), greedy.tolist(), strict=True)
        ]

    def _log_probabilities(
        self, logits: torch.Tensor, where: torch.Tensor, asked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the tokens `asked` after the logits at `where`, ascending; and the likeliest there."""
        dtype = self.softmax_dtype or torch.promote_types(logits.dtype, torch.float32)
        scores, best = [], []
        for begin in range(0, len(logits), _LOGITS_AT_ONCE):
            # Not `logsumexp`: it rounds in another way, by 1e-5 a token on a CPU.
            block = functional.log_softmax(
                logits[begin : begin + _LOGITS_AT_ONCE], dim=-1, dtype=dtype
            )
            here = (where >= begin) & (where < begin + len(block))
            scores.append(block[where[here] - begin, asked[here]])
            best.append(block.argmax(-1)[where[here] - begin])
        return torch.cat(scores), torch.cat(best)

    def _differs(self) -> str | None:
        """Score a small tree in both ways; what is wrong with ours, if anything."""
        requests = _example(self.vocab_size, self.max_length)
        quiet = tqdm(disable=True)
        try:
            # In one pass; and cut, so that most passes stand on what was kept.
            found = [self._score(requests, budget, quiet) for budget in (7, 64)]
        except Exception as error:  # a model may refuse the mask, the cache or the head in any way
            return f"the model refuses what that takes ({type(error).__name__}: {error})"
        expected = [self._plainly(request) for request in requests]
        precise = (torch.float32, torch.float64)
        exact = self.model.dtype in precise and self.mixed_precision_dtype is None
        difference = max(
            abs(ours - theirs) / (1 if exact else abs(theirs))
            for answers in found
            for (ours, _), theirs in zip(answers, expected, strict=True)
        )
        if difference <= (1e-3 if exact else 0.05):
            return None
        return f"log-likelihoods of an example would differ by {difference:.2g}" + (
            "" if exact else " of their size"
        )

    def _plainly(self, request: Request) -> float:
        """Log-likelihood of a continuation, read on its own through `HFLM`'s call of the model."""
        _, context, continuation = request
        tokens = torch.tensor([(context + continuation)[:-1]], device=self.device)
        scores = self._model_call(tokens)[0, -len(continuation) :].float().log_softmax(-1)
        asked = torch.tensor(continuation, device=scores.device)
        return float(scores.gather(-1, asked[:, None]).sum())


class _Tally:
    """What is known so far of one answer."""

    def __init__(self, left: int) -> None:
        self.left = left
        self._sum = 0.0
        self._greedy = True

    def add(self, log_likelihood: float, greedy: bool) -> None:
        self.left -= 1
        self._sum += log_likelihood
        self._greedy &= greedy

    @property
    def answer(self) -> Answer:
        return self._sum, self._greedy


def _unfit(model: Any, backend: str) -> str | None:
    """Why prefixes of such a model cannot be shared, from what it says of itself."""
    config = model.config.get_text_config(decoder=True)
    attention = model.config._attn_implementation
    if backend != "causal" or model.config.is_encoder_decoder:
        return "the model has an encoder"
    if attention not in _MASKED_ATTENTION:
        return f"attention `{attention}` takes no mask of ours; load the model with `sdpa`"
    if getattr(model, "_is_stateful", False):
        return "the model is recurrent"
    layers = DynamicCache(config=model.config).layers
    if any(type(layer) is not DynamicLayer for layer in layers) or (
        "local" in getattr(config, "attention_layers", ())
    ):
        return "not all layers attend to the whole text"
    if found := sorted(_ROPE_BY_LENGTH & _rope_types(config)):
        return f"rotary embeddings of type `{found[0]}` change with the length of the text"
    if any(
        adapter.is_prompt_learning or getattr(adapter, "alora_invocation_tokens", None)
        for adapter in getattr(model, "peft_config", {}).values()
    ):
        return "the adapter adds to the text or begins in the middle of it"
    return None


def _rope_types(config: Any) -> set[str]:
    """Of all layers; models with several kinds of layers nest them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    return {str(kind["rope_type"]) for kind in kinds if "rope_type" in kind}


def _example(vocabulary: int, max_length: int) -> list[Request]:
    """Two contexts that begin alike, each with continuations that do; always the same ones."""
    draw = random.Random(0).choices
    tokens = range(vocabulary)
    length = max(1, min(8, max_length // 3))
    start = draw(tokens, k=length)
    contexts = [start + draw(tokens, k=length) for _ in range(2)]
    first = draw(tokens, k=1)
    return [
        (None, context, continuation)
        for context in contexts
        for continuation in (draw(tokens, k=1), first + draw(tokens, k=2), first + draw(tokens))
    ]
