import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import DataError, RecipeError
from posttrain.events import EventReader, Warn
from posttrain.recipe.dpo import DpoConfig
from posttrain.stages.program import StageResult
from posttrain.train.head import PlainLogProbs
from posttrain.train.pairs import encode_pairs
from tests.unit.train.pair_programs import (
    answers_stage_dir,
    make_marked_dataset,
    make_pair_dataset,
    make_pairs,
    make_reference,
    run_here,
)
from tests.unit.train.programs import digests_of, history_of, losses, progress_of, run

# Losses of the run below on the tiny model, float32, CPU. A refactoring must not move them.
GOLDEN_LOSSES = [0.693147, 0.693147, 0.642455, 0.568746, 0.546537, 0.552444]
GOLDEN_HELD_OUT = [0.693147, 0.640908, 0.551095, 0.528364]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair_dataset(tmp_path_factory.mktemp("dataset") / "pairs")


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StageResult]:
    stage_dir = answers_stage_dir(
        tmp_path_factory.mktemp("dpo") / "run", "dpo", tiny_model, dataset
    )
    return stage_dir, run_here("dpo", stage_dir)


def warnings_of(stage_dir: Path) -> list[str]:
    events = EventReader(stage_dir / "events.jsonl").read()
    return [event.message for event in events if isinstance(event, Warn)]


