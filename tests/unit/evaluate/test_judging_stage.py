"""The stage `judge`, from two small models and held-out rows to a comparison."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from posttrain.data.prepared import PreparedDataset, write_dataset
from posttrain.data.rows import Chat, Document, Message
from posttrain.errors import DataError, ModelError, UsageError
from posttrain.evaluate.greedy import write_greedily
from posttrain.evaluate.judging.answers import Answering, answer, draw_prompts, sampled
from posttrain.evaluate.judging.pairs import Pair, Written
from posttrain.evaluate.judging.prompting import BEGUN, LETTER_ALONE, judging_prompt
from posttrain.evaluate.results import WinRate
from posttrain.events import EventReader, Warn
from posttrain.preferences.key import Key, read_key
from posttrain.recipe.judge import JudgeConfig
from posttrain.stages.judge import main
from posttrain.stages.program import StageContext, StageInput, StageJob, StageResult
from posttrain.store.files import write_json
from tests.unit.evaluate.test_judging_endpoint import KEY, Served, completion, server

__all__ = ["server"]

Run = Callable[..., tuple[StageContext[JudgeConfig], StageResult]]

SMALL = {"prompts": 8, "max_new_tokens": 6, "batch_size": 3, "dtype": "float32", "model": "sft"}
SHORT = "Which is better?"
"""Instructions that leave room in the window of a tiny model."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkative(tiny_model, tmp_path_factory.mktemp("one-llama"), 1)


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkative(tiny_model, tmp_path_factory.mktemp("other-llama"), 2)


def talkative(tiny_model: Path, folder: Path, seed: int) -> Path:
    """A random model that does not repeat the last word, as one with tied embeddings does."""
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    config.initializer_range = 0.3
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        Chat(
            id=f"id{n}",
            file="f",
            row=n,
            messages=(
                Message("system", "Be brief."),
                Message("user", f"What is {n} and {n * n}?" + " Think." * (n % 4)),
                Message("assistant", f"Number {n}."),
            ),
        )
        for n in range(14)
    ]
    folder = tmp_path_factory.mktemp("chats")
    write_dataset(folder, "chats", {"train": rows[:2], "validation": rows[2:]})
    return folder


def source(path: Path, kind: str = "model") -> StageInput:
    return StageInput(kind=kind, path=str(path), digest=path.name)


@pytest.fixture
def run(tmp_path: Path, one_model: Path, other_model: Path, chats: Path) -> Run:
    """Run the stage in a fresh folder; all runs of a test share one cache."""

    def run(
        by: object, swapped: bool = False, cached: bool = True, **more: Any
    ) -> tuple[StageContext[JudgeConfig], StageResult]:
        models = [source(one_model), source(other_model)]
        one, other = reversed(models) if swapped else models
        inputs = {"model": one, "opponent": other, "dataset": source(chats, "dataset")}
        inputs |= more.pop("inputs", {})
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        (folder / "output").mkdir(parents=True)
        config = JudgeConfig.model_validate({**SMALL, **more, "by": by})
        job = StageJob(
            stage="judge",
            name="judge",
            config=config.model_dump(mode="json"),
            inputs=inputs,
            cache=str(tmp_path / "cache") if cached else None,
        )
        write_json(folder / "stage.json", job.model_dump())
        context: StageContext[JudgeConfig] = StageContext(folder, JudgeConfig)
        return context, main(context)

    return run


