from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from posttrain.data.rows import Document, Message
from posttrain.errors import DataError, UsageError
from posttrain.evaluate.items import Item, read_items, write_items
from posttrain.evaluate.results import Hacking
from posttrain.events import EventWriter
from posttrain.recipe import GrpoConfig
from posttrain.store.files import write_json
from posttrain.train.prompts import Prompt
from posttrain.train.rewards import Reward
from posttrain.train.watch import RewardWatch, Written

PROMPTS = [
    Prompt(
        Document(id=f"{n:016x}", file="p", row=n, text=f"q{n}"),
        (Message("user", f"What is <b>{n}</b>?"),),
        [1],
        None,
    )
    for n in range(20)
]


def words(_prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
    return np.array([len(answer.split()) for answer in answers], np.float64)


def variety(_prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
    return np.array([len(set(answer.split())) / len(answer.split()) for answer in answers])


REWARD = Reward({"words": words, "variety": variety}, {"words": 0.5, "variety": 2.0})
JUDGE = Reward({"variety": variety}, {"variety": 1.0})


def written(step: int, seed: int = 0) -> list[Written]:
    """Answers that grow longer and poorer with the steps."""
    rng = np.random.default_rng([step, seed])
    texts = [
        " ".join(f"w{word}" for word in rng.integers(60 // (step + 1), size=8 + 2 * step))
        for _ in PROMPTS
    ]
    return [
        Written(text, len(text.split()), ended=number % 4 > 0, kl=0.1 * step)
        for number, text in enumerate(texts)
    ]


Begin = Callable[..., RewardWatch]


@pytest.fixture
def begin(tmp_path) -> Begin:
    def begin(judge: Reward | None = JUDGE, **watch: object) -> RewardWatch:
        config = GrpoConfig(dataset="d", reward="words.py:words", watch=watch)
        return RewardWatch(PROMPTS, REWARD, judge, tmp_path / "checkpoints", config)

    return begin


@pytest.fixture
def output(tmp_path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


def test_a_look_returns_the_means_of_what_was_seen(begin):
    answers = written(3)
    values = begin().look(3, answers)
    texts = [answer.text for answer in answers]
    assert values["eval_reward/words"] == 14.0
    assert values["eval_reward/variety"] == pytest.approx(variety(PROMPTS, texts).mean())
    assert values["eval_reward"] == pytest.approx(7 + 2 * values["eval_reward/variety"])
    assert values["eval_judge"] == values["eval_reward/variety"]
    assert values["eval_kl"] == pytest.approx(0.3)
    assert values["eval_length"] == 14.0
    assert values["eval_ended"] == 0.75
    measured = {"repetition", "distinct_1", "distinct_2", "refusals", "hedges"}
    assert {f"eval_{name}" for name in measured} < set(values)


def test_without_a_judge_there_is_no_judge_among_the_means(begin):
    assert "eval_judge" not in begin(judge=None).look(0, written(0))


def test_an_answer_too_few_is_refused(begin):
    with pytest.raises(ValueError, match="19 answers to 20 held-out prompts"):
        begin().look(0, written(0)[1:])


def test_a_stage_leaves_its_answers_the_finding_and_a_page(begin, output):
    watch = begin()
    for step in (0, 2, 4, 6):
        watch.look(step, written(step))
    finding = watch.leave(output, best_step=4, title="GRPO on <chats>")
    assert finding.flagged
    assert finding.step == 4
    assert Hacking.load(output) == finding
    table = pq.read_table(output / "answers.parquet").to_pylist()
    assert [row["step"] for row in table] == [0] * 20 + [4] * 20 + [6] * 20
    assert table[20]["answer"] == written(4)[0].text
    assert table[20]["id"] == PROMPTS[0].row.id
    assert table[20]["reward"] == 0.5 * 16 + 2 * table[20]["judge"]
    assert (table[20]["ended"], table[21]["ended"], table[20]["tokens"]) == (False, True, 16)
    assert sorted(path.name for path in output.iterdir()) == [
        "answers.parquet",
        "watch.html",
        "watch.json",
    ]


def test_the_page_says_the_finding_and_shows_texts_as_texts(begin, output):
    watch = begin()
    for step in (0, 4):
        watch.look(step, written(step))
    finding = watch.leave(output, 4, "GRPO on <chats>")
    page = (output / "watch.html").read_text()
    assert "GRPO on &lt;chats&gt;" in page
    assert "What is &lt;b&gt;" in page
    assert "<b>flagged</b>" in page
    for warning in finding.warnings:
        assert warning.replace(">", "&gt;") in page
    assert "http" not in page
    assert "<script" not in page


def test_a_watch_without_a_signal_says_so_on_its_page(begin, output):
    watch = begin(judge=None)
    for step in (0, 4):
        watch.look(step, written(step))
    assert not watch.leave(output, 4, "title").audited
    assert "<b>not audited</b>" in (output / "watch.html").read_text()


def test_a_run_that_was_killed_leaves_the_same_bytes(begin, output, tmp_path):
    watch = begin()
    for step in (0, 2, 4):
        watch.look(step, written(step))
    watch.leave(output, 2, "title")
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    # From the checkpoint at step 2: what came after it is seen once more.
    resumed = begin()
    resumed.look(2, written(2))
    resumed.look(4, written(4))
    resumed.leave(output, 2, "title")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_a_look_that_differs_takes_the_place_of_the_one_before(begin, output):
    watch = begin()
    watch.look(0, written(0))
    watch.look(4, written(4))
    watch.look(4, written(4, seed=1))
    watch.leave(output, 4, "title")
    table = pq.read_table(output / "answers.parquet").to_pylist()
    assert [row["answer"] for row in table[20:]] == [w.text for w in written(4, seed=1)]


def test_the_kept_step_must_have_been_seen(begin, output):
    watch = begin()
    watch.look(0, written(0))
    with pytest.raises(DataError, match="no answers at step 7"):
        watch.leave(output, 7, "title")


def test_benchmarks_asked_at_one_moment_only_are_told(begin, output, tmp_path):
    watch = begin(tasks=("quiz",))
    watch.look(0, written(0))
    watch.look(4, written(4))
    with pytest.raises(DataError, match="were not asked before training"):
        watch.leave(output, 4, "title")


def test_items_before_and_after_are_a_signal(begin, output, tmp_path):
    for moment, right in (("before", 90), ("after", 60)):
        folder = tmp_path / "checkpoints" / f"benchmarks-{moment}"
        folder.mkdir(parents=True)
        items = [
            Item("quiz", "quiz", n, str(n), "acc", float(n < right), {}, ()) for n in range(100)
        ]
        write_items(folder, items)
        write_json(folder / "higher_is_better.json", {"quiz": True})
    watch = begin(judge=None, tasks=("quiz",))
    watch.look(0, written(0))
    watch.look(4, written(4))
    finding = watch.leave(output, 4, "title")
    assert finding.flagged
    assert [(one.name, one.before, one.after) for one in finding.signals] == [("quiz", 0.9, 0.6)]


def test_a_reward_function_that_fails_fails_the_look(begin, tmp_path):
    def broken(_prompts: Sequence[Prompt], _answers: Sequence[str]) -> np.ndarray:
        raise UsageError("the reward function f.py:f failed")

    config = GrpoConfig(dataset="d", reward="f.py:f")
    watch = RewardWatch(PROMPTS, Reward({"f": broken}, {"f": 1.0}), None, tmp_path / "c", config)
    with pytest.raises(UsageError):
        watch.look(0, written(0))
    assert not (tmp_path / "c").exists()


@pytest.fixture
def loaded(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return model.train(), AutoTokenizer.from_pretrained(tiny_model)


def test_benchmarks_are_asked_once_a_moment_and_change_no_random_number(
    begin, loaded, real_data, tmp_path, output
):
    import torch

    model, tokenizer = loaded
    events = EventWriter(tmp_path / "events.jsonl")
    watch = begin(judge=None, tasks=("hellaswag",), limit=12, offline_root=str(real_data / "hub"))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    watch.ask("before", model, tokenizer, events)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert model.training
    folder = tmp_path / "checkpoints" / "benchmarks-before"
    items = read_items(folder)
    assert len(items) == 12
    # A resumed run has other weights by now, and must not ask them for what was before.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    watch.ask("before", model, tokenizer, events)
    assert read_items(folder) == items
    watch.ask("after", model, tokenizer, events)
    watch.look(0, written(0))
    watch.look(4, written(4))
    [signal] = watch.leave(output, 4, "title").signals
    assert (signal.name, signal.n) == ("hellaswag", 12)
    assert signal.before == pytest.approx(sum(item.value for item in items) / 12)


def test_nothing_is_asked_without_tasks(begin, tmp_path):
    begin().ask("before", None, None, None)
    assert not (tmp_path / "checkpoints").exists()
