"""How often the gate is right: simulated gates whose truth is known, as Markdown tables and JSON.

A benchmark's items are answered by a base and by a candidate that gets some of them wrong that the
base got right, and the other way round. How many change, and by how many more of them worsen than
improve (the true drop), is set; the gate's own functions decide, at the recipe's defaults: a drop
of 0.02 accepted, 95% confidence. Every cell is a number of gates, each drawn anew.

    python benchmarks/gate.py [--gates 2000] [--only SECTION ...] [--check 50]

`fail_at_no_drop_max` is the largest share of gates, over all cells, that fail although nothing has
dropped; `pass_at_double_margin_max` the largest that pass although a benchmark has dropped by twice
what is accepted. Both should stay below 0.05. `--check` also writes that many simulated evaluations
to files and has the gate itself judge them: the same answers, or it stops.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

from posttrain.evaluate import statistics
from posttrain.evaluate.candidates import judge_several
from posttrain.evaluate.items import Item, write_items, write_perplexity
from posttrain.evaluate.perplexity_check import PERPLEXITY_TOLERANCE
from posttrain.evaluate.results import EvaluationResults, Outcome, Settings, TaskResult
from posttrain.evaluate.statistics import PairedDifference
from posttrain.evaluate.verdict import Candidate, Opponents, judge
from posttrain.evaluate.win_rate_check import wins_less_losses
from posttrain.recipe.gate import GateConfig

MARGIN = 0.02
CHANGED = (0.1, 0.2)
"""Shares of the items that base and candidate do not both get right or wrong. At a base accuracy of
one half that is a tetrachoric correlation of 0.95 and 0.81."""
SUBJECTS_DIFFER = 0.03
"""Standard deviation of the true drop over MMLU's subjects."""
TIES = 0.2
RESAMPLES = 1000
"""Where the numbers of a gate are its own, so that no other gate has had its interval: a tenth of
what a recipe asks for, which moves no bound by more than chance."""
MMLU = (
    *[100] * 10, 102, 103, 108, 110, 112, 114, 121, 126, 131, 135, 144, 145, 151, 152, 163, 165,
    166, 171, 173, 193, 198, 201, 203, 204, 216, 223, 234, 235, 237, 238, 245, 265, 270, 272, 282,
    306, 310, 311, 324, 346, 378, 390, 545, 612, 783, 895, 1534,
)  # fmt: skip
"""Test items of the 57 subjects, 14,042 in all."""


@dataclass(frozen=True)
class Cell:
    """Gates that have the same truth."""

    section: str
    case: str
    items: int
    truth: str
    """`no drop`, `at the margin`, `double margin`; or a true win rate."""
    gates: int
    passed: float
    """Share of the gates that passed."""
    failed: float


@dataclass(frozen=True)
class Plan:
    """What is simulated."""

    gates: int
    seed: int
    config: GateConfig

    @property
    def quick(self) -> GateConfig:
        """With fewer resamples."""
        return self.config.model_copy(update={"bootstrap_samples": RESAMPLES})

    def cell(
        self,
        section: str,
        case: str,
        items: int,
        truth: str,
        gate: Callable[[np.random.Generator], Outcome],
    ) -> Cell:
        """Decide many gates; each cell has random numbers of its own."""
        name = f"{section} {case} {items} {truth}"
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        outcomes = Counter(gate(rng) for _ in range(self.gates))
        passed, failed = outcomes["pass"] / self.gates, outcomes["fail"] / self.gates
        print(f"{name}: pass {passed:.3f}, fail {failed:.3f}", file=sys.stderr)
        return Cell(section, case, items, truth, self.gates, passed, failed)


TRUTHS = {"no drop": 0.0, "at the margin": MARGIN, "double margin": 2 * MARGIN}


def one_benchmark(
    plan: Plan,
    sizes: Sequence[int] = (100, 200, 400, 1000, 2000, 10042),
    shares: Sequence[float] = CHANGED,
) -> Cells:
    """HellaSwag: items that stand alone."""
    for changed, n, (truth, drop) in itertools.product(shares, sizes, TRUTHS.items()):

        def gate(rng: np.random.Generator) -> Outcome:
            counts = draw(rng, n, drop, changed)  # noqa: B023 - called before the next round
            return decided([compare(*counts, n, plan.config)], plan.config)  # noqa: B023

        yield plan.cell("one benchmark", f"{changed:.0%} changed", n, truth, gate)


def mmlu(plan: Plan, limits: Sequence[int] = (5, 20, 100, 400, 1534)) -> Cells:
    """57 subjects, whose true drops differ; `limit` items of each at most."""
    changed = CHANGED[0]
    for limit, (truth, drop) in itertools.product(limits, TRUTHS.items()):
        sizes = np.minimum(MMLU, limit)

        def gate(rng: np.random.Generator) -> Outcome:
            subjects = of_subjects(rng, sizes, drop, changed, plan.quick)  # noqa: B023
            return decided([subjects], plan.config)

        yield plan.cell("MMLU", f"{changed:.0%} changed", int(sizes.sum()), truth, gate)