def fill(
    folder: Path, key: Key, rater: str, out: Path, likes: str = "first", rows: int = 99
) -> StageInput:
    """Fill in a rater's table with the candidate's answers, or the opponent's."""
    with (folder / "sheets" / f"{rater}.csv").open(encoding="utf-8-sig", newline="") as file:
        header, *table = list(csv.reader(file))
    for row in table[:rows]:
        order = key.orders[rater][row[header.index("item")]]
        row[header.index("choice")] = "A" if (order == "AB") == (likes == "first") else "B"
    with out.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *table])
    return StageInput(kind="source", path=str(out), digest=out.name)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_people_get_sheets_and_their_ratings_are_counted_without_the_models(
    run: Run, tmp_path: Path, one_model: Path
) -> None:
    first, result = run("people")
    assert result.headline == "no ratings yet: 8 prompts wait on 2 sheets in sheets/"
    assert WinRate.load(first.output).win_rate is None
    assert set(bytes_of(first.output)) == {
        "answers.parquet",
        "comparison.json",
        "key.json",
        "sheets/HOW-TO-RATE.txt",
        "sheets/rater-1.csv",
        "sheets/rater-1.html",
        "sheets/rater-2.csv",
        "sheets/rater-2.html",
    }
    key = read_key(first.output)
    one = fill(first.output, key, "rater-1", tmp_path / "one.csv")
    other = fill(first.output, key, "rater-2", tmp_path / "other.csv")
    no_weights = tmp_path / "no-weights"
    shutil.copytree(one_model, no_weights)
    (no_weights / "model.safetensors").unlink()
    model = source(one_model).model_copy(update={"path": str(no_weights)})
    rated, result = run("people", inputs={"model": model, "ratings:0": one, "ratings:1": other})
    found = WinRate.load(rated.output)
    assert (found.candidate, found.opponent, found.judge) == ("sft", "base", "people (2)")
    assert found.scores == (1.0,) * 8
    assert found.low is not None
    assert 0.5 < found.low < 0.9
    assert result.metrics["win_rate"] == 1.0
    assert result.headline.startswith("win rate 100.0% (")
    assert read_key(rated.output) == key


def test_raters_who_disagree_meet_in_the_middle(run: Run, tmp_path: Path) -> None:
    first, _ = run("people")
    key = read_key(first.output)
    filled = {
        "ratings:0": fill(first.output, key, "rater-1", tmp_path / "one.csv"),
        "ratings:1": fill(first.output, key, "rater-2", tmp_path / "two.csv", likes="second"),
    }
    rated, _ = run("people", inputs=filled)
    found = WinRate.load(rated.output)
    assert found.win_rate == 0.5
    assert any("have only 8 prompts in common" in warning for warning in found.warnings)


def test_a_sheet_that_is_half_filled_counts_for_what_it_holds(run: Run, tmp_path: Path) -> None:
    first, _ = run("people")
    key = read_key(first.output)
    filled = fill(first.output, key, "rater-1", tmp_path / "one.csv", rows=3)
    rated, _ = run("people", inputs={"ratings:0": filled})
    found = WinRate.load(rated.output)
    assert found.scores == (1.0,) * 3
    assert found.judge == "people (1)"
    assert "5 of 8 prompts have no verdict and are left out" in found.warnings


def test_sheets_of_other_answers_are_refused(run: Run, tmp_path: Path) -> None:
    first, _ = run("people")
    filled = fill(first.output, read_key(first.output), "rater-1", tmp_path / "one.csv")
    with pytest.raises(DataError, match="is of the sheets"):
        run("people", max_new_tokens=5, inputs={"ratings:0": filled})


def test_sheets_do_not_say_whose_answers_they_show(run: Run) -> None:
    context, _ = run("people")
    names = ("sft", "candidate", "opponent", "one-llama", "other-llama", '"first"', "AB", "BA")
    for path in (context.output / "sheets").iterdir():
        text = path.read_text("utf-8-sig").replace("AB", "AB", 1)
        data = text.partition("const SHEET = ")[2].partition("\n")[0] or text
        assert not [name for name in names if name in data], path.name
    key = read_key(context.output)
    for orders in key.orders.values():
        assert sorted(orders.values()) == ["AB"] * 4 + ["BA"] * 4
    assert "the candidate's" in json.loads((context.output / "key.json").read_text())["note"]


@pytest.mark.parametrize("by", ["people", {"model": {"model": "m", "instructions": SHORT}}])
def test_the_same_inputs_give_the_same_bytes(run: Run, by: object, other_model: Path) -> None:
    inputs = {} if by == "people" else {"judge": source(other_model)}
    first, _ = run(by, cached=False, inputs=inputs)
    second, _ = run(by, inputs=inputs)
    assert bytes_of(first.output) == bytes_of(second.output)


