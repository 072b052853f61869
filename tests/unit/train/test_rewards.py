from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.rows import Chat, Message
from posttrain.errors import RecipeError, UsageError
from posttrain.recipe.grpo import GrpoConfig
from posttrain.recipe.online import RewardTerm
from posttrain.stages.program import StageContext, StageInput
from posttrain.train.prompts import Prompt
from posttrain.train.rewards import Reward, call_function, load_function, load_reward
from tests.unit.train.programs import make_stage_dir


def make_prompts(count: int) -> list[Prompt]:
    prompts = []
    for n in range(count):
        messages = (Message("system", "Be kind."), Message("user", f"What is {n}?"))
        row = Chat(id=f"{n:016}", file="a.jsonl", row=n + 1, messages=messages)
        prompts.append(Prompt(row, messages, [1, 2, 3], f"It is {n}." if n else None))
    return prompts


def call(tmp_path: Path, code: str, answers: list[str], **arguments: Any) -> np.ndarray:
    """The scores of the function `score` in a file of that code."""
    (tmp_path / "rewards.py").write_text(code)
    reference = f"{tmp_path}/rewards.py:score"
    term = RewardTerm(function=reference, arguments=arguments)
    return call_function(load_function(reference), term, make_prompts(len(answers)), answers)


def reward_of(tmp_path: Path, code: str, *terms: dict[str, Any]) -> Reward:
    """The reward that a stage with these terms has, all of them functions of one file."""
    (tmp_path / "rewards.py").write_text(code)
    config: dict[str, object] = {"dataset": "chats", "reward": list(terms)}
    parsed = GrpoConfig.model_validate({"stage": "grpo", **config})
    source = StageInput(kind="source", path=str(tmp_path / "rewards.py"), digest="")
    inputs = {f"reward:{term.name}": source for term in parsed.reward}
    stage_dir = make_stage_dir(tmp_path / "stage", "grpo", config, inputs)
    return load_reward(StageContext(stage_dir, GrpoConfig), parsed.reward)


def test_a_function_gets_what_it_has_parameters_for(tmp_path: Path) -> None:
    code = """
def score(references, answers, prompts, base):
    assert prompts[1] == [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 1?"}
    ]
    assert references == [None, "It is 1."]
    return [base + len(answer) for answer in answers]
"""
    assert call(tmp_path, code, ["a", "bcd"], base=0.5).tolist() == [1.5, 3.5]


def test_a_function_that_takes_everything_gets_everything(tmp_path: Path) -> None:
    code = "def score(**given): return [len(given) for _ in given['answers']]"
    assert call(tmp_path, code, ["a"], more=1).tolist() == [4]


@pytest.mark.parametrize(
    "returned",
    [
        "[True, False]",
        "(n for n in (1, 0))",
        "__import__('numpy').array([1.0, 0.0])",
        "__import__('torch').tensor([1.0, 0.0])",
    ],
)
def test_truth_values_arrays_and_generators_are_numbers(tmp_path: Path, returned: str) -> None:
    scores = call(tmp_path, f"def score(answers): return {returned}", ["a", "b"])
    assert scores.tolist() == [1.0, 0.0]
    assert scores.dtype == np.float64


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1, None]", r"rewards.py:score returned None for answer 2; return a finite number"),
        ("[1, float('nan')]", r"returned nan for answer 2"),
        ("['high', 1]", r"returned 'high' for answer 1"),
        ("[1]", r"returned 1 numbers for 2 answers; return one an answer, in their order"),
        ("0.5", r"returned 0.5; return a list with one number an answer"),
        ("None", r"returned None; return a list"),
        ("'12'", r"returned '12'; return a list"),
        ("{'a': 1, 'b': 2}", r"returned .*; return a list"),
        ("__import__('numpy').float32(1)", r"returned .*; return a list"),
    ],
)
def test_what_is_no_number_an_answer_is_refused_and_named(
    tmp_path: Path, returned: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        call(tmp_path, f"def score(answers): return {returned}", ["a", "b"])


def test_an_error_in_the_function_has_its_own_line(tmp_path: Path) -> None:
    code = """def helper(text):
    return int(text)

def score(answers):
    yield helper(answers[0])
"""
    with pytest.raises(UsageError, match=r"score failed in line 2: ValueError: invalid literal"):
        call(tmp_path, code, ["one"])


def test_an_error_in_what_the_function_calls_has_the_line_of_the_call(tmp_path: Path) -> None:
    code = "import json\ndef score(answers):\n    return [json.loads(answer) for answer in answers]"
    with pytest.raises(UsageError, match=r"failed in line 3: JSONDecodeError"):
        call(tmp_path, code, ["{"])


def test_a_function_that_leaves_the_program_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"failed in line 1: SystemExit: 3"):
        call(tmp_path, "def score(answers): raise SystemExit(3)", ["a"])


