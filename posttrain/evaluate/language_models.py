"""Who answers lm-eval: a model in transformers or in vLLM, asked only what is not known yet.

Questions are put a portion at a time, and the answers of a portion are kept before the next one: an
evaluation that is killed goes on behind its last whole portion. A portion is made of the items of
one leaf task in their order, and so does not depend on the other tasks or on when an evaluation was
stopped. That matters because the last bits of a log-likelihood depend on what else is in its batch:
so an evaluation that was interrupted, or found another one's answers, gives the same bytes as one
that asked everything itself. The exception is a raised `limit`, where the items that are added
share batches with each other alone.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.errors import DataError, ModelError
from posttrain.evaluate.item_cache import Answer, AnswerCache
from posttrain.events import EventWriter
from posttrain.hardware import ResolvedDType

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.stages.program import StageInput

Backend = Literal["shared_prefixes", "hf", "vllm"]
Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]

_PROGRESS_EVERY_S = 2.0

_PORTION: dict[tuple[bool, bool], int] = {
    (False, False): 64,
    (False, True): 16,
    (True, False): 1024,
    (True, True): 128,
}
"""Items asked before their answers are kept, by whether there is a GPU and whether answers are
written. A kill costs the work on one portion: about a minute of a small model on a slow machine. It
still fills many batches, and the examples before a question are shared by most of it."""

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be set to."""


class Weights:
    """A model in transformers, loaded when it is first needed."""

    def __init__(self, source: StageInput, dtype: ResolvedDType, events: EventWriter) -> None:
        """Remember what to load."""
        self._source = source
        self._dtype = dtype
        self._events = events
        self._model: PreTrainedModel | None = None

    def load(self) -> PreTrainedModel:
        """The model, ready to be asked.

        Raises:
            ModelError: it cannot be loaded.
        """
        if self._model is None:
            from posttrain.models import load_causal_lm

            self._events.phase("loading the model")
            self._model = load_causal_lm(self._source, self._dtype)
        return self._model

    def release(self) -> None:
        """Free the memory that it takes, if nobody else holds it."""
        import torch

        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_backend(backend: Backend, source: StageInput) -> None:
    """Find out what cannot work, before anything is loaded.

    Raises:
        DataError: vLLM is asked for and not installed, or cannot read this adapter.
    """
    if backend != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise DataError(
            "evaluate.backend: `vllm` is not installed; on a machine with a GPU install it into "
            "this environment (pip install vllm), or write `backend: shared_prefixes`"
        )
    if source.kind == "adapter":
        _lora_rank(Path(source.path))


