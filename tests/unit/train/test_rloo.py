from pathlib import Path

import pytest

from posttrain.recipe.rloo import RlooConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.stages.rloo import main
from tests.unit.train.programs import digests_of, history_of, make_dataset, run, start
from tests.unit.train.test_grpo import LEARNS, group_stage_dir, make_sharp_model, wait_for_step


def train(stage_dir: Path) -> StageResult:
    """Run the stage in this process, which has the libraries loaded already."""
    context = StageContext(stage_dir, RlooConfig)
    context.output.mkdir()
    result = main(context)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "chats")


@pytest.fixture(scope="module")
def sharp_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sharp_model(tiny_model, tmp_path_factory.mktemp("sharp"))


@pytest.mark.parametrize("adapter", [{"rank": 8}, None], ids=["lora", "full"])
def test_the_reward_rises(
    sharp_model: Path, dataset: Path, tmp_path: Path, adapter: dict[str, int] | None
) -> None:
    rate = {"learning_rate": 2e-2 if adapter else 5e-3, "scheduler": "constant"}
    stage_dir = group_stage_dir(
        tmp_path / "run",
        "rloo",
        sharp_model,
        dataset,
        **{**LEARNS, "adapter": adapter, "optimization": rate},
    )
    result = train(stage_dir)
    metrics = result.metrics
    assert metrics["held_out_reward_after"] > metrics["held_out_reward_before"] + 0.3
    assert result.headline.endswith("nats of KL in 10 steps")
    for step in history_of(stage_dir).steps:
        assert step.values["entropy"] > 0
        assert "step_time" not in step.values


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_reward_rises_with_every_seed(
    sharp_model: Path, dataset: Path, tmp_path: Path, normalize: bool, seed: int
) -> None:
    settings = {**LEARNS, "normalize_advantages": normalize, "seed": seed}
    stage_dir = group_stage_dir(tmp_path / "run", "rloo", sharp_model, dataset, **settings)
    metrics = train(stage_dir).metrics
    assert metrics["held_out_reward_after"] > metrics["held_out_reward_before"] + 0.3


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 8, "validation": {"every_steps": 2}}
    whole = group_stage_dir(tmp_path / "whole", "rloo", sharp_model, dataset, **settings)
    train(whole)
    killed = group_stage_dir(tmp_path / "killed", "rloo", sharp_model, dataset, **settings)
    program = start("rloo", killed)
    wait_for_step(killed, 3)
    program.kill()
    program.wait()
    assert not (killed / "result.json").exists()
    run("rloo", killed)
    for step, expected in zip(history_of(killed).steps, history_of(whole).steps, strict=True):
        assert step == expected
    assert digests_of(killed / "output") == digests_of(whole / "output")