def several_benchmarks(plan: Plan, sizes: Sequence[int] = (200, 1000)) -> Cells:
    """No drop in any; or in one of them only, which is the hardest to notice."""
    for count, n, (truth, drop) in itertools.product((2, 4), sizes, TRUTHS.items()):

        def gate(rng: np.random.Generator) -> Outcome:
            drops = [drop] + [0.0] * (count - 1)  # noqa: B023
            found = [compare(*draw(rng, n, one), n, plan.config) for one in drops]  # noqa: B023
            return decided(found, plan.config)

        yield plan.cell("several benchmarks", f"{count} of {n}", count * n, truth, gate)


def with_a_champion(plan: Plan, sizes: Sequence[int] = (200, 1000)) -> Cells:
    """Two benchmarks against base and champion, which are equally good; the drop is in both."""
    for n, (truth, drop) in itertools.product(sizes, TRUTHS.items()):

        def gate(rng: np.random.Generator) -> Outcome:
            drops = [drop, 0.0] * 2  # noqa: B023
            found = [compare(*draw(rng, n, one), n, plan.config) for one in drops]  # noqa: B023
            return decided(found, plan.config)

        yield plan.cell("base and champion", f"2 of {n}", 2 * n, truth, gate)


def several_candidates(plan: Plan, sizes: Sequence[int] = (200, 1000)) -> Cells:
    """All candidates have the same true drop; one that passes is enough."""
    for count, n, (truth, drop) in itertools.product((2, 4), sizes, TRUTHS.items()):

        def gate(rng: np.random.Generator) -> Outcome:
            counts = [draw(rng, n, drop) for _ in range(count)]  # noqa: B023
            return of_several(counts, n, plan.config)  # noqa: B023

        yield plan.cell("several candidates", f"{count} candidates", n, truth, gate)


def scores(plan: Plan, sizes: Sequence[int] = (50, 100, 400)) -> Cells:
    """A test set's scores between 0 and 1, such as F1: often 0 or 1, else anything between."""
    for n, (truth, drop) in itertools.product(sizes, TRUTHS.items()):

        def gate(rng: np.random.Generator) -> Outcome:
            base = between(rng, n, 0.0)  # noqa: B023
            again = between(rng, n, drop / 0.2)  # noqa: B023
            candidate = np.where(rng.random(n) < 0.2, again, base)  # noqa: B023
            config = plan.quick
            found = statistics.paired_difference(
                base,
                candidate,
                max_drop=MARGIN,
                confidence=config.confidence,
                bootstrap_samples=config.bootstrap_samples,
            )
            return decided([found], config)

        yield plan.cell("scores in [0, 1]", "20% changed", n, truth, gate)


def perplexity(plan: Plan, sizes: Sequence[int] = (20, 50, 200)) -> Cells:
    """Held-out rows of very different lengths; the margin is a rise of one percent."""
    for rows, (truth, drop) in itertools.product(sizes, TRUTHS.items()):

        def gate(rng: np.random.Generator) -> Outcome:
            rise = drop / MARGIN * PERPLEXITY_TOLERANCE  # noqa: B023
            tokens = np.exp(rng.normal(4.5, 0.8, rows)).round() + 1  # noqa: B023
            # Heavy tails: Student's t with 4 degrees of freedom.
            worse = tokens * (rise + 0.04 * rng.standard_t(4, rows))  # noqa: B023
            found = statistics.paired_nats(
                3 * tokens,
                3 * tokens + worse,
                tokens,
                max_rise=PERPLEXITY_TOLERANCE,
                confidence=plan.config.confidence,
                bootstrap_samples=plan.quick.bootstrap_samples,
            )
            return decided([found], plan.config, PERPLEXITY_TOLERANCE)

        yield plan.cell("perplexity", "sd 0.06 nats a token", rows, truth, gate)


def win_rate(plan: Plan, sizes: Sequence[int] = (50, 60, 200)) -> Cells:
    """Prompts won, tied and lost; more than a half is asked for."""
    for n, rate in itertools.product(sizes, (0.5, 0.6, 0.65, 0.7, 0.8)):

        def gate(rng: np.random.Generator) -> Outcome:
            shares = [rate - TIES / 2, 1 - rate - TIES / 2, TIES]  # noqa: B023
            won, lost, _ = rng.multinomial(n, shares)  # noqa: B023
            return decided([preferred(int(won), int(lost), n, plan.config)], plan.config, 0.0)  # noqa: B023

        yield plan.cell("win rate", f"{TIES:.0%} ties", n, f"{rate:.0%} won", gate)


