"""Rewards of answers: trained reward models and Python functions, weighted and added up.

A function is the user's own, in a file of theirs:

    def brevity(answers):
        return [-len(answer) / 100 for answer in answers]

It is called with those of these that it has parameters for, each a list with one entry an answer,
and returns as many numbers, in their order; true and false count as 1 and 0:

    prompts     the turns before the answer, each as `{"role": ..., "content": ...}`
    answers     the answer's text
    references  the answer that the row has, or None

Further parameters come from `arguments` in the recipe. How many answers a call has depends on the
method and on the number of processes: a score must depend on its own answer alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from posttrain.data.rows import Message, plain_messages
from posttrain.errors import Problem, RecipeError, UsageError
from posttrain.hardware import resolve_dtype
from posttrain.recipe.online import GIVEN, REWARD, OnlineConfig, RewardTerm
from posttrain.stages.program import StageContext
from posttrain.train.prompts import Prompt

if TYPE_CHECKING:
    from posttrain.train.reward_model import RewardModel

Config = TypeVar("Config", bound=OnlineConfig)

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

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


def check_parameters(function: Callable[..., Any], term: RewardTerm) -> None:
    """Refuse a function that could not be called with what it is given.

    Raises:
        RecipeError: a parameter that nothing fills, or an argument that there is no parameter for.
    """
    reference = str(term.function)
    if inspect.iscoroutinefunction(function):
        raise _refused(reference, "is a coroutine", "write `def` and not `async def`")
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = [parameter.name for parameter in parameters if parameter.kind in _BY_NAME]
    for name in term.arguments:
        if name not in names and not takes_all:
            fix = f"it has {', '.join(names) or 'none'}"
            raise _refused(reference, f"has no parameter `{name}` for the recipe's argument", fix)
    for parameter in parameters:
        needed = parameter.default is inspect.Parameter.empty and parameter.kind not in _STARRED
        filled = parameter.kind in _BY_NAME and parameter.name in {*GIVEN, *term.arguments}
        if needed and not filled:
            message = f"has a parameter `{parameter.name}` that nothing fills"
            fix = f"take {', '.join(GIVEN)} by these names, and the rest under `arguments`"
            raise _refused(reference, message, fix)


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
    takes_all = any(value.kind is inspect.Parameter.VAR_KEYWORD for value in parameters.values())
    wanted = {name: value for name, value in given.items() if takes_all or name in parameters}
    file = _file_of(function)
    try:
        with _beside(file):
            returned = function(**wanted, **term.arguments)
            # A generator runs here, and may fail here.
            values = list(returned) if _is_list(returned) else None
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the reward function {term.function} failed{_line(error, file)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if values is None:
        raise UsageError(
            f"the reward function {term.function} returned {_shown(returned)}; return a list with "
            "one number an answer"
        )
    if len(values) != len(answers):
        raise UsageError(
            f"the reward function {term.function} returned {len(values)} numbers for "
            f"{len(answers)} answers; return one an answer, in their order"
        )
    return np.array([_number(term, n, value) for n, value in enumerate(values, 1)], np.float64)


def _load_term(context: StageContext[Config], term: RewardTerm) -> Score:
    source = context.input(REWARD + term.name)
    if term.function is not None:
        function = load_function(term.function, Path(source.path))
        check_parameters(function, term)
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


def _number(term: RewardTerm, position: int, value: object) -> float:
    """A score as a number; `position` counts from 1."""
    try:
        number = math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number):
        return number
    raise UsageError(
        f"the reward function {term.function} returned {_shown(value)} for answer {position}; "
        "return a finite number for each, such as 0 for an answer that it cannot judge"
    )


def _is_list(value: object) -> bool:
    """Whether it holds values, and is no text: lists, arrays, tensors, generators."""
    if isinstance(value, str | bytes | dict) or not isinstance(value, Iterable):
        return False
    # An array without dimensions is one number, and says so only when it is gone through.
    return getattr(value, "ndim", 1) > 0


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _run(reference: str, file: Path) -> ModuleType:
    """The file as a module of its own; what lies beside it can be imported from it."""
    # Named after its place: files of the same name in two folders are two modules.
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}_{place}", file)
    if spec is None or spec.loader is None:
        raise _refused(reference, f"{file} is no Python file", "write FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        with _beside(file):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        where = "" if isinstance(error, SyntaxError) else _line(error, file)
        message = f"{file.name} cannot be run{where}: {type(error).__name__}: {error}"
        raise _refused(reference, message, "mend the file") from error
    return module


@contextmanager
def _beside(file: Path | None) -> Iterator[None]:
    """Let what is run import what lies beside the file."""
    if file is None:
        yield
        return
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _file_of(function: Callable[..., Any]) -> Path | None:
    module = sys.modules.get(getattr(function, "__module__", None) or type(function).__module__)
    file = getattr(module, "__file__", None)
    return Path(file) if file else None


def _line(error: BaseException, file: Path | None) -> str:
    """Such as ` in line 7`: where in the user's file it happened; empty where that is not known."""
    own = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if file is not None and Path(frame.filename).resolve() == file.resolve()
    ]
    return f" in line {own[-1]}" if own else ""


def _refused(reference: str, message: str, fix: str) -> RecipeError:
    return RecipeError([Problem(f"reward: {reference}", message, fix)])
