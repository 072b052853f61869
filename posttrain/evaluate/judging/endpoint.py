"""A model behind an OpenAI-compatible interface as the judge.

Every readable reply is kept under the digest of its request, so that a repeated or killed run pays
for none twice. The key comes from the environment, goes into one header, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.errors import ModelError, UsageError
from posttrain.evaluate.judging.pairs import ORDERS, Pair, Side, Vote, preferred
from posttrain.evaluate.judging.prompting import WITH_REASON, judging_prompt, read_verdict
from posttrain.recipe.judge import Endpoint
from posttrain.store.files import write_json
from posttrain.store.fingerprint import canonical_json

RATER = "judge"

_RETRIED = frozenset({408, 409, 425, 429})
_LONGEST_WAIT = 120.0
"""Seconds; an endpoint that asks for a longer wait is asked again sooner."""
_SHOWN = 300
"""Characters of a refusal that are repeated."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Said(_Record):
    content: str | None = None


class _Choice(_Record):
    message: _Said


class _Completion(_Record):
    """As much of a chat completion as is read."""

    choices: tuple[_Choice, ...] = Field(min_length=1)


class _Stopped(Exception):
    """Another request has failed for good."""


@dataclass(frozen=True)
class _Failure:
    """Why a try brought no reply."""

    text: str
    again: bool
    """Whether another try may bring one."""
    wait: float | None = None
    """Seconds that the endpoint asks to wait."""


def judge_by_endpoint(
    pairs: Sequence[Pair],
    config: Endpoint,
    cache: Path,
    tell: Callable[[int, int], None],
    backoff: float = 1.0,
) -> list[Vote]:
    """The verdict of the model on each pair, in both orders.

    A reply without exactly one verdict is a vote that cannot be read.

    Args:
        pairs: Without identical answers.
        config: Address, model, key's variable, retries.
        cache: Folder in which readable replies are kept.
        tell: Told how many votes there are, of how many.
        backoff: Seconds to wait before the second try; doubled before each further one.

    Raises:
        UsageError: the environment has no key.
        ModelError: the endpoint refuses, gives up after all tries, or is no chat completion
            interface; or no reply at all can be read.
    """
    asker = _Asker(config, api_key(config), cache, backoff)
    asked = [(pair, first) for pair in pairs for first in ORDERS]
    replies: dict[int, str] = {}
    with asker.client(), ThreadPoolExecutor(config.concurrency) as pool:
        waiting = {
            pool.submit(
                asker.reply, judging_prompt(pair, first, config.instructions, WITH_REASON)
            ): n
            for n, (pair, first) in enumerate(asked)
        }
        try:
            for future in as_completed(waiting):
                try:
                    replies[waiting[future]] = future.result()
                except _Stopped:
                    continue  # the failure that stopped it comes from another one
                tell(len(replies), len(asked))
        except BaseException:
            asker.stop()
            pool.shutdown(cancel_futures=True)
            raise
    votes = [_vote(pair, first, replies[n]) for n, (pair, first) in enumerate(asked)]
    if votes and all(vote.preferred is None for vote in votes):
        raise ModelError(
            f"by.endpoint: none of {len(votes)} replies of `{config.model}` has a verdict such as "
            f"[[A]]; the first one: {asker.safe(votes[0].reply) or '(empty)'}"
        )
    return votes


def api_key(config: Endpoint) -> str | None:
    """The key; None where the recipe says that there is none.

    Raises:
        UsageError: the variable is not set, or empty.
    """
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UsageError(
            f"by.endpoint: the environment variable {config.api_key_env} holds no key for "
            f"{config.url}; set it, or write `api_key_env: null` for an endpoint without one"
        )
    return key


