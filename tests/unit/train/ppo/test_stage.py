import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.errors import DataError, ModelError
from posttrain.recipe.ppo import PpoConfig
from posttrain.stages.ppo import main
from posttrain.stages.program import StageContext, StageInput, StageResult
from posttrain.train.callbacks import EXIT_TERMINATED
from tests.unit.train.programs import (
    digests_of,
    history_of,
    make_chats,
    make_dataset,
    make_stage_dir,
    progress_of,
    run,
    start,
)

STEPS, EVERY = 6, 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "chats")


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(
        "def letters(answers, letter='e'):\n"
        "    return [float(answer.count(letter)) for answer in answers]\n"
        "def exhausting(answers):\n"
        "    raise MemoryError('no room')\n"
    )
    return file


def ppo_stage_dir(folder: Path, model: Path, dataset: Path, function: Path, **config: Any) -> Path:
    """Six updates over 24 prompts, evaluated at 0, 2, 4 and 6."""
    settings: dict[str, Any] = {
        "dataset": "chats",
        "reward": f"{function}:letters",
        "adapter": {"rank": 4},
        "max_steps": STEPS,
        "optimization": {"learning_rate": 5e-3},
        "batching": {"batch_size": 8},
        "rollout": {"max_new_tokens": 8},
        "validation": {"every_steps": EVERY, "patience": None},
        "passes": 2,
        "dtype": "float32",
        **config,
    }
    inputs = {
        "model": StageInput(kind="model", path=str(model), digest="base-digest"),
        "dataset": StageInput(kind="dataset", path=str(dataset), digest="dataset-digest"),
    }
    for name in ("letters", "exhausting"):
        inputs[f"reward:{name}"] = StageInput(kind="source", path=str(function), digest="code")
    return make_stage_dir(folder, "ppo", settings, inputs)