def answer_logp(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    """Sum over the answer's tokens, by the model's own logits."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float(logits[place, token]) for place, token in zip(places, answer, strict=True))


def test_losses_are_those_of_the_last_release(trained: tuple[Path, StageResult]) -> None:
    history = history_of(trained[0])
    assert losses(history) == pytest.approx(GOLDEN_LOSSES, abs=1e-4)
    assert [e.loss for e in history.held_out] == pytest.approx(GOLDEN_HELD_OUT, abs=1e-4)


def test_held_out_rows_are_scored_as_the_saved_adapter_and_its_base_score_them(
    trained: tuple[Path, StageResult], tiny_model: Path
) -> None:
    """Recomputed row by row without the trainer: log-probabilities, rewards, loss and accuracy."""
    account = pq.read_table(trained[0] / "output/held_out.parquet").to_pydict()
    rows = make_pairs(7, seed=1)
    assert sorted(account["id"]) == sorted(row.id for row in rows)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    pairs = {
        row.id: pair
        for row, pair in zip(
            rows, encode_pairs(AutoTokenizer.from_pretrained(tiny_model), rows, 64), strict=True
        )
    }
    reference = {
        key: (
            answer_logp(base, pair.prompt_ids, pair.chosen_ids),
            answer_logp(base, pair.prompt_ids, pair.rejected_ids),
        )
        for key, pair in pairs.items()
    }
    model = PeftModel.from_pretrained(base, trained[0] / "output").eval()
    total = 0.0
    for line, key in enumerate(account["id"]):
        chosen = answer_logp(model, pairs[key].prompt_ids, pairs[key].chosen_ids)
        rejected = answer_logp(model, pairs[key].prompt_ids, pairs[key].rejected_ids)
        assert account["chosen_logp"][line] == pytest.approx(chosen, abs=1e-3)
        assert account["reference_rejected_logp"][line] == pytest.approx(
            reference[key][1], abs=1e-3
        )
        margin = 0.1 * (chosen - reference[key][0] - rejected + reference[key][1])
        assert account["margin"][line] == pytest.approx(margin, abs=1e-4)
        total -= float(torch.nn.functional.logsigmoid(torch.tensor(margin)))
    metrics = trained[1].metrics
    assert metrics["held_out_loss"] == pytest.approx(total / 7, abs=1e-5)
    right = sum(margin > 0 for margin in account["margin"])
    assert metrics["held_out_accuracy"] == right / 7
    assert metrics["held_out_accuracy_low"] < right / 7 <= metrics["held_out_accuracy_high"]
    assert metrics["held_out_margin"] == pytest.approx(sum(account["margin"]) / 7)
    assert metrics["held_out_margin_before"] == pytest.approx(0)


def test_what_trl_says_of_each_step_is_kept_and_shown(trained: tuple[Path, StageResult]) -> None:
    stage_dir, result = trained
    names = {
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
        *("entropy", "mean_token_accuracy"),
    }
    record = json.loads((stage_dir / "output/training.json").read_bytes())
    assert all(step["values"].keys() == names for step in record["steps"])
    assert record["held_out"][-1]["values"]["rewards/margins"] > 0
    assert names <= progress_of(stage_dir)[-1].values.keys()
    # Of 600 words, hardly known: entropy is close to that of guessing.
    assert 6.2 < record["steps"][0]["values"]["entropy"] < 6.4
    assert "of 7 pairs right" in result.headline
    assert "held-out loss 0.6931 -> " in result.headline
    assert "Loss of a pair over optimizer steps" in (stage_dir / "output/loss.html").read_text()


def test_the_adapter_alone_is_saved(trained: tuple[Path, StageResult], tiny_model: Path) -> None:
    output = trained[0] / "output"
    assert {path.name for path in output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "held_out.parquet",
        "loss.html",
        "resources.json",
        "rows.parquet",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    names = load_file(output / "adapter_model.safetensors")
    assert len(names) == 2 * 7 * 2, "A and B of seven layers in each of two blocks"
    assert not any("ref" in name.split(".") for name in names)
    for path in output.glob("*.json"):
        assert str(tiny_model) not in path.read_text()


def test_what_is_logged_of_the_logits_is_right() -> None:
    """Of the plain head: compared with what the logits themselves say."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8), torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(0, 11, (7,))
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    found = PlainLogProbs.apply(hidden, weight, None, targets, 1.0, 1024, None, 1.0, names)
    logits = hidden @ weight.T
    log_probs = logits.log_softmax(-1)
    expected = (
        log_probs.gather(1, targets[:, None])[:, 0],
        -(log_probs.exp() * log_probs).sum(-1),
        (2 * log_probs).exp().sum(-1).log(),
        logits.mean(-1),
        logits.argmax(-1) == targets,
    )
    for name, ours, theirs in zip(names, found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
        assert ours.requires_grad == (name == "log_probs")


def test_every_training_pair_is_accounted_for(trained: tuple[Path, StageResult]) -> None:
    """22 rows in batches of 8: two of them stand in the table twice."""
    account = pq.read_table(trained[0] / "output/rows.parquet").to_pydict()
    assert account["id"] == [row.id for row in make_pairs(22)]
    assert account["passes"] == [4, 4] + [2] * 20
    read = sum(n * times for n, times in zip(account["tokens"], account["passes"], strict=True))
    assert read == history_of(trained[0]).tokens


def test_the_same_run_leaves_the_same_bytes_and_so_does_one_that_was_killed(
    trained: tuple[Path, StageResult], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """A run ended by SIGKILL after its second step goes on from the checkpoint there."""
    stage_dir = answers_stage_dir(tmp_path / "again", "dpo", tiny_model, dataset)
    run_here("dpo", stage_dir)
    shutil.rmtree(stage_dir / "checkpoints/checkpoint-6")
    shutil.rmtree(stage_dir / "checkpoints/checkpoint-4")
    shutil.rmtree(stage_dir / "output")
    run_here("dpo", stage_dir)
    assert digests_of(stage_dir / "output") == digests_of(trained[0] / "output")


def test_a_cached_reference_gives_the_losses_of_a_computed_one(
    trained: tuple[Path, StageResult], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    folder = make_reference(tmp_path / "reference", "dpo", tiny_model, dataset)
    stage_dir = answers_stage_dir(tmp_path / "cached", "dpo", tiny_model, dataset, cached=folder)
    run_here("dpo", stage_dir)
    computed, cached = history_of(trained[0]), history_of(stage_dir)
    assert losses(cached) == pytest.approx(losses(computed), abs=1e-5)
    assert [e.loss for e in cached.held_out] == pytest.approx(
        [e.loss for e in computed.held_out], abs=1e-5
    )


def test_all_weights_are_trained_against_a_copy_of_where_they_started(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = answers_stage_dir(tmp_path / "full", "dpo", tiny_model, dataset, adapter=None)
    metrics = run_here("dpo", stage_dir).metrics
    assert metrics["trainable_share"] == 1
    assert metrics["held_out_loss_before"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["held_out_loss"] < 0.3
    assert metrics["held_out_margin"] > 1
    assert AutoModelForCausalLM.from_pretrained(stage_dir / "output").num_parameters() > 0


def test_without_a_reference_the_answers_own_probabilities_count(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = answers_stage_dir(
        tmp_path / "none", "dpo", tiny_model, dataset, max_steps=2, reference="none"
    )
    run_here("dpo", stage_dir)
    account = pq.read_table(stage_dir / "output/held_out.parquet").to_pydict()
    assert account["reference_chosen_logp"] == [0.0] * 7
    assert account["chosen_reward"] == pytest.approx([0.1 * n for n in account["chosen_logp"]])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, 2])
def test_two_processes_learn_what_one_does(
    trained: tuple[Path, StageResult],
    tiny_model: Path,
    dataset: Path,
    tmp_path: Path,
    zero: int | None,
) -> None:
    launch: dict[str, object] = {"num_processes": 2}
    if zero is not None:
        launch["sharding"] = {"zero": zero}
    stage_dir = answers_stage_dir(tmp_path / "two", "dpo", tiny_model, dataset, launch=launch)
    run("dpo", stage_dir, processes=2)
    alone, together = history_of(trained[0]), history_of(stage_dir)
    assert losses(together) == pytest.approx(losses(alone), abs=1e-4)
    assert [e.loss for e in together.held_out] == pytest.approx(
        [e.loss for e in alone.held_out], abs=1e-4
    )
    accounts = [pq.read_table(folder / "output/rows.parquet") for folder in (trained[0], stage_dir)]
    assert accounts[0].equals(accounts[1])


def test_chosen_answers_that_become_unlikely_are_said(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """A loss that pushes both answers down, far too fast."""
    stage_dir = answers_stage_dir(
        tmp_path / "falling",
        "dpo",
        tiny_model,
        dataset,
        adapter=None,
        loss="apo_down",
        epochs=4,
        optimization={"learning_rate": 0.01},
    )
    run_here("dpo", stage_dir)
    assert any(
        "chosen answers became less likely" in message and "raise `beta`" in message
        for message in warnings_of(stage_dir)
    )


def test_rows_of_another_kind_are_refused_with_the_formats_that_do(
    tiny_model: Path, tmp_path: Path
) -> None:
    marked = make_marked_dataset(tmp_path / "marked")
    stage_dir = answers_stage_dir(tmp_path / "dpo", "dpo", tiny_model, marked)
    with pytest.raises(DataError, match=r"needs preferences and these rows are kto.*: preference"):
        run_here("dpo", stage_dir)


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        ({"loss": "exo_pair"}, "write 0.001"),
        ({"label_smoothing": 0.1}, "loss: robust"),
        ({"adapter": {"init": "pissa"}}, "reference: cached"),
        ({"batching": {"packing": True}}, "packing: false"),
        ({"optimization": {"neftune_alpha": 5}}, "remove `optimization.neftune_alpha`"),
    ],
)
def test_what_cannot_work_is_refused_when_the_recipe_is_read(
    config: dict[str, object], fix: str
) -> None:
    with pytest.raises(ValidationError, match=fix):
        DpoConfig(dataset="pairs", **config)  # type: ignore[arg-type]


def test_a_field_that_the_recipe_has_is_sent_there(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = answers_stage_dir(
        tmp_path / "dpo", "dpo", tiny_model, dataset, extra_args={"loss_type": "ipo"}
    )
    with pytest.raises(RecipeError, match="write `loss` of the stage"):
        run_here("dpo", stage_dir)