class _Asker:
    """Sends requests, again where that may help, and keeps what comes back."""

    def __init__(self, config: Endpoint, key: str | None, cache: Path, backoff: float) -> None:
        self._config = config
        self._key = key
        self._cache = cache
        self._backoff = backoff
        self._stopping = threading.Event()
        self._client = httpx.Client(
            timeout=config.timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        # One line a request would bury the log.
        logging.getLogger("httpx").setLevel(logging.WARNING)

    @contextmanager
    def client(self) -> Iterator[None]:
        """Close the connections in the end."""
        with self._client:
            yield

    def stop(self) -> None:
        """Have nothing more asked: whoever waits for another try is woken up."""
        self._stopping.set()

    def safe(self, text: str) -> str:
        """A text from outside, short and without the key, which some endpoints repeat."""
        hidden = text.replace(self._key, "***") if self._key else text
        return " ".join(hidden.split())[:_SHOWN]

    def reply(self, prompt: str) -> str:
        """What the model says to a prompt, from the cache or from the endpoint.

        Raises:
            ModelError: it says nothing, after all tries.
        """
        body = self._body(prompt)
        kept = self._kept(body)
        if kept.is_file():
            return str(json.loads(kept.read_bytes())["reply"])
        if self._stopping.is_set():
            raise _Stopped
        try:
            reply = self._ask(body)
        except ModelError:
            self.stop()
            raise
        if read_verdict(reply) is not None:
            write_json(kept, {"model": self._config.model, "reply": reply})
        return reply

    def _body(self, prompt: str) -> dict[str, object]:
        config = self._config
        body: dict[str, object] = {
            "model": config.model,
            "messages": [{"role": "user", "content": prompt}],
        }
        if config.temperature is not None:
            body["temperature"] = config.temperature
        if config.max_tokens is not None:
            body["max_tokens"] = config.max_tokens
        return body

    def _kept(self, body: Mapping[str, object]) -> Path:
        request = canonical_json([self._config.url, dict(body)])
        digest = hashlib.sha256(request).hexdigest()
        return self._cache / digest[:2] / f"{digest}.json"

    def _ask(self, body: Mapping[str, object]) -> str:
        tries = self._config.max_retries + 1
        for number in range(tries):
            found = self._try(body)
            if isinstance(found, str):
                # A judge that repeats what it was sent could repeat a key: nothing keeps it.
                return found.replace(self._key, "***") if self._key else found
            if not found.again:
                raise ModelError(f"by.endpoint: {self._config.url}: {found.text}")
            last = found
            if number + 1 < tries and self._stopping.wait(self._pause(number, found)):
                raise _Stopped
        raise ModelError(
            f"by.endpoint: {self._config.url}: {last.text}, after {tries} tries; the verdicts so "
            "far are kept, and the next run asks for the others"
        )

    def _pause(self, number: int, failure: _Failure) -> float:
        # With some randomness, so that requests that failed together do not return together.
        backoff = self._backoff * 2.0**number * random.uniform(1, 1.5)
        return min(_LONGEST_WAIT, max(backoff, failure.wait or 0.0))

    def _try(self, body: Mapping[str, object]) -> str | _Failure:
        try:
            answer = self._client.post(_address(self._config.url), json=dict(body))
        except httpx.TimeoutException:
            return _Failure(f"no reply within {self._config.timeout_s:g} s", again=True)
        except httpx.TransportError as error:
            return _Failure(self.safe(str(error)) or type(error).__name__, again=True)
        if answer.status_code != 200:
            return self._refusal(answer)
        try:
            completion = _Completion.model_validate_json(answer.content)
        except ValidationError:
            text = f"not a chat completion: {self.safe(answer.text) or '(empty)'}"
            return _Failure(text, again=True)
        return completion.choices[0].message.content or ""

    def _refusal(self, answer: httpx.Response) -> _Failure:
        code = answer.status_code
        said = self.safe(answer.text)
        text = f"{code} {answer.reason_phrase}" + (f": {said}" if said else "")
        if code in (401, 403) and self._config.api_key_env:
            text += f" (the key is that of {self._config.api_key_env})"
        again = code in _RETRIED or code >= 500
        return _Failure(text, again, _retry_after(answer.headers.get("retry-after")))


def _address(url: str) -> str:
    return url if url.endswith("/chat/completions") else f"{url}/chat/completions"


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    seconds: float = (date - datetime.now(date.tzinfo or UTC)).total_seconds()
    return max(0.0, seconds)


def _vote(pair: Pair, first: Side, reply: str) -> Vote:
    choice = read_verdict(reply)
    said = preferred(choice, first) if choice else None
    return Vote(pair.id, RATER, first, said, reply=reply)
