"""A judge behind an OpenAI-compatible interface: a real server on this machine, well and unwell."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.rows import Message
from posttrain.errors import ModelError, UsageError
from posttrain.evaluate.judging.endpoint import _retry_after, judge_by_endpoint
from posttrain.evaluate.judging.pairs import Pair, Vote, Written
from posttrain.recipe.judge import Endpoint

KEY = "planted-0123456789abcdef"

Reply = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


def completion(text: str | None) -> Reply:
    body = {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {}}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def judgement(body: dict[str, Any], number: int) -> Reply:
    """Prefers the answer that says it is good."""
    prompt = body["messages"][0]["content"]
    place = "A" if prompt.index("good") < prompt.index("bad") else "B"
    return completion(f"It is better.\n[[{place}]]")


@dataclass
class Served:
    """A server, what it answers, and what it was asked."""

    answer: Callable[[dict[str, Any], int], Reply] = judgement
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def config(self, **more: Any) -> Endpoint:
        return Endpoint(**{"url": self.url, "model": "judge-1", "api_key_env": None, **more})


@pytest.fixture
def server() -> Iterator[Served]:
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                number = len(served.bodies)
                served.bodies.append(body)
                served.keys.append(self.headers.get("Authorization"))
                served.paths.append(self.path)
                served.times.append(time.monotonic())
                served.busy += 1
                served.busiest = max(served.busiest, served.busy)
            status, headers, content = served.answer(body, number)
            with served.lock:
                served.busy -= 1
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # whoever asked has stopped waiting

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield served
    http.shutdown()
    http.server_close()
    thread.join()


def make_pairs(count: int) -> list[Pair]:
    """The candidate is good in the first of every two."""
    texts = [("good", "bad"), ("bad", "good")]
    return [
        Pair(
            id=f"p{n}",
            source=f"f:{n}",
            prompt=(Message("user", f"Question {n}?"),),
            candidate=Written(texts[n % 2][0], 1, True),
            opponent=Written(texts[n % 2][1], 1, True),
        )
        for n in range(count)
    ]


def ask(config: Endpoint, cache: Path, count: int = 4) -> list[Vote]:
    return judge_by_endpoint(make_pairs(count), config, cache, lambda done, total: None, 0.001)


def test_both_orders_are_asked_and_verdicts_mean_the_same_answer(
    server: Served, tmp_path: Path
) -> None:
    votes = ask(server.config(), tmp_path)
    assert [(vote.pair, vote.first) for vote in votes[:3]] == [
        ("p0", "candidate"),
        ("p0", "opponent"),
        ("p1", "candidate"),
    ]
    assert [v.preferred for v in votes] == (["candidate"] * 2 + ["opponent"] * 2) * 2
    assert len(server.bodies) == 8
    assert set(server.paths) == {"/v1/chat/completions"}
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.0, 512)
    assert server.keys == [None] * 8


def test_settings_that_are_null_are_not_sent(server: Served, tmp_path: Path) -> None:
    ask(server.config(temperature=None, max_tokens=None), tmp_path, 1)
    assert set(server.bodies[0]) == {"model", "messages"}


def test_a_full_endpoint_is_asked_again_when_it_says(server: Served, tmp_path: Path) -> None:
    def busy(body: dict[str, Any], number: int) -> Reply:
        if number == 0:
            return 429, {"Retry-After": "0.4"}, b"slow down"
        return judgement(body, number)

    server.answer = busy
    votes = ask(server.config(concurrency=1), tmp_path, 1)
    assert [vote.preferred for vote in votes] == ["candidate"] * 2
    assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[1]
    assert server.times[1] - server.times[0] >= 0.4


def test_the_time_to_wait_may_be_a_date() -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert _retry_after(in_a_minute) == pytest.approx(60, abs=3)
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _retry_after("1.5") == 1.5
    assert _retry_after("soon") is None
    assert _retry_after(None) is None


def test_an_endpoint_that_keeps_failing_is_given_up_and_its_verdicts_are_kept(
    server: Served, tmp_path: Path
) -> None:
    def failing(body: dict[str, Any], number: int) -> Reply:
        if "Question 3" in body["messages"][0]["content"]:
            return 500, {}, b"out of memory"
        return judgement(body, number)

    server.answer = failing
    config = server.config(max_retries=3, concurrency=1)
    with pytest.raises(ModelError, match=r"500 .*out of memory, after 4 tries"):
        ask(config, tmp_path)
    assert len(server.bodies) == 6 + 4
    server.answer = judgement
    votes = ask(config, tmp_path)
    assert all(vote.preferred for vote in votes)
    assert len(server.bodies) == 10 + 2, "what was answered is not asked again"


def test_a_repeated_run_asks_nothing_and_another_model_everything(
    server: Served, tmp_path: Path
) -> None:
    first = ask(server.config(), tmp_path)
    assert ask(server.config(concurrency=1, timeout_s=5), tmp_path) == first
    assert len(server.bodies) == 8
    ask(server.config(model="judge-2"), tmp_path)
    assert len(server.bodies) == 16


def test_a_slow_endpoint_is_asked_again(server: Served, tmp_path: Path) -> None:
    waiting = threading.Event()

    def slow(body: dict[str, Any], number: int) -> Reply:
        if number == 0:
            waiting.wait(5)
        return judgement(body, number)

    server.answer = slow
    votes = ask(server.config(timeout_s=0.3, concurrency=1), tmp_path, 1)
    waiting.set()
    assert [vote.preferred for vote in votes] == ["candidate"] * 2
    assert len(server.bodies) == 3


def test_an_endpoint_that_is_not_there_is_named(tmp_path: Path, server: Served) -> None:
    config = server.config(url="http://127.0.0.1:9/v1", max_retries=1)
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9.*after 2 tries"):
        ask(config, tmp_path)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_request_that_is_wrong_is_not_repeated(
    server: Served, tmp_path: Path, status: int
) -> None:
    server.answer = lambda body, number: (status, {}, b'{"error": "no such model"}')
    with pytest.raises(ModelError, match=f"{status} .*no such model"):
        ask(server.config(concurrency=1), tmp_path)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "content", [b"<html>hello</html>", b"[]", b'{"choices": []}', b"", b"\xff\xfe"]
)
def test_what_is_no_chat_completion_is_refused(
    server: Served, tmp_path: Path, content: bytes
) -> None:
    server.answer = lambda body, number: (200, {}, content)
    with pytest.raises(ModelError, match="not a chat completion"):
        ask(server.config(max_retries=1), tmp_path)


def test_replies_without_a_verdict_are_counted_and_asked_again_next_time(
    server: Served, tmp_path: Path
) -> None:
    def vague(body: dict[str, Any], number: int) -> Reply:
        if "Question 0" in body["messages"][0]["content"]:
            return completion("Both have their merits.")
        if "Question 1" in body["messages"][0]["content"]:
            return completion(None)
        return judgement(body, number)

    server.answer = vague
    votes = ask(server.config(), tmp_path)
    assert [vote.preferred for vote in votes[:4]] == [None] * 4
    assert votes[0].reply == "Both have their merits."
    assert all(vote.preferred for vote in votes[4:])
    ask(server.config(), tmp_path)
    assert len(server.bodies) == 8 + 4


def test_a_judge_that_never_gives_a_verdict_is_an_error_that_shows_one(
    server: Served, tmp_path: Path
) -> None:
    server.answer = lambda body, number: completion("I would rather not say.")
    with pytest.raises(ModelError, match="I would rather not say"):
        ask(server.config(), tmp_path)


def test_no_more_requests_are_made_at_a_time_than_allowed(server: Served, tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def together(body: dict[str, Any], number: int) -> Reply:
        both.wait(10)
        return judgement(body, number)

    server.answer = together
    ask(server.config(concurrency=2), tmp_path)
    assert server.busiest == 2


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level("DEBUG")

    def tells(body: dict[str, Any], number: int) -> Reply:
        return completion(f"Your key is {KEY}. [[A]]")

    server.answer = tells
    votes = ask(server.config(api_key_env="JUDGE_KEY"), tmp_path, 1)
    assert server.keys == [f"Bearer {KEY}"] * 2
    server.answer = lambda body, number: (401, {}, f"wrong key: {KEY}".encode())
    with pytest.raises(ModelError, match=r"401 .*wrong key: \*\*\*.*JUDGE_KEY") as error:
        ask(server.config(api_key_env="JUDGE_KEY", model="other"), tmp_path, 1)
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2
    seen = [*written, repr(votes), str(error.value), repr(error.getrepr()), caplog.text]
    assert KEY not in "".join([*seen, *capfd.readouterr()])


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key_is_said_before_anything_is_asked(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(UsageError, match=r"JUDGE_KEY holds no key.*api_key_env: null"):
        ask(server.config(api_key_env="JUDGE_KEY"), tmp_path)
    assert server.bodies == []