def test_a_local_judge_does_not_know_whose_answers_it_reads(run: Run, other_model: Path) -> None:
    """Candidate and opponent exchanged, every verdict is the other one."""
    by = {"model": {"model": "org/judge", "instructions": SHORT}}
    inputs = {"judge": source(other_model)}
    one, result = run(by, inputs=inputs)
    other, _ = run(by, swapped=True, inputs=inputs)
    scores = WinRate.load(one.output).scores
    assert len(scores) == 8
    assert WinRate.load(other.output).scores == tuple(1 - score for score in scores)
    votes = pq.read_table(one.output / "answers.parquet").column("votes").to_pylist()
    assert all([vote["first"] for vote in of] == ["candidate", "opponent"] for of in votes)
    assert "of 8 prompts by model org/judge" in result.headline
    warnings = [
        e.message for e in EventReader(one.stage_dir / "events.jsonl").read() if isinstance(e, Warn)
    ]
    assert any("8 prompts were compared: at least 50" in text for text in warnings)
    assert any("the judge is one of the two models" in text for text in warnings)


def test_a_local_judges_verdict_is_the_likelier_letter(run: Run, other_model: Path) -> None:
    by = {"model": {"model": "m", "instructions": SHORT}}
    context, _ = run(by, inputs={"judge": source(other_model)})
    rows = pq.read_table(context.output / "answers.parquet").to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(other_model)
    model = AutoModelForCausalLM.from_pretrained(other_model).eval()
    a, b = (tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in "AB")
    for row in rows:
        pair = Pair(
            row["id"],
            row["source"],
            tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"]),
            Written(row["candidate"], 0, True),
            Written(row["opponent"], 0, True),
        )
        for vote in row["votes"]:
            text = judging_prompt(pair, vote["first"], SHORT, LETTER_ALONE)
            text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{BEGUN}"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            found = [_log_likelihood(model, ids, letter) for letter in (a, b)]
            odds = (found[0] - found[1]) * (1 if vote["first"] == "candidate" else -1)
            assert vote["margin"] == pytest.approx(odds, abs=1e-3)
            assert vote["preferred"] == ("candidate" if vote["margin"] > 0 else "opponent")


def _log_likelihood(model: Any, prompt: list[int], letter: list[int]) -> float:
    """Of all tokens of the letter: a blank may be one of its own, the same for both."""
    ids = torch.tensor([prompt + letter])
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)
    return sum(float(log_probs[0, len(prompt) + n - 1, token]) for n, token in enumerate(letter))


def test_a_judge_that_cannot_read_so_much_says_so(run: Run, other_model: Path) -> None:
    with pytest.raises(ModelError, match="512 tokens"):
        run({"model": "m"}, inputs={"judge": source(other_model)})


