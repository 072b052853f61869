"""Rewards of answers: trained reward models and Python functions, weighted and added up.

A function is the user's own, in a file of theirs:

    def brevity(answers):
        return [-len(answer) / 100 for answer in answers]

It is called with those of these that it has parameters for, each a list with one entry an answer,
and returns as many numbers:

    prompts     the turns before the answer, each as `{"role": ..., "content": ...}`
    answers     the answer's text
    references  the answer that the row has, or None

Further parameters come from `arguments` in the recipe.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from posttrain.data.rows import Message, plain_messages
from posttrain.errors import Problem, RecipeError, UsageError
from posttrain.hardware import resolve_dtype
from posttrain.recipe.online import REWARD, OnlineConfig, RewardTerm
from posttrain.stages.program import StageContext
from posttrain.train.prompts import Prompt

if TYPE_CHECKING:
    from posttrain.train.reward_model import RewardModel

Config = TypeVar("Config", bound=OnlineConfig)

Score = Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]
"""Prompts and an answer to each -> float64 of shape (answers,)."""


@dataclass(frozen=True)
class Scores:
    """What answers are worth."""

    total: np.ndarray
    """The weighted sum: float64 of shape (answers,)."""
    terms: dict[str, np.ndarray]
    """Each term before its weight, by name."""


@dataclass(frozen=True)
class Reward:
    """Several scores as one."""

    scores: dict[str, Score]
    weights: dict[str, float]

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Scores:
        """Score an answer to each prompt.

        Raises:
            UsageError: a function failed, or returned something else than a number an answer.
        """
        terms = {name: score(prompts, answers) for name, score in self.scores.items()}
        total = np.zeros(len(answers))
        for name, values in terms.items():
            total = total + self.weights[name] * values
        return Scores(total, terms)


def load_reward(context: StageContext[Config], terms: Sequence[RewardTerm]) -> Reward:
    """The reward that terms of a stage's recipe describe, with its models in memory.

    Args:
        context: The stage; `reward:NAME` among its inputs is the model or the file of a term.
        terms: The stage's `reward`, or its `watch.judge`.
    """
    scores = {term.name: _load_term(context, term) for term in terms}
    return Reward(scores, {term.name: term.weight for term in terms})


def load_function(reference: str, file: Path | None = None) -> Callable[..., Any]:
    """The function that `FILE.py:NAME` names; runs the file.

    Args:
        reference: As the recipe has it.
        file: Where the file is now, if not where the recipe says.

    Raises:
        RecipeError: no such file or function, or the file cannot be run.
    """
    path, _, name = reference.rpartition(":")
    file = file or Path(path)
    if not file.is_file():
        raise _refused(reference, f"there is no file {path}", "write FILE.py:NAME")
    function = getattr(_run(reference, file), name, None)
    if not callable(function):
        raise _refused(reference, f"{path} defines no function `{name}`", "correct the name")
    return function  # type: ignore[no-any-return]


def call_function(
    function: Callable[..., Any],
    term: RewardTerm,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
) -> np.ndarray:
    """One number an answer, from a user's function.

    Raises:
        UsageError: it failed, or returned something else.
    """
    given = {
        "prompts": [plain_messages(prompt.messages) for prompt in prompts],
        "answers": list(answers),
        "references": [prompt.reference for prompt in prompts],
    }
    parameters = inspect.signature(function).parameters
    wanted = {name: value for name, value in given.items() if name in parameters}
    try:
        values = [float(value) for value in function(**wanted, **term.arguments)]
    except Exception as error:
        where = f"{type(error).__name__}: {error}"
        raise UsageError(f"the reward function {term.function} failed: {where}") from error
    if len(values) != len(answers):
        raise UsageError(
            f"the reward function {term.function} returned {len(values)} numbers for "
            f"{len(answers)} answers; return one an answer, in their order"
        )
    if not all(math.isfinite(value) for value in values):
        raise UsageError(f"the reward function {term.function} returned a value that is no number")
    return np.array(values, np.float64)


def _load_term(context: StageContext[Config], term: RewardTerm) -> Score:
    source = context.input(REWARD + term.name)
    if term.function is not None:
        function = load_function(term.function, Path(source.path))
        return lambda prompts, answers: call_function(function, term, prompts, answers)
    from posttrain.train.reward_model import load_reward_model

    model = load_reward_model(source, resolve_dtype(context.config.dtype))
    return lambda prompts, answers: _by_model(model, prompts, answers)


def _by_model(model: RewardModel, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
    return model.scores(
        [
            (*prompt.messages, Message("assistant", answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    )


def _run(reference: str, file: Path) -> ModuleType:
    """The file as a module of its own; what lies beside it can be imported from it."""
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise _refused(reference, f"{file} is no Python file", "write FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        message = f"{file} cannot be run: {type(error).__name__}: {error}"
        raise _refused(reference, message, "mend the file") from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def _refused(reference: str, message: str, fix: str) -> RecipeError:
    return RecipeError([Problem(f"reward: {reference}", message, fix)])
