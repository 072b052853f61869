"""A small edition of `benchmarks/gate.py`: how often the gate is wrong where the truth is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from posttrain.recipe.gate import GateConfig

GATES = 150


@pytest.fixture(scope="module")
def simulation():
    path = Path(__file__).parents[3] / "benchmarks" / "gate.py"
    spec = importlib.util.spec_from_file_location("simulated_gates", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def plan(simulation):
    return simulation.Plan(GATES, seed=1, config=GateConfig(bootstrap_samples=1000))


@pytest.mark.parametrize(
    ("section", "sizes"),
    [
        ("one", (100, 400)),
        ("several", (200,)),
        ("champion", (200,)),
        ("candidates", (200,)),
        ("scores", (50,)),
        ("perplexity", (20,)),
        ("mmlu", (5,)),
    ],
)
def test_wrong_answers_are_rare(simulation, plan, section, sizes):
    for cell in simulation.SECTIONS[section](plan, sizes):
        # Five percent, and three standard deviations of so few gates.
        if cell.truth == "no drop":
            assert cell.failed < 0.05, cell
        if cell.truth == "at the margin":
            assert max(cell.passed, cell.failed) < 0.05 + 3 * (0.05 * 0.95 / GATES) ** 0.5, cell
        if cell.truth == "double margin":
            assert cell.passed < 0.05, cell


def test_an_even_win_rate_hardly_ever_passes_and_a_high_one_does(simulation, plan):
    cells = {cell.truth: cell for cell in simulation.win_rate(plan, (60,))}
    assert cells["50% won"].passed < 0.05 + 3 * (0.05 * 0.95 / GATES) ** 0.5
    assert cells["70% won"].passed > 0.85


def test_with_all_of_hellaswag_the_gate_nearly_always_knows(simulation):
    plan = simulation.Plan(40, seed=1, config=GateConfig(bootstrap_samples=1000))
    cells = {cell.truth: cell for cell in simulation.one_benchmark(plan, (10042,), (0.1,))}
    assert cells["no drop"].passed > 0.95
    assert cells["double margin"].failed > 0.95


def test_the_simulation_decides_as_the_gate_does_on_files(simulation):
    simulation.check_against_the_gate(8, 3, GateConfig(bootstrap_samples=1000))
