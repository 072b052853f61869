from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.stages.program import StageResult
from posttrain.train.pairs import encode_pairs
from tests.unit.train.pair_programs import (
    answers_stage_dir,
    make_pair_dataset,
    make_pairs,
    run_here,
)
from tests.unit.train.programs import digests_of, history_of, losses, run

# Losses of the run below on the tiny model, float32, CPU. A refactoring must not move them.
GOLDEN_LOSSES = [6.469707, 6.465343, 6.433042, 6.350587, 6.323388, 6.299123]
GOLDEN_HELD_OUT = [6.485227, 6.432423, 6.335196, 6.311641]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair_dataset(tmp_path_factory.mktemp("dataset") / "pairs")


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StageResult]:
    stage_dir = answers_stage_dir(
        tmp_path_factory.mktemp("orpo") / "run", "orpo", tiny_model, dataset
    )
    return stage_dir, run_here("orpo", stage_dir)


def test_losses_are_those_of_the_last_release(trained: tuple[Path, StageResult]) -> None:
    history = history_of(trained[0])
    assert losses(history) == pytest.approx(GOLDEN_LOSSES, abs=1e-4)
    assert [e.loss for e in history.held_out] == pytest.approx(GOLDEN_HELD_OUT, abs=1e-4)


def test_the_loss_is_that_of_the_paper(trained: tuple[Path, StageResult], tiny_model: Path) -> None:
    """Equations 6 and 7, row by row, from the saved adapter's own logits."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, trained[0] / "output").eval()
    rows = make_pairs(7, seed=1)
    found = []
    for pair in encode_pairs(AutoTokenizer.from_pretrained(tiny_model), rows, 64):
        means = []
        for answer in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + answer])
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].log_softmax(-1)
            scores = scores.gather(1, ids[0, 1:, None])[:, 0]
            if answer is pair.chosen_ids:
                likelihood = -scores.mean()
            means.append(scores[-len(answer) :].mean())
        chosen, rejected = (mean - torch.log1p(-mean.exp()) for mean in means)
        found.append(likelihood - 0.1 * torch.nn.functional.logsigmoid(chosen - rejected))
    expected = float(torch.stack(found).mean())
    assert trained[1].metrics["held_out_loss"] == pytest.approx(expected, abs=1e-5)


def test_rewards_are_of_the_answers_mean_log_probabilities(
    trained: tuple[Path, StageResult],
) -> None:
    account = pq.read_table(trained[0] / "output/held_out.parquet").to_pydict()
    assert "reference_chosen_logp" not in account
    assert account["chosen_reward"] == pytest.approx(
        [0.1 * mean for mean in account["chosen_mean_logp"]]
    )
    history = history_of(trained[0])
    assert {"log_odds_ratio", "nll_loss", "rewards/margins"} <= history.steps[0].values.keys()
    assert history.held_out[-1].values["logps/chosen"] == pytest.approx(
        sum(account["chosen_mean_logp"]) / 7
    )


def test_the_micro_batch_changes_nothing(
    trained: tuple[Path, StageResult], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    batching = {"batch_size": 8, "max_length": 64, "micro_batch_size": 2}
    stage_dir = answers_stage_dir(tmp_path / "two", "orpo", tiny_model, dataset, batching=batching)
    run_here("orpo", stage_dir)
    alone, together = history_of(stage_dir), history_of(trained[0])
    assert losses(alone) == pytest.approx(losses(together), abs=1e-4)
    assert [e.loss for e in alone.held_out] == pytest.approx(
        [e.loss for e in together.held_out], abs=1e-4
    )


def test_the_same_run_leaves_the_same_bytes(
    trained: tuple[Path, StageResult], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = answers_stage_dir(tmp_path / "again", "orpo", tiny_model, dataset)
    run_here("orpo", stage_dir)
    assert digests_of(stage_dir / "output") == digests_of(trained[0] / "output")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    trained: tuple[Path, StageResult], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = answers_stage_dir(
        tmp_path / "two", "orpo", tiny_model, dataset, launch={"num_processes": 2}
    )
    run("orpo", stage_dir, processes=2)
    alone, together = history_of(trained[0]), history_of(stage_dir)
    assert losses(together) == pytest.approx(losses(alone), abs=1e-4)
    assert [e.loss for e in together.held_out] == pytest.approx(
        [e.loss for e in alone.held_out], abs=1e-4
    )