def make_reward_model(base: Path, folder: Path) -> Path:
    from posttrain.train.reward_head import choose_padding, load_body, start_head
    from posttrain.train.reward_model import RewardRecord

    model = load_body(source(base), "float32")
    start_head(model, 0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    choose_padding(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    RewardRecord(max_length=128, mean=0.25, std=1.0, pairs=1).write(folder)
    return folder


def test_a_reward_model_prefers_the_higher_score(run: Run, tmp_path: Path, one_model: Path) -> None:
    reward = make_reward_model(one_model, tmp_path / "reward")
    inputs = {"judge": source(reward, "reward")}
    one, result = run({"reward": "rm"}, inputs=inputs)
    other, _ = run({"reward": "rm"}, swapped=True, inputs=inputs)
    found = WinRate.load(one.output)
    assert found.judge == "reward rm"
    assert found.first_preferred is None
    assert found.consistent is None
    assert "first answer" not in result.headline
    rows = pq.read_table(one.output / "answers.parquet").to_pylist()
    margins = [row["votes"][0]["margin"] for row in rows]
    assert found.scores == tuple(float(margin > 0) for margin in margins)
    assert WinRate.load(other.output).scores == tuple(1 - score for score in found.scores)
    least = sorted(abs(margin) for margin in margins)[3]
    by = {"reward": {"reward": "rm", "margin": least}}
    wide, _ = run(by, inputs=inputs)
    assert WinRate.load(wide.output).scores.count(0.5) == 4


def test_a_killed_run_goes_on_and_gives_the_same_answers(
    tmp_path: Path, one_model: Path, chats: Path
) -> None:
    answering = Answering(64, 6, "float32", 3)
    model = source(one_model)
    rows = draw_prompts(PreparedDataset.open(chats).unseen(), [model], answering, 8, 0)
    whole = answer(model, rows, answering, tmp_path / "whole", lambda done, total: None)

    def killed(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(model, rows, answering, tmp_path / "killed", killed)
    told: list[int] = []
    again = answer(model, rows, answering, tmp_path / "killed", lambda done, _: told.append(done))
    assert again == whole
    assert told == [3, 6, 8], "a finished batch is not written again"
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_answers_are_the_models_likeliest_words_whatever_its_own_settings(
    one_model: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(one_model)
    model = AutoModelForCausalLM.from_pretrained(one_model).eval()
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    prompts = [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("One", "Two and three and four", "Five six")
    ]
    found = [sampled(one) for one in write_greedily(model, tokenizer, prompts, 5, len(prompts))]
    assert model.generation_config.repetition_penalty == 5.0
    for prompt, one in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert one.text == text.strip()
        assert one.tokens == len(ids) - len(prompt)


def test_prompts_are_drawn_by_seed_each_once_and_none_too_long(
    one_model: Path, chats: Path
) -> None:
    rows = PreparedDataset.open(chats).unseen()
    models = [source(one_model)]
    answering = Answering(64, 6, "float32", 3)

    def drawn(rows: list[Any], seed: int, count: int = 100) -> list[str]:
        return [row.id for row in draw_prompts(rows, models, answering, count, seed)]

    everything = drawn(rows, 0)
    assert sorted(everything) == sorted(row.id for row in rows)
    assert drawn(rows, 0, 5) == everything[:5]
    assert drawn(rows, 1) != everything
    assert drawn([*rows, *rows], 0) == everything
    assert drawn(rows[3:], 0) == [one for one in everything if one in {r.id for r in rows[3:]}]
    short = draw_prompts(rows, models, Answering(42, 6, "float32", 3), 100, 0)
    assert 0 < len(short) < len(rows)
    with pytest.raises(DataError, match="max_prompt_tokens"):
        draw_prompts(rows, models, Answering(64, 512, "float32", 3), 8, 0)


def test_documents_hold_no_prompts(run: Run, tmp_path: Path) -> None:
    rows = [Document(id=f"{n}", file="f", row=n, text=f"Text {n}.") for n in range(4)]
    write_dataset(tmp_path / "documents", "documents", {"validation": rows})
    with pytest.raises(DataError, match="documents hold no prompts"):
        run("people", inputs={"dataset": source(tmp_path / "documents", "dataset")})


def test_too_few_prompts_are_reported(run: Run) -> None:
    context, _ = run("people", prompts=60)
    assert pq.read_table(context.output / "answers.parquet").num_rows == 12
    first, _ = run(
        {"model": {"model": "m", "instructions": SHORT}},
        prompts=60,
        inputs={"judge": context.input("opponent")},
    )
    assert any("only 12 held-out prompts" in w for w in WinRate.load(first.output).warnings)


def test_a_model_beside_itself_is_all_ties_and_nobody_is_asked(run: Run, one_model: Path) -> None:
    context, result = run("people", inputs={"opponent": source(one_model)})
    found = WinRate.load(context.output)
    assert found.scores == (0.5,) * 8
    assert "100% ties" in result.headline
    assert read_key(context.output).items == {}


def test_a_missing_key_costs_no_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    by = {"endpoint": {"url": "http://127.0.0.1:9", "model": "m", "api_key_env": "NO_SUCH_KEY"}}
    with pytest.raises(UsageError, match="NO_SUCH_KEY"):
        run(by, inputs={"model": source(Path("/nowhere"))})


def test_an_endpoint_judges_and_its_key_is_in_no_file(
    run: Run, tmp_path: Path, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.answer = lambda body, number: completion(f"{KEY} says [[{'AB'[number % 3 == 0]}]]")
    by = {"endpoint": {"url": server.url, "model": "judge-1", "api_key_env": "JUDGE_KEY"}}
    context, result = run(by)
    assert len(server.bodies) == 16
    assert server.keys == [f"Bearer {KEY}"] * 16
    assert "of 8 prompts by endpoint judge-1" in result.headline
    again, _ = run(by)
    assert len(server.bodies) == 16
    assert bytes_of(again.output) == bytes_of(context.output)
    votes = pq.read_table(again.output / "answers.parquet").column("votes").to_pylist()
    assert votes[0][0]["reply"].startswith("*** says [[")
    files = bytes_of(tmp_path)
    assert any("cache/judging/votes" in name for name in files)
    assert not [name for name, content in files.items() if KEY.encode() in content]