Cells = Iterator[Cell]
SECTIONS: dict[str, Callable[[Plan], Cells]] = {
    "one": one_benchmark,
    "several": several_benchmarks,
    "champion": with_a_champion,
    "candidates": several_candidates,
    "scores": scores,
    "perplexity": perplexity,
    "win-rate": win_rate,
    "mmlu": mmlu,
}


def main() -> None:
    """Simulate, print the tables, then the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gates", type=int, default=2000, help="simulated gates a cell")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument("--bootstrap-samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=50, help="gates judged from files as well")
    given = parser.parse_args()
    config = GateConfig(bootstrap_samples=given.bootstrap_samples)
    plan = Plan(given.gates, given.seed, config)
    check_against_the_gate(given.check, given.seed, config)
    cells = [cell for name in given.only for cell in SECTIONS[name](plan)]
    print(tables(cells))
    print(json.dumps(summary(cells)))


def draw(rng: np.random.Generator, n: int, drop: float, changed: float = CHANGED[0]) -> Counts:
    """How many items improved, and how many got worse."""
    better, worse = (changed - drop) / 2, (changed + drop) / 2
    improved, worsened, _ = rng.multinomial(n, [better, worse, 1 - changed])
    return int(improved), int(worsened)


Counts = tuple[int, int]


def compare(improved: int, worsened: int, n: int, config: GateConfig) -> PairedDifference:
    """The gate's interval for right and wrong."""
    return _compare(improved, worsened, n, config.confidence, config.bootstrap_samples)


@cache
def _compare(
    improved: int, worsened: int, n: int, confidence: float, samples: int
) -> PairedDifference:
    return statistics.paired_difference(
        *answers(improved, worsened, n),
        max_drop=MARGIN,
        confidence=confidence,
        bootstrap_samples=samples,
    )


