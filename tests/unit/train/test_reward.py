import hashlib
import json
import math
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from posttrain.data.formats import read_rows
from posttrain.data.mixing import mix_datasets
from posttrain.data.prepared import write_dataset
from posttrain.data.rows import Message, Preference
from posttrain.errors import DataError
from posttrain.events import EventReader, EventWriter, Warn
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.mix import MixConfig
from posttrain.recipe.reward import RewardConfig
from posttrain.stages.program import StageContext, StageInput, StageResult, read_result
from posttrain.stages.reward import main
from posttrain.train.reward_model import load_reward_model
from tests.unit.train.programs import (
    COLOURS,
    THINGS,
    digests_of,
    history_of,
    losses,
    make_dataset,
    make_stage_dir,
    progress_of,
    run,
    start,
)

# Losses of the run below on the tiny model, float32, CPU. A refactoring must not move them; a
# change that is meant to (another optimizer, another head) replaces them and says why.
GOLDEN_LOSSES = [0.650553, 0.681145, 0.559486, 0.400000, 0.208137, 0.333748]
GOLDEN_HELD_OUT = [0.673224, 0.536220, 0.295695, 0.219168]


def make_pairs(count: int, seed: int = 0, margin: float | None = None) -> list[Preference]:
    """Pairs with a rule to learn: the chosen answer agrees, the rejected one does not."""
    draw = random.Random(seed)
    pairs = []
    for row in range(1, count + 1):
        colour, thing = draw.choice(COLOURS), draw.choice(THINGS)
        name = hashlib.sha256(f"{seed} {row}".encode()).hexdigest()[:16]
        pairs.append(
            Preference(
                id=name,
                file="pairs.jsonl",
                row=row,
                prompt=(Message("user", f"Is the {thing} {colour}? ({row})"),),
                chosen=(Message("assistant", f"Yes, the {thing} is {colour}."),),
                rejected=(Message("assistant", f"No, the {thing} is {draw.choice(COLOURS)}."),),
                margin=margin,
            )
        )
    return pairs


def make_preferences(
    folder: Path, train: int = 24, held_out: int = 10, margin: float | None = None
) -> Path:
    rows = {"train": make_pairs(train, 0, margin), "validation": make_pairs(held_out, 1, margin)}
    write_dataset(folder, "preferences", rows)  # type: ignore[arg-type]
    return folder


def reward_stage_dir(folder: Path, model: Path, dataset: Path, **config: object) -> Path:
    """A work directory of a short run: six steps over 24 pairs, evaluated at 0, 2, 4 and 6."""
    settings: dict[str, object] = {
        "dataset": "pairs",
        "epochs": 2,
        "adapter": {"rank": 4, "dropout": 0.1},
        "optimization": {"learning_rate": 5e-3},
        "batching": {"batch_size": 8, "max_length": 96},
        "validation": {"every_steps": 2},
        "dtype": "float32",
        **config,
    }
    inputs = {
        "model": StageInput(kind="model", path=str(model), digest="base-digest"),
        "dataset": StageInput(kind="dataset", path=str(dataset), digest="dataset-digest"),
    }
    return make_stage_dir(folder, "reward", settings, inputs)


def train(stage_dir: Path) -> StageResult:
    """Run the stage in this process, which has the libraries loaded already."""
    context = StageContext(stage_dir, RewardConfig)
    context.output.mkdir(exist_ok=True)
    result = main(context)
    assert result is not None
    return result


def as_input(stage_dir: Path, base: Path) -> StageInput:
    """What a later stage is given of a run."""
    output = stage_dir / "output"
    adapted = (output / "adapter_config.json").exists()
    return StageInput(
        kind="reward", path=str(output), digest="", base=str(base) if adapted else None
    )


def warnings_of(stage_dir: Path) -> list[str]:
    events = EventReader(stage_dir / "events.jsonl").read()
    return [event.message for event in events if isinstance(event, Warn)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_preferences(tmp_path_factory.mktemp("dataset") / "pairs")


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StageResult]:
    stage_dir = reward_stage_dir(tmp_path_factory.mktemp("reward") / "run", tiny_model, dataset)
    return stage_dir, train(stage_dir)


def test_losses_are_those_of_the_last_release(trained: tuple[Path, StageResult]) -> None:
    history = history_of(trained[0])
    assert losses(history) == pytest.approx(GOLDEN_LOSSES, abs=1e-4)
    assert [e.loss for e in history.held_out] == pytest.approx(GOLDEN_HELD_OUT, abs=1e-4)