def train(stage_dir: Path) -> StageResult:
    context = StageContext(stage_dir, PpoConfig)
    context.output.mkdir()
    result = main(context)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, dataset: Path, function: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that nothing disturbed."""
    stage_dir = ppo_stage_dir(tmp_path_factory.mktemp("ppo") / "run", tiny_model, dataset, function)
    train(stage_dir)
    return stage_dir


def test_the_output_is_an_adapter_that_loads_and_nothing_of_the_critic(
    trained: Path, tiny_model: Path
) -> None:
    output = trained / "output"
    assert {path.name for path in output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "answers.parquet",
        "chat_template.jinja",
        "loss.html",
        "resources.json",
        "rows.parquet",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
        "watch.html",
        "watch.json",
    }
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), output)
    for path in output.glob("*.json"):
        assert str(trained.parent) not in path.read_text()


def test_every_update_is_in_the_history_and_among_the_events(trained: Path) -> None:
    history = history_of(trained)
    assert [step.step for step in history.steps] == list(range(1, STEPS + 1))
    assert [look.step for look in history.held_out] == list(range(0, STEPS + 1, EVERY))
    first = history.steps[0]
    assert first.values["kl"] == 0
    assert first.loss == pytest.approx(-first.values["reward"])
    assert first.learning_rate == 5e-3
    assert history.steps[-1].learning_rate == pytest.approx(5e-3 / STEPS), "annealed towards 0"
    last = history.steps[-1].values
    for name in (
        "reward", "reward/letters", "kl", "kl_k3", "kl_coef", "entropy", "length", "ended",
        "policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "update_kl",
        "update_kl_k1", "explained_variance", "critic_grad_norm", "steps_taken",
    ):  # fmt: skip
        assert name in last
    progress = progress_of(trained)
    assert [event.done for event in progress] == list(range(1, STEPS + 1))
    assert progress[0].unit == "update"
    assert {"reward", "kl", "answers_per_s", "tokens_per_s"} <= set(progress[-1].values)


def test_the_kept_step_has_the_most_reward_less_the_price_of_divergence(trained: Path) -> None:
    history = history_of(trained)
    for look in history.held_out:
        assert look.loss == pytest.approx(0.05 * look.values["kl"] - look.values["reward"])
    kept = load_file(trained / "output/adapter_model.safetensors")
    record = json.loads((trained / "output/training.json").read_bytes())
    assert record["best_step"] == history.best.step
    assert kept


def test_every_row_is_accounted_for(trained: Path) -> None:
    account = pq.read_table(trained / "output/rows.parquet")
    assert account.column("id").to_pylist() == [chat.id for chat in make_chats(24)]
    assert sum(account.column("passes").to_pylist()) == 8 * history_of(trained).best.step


def test_checkpoints_are_bounded(trained: Path) -> None:
    checkpoints = list((trained / "checkpoints").glob("checkpoint-*"))
    assert 2 <= len(checkpoints) <= 3
    assert all((checkpoint / "COMPLETE").exists() for checkpoint in checkpoints)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    sent: signal.Signals,
    trained: Path,
    tiny_model: Path,
    dataset: Path,
    function: Path,
    tmp_path: Path,
) -> None:
    stage_dir = ppo_stage_dir(tmp_path / "stopped", tiny_model, dataset, function)
    program = start("ppo", stage_dir)
    # After an update that no evaluation follows: a checkpoint there is owed to SIGTERM alone.
    while len(progress_of(stage_dir)) < 3 and program.poll() is None:
        time.sleep(0.005)
    program.send_signal(sent)
    code = program.wait(timeout=120)
    assert code == (-signal.SIGKILL if sent == signal.SIGKILL else EXIT_TERMINATED)
    assert not (stage_dir / "result.json").exists()
    shutil.rmtree(stage_dir / "output")
    train(stage_dir)
    assert digests_of(stage_dir / "output") == digests_of(trained / "output")
    done = [event.done for event in progress_of(stage_dir)]
    assert done != list(range(1, STEPS + 1)) + list(range(1, STEPS + 1)), "started all over"


def test_a_checkpoint_that_was_torn_is_not_used(
    trained: Path, tiny_model: Path, dataset: Path, function: Path, tmp_path: Path
) -> None:
    stage_dir = ppo_stage_dir(tmp_path / "torn", tiny_model, dataset, function)
    torn = stage_dir / "checkpoints/checkpoint-4"
    torn.mkdir(parents=True)
    (torn / "policy").write_bytes(b"half")
    train(stage_dir)
    assert digests_of(stage_dir / "output") == digests_of(trained / "output")


def test_a_run_that_had_ended_is_not_trained_any_further(
    trained: Path, tiny_model: Path, dataset: Path, function: Path, tmp_path: Path
) -> None:
    stage_dir = ppo_stage_dir(tmp_path / "again", tiny_model, dataset, function)
    (stage_dir / "checkpoints").symlink_to(trained / "checkpoints")
    train(stage_dir)
    assert not progress_of(stage_dir)
    assert digests_of(stage_dir / "output") == digests_of(trained / "output")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    trained: Path, tiny_model: Path, dataset: Path, function: Path, tmp_path: Path
) -> None:
    launch = {"num_processes": 2}
    stage_dir = ppo_stage_dir(tmp_path / "two", tiny_model, dataset, function, launch=launch)
    run("ppo", stage_dir, processes=2)
    together, alone = history_of(stage_dir), history_of(trained)
    for two, one in zip(together.steps, alone.steps, strict=True):
        assert two.values == pytest.approx(one.values, abs=1e-4)
    assert [look.values for look in together.held_out] == [
        pytest.approx(look.values, abs=1e-4) for look in alone.held_out
    ]
    accounts = [pq.read_table(folder / "output/rows.parquet") for folder in (trained, stage_dir)]
    assert accounts[0].equals(accounts[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": None, "kl": {"target": 1.0}},
        {"adapter": None, "critic": {"backbone": "shared", "learning_rate": 1e-3}},
        {"adapter": {"rank": 4}, "quantization": {}},
    ],
    ids=["all weights, steered", "shared critic", "qlora"],
)
def test_other_ways_to_train(
    settings: dict[str, Any], tiny_model: Path, dataset: Path, function: Path, tmp_path: Path
) -> None:
    stage_dir = ppo_stage_dir(
        tmp_path / "run", tiny_model, dataset, function, **{"max_steps": 2, **settings}
    )
    metrics = train(stage_dir).metrics
    assert metrics["steps"] == 2
    first, second = history_of(stage_dir).steps
    assert first.values["kl"] == pytest.approx(0, abs=1e-4)
    assert second.values["kl"] != 0
    # An answer's divergence is below the target at first.
    steered = "kl" in settings
    assert (second.values["kl_coef"] < first.values["kl_coef"]) == steered
    weights = "model.safetensors" if settings["adapter"] is None else "adapter_model.safetensors"
    assert (stage_dir / "output" / weights).exists()


def test_it_stops_where_nothing_improves(
    tiny_model: Path, dataset: Path, function: Path, tmp_path: Path
) -> None:
    stage_dir = ppo_stage_dir(
        tmp_path / "run", tiny_model, dataset, function,
        max_steps=50, validation={"every_steps": 1, "patience": 2, "min_delta": 100.0},
    )  # fmt: skip
    assert train(stage_dir).metrics["steps"] == 2


def test_running_out_of_memory_says_what_to_write(
    tiny_model: Path, dataset: Path, function: Path, tmp_path: Path
) -> None:
    stage_dir = ppo_stage_dir(tmp_path / "run", tiny_model, dataset, function)
    context = StageContext(stage_dir, PpoConfig)
    context.output.mkdir()

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    context.events.phase = full  # type: ignore[method-assign, assignment]
    with pytest.raises(ModelError, match=r"out of memory .*micro_batch_size: 4.*rollout"):
        main(context)


def test_prompts_that_are_all_too_long_are_refused(
    tiny_model: Path, dataset: Path, function: Path, tmp_path: Path
) -> None:
    stage_dir = ppo_stage_dir(
        tmp_path / "run", tiny_model, dataset, function, rollout={"max_prompt_tokens": 2}
    )
    with pytest.raises(DataError, match="max_prompt_tokens"):
        train(stage_dir)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"type": "prefix"}}, "type: lora"),
        ({"adapter": {"type": "adalora"}}, "type: lora"),
        ({"adapter": {"type": "lora", "init": "pissa"}}, "init: pissa"),
        ({"optimization": {"neftune_alpha": 5}}, "neftune_alpha"),
        ({"launch": {"nodes": 2, "rendezvous": "a:1"}}, "one machine"),
        ({"minibatches": 3}, "3 minibatches"),
        ({"extra_args": {"x": 1}}, "extra_args"),
    ],
)
def test_what_cannot_work_is_refused_in_the_recipe(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PpoConfig.model_validate({"dataset": "d", "reward": "reward", **settings})


def test_the_learning_rate_falls_from_the_first_update_whatever_else_is_said() -> None:
    config = PpoConfig.model_validate(
        {"dataset": "d", "reward": "reward", "optimization": {"learning_rate": 1e-5}}
    )
    assert (config.optimization.scheduler, config.optimization.warmup) == ("linear", 0.0)