def answers(improved: int, worsened: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Items of a base and a candidate, those that changed first."""
    base = np.r_[np.zeros(improved), np.ones(worsened), np.ones(n - improved - worsened)]
    candidate = base.copy()
    candidate[: improved + worsened] = 1 - base[: improved + worsened]
    return base, candidate


def of_subjects(
    rng: np.random.Generator, sizes: np.ndarray, drop: float, changed: float, config: GateConfig
) -> PairedDifference:
    """The gate's interval for items in subjects, each with a true drop of its own."""
    drops = drop + SUBJECTS_DIFFER * rng.standard_normal(len(sizes))
    change = np.maximum(changed, np.abs(drops))
    uniform = rng.random(int(sizes.sum()))
    change, drops = np.repeat(change, sizes), np.repeat(drops, sizes)
    base = np.where(uniform < (change + drops) / 2, 1.0, 0.0)
    candidate = np.where((uniform < change) & (base == 0), 1.0, 0.0)
    return statistics.paired_difference(
        base,
        candidate,
        np.repeat(np.arange(len(sizes)), sizes),  # type: ignore[arg-type]
        max_drop=MARGIN,
        confidence=config.confidence,
        bootstrap_samples=config.bootstrap_samples,
    )


def between(rng: np.random.Generator, n: int, shift: float) -> np.ndarray:
    """Scores with a mean of one half less `shift`."""
    kind = rng.random(n)
    return np.where(kind < 0.3 + shift, 0.0, np.where(kind < 0.6, 1.0, rng.random(n)))


def preferred(won: int, lost: int, n: int, config: GateConfig) -> PairedDifference:
    """The gate's interval for wins less losses."""
    return _preferred(won, lost, n, config.confidence, config.bootstrap_samples)


@cache
def _preferred(won: int, lost: int, n: int, confidence: float, samples: int) -> PairedDifference:
    outcome = [1.0] * won + [0.0] * lost + [0.5] * (n - won - lost)
    config = GateConfig(confidence=confidence, bootstrap_samples=samples)
    return wins_less_losses(outcome, 0.5, config)


def decided(
    found: Sequence[PairedDifference], config: GateConfig, margin: float = MARGIN
) -> Outcome:
    """What the gate makes of its checks: all pass, or one fails beside the others."""
    outcomes = [statistics.non_inferiority(one, margin) for one in found]
    stands = statistics.holm([one.p_worse for one in found], 1 - config.confidence)
    if any(one == "fail" and kept for one, kept in zip(outcomes, stands, strict=True)):
        return "fail"
    return "pass" if set(outcomes) == {"pass"} else "not enough evidence"


def of_several(counts: Sequence[Counts], n: int, config: GateConfig) -> Outcome:
    """Candidates that share the error by Holm's procedure."""
    outcomes: dict[int, Outcome] = {}
    left = list(range(len(counts)))
    while left:
        error = (1 - config.confidence) / len(left)
        strict = config.model_copy(update={"confidence": 1 - error}) if len(left) > 1 else config
        for number in left:
            outcomes[number] = decided([compare(*counts[number], n, strict)], strict)
        still = [number for number in left if outcomes[number] != "pass"]
        if still == left:
            break
        left = still
    said = set(outcomes.values())
    return "pass" if "pass" in said else "fail" if said == {"fail"} else "not enough evidence"


def check_against_the_gate(cases: int, seed: int, config: GateConfig) -> None:
    """The gate itself, on files, must say what the simulation says."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        for case in range(cases):
            folder = Path(name) / str(case)
            n, count = int(rng.integers(50, 800)), int(rng.integers(1, 4))
            drops = rng.choice([0.0, 0.02, 0.04, 0.09], size=count)
            counts = [draw(rng, n, drop) for drop in drops]
            if case % 2:
                expected = decided([compare(*one, n, config) for one in counts], config)
                tasks = [answers(*one, n) for one in counts]
                base = write(folder / "base", [first for first, _ in tasks])
                candidate = write(folder / "new", [second for _, second in tasks])
                said = judge(base, candidate, config).verdict
            else:
                expected = of_several(counts, n, config)
                said = several_on_files(folder, counts, n, config)
            if said != expected:
                sys.exit(f"case {case} {counts} of {n}: the gate says {said}, not {expected}")
    print(f"{cases} gates judged from files as simulated", file=sys.stderr)


def several_on_files(folder: Path, counts: Sequence[Counts], n: int, config: GateConfig) -> Outcome:
    """Candidates are compared with one base: which items change differs, not how many."""
    base = np.r_[np.zeros(n // 2), np.ones(n - n // 2)]
    opponents = Opponents.read(write(folder / "base", [base]), None, config)
    candidates = {}
    for number, (improved, worsened) in enumerate(counts):
        after = base.copy()
        after[:improved], after[n - worsened :] = 1.0, 0.0
        at = write(folder / str(number), [after])
        candidates[str(number)] = Candidate.read(at, str(number))
    return judge_several(opponents, candidates, config).verdict


def write(folder: Path, tasks: Sequence[np.ndarray]) -> Path:
    """An evaluation as the `evaluate` stage leaves it."""
    folder.mkdir(parents=True)
    names = [f"task{number}" for number in range(len(tasks))]
    write_items(
        folder,
        [
            Item(name, name, item, str(item), "acc", float(value), {"acc": float(value)}, ())
            for name, values in zip(names, tasks, strict=True)
            for item, value in enumerate(values)
        ],
    )
    write_perplexity(folder, [])
    settings = Settings(
        lm_eval="",
        tasks=(),
        limit=None,
        seed=0,
        dtype="float32",
        questions_in_chat_template=False,
        chat_template=None,
        perplexity_rows=1,
        perplexity_max_length=1,
    )
    results = tuple(
        TaskResult(
            task=name,
            metric="acc",
            value=float(values.mean()),
            standard_error=None,
            n=len(values),
            higher_is_better=True,
            metrics={},
            groups={},
        )
        for name, values in zip(names, tasks, strict=True)
    )
    EvaluationResults(
        tasks=results, perplexity=None, settings=settings, settings_digest=settings.digest
    ).save(folder)
    return folder


def tables(cells: Sequence[Cell]) -> str:
    """Power against items, and the errors beside it."""
    lines: list[str] = []
    for section, of_section in itertools.groupby(cells, lambda cell: cell.section):
        rows = list(of_section)
        truths = list(dict.fromkeys(cell.truth for cell in rows))
        lines += ["", f"**{section}**", ""]
        lines.append("| | items |" + "".join(f" {t}: pass | fail |" for t in truths))
        lines.append("|---|---:|" + "---:|---:|" * len(truths))
        for (case, items), of_row in itertools.groupby(rows, lambda cell: (cell.case, cell.items)):
            numbers = "".join(f" {cell.passed:.1%} | {cell.failed:.1%} |" for cell in of_row)
            lines.append(f"| {case} | {items:,} |{numbers}")
    return "\n".join(lines).strip()


def summary(cells: Sequence[Cell]) -> dict[str, object]:
    """The largest errors, and all cells."""

    def largest(truth: str, outcome: str) -> float | None:
        shares = [getattr(cell, outcome) for cell in cells if cell.truth == truth]
        return max(shares) if shares else None

    return {
        "fail_at_no_drop_max": largest("no drop", "failed"),
        "pass_at_double_margin_max": largest("double margin", "passed"),
        "win_rate_pass_at_half_max": largest("50% won", "passed"),
        "win_rate_fail_at_half_max": largest("50% won", "failed"),
        "cells": [asdict(cell) for cell in cells],
    }


if __name__ == "__main__":
    main()