def load_transformers(
    backend: Backend, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Any:
    """lm-eval's language model over a loaded one."""
    from lm_eval.models.huggingface import HFLM

    kind = HFLM
    if backend == "shared_prefixes":
        from posttrain.evaluate.shared_prefixes import SharedPrefixLM

        kind = SharedPrefixLM
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def load_vllm(source: StageInput, dtype: str, seed: int) -> Any:
    """lm-eval's language model over vLLM, which loads the weights itself.

    Written from lm-eval's and vLLM's documentation; without a GPU it cannot be tried.
    """
    from lm_eval.models.vllm_causallms import VLLM

    if source.kind != "adapter":
        return VLLM(pretrained=source.path, dtype=dtype, seed=seed)
    return VLLM(
        pretrained=source.base,
        tokenizer=source.path,
        dtype=dtype,
        seed=seed,
        lora_local_path=source.path,
        max_lora_rank=_lora_rank(Path(source.path)),
    )


class RememberingLM:
    """Stands between lm-eval and a language model: asks what is not known, and keeps the answers.

    The language model is loaded for the first question that nobody has answered yet.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        load: Callable[[], Any],
        events: EventWriter,
        *,
        seed: int,
        answers: AnswerCache | None = None,
    ) -> None:
        """Prepare to ask.

        Args:
            load: Gives lm-eval's language model.
            events: Progress goes here.
            seed: Of answers that are drawn at random.
            answers: What is known; None keeps nothing.
        """
        self._load = load
        self._events = events
        self._seed = seed
        self._answers = answers
        self._loaded: Any = None
        self._warned = False

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the language model reads it."""
        return str(self._model().apply_chat_template(chat_history, add_generation_prompt))

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval tells its own caches apart, where they are used."""
        return str(self._model().tokenizer_name)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """How likely a text is after a prompt, in nats, and whether greedy decoding writes it."""
        answers = self._answer("loglikelihood", requests)
        return [(_nats(answer), bool(answer.greedy)) for answer in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """How likely a whole text is, in nats."""
        return [_nats(answer) for answer in self._answer("loglikelihood_rolling", requests)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What is written after a prompt."""
        return [answer.text or "" for answer in self._answer("generate_until", requests)]

    def _model(self) -> Any:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _answer(self, kind: Kind, instances: Sequence[Any]) -> list[Answer]:
        from transformers import set_seed

        requests = _requests(kind, instances)
        leaves = list(dict.fromkeys(request.leaf for request in requests))
        known = {leaf: self._answers.read(leaf) if self._answers else {} for leaf in leaves}
        missing = [request for request in requests if request.key not in known[request.leaf]]
        if len(missing) < len(requests):
            there = len(requests) - len(missing)
            self._events.phase(f"{there:,} of {len(requests):,} answers were given before")
        progress = _Progress(self._events, len(requests), len(missing))
        for portion in _portions(missing, _portion_size(kind)):
            # Of its own content: so random answers do not depend on what was asked before.
            set_seed(_seed_of(self._seed, portion))
            leaf = portion[0].leaf
            known[leaf].update(self._ask(kind, portion, progress))
            progress.answered(len(portion))
            if self._answers is not None:
                self._answers.save(leaf, known[leaf])
        set_seed(self._seed)  # whatever comes next does not depend on what was known
        return [known[request.leaf][request.key] for request in requests]

    def _ask(
        self, kind: Kind, portion: Sequence[_Request], progress: _Progress
    ) -> dict[str, Answer]:
        model = self._model()
        model.cache_hook = progress
        given = getattr(model, kind)([one.instance for one in portion], disable_tqdm=True)
        if kind != "generate_until":
            self._warn_of_fallback(model)
        return {
            request.key: _to_answer(kind, answer)
            for request, answer in zip(portion, given, strict=True)
        }

    def _warn_of_fallback(self, model: Any) -> None:
        reason = getattr(model, "fallback_reason", None)
        if reason and not self._warned:
            self._warned = True
            self._events.warning(f"what questions share is read again for each: {reason}")


@dataclass(frozen=True)
class _Request:
    """One request of lm-eval's."""

    leaf: str
    item: int
    """The item's position among those of its leaf that are asked."""
    key: str
    """Of its content; equal requests of one leaf, such as a question asked repeatedly for answers
    drawn at random, are numbered."""
    instance: Any


def _requests(kind: Kind, instances: Sequence[Any]) -> list[_Request]:
    from lm_eval.api.model import hash_args

    seen: dict[tuple[str, str], int] = {}
    requests = []
    for instance in instances:
        leaf, digest = str(instance.task_name), hash_args(kind, instance.args)
        number = seen[leaf, digest] = seen.get((leaf, digest), -1) + 1
        key = f"{digest}-{number}" if number else digest
        requests.append(_Request(leaf, int(instance.doc_id), key, instance))
    return requests


def _portion_size(kind: Kind) -> int:
    import torch

    return _PORTION[torch.cuda.is_available(), kind == "generate_until"]


def _portions(requests: Sequence[_Request], size: int) -> Iterator[list[_Request]]:
    """At most `size` items of one leaf at a time; an item's requests stay together."""
    portion: list[_Request] = []
    items = 0
    for request in requests:
        begins = not portion or (request.leaf, request.item) != (portion[-1].leaf, portion[-1].item)
        if portion and begins and (items == size or request.leaf != portion[0].leaf):
            yield portion
            portion, items = [], 0
        items += begins
        portion.append(request)
    if portion:
        yield portion


def _seed_of(seed: int, portion: Sequence[_Request]) -> int:
    digest = hashlib.sha256(f"{seed}:{portion[0].key}".encode()).digest()
    return int.from_bytes(digest[:4])


def _to_answer(kind: Kind, given: Any) -> Answer:
    match kind:
        case "loglikelihood":
            return Answer(log_likelihood=float(given[0]), greedy=bool(given[1]))
        case "loglikelihood_rolling":
            return Answer(log_likelihood=float(given))
        case "generate_until":
            return Answer(text=str(given))


def _nats(answer: Answer) -> float:
    if answer.log_likelihood is None:
        raise TypeError(f"not a likelihood: {answer}")
    return answer.log_likelihood


class _Progress:
    """Stands where a language model of lm-eval's hands each finished request to its cache."""

    def __init__(self, events: EventWriter, total: int, missing: int) -> None:
        self._events = events
        self._total = total
        self._missing = missing
        self._answered = 0  # in whole portions
        self._partial = 0
        self._started = self._reported = time.monotonic()

    def add_partial(self, attr: str, req: object, res: object) -> None:
        """Count one answered request."""
        del attr, req, res
        self._partial += 1
        if time.monotonic() - self._reported >= _PROGRESS_EVERY_S:
            self._report(self._answered + self._partial)

    def answered(self, requests: int) -> None:
        """Count a portion."""
        self._answered += requests
        self._partial = 0
        self._report(self._answered)

    def _report(self, asked: int) -> None:
        self._reported = time.monotonic()
        left = max(self._missing - asked, 0)
        eta = (self._reported - self._started) / asked * left
        self._events.progress(self._total - left, self._total, unit="answer", eta_s=round(eta, 1))


def _lora_rank(adapter: Path) -> int:
    """The largest rank in an adapter, as vLLM has to be told, rounded up to what it knows."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{adapter}: adapter_config.json cannot be read: {error}") from error
    rank = max([int(config.get("r") or 0), *(config.get("rank_pattern") or {}).values()])
    if config.get("peft_type") != "LORA" or config.get("use_dora") or rank > _LORA_RANKS[-1]:
        raise DataError(
            "evaluate.backend: `vllm` reads plain LoRA adapters up to rank "
            f"{_LORA_RANKS[-1]} only; put `- merge: {{}}` before this stage, or write "
            "`backend: shared_prefixes`"
        )
    return next(known for known in _LORA_RANKS if known >= rank)