def test_the_result_says_how_good_the_scores_are(trained: tuple[Path, StageResult]) -> None:
    stage_dir, result = trained
    metrics = result.metrics
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"]
    assert metrics["held_out_accuracy_low"] < metrics["held_out_accuracy"] == 1
    assert 0 <= metrics["held_out_brier"] < 0.25
    assert 0 <= metrics["held_out_calibration_error"] <= 0.5
    assert not any("perplexity" in name for name in metrics)
    assert result.headline.startswith("held-out accuracy 100.0% (72.2% to 100.0%), held-out loss ")
    last = progress_of(stage_dir)[-1]
    assert (last.done, last.total) == (6, 6)
    assert {"accuracy", "margin", "mean_reward", "tokens_per_s"} <= last.values.keys()
    assert history_of(stage_dir).held_out[-1].values["accuracy"] == 1


def test_the_held_out_table_has_the_scores_that_the_loaded_model_gives(
    trained: tuple[Path, StageResult], tiny_model: Path
) -> None:
    """And the figures of the result follow from it."""
    table = pq.read_table(trained[0] / "output/held_out.parquet").to_pydict()
    pairs = sorted(make_pairs(10, seed=1), key=lambda pair: table["id"].index(pair.id))
    model = load_reward_model(as_input(trained[0], tiny_model), "float32")
    for kind in ("chosen", "rejected"):
        scores = model.scores([pair.prompt + getattr(pair, kind) for pair in pairs])
        assert scores == pytest.approx(table[kind], abs=1e-5)
    assert set(table["task"]) == {"pairs"}
    margins = np.array(table["chosen"]) - np.array(table["rejected"])
    assert table["margin"] == pytest.approx(margins)
    metrics = trained[1].metrics
    assert metrics["held_out_accuracy"] == np.mean(margins > 0)
    assert metrics["held_out_loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), abs=1e-6)
    brier = np.mean((1 - 1 / (1 + np.exp(-margins))) ** 2)
    assert metrics["held_out_brier"] == pytest.approx(brier)


def test_the_average_training_answer_scores_nothing(
    trained: tuple[Path, StageResult], tiny_model: Path
) -> None:
    model = load_reward_model(as_input(trained[0], tiny_model), "float32")
    answers = [
        pair.prompt + answer for pair in make_pairs(24) for answer in (pair.chosen, pair.rejected)
    ]
    scores = model.scores(answers)
    assert scores.mean() == pytest.approx(0, abs=1e-5)
    assert scores.std() == pytest.approx(trained[1].metrics["score_std"], abs=1e-5)
    assert abs(trained[1].metrics["score_mean"]) > 1e-3, "else the test shows nothing"


def test_the_output_holds_an_adapter_with_its_head_and_nothing_of_this_machine(
    trained: tuple[Path, StageResult], tiny_model: Path
) -> None:
    output = trained[0] / "output"
    assert {path.name for path in output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "held_out.parquet",
        "loss.html",
        "resources.json",
        "reward.html",
        "reward.json",
        "rows.parquet",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    for path in [*output.glob("*.json"), *output.glob("*.html")]:
        assert str(tiny_model) not in path.read_text()
        assert str(trained[0].parent) not in path.read_text()
    weights = load_file(output / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    (head,) = [weight for name, weight in weights.items() if "score" in name]
    assert head.shape == (1, 64)
    config = json.loads((output / "adapter_config.json").read_bytes())
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]
    assert not any("score" in name for name in config["target_modules"])


def test_plain_peft_reads_the_same_scores(
    trained: tuple[Path, StageResult], tiny_model: Path
) -> None:
    """As tools that know nothing of posttrain would."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model = PeftModel.from_pretrained(base, trained[0] / "output").eval()
    ours = load_reward_model(as_input(trained[0], tiny_model), "float32")
    pair = make_pairs(1, seed=5)[0]
    chat = pair.prompt + pair.chosen
    text = ours.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in chat], tokenize=False
    )
    ids = ours.tokenizer(text.rstrip("\n"), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        score = float(model(**ids).logits)
    assert ours.scores([chat])[0] == pytest.approx(score - ours.record.mean, abs=1e-5)


def test_the_same_run_leaves_the_same_bytes(
    trained: tuple[Path, StageResult], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    again = reward_stage_dir(tmp_path / "elsewhere", tiny_model, dataset)
    train(again)
    assert digests_of(again / "output") == digests_of(trained[0] / "output")


METHODS: dict[str, dict[str, Any]] = {
    "all weights": {"adapter": None, "optimization": {"learning_rate": 2e-3}},
    "dora": {"adapter": {"rank": 4, "dora": True}},
    "pissa": {"adapter": {"rank": 4, "init": "pissa"}},
    "adalora": {"adapter": {"type": "adalora", "rank": 2, "initial_rank": 4}},
    "ia3": {"adapter": {"type": "ia3"}},
    "vera": {"adapter": {"type": "vera", "rank": 16}},
    "qlora": {"adapter": {"rank": 4}, "quantization": {}},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_comes_back_from_disk(
    method: str, tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = reward_stage_dir(tmp_path / "run", tiny_model, dataset, **METHODS[method])
    metrics = train(stage_dir).metrics
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"] - 0.02
    assert (metrics["trainable_share"] == 1) == (METHODS[method]["adapter"] is None)
    model = load_reward_model(as_input(stage_dir, tiny_model), "float32")
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    table = pq.read_table(stage_dir / "output/held_out.parquet").to_pydict()
    pairs = sorted(make_pairs(10, seed=1), key=lambda pair: table["id"].index(pair.id))
    scores = model.scores([pair.prompt + pair.chosen for pair in pairs])
    # The unquantized base is not the one that was trained on.
    tolerance = 0.2 if method == "qlora" else 1e-4
    assert scores == pytest.approx(table["chosen"], abs=tolerance)


def test_all_weights_are_left_as_a_model_of_one_label(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = reward_stage_dir(tmp_path / "run", tiny_model, dataset, adapter=None, max_steps=1)
    train(stage_dir)
    model = AutoModelForSequenceClassification.from_pretrained(stage_dir / "output")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id is not None
    assert model.config.architectures == ["LlamaForSequenceClassification"]


def test_the_head_starts_at_the_scale_of_the_width(tiny_model: Path) -> None:
    """N(0, 1 / (64 + 1)), the same for the same seed."""
    from posttrain.train.reward_head import load_body, start_head

    model = load_body(StageInput(kind="model", path=str(tiny_model), digest=""), "float32")
    drawn = []
    for seed in range(200):
        start_head(model, seed)
        drawn.append(model.score.weight.detach().clone())
    start_head(model, 7)
    assert torch.equal(model.score.weight, drawn[7])
    assert float(torch.cat(drawn).std()) == pytest.approx(65**-0.5, rel=0.02)


def test_margins_are_asked_for_and_can_be_ignored(tiny_model: Path, tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"adapter": {"rank": 4, "dropout": 0.0}}
    found = {}
    for name, margin, use in (("none", None, True), ("ignored", 2.0, False), ("asked", 2.0, True)):
        data = make_preferences(tmp_path / f"{name}-data", margin=margin)
        run_dir = tmp_path / name
        reward_stage_dir(run_dir, tiny_model, data, use_margins=use, epochs=1, **quiet)
        train(run_dir)
        found[name] = history_of(run_dir)
    assert losses(found["ignored"]) == losses(found["none"])
    # -log sigmoid(m - 2) of a pair where -log sigmoid(m) is the loss without it.
    assert losses(found["asked"])[0] > losses(found["none"])[0] + 1
    assert found["asked"].held_out[0].loss == pytest.approx(found["none"].held_out[0].loss)


def test_centring_pulls_scores_towards_zero(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    means = []
    for center in (0.0, 1.0):
        run_dir = tmp_path / str(center)
        reward_stage_dir(
            run_dir,
            tiny_model,
            dataset,
            center=center,
            epochs=6,
            validation={"every_steps": 18},
        )
        means.append(abs(train(run_dir).metrics["score_mean"]))
    assert means[1] < 0.5 * means[0]


def test_every_training_row_is_accounted_for(tiny_model: Path, tmp_path: Path) -> None:
    """27 pairs in batches of 8: five of them fill the last batch of an epoch."""
    data = make_preferences(tmp_path / "data", train=27)
    stage_dir = reward_stage_dir(tmp_path / "run", tiny_model, data)
    result = train(stage_dir)
    account = pq.read_table(stage_dir / "output/rows.parquet").to_pydict()
    assert account["id"] == [pair.id for pair in make_pairs(27)]
    assert set(account["verdict"]) == {"trained"}
    assert account["position"] == list(range(27))
    best = int(result.metrics["best_step"])
    assert best == 8
    assert sorted(account["passes"]) == [2] * 22 + [4] * 5
    read = zip(account["tokens"], account["passes"], strict=True)
    assert sum(tokens * passes for tokens, passes in read) == history_of(stage_dir).tokens


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tiny_model: Path, tmp_path: Path) -> None:
    data = make_preferences(tmp_path / "data", train=27, held_out=7)
    quiet: dict[str, Any] = {"adapter": {"rank": 4, "dropout": 0.0}}
    one = reward_stage_dir(tmp_path / "one", tiny_model, data, **quiet)
    two = reward_stage_dir(tmp_path / "two", tiny_model, data, **quiet, launch={"num_processes": 2})
    alone_metrics = train(one).metrics
    metrics = run("reward", two, processes=2).metrics
    alone, together = history_of(one), history_of(two)
    assert losses(together) == pytest.approx(losses(alone), abs=1e-4)
    assert [e.loss for e in together.held_out] == pytest.approx(
        [e.loss for e in alone.held_out], abs=1e-4
    )
    assert together.tokens == alone.tokens
    assert metrics["score_mean"] == pytest.approx(alone_metrics["score_mean"], abs=1e-4)
    accounts = [pq.read_table(run_dir / "output/rows.parquet") for run_dir in (one, two)]
    assert accounts[0].equals(accounts[1])


def test_a_killed_run_ends_in_the_bytes_of_an_uninterrupted_one(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    long = {"epochs": 10, "validation": {"every_steps": 4, "patience": None}}
    whole = reward_stage_dir(tmp_path / "whole", tiny_model, dataset, **long)
    broken = reward_stage_dir(tmp_path / "broken", tiny_model, dataset, **long)
    program = start("reward", broken)
    try:
        deadline = time.monotonic() + 90
        while not any(event.done >= 14 for event in progress_of(broken)):
            assert program.poll() is None, (broken / "log.txt").read_text()
            assert time.monotonic() < deadline, "no step 14 in 90 s"
            time.sleep(0.005)
    finally:
        program.kill()
    assert program.wait() == -signal.SIGKILL
    assert read_result(broken) is None
    train(broken)
    train(whole)
    assert digests_of(broken / "output") == digests_of(whole / "output")


def test_a_model_that_prefers_the_wrong_answers_is_warned_of(
    tiny_model: Path, tmp_path: Path
) -> None:
    turned = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in make_pairs(10, seed=1)
    ]
    rows = {"train": make_pairs(24), "validation": turned}
    write_dataset(tmp_path / "data", "preferences", rows)  # type: ignore[arg-type]
    stage_dir = reward_stage_dir(tmp_path / "run", tiny_model, tmp_path / "data")
    assert train(stage_dir).metrics["held_out_accuracy"] < 0.6
    said = warnings_of(stage_dir)
    assert any("misleads PPO" in warning for warning in said)
    assert any("did not fall" in warning for warning in said)


def test_answers_that_lose_their_end_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    data = make_preferences(tmp_path / "data")
    batching = {"batch_size": 8, "max_length": 24}
    stage_dir = reward_stage_dir(tmp_path / "run", tiny_model, data, batching=batching, max_steps=1)
    train(stage_dir)
    assert any("24 training pairs have an answer that is cut" in w for w in warnings_of(stage_dir))


def test_each_dataset_of_a_mix_has_a_held_out_loss_of_its_own(
    tiny_model: Path, tmp_path: Path
) -> None:
    folders = {}
    for seed, name in enumerate(("colours", "things")):
        rows = {"train": make_pairs(12, seed), "validation": make_pairs(5, seed + 10)}
        write_dataset(tmp_path / name, "preferences", rows)  # type: ignore[arg-type]
        folders[name] = tmp_path / name
    config = MixConfig(name="both", sources=[{"dataset": name} for name in folders])
    mix_datasets(config, folders, tmp_path / "both", EventWriter(tmp_path / "events.jsonl"))
    stage_dir = reward_stage_dir(tmp_path / "run", tiny_model, tmp_path / "both", epochs=1)
    metrics = train(stage_dir).metrics
    table = pq.read_table(stage_dir / "output/held_out.parquet").to_pydict()
    for task in folders:
        mine = [n for n, name in enumerate(table["task"]) if name == task]
        assert len(mine) == 5
        loss = np.mean([math.log1p(math.exp(-table["margin"][n])) for n in mine])
        assert metrics[f"held_out_loss/{task}"] == pytest.approx(loss, abs=1e-6)


def test_chats_are_refused_with_the_format_that_gives_pairs(
    tiny_model: Path, tmp_path: Path
) -> None:
    chats = make_dataset(tmp_path / "chats")
    stage_dir = reward_stage_dir(tmp_path / "run", tiny_model, chats)
    with pytest.raises(DataError, match="`preference`"):
        train(stage_dir)


@pytest.mark.parametrize("adapter", ["prefix", "prompt", "bottleneck"])
def test_adapters_without_a_place_for_the_head_are_refused(adapter: str) -> None:
    with pytest.raises(ValidationError, match=f"`{adapter}` cannot hold the head"):
        RewardConfig(dataset="pairs", adapter={"type": adapter})


def test_pairs_cannot_be_packed() -> None:
    with pytest.raises(ValidationError, match="packing: false"):
        RewardConfig(dataset="pairs", batching={"packing": True})


def test_real_pairs_are_learned_from(real_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    rows: list[Any] = list(read_rows(DatasetSpec(source=str(real_data / "dpo_en_demo.json"))))
    write_dataset(tmp_path / "data", "preferences", {"train": rows[:40], "validation": rows[40:60]})
    stage_dir = reward_stage_dir(
        tmp_path / "run",
        tiny_model,
        tmp_path / "data",
        batching={"batch_size": 8, "max_length": 256},
        epochs=1,
    )
    metrics = train(stage_dir).metrics
    assert metrics["steps"] == 5
    assert -1 <= metrics["length_spearman"] <= 1
