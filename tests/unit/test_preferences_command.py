"""`posttrain data preferences` as a user calls it, on tiny models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from posttrain.commands import preferences
from posttrain.data.formats import read_rows
from posttrain.data.rows import Message, Preference
from posttrain.errors import DataError, ModelError, PosttrainError, RecipeError, UsageError
from posttrain.hardware import resolve_dtype
from posttrain.preferences.key import read_key
from posttrain.recipe.adapters import LoraConfig
from posttrain.recipe.datasets import DatasetSpec
from posttrain.stages.program import StageInput
from posttrain.train.reward_head import load_body, start_head
from posttrain.train.reward_model import RewardRecord, load_reward_model
from tests.unit.preferences.sheets_made import bad, fill
from tests.unit.test_generate_command import Home

JUDGE = """
import os, signal

def length(answers):
    return [len(answer) for answer in answers]

def like_the_reference(prompts, answers, references):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [len(set(answer) & set(reference)) for answer, reference in zip(answers, references)]

def fatal(answers):
    os.kill(os.getpid(), signal.SIGKILL)

def needs_more(answers, colour):
    return [0 for _ in answers]

def broken(answers):
    return [1 / 0 for _ in answers]
"""


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("home")
    home = Home(root, tiny_model)
    home.train("sft", LoraConfig(rank=4), root / "lora", seed=1)
    home.put("reward", "reward", reward_model(tiny_model, root / "reward"), name="taste")
    return home


def reward_model(base: Path, folder: Path) -> Path:
    """What a `reward` stage leaves, untrained."""
    model = load_body(StageInput(kind="model", path=str(base), digest=""), "float32")
    start_head(model, seed=0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    RewardRecord(max_length=256, mean=0.5, std=1.0, pairs=1).write(folder)
    return folder


@pytest.fixture(autouse=True)
def _at_home(made: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("POSTTRAIN_HOME", str(made.store.root.parent))
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(JUDGE)
    rows = [{"instruction": f"What is {n}?", "output": f"It is {n}."} for n in range(12)]
    Path("rows.json").write_text(json.dumps(rows))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(*arguments: str) -> str:
    result = CliRunner().invoke(preferences.app, arguments)
    if isinstance(result.exception, PosttrainError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def sample(*arguments: str, model: str = "convert", out: str = "pairs.jsonl") -> str:
    given = {"--prompts": "rows.json", "--reward": "judge.py:length"}
    given |= {"--max-new-tokens": "6", "--batch-size": "6", "--out": out}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=False))
    flags = ["--overwrite"] if arguments[-1:] == ("--overwrite",) else []
    options = [part for item in given.items() if item[0] != "--overwrite" for part in item]
    return call("sample", model, *options, *flags)


def lines(path: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_pairs_are_sampled_rated_by_people_and_open_in_a_recipe(made: Home) -> None:
    said = sample("--seed", "3", "--pairs", "adjacent")
    assert "12  prompts" in said
    assert "48  answers" in said
    pairs = lines("pairs.jsonl")
    assert len(pairs) > 20
    for pair in pairs:
        chosen, rejected = pair["scores"]  # type: ignore[misc]
        assert chosen == len(pair["chosen"][0]["content"])  # type: ignore[index]
        assert pair["margin"] == chosen - rejected > 0
        assert pair["reward"].startswith("judge.py:length@")  # type: ignore[attr-defined]
        assert pair["model"] == f"convert@{made.model.digest[:12]}"
        assert pair["seed"] == 3
    rows = list(read_rows(DatasetSpec(source="pairs.jsonl")))
    assert [type(row) for row in rows] == [Preference] * len(pairs)
    assert [row.margin for row in rows] == [pair["margin"] for pair in pairs]  # type: ignore[union-attr]

    call("sheet", "pairs.jsonl", "--out", "sheets", "--format", "csv", "--limit", "20")
    key = read_key(Path("sheets"))
    assert {item.proposed_by for item in key.items.values()} == {pairs[0]["reward"]}

    def shorter(item: object) -> str:
        first, second = item.texts  # type: ignore[attr-defined]
        return "first" if len(first) < len(second) else "second"

    for rater in key.orders:
        fill(Path("sheets"), key, rater, shorter, Path(f"{rater}.csv"))
    said = call("read", "sheets", "rater-1.csv", "rater-2.csv", "--out", "rated.jsonl")
    assert "20 items -> 20 pairs" in said
    assert "0% (0% to 16%) of 20 pairs; 20 turned round" in said
    rated = list(read_rows(DatasetSpec(source="rated.jsonl")))
    for row in rated:
        assert isinstance(row, Preference)
        assert len(row.chosen[0].content) < len(row.rejected[0].content)
        assert row.margin is None


def test_the_summary_is_one_object_on_request() -> None:
    result = CliRunner().invoke(
        preferences.app,
        ["sample", "convert", "--prompts", "rows.json", "--limit", "2", "--max-new-tokens", "4",
         "--reward", "judge.py:length", "--out", "pairs.jsonl", "--json"],
    )  # fmt: skip
    found = json.loads(result.stdout)
    record = json.loads(Path("pairs.jsonl.json").read_text())
    assert found == {"out": "pairs.jsonl", **record}
    assert found["report"]["counts"]["prompts"] == 2


def test_equal_runs_write_equal_bytes_and_another_seed_others() -> None:
    for out, seed in (("one/pairs.jsonl", "1"), ("two/pairs.jsonl", "1"), ("pairs.jsonl", "2")):
        sample("--limit", "4", "--seed", seed, out=out)
    names = ("pairs.jsonl", "pairs.jsonl.json", "pairs.answers.jsonl")
    for name in names:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
        assert Path("one", name).read_bytes() != Path(name).read_bytes()
    record = json.loads(Path("one/pairs.jsonl.json").read_text())
    assert record["sampling"]["seed"] == 1
    assert str(Path.cwd()) not in json.dumps(record)


def test_a_killed_run_keeps_its_answers_and_goes_on() -> None:
    command = [sys.executable, "-m", "posttrain", "data", "preferences", "sample", "convert"]
    command += ["--prompts", "rows.json", "--max-new-tokens", "6", "--batch-size", "6"]
    killed = subprocess.run(
        [*command, "--reward", "judge.py:fatal", "--out", "pairs.jsonl"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path("pairs.jsonl").exists()
    assert "answers: 48 of 48" in sample().splitlines()[0]
    sample(out="whole.jsonl")
    assert Path("pairs.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_a_run_that_was_killed_while_it_sampled_draws_what_it_would_have_drawn() -> None:
    sample(out="whole.jsonl")
    whole = Path("whole.answers.jsonl").read_bytes()
    kept = whole.splitlines(keepends=True)[:7]
    kept[-1] = kept[-1][:50]  # torn
    Path(".pairs.answers.jsonl.partial").write_bytes(b"".join(kept))
    assert "answers: 24 of 48" in sample().splitlines()[0]
    assert Path("pairs.answers.jsonl").read_bytes() == whole
    assert Path("pairs.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not Path(".pairs.answers.jsonl.partial").exists()


def test_a_prompt_that_is_asked_twice_is_answered_anew() -> None:
    Path("prompts.txt").write_text("Why?\n" * 6)  # three prompts are asked at once
    sample("--prompts", "prompts.txt")
    answers = [str(line["answers"]) for line in lines("pairs.answers.jsonl")]
    assert len(set(answers)) == 6


def test_answers_are_used_again_for_other_pairs_and_never_lost_unasked() -> None:
    sample("--limit", "3")
    with pytest.raises(UsageError, match=r"pairs\.jsonl: is there already; add --overwrite"):
        sample("--limit", "3")
    answers = Path("pairs.answers.jsonl").read_bytes()
    said = sample("--limit", "3", "--pairs", "all", "--overwrite")
    assert "answers: 12 of 12" in said.splitlines()[0]
    assert Path("pairs.answers.jsonl").read_bytes() == answers
    Path("pairs.jsonl").unlink()
    with pytest.raises(UsageError, match="answers to 3 prompts that were sampled with other"):
        sample("--limit", "3", "--seed", "9")
    sample("--limit", "3", "--seed", "9", "--overwrite")
    assert Path("pairs.answers.jsonl").read_bytes() != answers


def test_a_reward_model_scores_by_name_and_as_a_folder(made: Home) -> None:
    stored = next((made.store.root / "reward").iterdir())
    for out, reward in (("name.jsonl", "taste"), ("folder.jsonl", str(stored))):
        sample("--limit", "4", "--reward", reward, out=out)
    model = load_reward_model(
        StageInput(kind="reward", path=str(stored), digest=""), resolve_dtype("auto")
    )
    for pair in lines("name.jsonl"):
        prompt = tuple(Message(**turn) for turn in pair["prompt"])  # type: ignore[attr-defined]
        chats = [
            (*prompt, Message("assistant", pair[side][0]["content"]))  # type: ignore[index]
            for side in ("chosen", "rejected")
        ]
        assert pair["scores"] == pytest.approx(model.scores(chats).tolist(), abs=1e-4)
    scores = [[pair["scores"] for pair in lines(name)] for name in ("name.jsonl", "folder.jsonl")]
    assert scores[0] == scores[1] != []


def test_an_adapter_answers_by_its_name_alone_or_put_on_its_base() -> None:
    sample("--limit", "3", model="sft", out="alone.jsonl")
    sample("--limit", "3", "--adapter", "sft", out="put.jsonl")
    sample("--limit", "3", out="base.jsonl")
    texts = {
        name: [line["answers"] for line in lines(f"{name}.answers.jsonl")]
        for name in ("alone", "put", "base")
    }
    assert texts["alone"] == texts["put"] != texts["base"]
    assert str(lines("alone.answers.jsonl")[0]["model"]).startswith("tiny/sft@")


def test_a_judge_sees_the_rows_references_and_every_kind_of_prompts_is_read() -> None:
    sample("--reward", "judge.py:like_the_reference", out="references.jsonl")
    Path("prompts.txt").write_text("Why?\n\nWho?\n")
    prompts = [{"prompt": "When?"}, {"messages": [{"role": "user", "content": "Where?"}]}]
    Path("prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    call(
        "sample", "convert", "--prompts", "prompts.txt", "--prompts", "prompts.jsonl",
        "--prompts", "references.jsonl", "--limit", "5", "--max-new-tokens", "4",
        "--reward", "judge.py:length", "--out", "several.jsonl",
    )  # fmt: skip
    asked = [line["prompt"][-1]["content"] for line in lines("several.answers.jsonl")]  # type: ignore[index]
    assert asked[:4] == ["Why?", "Who?", "When?", "Where?"]
    assert asked[4].startswith("What is ")


def test_prompts_that_are_too_long_are_left_out_and_counted() -> None:
    Path("prompts.txt").write_text("Short?\n" + "long " * 300 + "\n")
    said = sample("--prompts", "prompts.txt", "--max-prompt-tokens", "100")
    assert "1  prompts left out: none in the row, or too long" in said
    with pytest.raises(DataError, match="none of the 2 prompts has 3 tokens or fewer"):
        sample("--prompts", "prompts.txt", "--max-prompt-tokens", "3", out="other.jsonl")
    with pytest.raises(UsageError, match="and the model reads 512; lower --max-prompt-tokens"):
        sample("--prompts", "prompts.txt", "--max-new-tokens", "500", out="other.jsonl")


@pytest.mark.parametrize(
    ("reward", "error", "said"),
    [
        ("judge.py:none", RecipeError, "defines no function `none`"),
        ("other.py:length", UsageError, r"there is no file other\.py"),
        ("judge.py:needs_more", RecipeError, "has a parameter `colour` that nothing fills"),
        ("judge.py:broken", UsageError, "failed in line 18: ZeroDivisionError"),
        ("nothing", UsageError, r"or FILE\.py:NAME, a function that scores"),
        ("convert", UsageError, "tiny/convert is a model, and scores nothing"),
        (".", UsageError, "this is not what a `reward` stage leaves"),
    ],
)
def test_a_reward_that_cannot_score_is_refused(
    reward: str, error: type[PosttrainError], said: str
) -> None:
    with pytest.raises(error, match=said):
        sample("--limit", "2", "--reward", reward)
    assert not Path("pairs.jsonl").exists()
    if reward != "judge.py:broken":
        assert not Path("pairs.answers.jsonl").exists(), "found before anything was sampled"


def test_models_and_prompts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        sample(model="nowhere")
    with pytest.raises((UsageError, DataError), match=r"none\.jsonl"):
        sample("--prompts", "none.jsonl")
    with pytest.raises(UsageError, match="is a reward, and holds no prompts"):
        sample("--prompts", "taste")
    with pytest.raises(UsageError, match=r"write a name that ends with \.jsonl"):
        sample(out="pairs.csv")
    (tmp_path / "adapter").mkdir()
    shutil.copy("rows.json", tmp_path / "adapter" / "rows.json")
    with pytest.raises((UsageError, ModelError)):
        sample("--adapter", str(tmp_path / "adapter"))


def test_sheets_are_never_written_over(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Why?", "chosen": "good", "rejected": "bad"}\n')
    said = call("sheet", str(rows), "--out", "sheets")
    assert "1 items, 0 of them for every rater" in said
    assert "hand it to no rater" in said
    with pytest.raises(UsageError, match="is not empty; name a new folder"):
        call("sheet", str(rows), "--out", "sheets")


def test_what_was_read_is_one_object_on_request(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Why?", "chosen": "good", "rejected": "bad"}\n' * 3)
    made = json.loads(
        call("sheet", str(rows), "--out", "sheets", "--format", "csv", "--raters", "1", "--json")
    )
    assert (made["items"], made["given"]) == (3, {"rater-1": 3})
    filled = fill(Path("sheets"), read_key(Path("sheets")), "rater-1", bad, Path("filled.csv"))
    read = json.loads(call("read", "sheets", str(filled), "--out", "rated.jsonl", "--json"))
    assert read["counts"]["pairs"] == 3
    assert read["pairs_turned"] == 3
    record = json.loads(Path("rated.jsonl.json").read_text())
    assert {**record, "out": "rated.jsonl"} == read
    with pytest.raises(UsageError, match="is there already"):
        call("read", "sheets", str(filled), "--out", "rated.jsonl")


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'pydantic', 'numpy'}"
    script = f"import sys, posttrain.commands.data; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
