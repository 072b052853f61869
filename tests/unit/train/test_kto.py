from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from posttrain.events import EventReader, Warn
from posttrain.recipe.kto import KtoConfig
from posttrain.stages.program import StageResult
from posttrain.train.kto import side_weights
from tests.unit.train.pair_programs import (
    answers_stage_dir,
    make_marked,
    make_marked_dataset,
    make_pair_dataset,
    make_reference,
    run_here,
)
from tests.unit.train.programs import history_of, losses, run

# Losses of the run below on the tiny model, float32, CPU. A refactoring must not move them.
GOLDEN_LOSSES = [0.5, 0.5, 0.432145, 0.406317, 0.320303, 0.317076]
GOLDEN_HELD_OUT = [0.5, 0.431283, 0.322884, 0.28164]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_marked_dataset(tmp_path_factory.mktemp("dataset") / "marked")


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StageResult]:
    stage_dir = answers_stage_dir(
        tmp_path_factory.mktemp("kto") / "run", "kto", tiny_model, dataset, adapter=None
    )
    return stage_dir, run_here("kto", stage_dir)


def warnings_of(stage_dir: Path) -> list[str]:
    events = EventReader(stage_dir / "events.jsonl").read()
    return [event.message for event in events if isinstance(event, Warn)]


def test_losses_are_those_of_the_last_release(trained: tuple[Path, StageResult]) -> None:
    history = history_of(trained[0])
    assert losses(history) == pytest.approx(GOLDEN_LOSSES, abs=1e-4)
    assert [e.loss for e in history.held_out] == pytest.approx(GOLDEN_HELD_OUT, abs=1e-4)


def test_wanted_answers_gain_and_unwanted_ones_lose(trained: tuple[Path, StageResult]) -> None:
    stage_dir, result = trained
    account = pq.read_table(stage_dir / "output/held_out.parquet").to_pydict()
    marked = {row.id: row.label for row in make_marked(7, seed=1)}
    assert dict(zip(account["id"], account["label"], strict=True)) == marked
    rewards = dict(zip(account["id"], account["reward"], strict=True))
    wanted = [reward for key, reward in rewards.items() if marked[key]]
    unwanted = [reward for key, reward in rewards.items() if not marked[key]]
    margin = sum(wanted) / len(wanted) - sum(unwanted) / len(unwanted)
    assert margin > 0.5
    assert result.metrics["held_out_margin"] == pytest.approx(margin)
    assert result.metrics["held_out_kl_before"] == pytest.approx(0, abs=1e-4)
    for line, reward in enumerate(account["reward"]):
        difference = account["logp"][line] - account["reference_logp"][line]
        assert reward == pytest.approx(0.1 * difference, abs=1e-5)


def test_the_micro_batch_changes_nothing(
    trained: tuple[Path, StageResult], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """How far the model has moved is estimated from the whole step, of one row a pass too."""
    batching = {"batch_size": 8, "max_length": 64, "micro_batch_size": 1}
    stage_dir = answers_stage_dir(
        tmp_path / "one", "kto", tiny_model, dataset, adapter=None, batching=batching
    )
    run_here("kto", stage_dir)
    alone, together = history_of(stage_dir), history_of(trained[0])
    assert losses(alone) == pytest.approx(losses(together), abs=1e-4)
    assert [step.values["kl"] for step in alone.steps] == pytest.approx(
        [step.values["kl"] for step in together.steps], abs=1e-3
    )
    assert [e.loss for e in alone.held_out] == pytest.approx(
        [e.loss for e in together.held_out], abs=1e-4
    )


def test_a_cached_reference_gives_the_losses_of_a_computed_one(
    trained: tuple[Path, StageResult], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    folder = make_reference(tmp_path / "reference", "kto", tiny_model, dataset, micro_batch_size=3)
    stage_dir = answers_stage_dir(
        tmp_path / "cached", "kto", tiny_model, dataset, cached=folder, adapter=None
    )
    run_here("kto", stage_dir)
    computed, cached = history_of(trained[0]), history_of(stage_dir)
    assert losses(cached) == pytest.approx(losses(computed), abs=1e-5)
    assert [e.loss for e in cached.held_out] == pytest.approx(
        [e.loss for e in computed.held_out], abs=1e-5
    )


def test_pairs_are_learned_as_a_wanted_and_an_unwanted_answer(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = make_pair_dataset(tmp_path / "pairs", train=12)
    stage_dir = answers_stage_dir(tmp_path / "kto", "kto", tiny_model, data, epochs=1)
    metrics = run_here("kto", stage_dir).metrics
    assert metrics["steps"] == 3, "24 answers in batches of 8"
    assert metrics["held_out_margin"] > 0
    account = pq.read_table(stage_dir / "output/held_out.parquet").to_pydict()
    assert account["label"] == [True, False] * 7
    rows = pq.read_table(stage_dir / "output/rows.parquet").to_pydict()
    assert rows["passes"] == [1] * 12
    names = load_file(stage_dir / "output/adapter_model.safetensors")
    assert not any("ref" in name.split(".") for name in names)


@pytest.mark.parametrize(
    ("config", "labels", "weights"),
    [
        ({}, [True] * 4 + [False] * 4, (1, 1)),
        ({}, [True] * 2 + [False] * 6, (3, 1)),
        ({}, [True] * 6 + [False] * 2, (1, 3)),
        ({"undesirable_weight": 0.5}, [True] * 2 + [False] * 6, (1.5, 0.5)),
        ({"desirable_weight": 2}, [True] * 6 + [False] * 2, (2, 6)),
        ({"desirable_weight": 2, "undesirable_weight": 1}, [True] + [False] * 9, (2, 1)),
        ({}, [True] * 4, (1, 1)),
    ],
)
def test_both_sides_count_alike_unless_the_recipe_says_otherwise(
    config: dict[str, float], labels: list[bool], weights: tuple[float, float]
) -> None:
    assert side_weights(KtoConfig(dataset="marked", **config), labels) == weights  # type: ignore[arg-type]


def test_very_unequal_sides_are_said(tiny_model: Path, tmp_path: Path) -> None:
    data = make_marked_dataset(tmp_path / "marked", train=20, wanted=0.1)
    stage_dir = answers_stage_dir(tmp_path / "kto", "kto", tiny_model, data, max_steps=1)
    run_here("kto", stage_dir)
    assert any(
        "2 of 20 answers are wanted and count 9 times each" in message
        for message in warnings_of(stage_dir)
    )


@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    trained: tuple[Path, StageResult], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = answers_stage_dir(
        tmp_path / "two", "kto", tiny_model, dataset, adapter=None, launch={"num_processes": 2}
    )
    run("kto", stage_dir, processes=2)
    alone, together = history_of(trained[0]), history_of(stage_dir)
    assert losses(together) == pytest.approx(losses(alone), abs=1e-4)
    assert [e.loss for e in together.held_out] == pytest.approx(
        [e.loss for e in alone.held_out], abs=1e-4
    )