def test_a_function_may_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "def score(answers):\n    print(answers)\n    return [1 for _ in answers]"
    assert call(tmp_path, code, ["a"]).tolist() == [1]
    assert capsys.readouterr().out == "['a']\n"


def test_what_lies_beside_the_file_can_be_imported_at_any_time(tmp_path: Path) -> None:
    (tmp_path / "early_words.py").write_text("GOOD = 'yes'")
    (tmp_path / "late_words.py").write_text("BAD = 'no'")
    code = """
from early_words import GOOD
def score(answers):
    from late_words import BAD
    return [(answer == GOOD) - (answer == BAD) for answer in answers]
"""
    assert call(tmp_path, code, ["yes", "no", "?"]).tolist() == [1, -1, 0]


def test_files_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    functions = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "rewards.py").write_text(f"def score(answers): return [{number}] * len(answers)")
        functions.append(load_function(f"{folder}/rewards.py:score"))
    assert [function(["a"]) for function in functions] == [[1], [2]]
    assert functions[0].__module__ != functions[1].__module__


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def other(): ...", r"defines no function `score`"),
        ("score = 3", r"defines no function `score`"),
        ("def score(:", r"cannot be run: SyntaxError: .*line 1"),
        ("import math\nmath.sqrt(-1)", r"cannot be run in line 2: ValueError"),
        ("import no_such_module_at_all", r"cannot be run in line 1: ModuleNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        call(tmp_path, code, [])


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no file .*absent.py"):
        load_function(f"{tmp_path}/absent.py:score")


@pytest.mark.parametrize(
    ("signature", "arguments", "message"),
    [
        ("answers, tokenizer", {}, r"a parameter `tokenizer` that nothing fills"),
        ("answers, /", {}, r"a parameter `answers` that nothing fills"),
        ("answers", {"limit": 3}, r"no parameter `limit` .*\n.*it has answers"),
    ],
)
def test_a_function_that_could_not_be_called_is_refused_before_training(
    tmp_path: Path, signature: str, arguments: dict[str, int], message: str
) -> None:
    term = {"function": "rewards.py:score", "arguments": arguments}
    with pytest.raises(RecipeError, match=message):
        reward_of(tmp_path, f"def score({signature}): return [1]", term)


def test_a_coroutine_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"`def` and not `async def`"):
        reward_of(tmp_path, "async def score(answers): ...", {"function": "rewards.py:score"})


TWO = """
def long(answers): return [len(answer) for answer in answers]
def polite(answers, word): return [word in answer for answer in answers]
"""


def test_terms_are_weighted_and_added_up(tmp_path: Path) -> None:
    reward = reward_of(
        tmp_path,
        TWO,
        {"function": "rewards.py:long", "weight": -0.5},
        {"function": "rewards.py:polite", "weight": 3.0, "arguments": {"word": "please"}},
    )
    scores = reward(make_prompts(2), ["please", "no"])
    assert scores.terms["long"].tolist() == [6, 2]
    assert scores.terms["polite"].tolist() == [1, 0]
    assert scores.total.tolist() == [-0.5 * 6 + 3.0, -0.5 * 2]


def test_answers_have_the_same_reward_however_they_are_batched(tmp_path: Path) -> None:
    reward = reward_of(tmp_path, TWO, {"function": "rewards.py:long"})
    prompts, answers = make_prompts(7), [n * "ab" for n in range(7)]
    whole = reward(prompts, answers).total
    for size in (1, 2, 5):
        parts = [
            reward(prompts[n : n + size], answers[n : n + size]).total for n in range(0, 7, size)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


def test_arguments_cannot_take_the_place_of_what_is_given() -> None:
    with pytest.raises(ValueError, match=r"`answers` is given to every function"):
        RewardTerm(function="a.py:b", arguments={"answers": []})
