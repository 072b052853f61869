"""Answers that are programs: run with their tests, and counted as pass@k."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import regex  # type: ignore[import-untyped]

from posttrain.evaluate.metrics.base import Case, Scores, Tell, share
from posttrain.evaluate.sandbox import Limits, check_sandbox, run_programs
from posttrain.recipe.test_sets import Code

_FENCE = regex.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", regex.DOTALL | regex.MULTILINE
)


class CodeMetric:
    """Whether programs pass the tests that are their reference."""

    packages: tuple[str, ...] = ()

    def __init__(self, config: Code) -> None:
        """Try the sandbox.

        Raises:
            SandboxError: this system does not allow code to be run safely.
        """
        check_sandbox()
        self._config = config
        self._limits = Limits(cpu_s=config.timeout_s, memory_mb=config.memory_mb)

    def refuse(self, reference: str) -> str | None:
        """It has to be Python."""
        tests = code_of(reference)
        if not tests.strip():
            return "has no tests"
        try:
            with warnings.catch_warnings(action="ignore"):
                compile(tests, "tests.py", "exec")
        except (SyntaxError, ValueError) as error:
            return f"is no Python: {error}"
        return None

    def score(self, cases: Sequence[Case], tell: Tell) -> Scores:
        """pass@k each; the share of all samples that passed, and of those that ran out of time."""
        programs = [
            {
                "setup.py": self._config.setup,
                "answer.py": code_of(answer),
                "tests.py": code_of(case.reference),
            }
            for case in cases
            for answer in case.answers
        ]
        outcomes = iter(run_programs(programs, self._limits, tell))
        found = [[next(outcomes).kind for _ in case.answers] for case in cases]
        values = tuple(
            pass_at_k(len(kinds), kinds.count("passed"), self._config.k) for kinds in found
        )
        passed = tuple(share([kind == "passed" for kind in kinds]) for kinds in found)
        timeouts = share([kind == "timeout" for kinds in found for kind in kinds])
        return Scores(
            values, also={f"{self._config.title}_passed": passed}, corpus={"timeouts": timeouts}
        )


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The chance that one of k answers passes, unbiased, from n of which some passed.

    1 - C(n - passed, k) / C(n, k): Chen et al., 2021, arXiv:2107.03374, equation 1.
    """
    every = math.comb(n, k)
    return (every - math.comb(n - passed, k)) / every


def code_of(text: str) -> str:
    """The first block of Python in Markdown, else the first block, else the text.

    A block that the end of the answer cuts off counts as well.
    """
    blocks = [(name.lower(), body) for name, body in _FENCE.findall(text)]
    for name, body in blocks:
        if name in ("python", "py", "python3"):
            return str(body)
    return str(blocks[0][1]) if blocks else text
