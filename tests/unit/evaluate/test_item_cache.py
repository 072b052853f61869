"""Answers are asked once: by another evaluation, under a larger limit, after a kill."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from lm_eval.api.model import LM

from posttrain.evaluate.harness import Benchmarks, Measured, ask_benchmarks, load_benchmarks
from posttrain.evaluate.item_cache import Answer, AnswerCache, Respondent
from posttrain.evaluate.language_models import RememberingLM
from posttrain.events import EventReader, EventWriter, Phase, Progress
from posttrain.recipe.evaluate import EvaluateConfig, Samples
from posttrain.stages.evaluate import main
from posttrain.store import Store
from posttrain.store.gc import CACHE_LOCK, collect, find_garbage

MODEL = Respondent(model="m", backend="hf", dtype="float32", seed=0, lm_eval="0")


class Oracle(LM):
    """Answers by the digest of what it is asked, and remembers what that was."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int]] = []

    def loglikelihood(self, requests, disable_tqdm=True):
        return [(-self._number(one), False) for one in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        return [-self._number(one) for one in requests]

    def generate_until(self, requests, disable_tqdm=True):
        import random  # seeded by whoever asks, as a model's draws are

        return [f"{self._number(one)} {random.random()}" for one in requests]

    def _number(self, request) -> float:
        self.asked.append((request.task_name, request.doc_id))
        digest = hashlib.sha256(repr(request.args).encode()).digest()
        return int.from_bytes(digest[:4]) / 2**28


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def ask(oracle, tmp_path):
    """`ask("quiz", limit=3)` gives what was measured; what was asked is in `oracle.asked`."""

    def ask(
        *names: str,
        folder: Path = tmp_path / "tasks",
        respondent: Respondent = MODEL,
        cached: bool = True,
        events: Path = tmp_path / "events.jsonl",
        **settings: object,
    ) -> Measured:
        oracle.asked.clear()
        writer = EventWriter(events)
        answers = AnswerCache(tmp_path / "cache", respondent, writer.warning) if cached else None
        loaded = load_benchmarks(Benchmarks(names, (folder,), **settings))  # type: ignore[arg-type]
        return ask_benchmarks(
            RememberingLM(lambda: oracle, writer, seed=0, answers=answers), loaded
        )

    return ask


@pytest.fixture(autouse=True)
def tasks(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    write_quiz(folder, "quiz", 12)
    write_quiz(folder, "riddle", 5)
    return folder


def write_quiz(folder: Path, name: str, items: int, **settings: object) -> None:
    folder.mkdir(exist_ok=True)
    rows = [
        {"question": f"{name}: {n} + 1 =", "choices": [str(n + 1), "no, never"], "answer": n % 2}
        for n in range(items)
    ]
    write_rows(folder, name, rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **settings,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def write_rows(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_nothing_is_asked_twice(ask, oracle):
    first = ask("quiz")
    assert len(oracle.asked) == 24
    assert ask("quiz") == first
    assert oracle.asked == []


def test_another_task_asks_its_own_items_alone(ask, oracle):
    first = ask("quiz")
    both = ask("quiz", "riddle")
    assert {task for task, _ in oracle.asked} == {"riddle"}
    assert len(oracle.asked) == 10
    assert both.items[:12] == first.items
    assert both == ask("quiz", "riddle", cached=False)


def test_a_larger_limit_asks_the_difference(ask, oracle):
    few = {item.item_id for item in ask("quiz", limit=4).items}
    more = ask("quiz", limit=9)
    assert len(oracle.asked) == 2 * 5
    assert few < {item.item_id for item in more.items}
    everything = ask("quiz")
    assert len(oracle.asked) == 2 * 3
    assert everything == ask("quiz", cached=False)


def test_an_edited_row_is_another_question_and_the_others_are_known(ask, oracle, tasks):
    ask("quiz")
    rows = [json.loads(line) for line in (tasks / "quiz.jsonl").read_text().splitlines()]
    rows[7]["question"] = "What is it?"
    write_rows(tasks, "quiz", rows)
    ask("quiz")
    assert oracle.asked == [("quiz", 7)] * 2


def test_examples_make_other_questions(ask, oracle):
    ask("quiz", limit=3)
    ask("quiz", limit=3, num_fewshot=2)
    assert len(oracle.asked) == 6


def test_another_metric_scores_known_answers(ask, oracle, tasks):
    ask("quiz")
    metric = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
    write_quiz(tasks, "quiz", 12, metric_list=[metric])
    again = ask("quiz")
    assert oracle.asked == []
    assert again.results[0].metric == "acc_norm"


@pytest.mark.parametrize("field", ["model", "backend", "dtype", "seed", "lm_eval"])
def test_another_respondent_is_asked(ask, oracle, field):
    ask("quiz")
    ask("quiz", respondent=replace(MODEL, **{field: 1 if field == "seed" else "other"}))
    assert len(oracle.asked) == 24


def test_what_is_written_is_remembered_also_when_it_is_drawn_repeatedly(
    ask, oracle, tasks, tmp_path
):
    settings = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "repeats": 3,
        "generation_kwargs": {"until": ["\n"], "do_sample": True},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    write_quiz(tasks, "quiz", 20, **settings)
    write_quiz(tasks, "riddle", 5, **settings)
    fresh = ask("quiz", cached=False)
    first = ask("quiz")
    assert len(oracle.asked) == 60
    assert ask("quiz") == first == fresh
    assert oracle.asked == []
    # Each draw is one of its own, whatever portion it is in and whatever was asked before.
    answers = AnswerCache(tmp_path / "cache", MODEL).read("quiz").values()
    assert len({str(answer.text).split()[1] for answer in answers}) == 60
    after_another = ask("riddle", "quiz", cached=False)
    assert after_another.items[5:] == fresh.items


def test_whole_texts_are_remembered(ask, oracle, tasks):
    metric = {"metric": "score", "aggregation": "mean", "higher_is_better": True}
    write_quiz(tasks, "quiz", 3, output_type="loglikelihood_rolling", doc_to_target="{{question}}")
    task = json.loads((tasks / "quiz.yaml").read_text())
    task["metric_list"] = [metric]
    (tasks / "score.py").write_text("def score(doc, results):\n    return {'score': results[0]}\n")
    text = json.dumps({**task, "process_results": "PLACE"}).replace(
        '"PLACE"', "!function score.score"
    )
    (tasks / "quiz.yaml").write_text(text)
    first = ask("quiz")
    assert len(oracle.asked) == 3
    assert ask("quiz") == first
    assert oracle.asked == []


def test_progress_goes_on_from_what_is_known(ask, tmp_path):
    ask("quiz")
    ask("quiz", "riddle", events=tmp_path / "second.jsonl")
    events = list(EventReader(tmp_path / "second.jsonl").read())
    assert any(
        isinstance(event, Phase) and event.message == "24 of 34 answers were given before"
        for event in events
    )
    [last] = [event for event in events if isinstance(event, Progress)][-1:]
    assert (last.done, last.total) == (34, 34)


ANSWERS = {
    f"{number:064x}": Answer(log_likelihood=-number / 3, greedy=number % 2 == 0)
    for number in range(40)
} | {"written": Answer(text="Ä\n"), "whole": Answer(log_likelihood=float("-inf"))}


@pytest.fixture
def cache(tmp_path) -> AnswerCache:
    cache = AnswerCache(tmp_path / "cache", MODEL)
    cache.save("leaf", ANSWERS)
    return cache


def test_answers_are_read_as_they_were(cache):
    assert cache.read("leaf") == ANSWERS
    assert cache.read("another leaf") == {}


def test_a_flipped_byte_is_noticed_or_harmless(cache, tmp_path):
    path, warnings = cache.path("leaf"), []
    content = path.read_bytes()
    noticed = 0
    for position in range(0, len(content), 5):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]
        )
        found = AnswerCache(tmp_path / "cache", MODEL, warnings.append).read("leaf")
        assert found in ({}, ANSWERS), position
        noticed += found == {}
    assert noticed == len(warnings) > len(content) / 10
    assert all("damaged, so its questions are asked again" in warning for warning in warnings)


def test_a_damaged_file_is_asked_again_and_replaced(ask, oracle, tmp_path):
    first = ask("quiz")
    [path] = (tmp_path / "cache").glob("*.parquet")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert ask("quiz") == first
    assert len(oracle.asked) == 24
    ask("quiz")
    assert oracle.asked == []


def test_a_file_does_not_pass_for_another_models(cache, tmp_path):
    other = AnswerCache(tmp_path / "cache", replace(MODEL, model="other"))
    cache.path("leaf").rename(other.path("leaf"))
    assert other.read("leaf") == {}


def test_the_first_answer_stays(cache, tmp_path):
    cache.save("leaf", {"written": Answer(text="other"), "new": Answer(text="new")})
    assert cache.read("leaf") == ANSWERS | {"new": Answer(text="new")}


def add_answers(folder: Path, begin: int) -> None:
    cache = AnswerCache(folder, MODEL)
    for number in range(begin, begin + 25):
        cache.save("leaf", {str(number): Answer(text=str(number))})
        assert str(number) in cache.read("leaf")


def test_two_processes_lose_nothing(tmp_path):
    folder, context = tmp_path / "shared", multiprocessing.get_context("spawn")
    workers = [context.Process(target=add_answers, args=(folder, begin)) for begin in (0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(AnswerCache(folder, MODEL).read("leaf")) == 50
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".parquet"]


def test_a_folder_that_cannot_be_written_costs_the_answers_alone(tmp_path):
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    cache = AnswerCache(tmp_path / "file", MODEL, warnings.append)
    cache.save("leaf", ANSWERS)
    cache.save("leaf", ANSWERS)
    assert cache.read("leaf") == {}
    assert len(warnings) == 1
    assert "cannot be kept" in warnings[0]


def test_garbage_collection_goes_by_the_last_use(tmp_path):
    store = Store(tmp_path)
    cache = AnswerCache(store.cache / "answers", MODEL)
    for leaf in ("old", "used", "new"):
        cache.save(leaf, ANSWERS)
    long_ago = time.time() - 8 * 24 * 3600
    for leaf in ("old", "used"):
        os.utime(cache.path(leaf), (long_ago, long_ago))
    os.utime(store.cache / "answers" / CACHE_LOCK, (long_ago, long_ago))
    garbage = find_garbage(store)
    assert {item.path for item in garbage} == {cache.path("old"), cache.path("used")}
    cache.read("used")  # between the look and the removal
    size = cache.path("old").stat().st_size
    assert collect(store, garbage) == size
    assert [bool(cache.read(leaf)) for leaf in ("old", "used", "new")] == [False, True, True]


# With a real model, through the stage


@pytest.fixture
def stage(make_context, tiny_model, tmp_path) -> Callable[..., Path]:
    """`stage(limit=3)` gives the folder of an evaluation's work."""

    def run(start: Callable[[Path], None] | None = None, cached: bool = True, **settings: object):
        defaults = {"tasks": ("quiz",), "task_folders": (str(tmp_path / "tasks"),)}
        config = EvaluateConfig(samples=Samples(count=0), **(defaults | settings))  # type: ignore[arg-type]
        context = make_context(config, {"model": ("model", tiny_model)})
        cache = str(tmp_path / "cache") if cached else None
        context.job = context.job.model_copy(update={"cache": cache})
        (context.stage_dir / "stage.json").write_text(context.job.model_dump_json())
        (start or (lambda folder: main(context)))(context.stage_dir)
        return context.stage_dir

    return run


def output(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "output").iterdir()}


def phases(folder: Path) -> list[str]:
    events = EventReader(folder / "events.jsonl").read()
    return [event.message for event in events if isinstance(event, Phase)]


@pytest.mark.parametrize("backend", ["hf", "shared_prefixes"])
def test_an_evaluation_is_the_same_with_and_without_known_answers(stage, tasks, backend):
    write_quiz(tasks, "quiz", 70)
    fresh = stage(backend=backend, cached=False)
    first = stage(backend=backend)
    again = stage(backend=backend)
    assert output(fresh) == output(first) == output(again)
    assert "loading the model" in phases(first)
    # Nothing to ask, so no minutes for loading weights either.
    assert "loading the model" not in phases(again)
    assert "140 of 140 answers were given before" in phases(again)


def test_an_evaluation_that_is_killed_goes_on_where_it_was(stage, tasks, tmp_path):
    write_quiz(tasks, "quiz", 200)

    def kill_in_the_middle(folder: Path) -> None:
        command = [sys.executable, "-m", "posttrain.stages.evaluate", str(folder)]
        program = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while program.poll() is None and not list((tmp_path / "cache").rglob("*.parquet")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        program.send_signal(signal.SIGKILL)
        assert program.wait() == -signal.SIGKILL, "it was done before it could be killed"

    stage(kill_in_the_middle)
    resumed = stage()
    [known] = [phase for phase in phases(resumed) if "given before" in phase]
    assert 128 <= int(known.split()[0]) < 400
    assert output(resumed) == output(stage(cached=False))
