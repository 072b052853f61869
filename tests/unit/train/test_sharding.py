"""Sharded training on two CPU processes learns, stops, resumes and saves like one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from posttrain.errors import RecipeError, UsageError
from posttrain.events import Event, Phase, Progress
from posttrain.launch import Program, run_to_end
from posttrain.recipe.sft import SftConfig
from posttrain.recipe.training import Launch, Sharding
from posttrain.stages.program import StageContext, StageResult, read_result
from posttrain.stages.sft import main
from posttrain.train.arguments import check_extra_args
from posttrain.train.checkpoints import newest_complete
from posttrain.train.history import History
from posttrain.train.sharding import config_problems, deepspeed_config
from tests.unit.train.programs import (
    history_of,
    losses,
    make_chats,
    make_dataset,
    sft_stage_dir,
)

CONFIGS = Path(__file__).parents[3] / "configs" / "deepspeed"

# Nats, float32, against one process with the same batches: the sums have another order.
TOLERANCE = 1e-4

FULL = {
    "adapter": None,
    "epochs": 25,
    "optimization": {"learning_rate": 0.03, "scheduler": "constant"},
    "batching": {"batch_size": 8, "max_length": 64, "micro_batch_size": 2},
    "validation": {"every_steps": 2, "patience": 1},
}
"""All weights, so fast that the held-out loss rises at step 6 and the run ends with step 4's."""

LORA = {
    "adapter": {"rank": 4, "dropout": 0.0},
    "batching": {"batch_size": 8, "max_length": 64, "micro_batch_size": 2},
}

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

ZERO_2, ZERO_3, FSDP = {"zero": 2}, {"zero": 3}, {"fsdp": True}

DIVIDE_EVERYTHING = {
    "zero_optimization": {
        "stage": 3,
        # ZeRO-3 leaves small parameters whole, and by default this model has no others.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
}


@dataclass(frozen=True)
class Run:
    stage_dir: Path
    result: StageResult

    @property
    def history(self) -> History:
        return history_of(self.stage_dir)

    @property
    def output(self) -> Path:
        return self.stage_dir / "output"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 and 7 rows: the last batch on each side is short, and processes get unequal shares."""
    folder = tmp_path_factory.mktemp("dataset") / "chats"
    return make_dataset(folder, train=27, held_out=7)


@pytest.fixture(scope="module")
def alone(
    tiny_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, object]], Run]:
    """Runs of one process, in this one, each once."""
    runs: dict[str, Run] = {}

    def run(settings: dict[str, object]) -> Run:
        key = json.dumps(settings)
        if key not in runs:
            folder = tmp_path_factory.mktemp("alone") / "sft"
            stage_dir = sft_stage_dir(folder, tiny_model, dataset, **settings)
            context = StageContext(stage_dir, SftConfig)
            context.output.mkdir()
            result = main(context)
            assert result is not None
            runs[key] = Run(stage_dir, result)
        return runs[key]

    return run


@pytest.fixture
def sharded(tiny_model: Path, dataset: Path, tmp_path: Path) -> Callable[..., Run]:
    """Runs on two processes."""

    def run(settings: dict[str, object], sharding: dict[str, object]) -> Run:
        if sharding == ZERO_3:
            sharding = {"config": str(write(tmp_path, DIVIDE_EVERYTHING).config)}
        launch = {"num_processes": 2, "sharding": sharding, "keep_checkpoints": 99}
        folder = tmp_path / "sharded"
        stage_dir = sft_stage_dir(folder, tiny_model, dataset, **settings, launch=launch)
        return Run(stage_dir, start(stage_dir))

    return run


def resume(run: Run, step: int) -> Run:
    """Run it again as if it had been killed after the checkpoint of a step."""
    for checkpoint in (run.stage_dir / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    (run.stage_dir / "result.json").unlink()
    done = []
    result = start(run.stage_dir, lambda e: done.append(e.done) if isinstance(e, Progress) else 0)
    assert min(done) == step + 1
    return Run(run.stage_dir, result)


def start(stage_dir: Path, on_event: Callable[[Event], object] = lambda _: None) -> StageResult:
    config = json.loads((stage_dir / "stage.json").read_bytes())["config"]
    launch = Launch.model_validate(config["launch"])
    program = Program(
        module="posttrain.stages.sft",
        stage_dir=stage_dir,
        num_processes=launch.num_processes,
        nodes=launch.nodes,
        rendezvous=launch.rendezvous,
        torchrun=launch.distributed,
        env=ENVIRONMENT,
    )
    return run_to_end(program, on_event, poll_s=0.02)


def assert_same_losses(run: Run, other: Run, tolerance: float = TOLERANCE) -> None:
    ours, theirs = run.history, other.history
    assert losses(ours) == pytest.approx(losses(theirs), abs=tolerance)
    assert [e.step for e in ours.held_out] == [e.step for e in theirs.held_out]
    assert [e.loss for e in ours.held_out] == pytest.approx(
        [e.loss for e in theirs.held_out], abs=tolerance
    )
    assert ours.trained_tokens == theirs.trained_tokens


def held_out_loss(model: PreTrainedModel, tokenizer_folder: Path) -> float:
    """Recomputed in one process, row by row, without the trainer: nats a trained token."""
    from posttrain.train.rows import encode_rows

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = encode_rows(tokenizer, make_chats(7, seed=1), 64).rows
    total = 0.0
    for row in rows:
        with torch.no_grad():
            out = model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels]))
        total += float(out.loss) * row.trainable
    return total / sum(row.trainable for row in rows)


def assert_complete_and_best(run: Run, tiny_model: Path) -> None:
    """What is saved is whole, and has the held-out loss that was reported, the best one."""
    expected = {name: t.shape for name, t in load_file(tiny_model / "model.safetensors").items()}
    saved = load_file(run.output / "model.safetensors")
    assert {name: t.shape for name, t in saved.items()} == expected
    model = AutoModelForCausalLM.from_pretrained(run.output).eval()
    reported = run.result.metrics["held_out_loss"]
    assert held_out_loss(model, run.output) == pytest.approx(reported, abs=1e-5)
    assert reported == min(e.loss for e in run.history.held_out[1:])
    assert run.result.metrics["best_step"] < run.result.metrics["steps"], "it stopped early"


def assert_adapter_complete_and_best(run: Run, one: Run, tiny_model: Path) -> None:
    name = "adapter_model.safetensors"
    ours, theirs = load_file(run.output / name), load_file(one.output / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.shape == theirs[key].shape
        torch.testing.assert_close(tensor, theirs[key], atol=1e-4, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, run.output).eval()
    reported = run.result.metrics["held_out_loss"]
    assert held_out_loss(model, run.output) == pytest.approx(reported, abs=1e-5)


# Full training


def test_zero_3_learns_resumes_and_saves_the_best_like_one_process(
    alone: Callable[..., Run], sharded: Callable[..., Run], tiny_model: Path
) -> None:
    run = sharded(FULL, ZERO_3)
    assert_same_losses(run, alone(FULL))
    assert_complete_and_best(run, tiny_model)
    whole = run.history
    resumed = resume(run, step=2)
    assert resumed.history == whole
    assert_complete_and_best(resumed, tiny_model)

    # Its checkpoints are no other run's.
    config = json.loads((run.stage_dir / "stage.json").read_bytes())
    config["config"]["launch"] = {}
    (run.stage_dir / "stage.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"written with `zero: 3` on 2 processes.*no sharding"):
        main(StageContext(run.stage_dir, SftConfig))


@pytest.mark.slow
def test_fsdp_learns_and_saves_the_best_like_one_process(
    alone: Callable[..., Run], sharded: Callable[..., Run], tiny_model: Path
) -> None:
    run = sharded(FULL, FSDP)
    assert_same_losses(run, alone(FULL))
    assert_complete_and_best(run, tiny_model)


def test_zero_2_on_two_machines_learns_and_saves_the_best_like_one_process(
    alone: Callable[..., Run], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """Both are this one, with an agent of torchrun's for each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launch = {"nodes": 2, "rendezvous": f"127.0.0.1:{port}", "sharding": ZERO_2}
    stage_dir = sft_stage_dir(tmp_path / "sft", tiny_model, dataset, **FULL, launch=launch)
    others: list[subprocess.Popen[bytes]] = []

    def join(event: Event) -> None:
        if isinstance(event, Phase) and event.message.startswith("waiting at"):
            command = [sys.executable, "-m", "posttrain.launch.join", str(stage_dir)]
            others.append(subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}))

    run = Run(stage_dir, start(stage_dir, join))
    assert [other.wait(timeout=60) for other in others] == [0]
    assert_same_losses(run, alone(FULL))
    assert_complete_and_best(run, tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [ZERO_2, FSDP], ids=["zero2", "fsdp"])
def test_zero_2_and_fsdp_learn_resume_and_save_the_best_like_one_process(
    alone: Callable[..., Run],
    sharded: Callable[..., Run],
    tiny_model: Path,
    sharding: dict[str, object],
) -> None:
    run = sharded(FULL, sharding)
    assert_same_losses(run, alone(FULL))
    whole = run.history
    resumed = resume(run, step=2)
    assert resumed.history == whole
    assert_complete_and_best(resumed, tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharding",
    [
        {"zero": 1},
        {"zero": 2, "offload": "optimizer"},
        {"zero": 3, "offload": "all"},
        {"config": str(CONFIGS / "zero3-offload.json")},
    ],
    ids=["zero1", "zero2-offload", "zero3-offload", "file"],
)
def test_offload_and_files_change_no_result(
    alone: Callable[..., Run],
    sharded: Callable[..., Run],
    tiny_model: Path,
    sharding: dict[str, object],
) -> None:
    run = sharded(FULL, sharding)
    assert_same_losses(run, alone(FULL))
    assert_complete_and_best(run, tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [ZERO_3, FSDP], ids=["zero3", "fsdp"])
def test_a_run_killed_after_its_last_step_is_saved_without_training_further(
    sharded: Callable[..., Run], tiny_model: Path, sharding: dict[str, object]
) -> None:
    finished = sharded(FULL, sharding)
    before = load_file(finished.output / "model.safetensors")
    (finished.stage_dir / "result.json").unlink()
    steps: list[Event] = []
    result = start(finished.stage_dir, steps.append)
    assert not any(isinstance(event, Progress) for event in steps)
    saved = load_file(finished.output / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert_complete_and_best(Run(finished.stage_dir, result), tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("sharding", [ZERO_2, ZERO_3, FSDP], ids=["zero2", "zero3", "fsdp"])
def test_bfloat16_learns_about_the_same(
    alone: Callable[..., Run],
    sharded: Callable[..., Run],
    settings: dict[str, object],
    sharding: dict[str, object],
) -> None:
    """Where DeepSpeed rounds, weights, differs from where autocast does, activations."""
    short = {**settings, "epochs": 2, "dtype": "bfloat16", "optimization": {"learning_rate": 2e-3}}
    run, one = sharded(short, sharding), alone(short)
    assert_same_losses(run, one, tolerance=0.01)


# Adapters


def test_lora_under_zero_3_learns_what_one_process_does_and_saves_whole_weights(
    alone: Callable[..., Run], sharded: Callable[..., Run], tiny_model: Path
) -> None:
    run, one = sharded(LORA, ZERO_3), alone(LORA)
    assert_same_losses(run, one)
    assert_adapter_complete_and_best(run, one, tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [ZERO_2, ZERO_3, FSDP], ids=["zero2", "zero3", "fsdp"])
def test_lora_learns_resumes_and_saves_whole_weights_like_one_process(
    alone: Callable[..., Run],
    sharded: Callable[..., Run],
    tiny_model: Path,
    sharding: dict[str, object],
) -> None:
    run, one = sharded(LORA, sharding), alone(LORA)
    assert_same_losses(run, one)
    whole = run.history
    resumed = resume(run, step=4)
    assert resumed.history == whole
    assert_adapter_complete_and_best(resumed, one, tiny_model)


@pytest.mark.slow
def test_a_sharded_run_that_is_stopped_goes_on_where_it_was(
    alone: Callable[..., Run], tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    settings = {**LORA, "epochs": 40}
    launch = {"num_processes": 2, "sharding": ZERO_3}
    stage_dir = sft_stage_dir(tmp_path / "sft", tiny_model, dataset, **settings, launch=launch)

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(stage_dir, interrupt)
    saved = newest_complete(stage_dir / "checkpoints")
    assert saved is not None
    assert read_result(stage_dir) is None
    steps: list[int] = []
    result = start(stage_dir, lambda e: steps.append(e.done) if isinstance(e, Progress) else 0)
    assert min(steps) == int(saved.name.removeprefix("checkpoint-")) + 1
    assert_same_losses(Run(stage_dir, result), alone(settings), tolerance=0.01)


# DeepSpeed's configuration


@pytest.mark.parametrize(
    ("file", "sharding"),
    [
        ("zero1", Sharding(zero=1)),
        ("zero2", Sharding(zero=2)),
        ("zero3", Sharding(zero=3)),
        ("zero2-offload", Sharding(zero=2, offload="optimizer")),
        ("zero3-offload", Sharding(zero=3, offload="all")),
    ],
)
def test_a_ready_file_says_what_the_recipes_keys_say(file: str, sharding: Sharding) -> None:
    path = CONFIGS / f"{file}.json"
    assert deepspeed_config(Sharding(config=str(path))) == deepspeed_config(sharding)


def test_every_ready_file_is_tested() -> None:
    names = {path.stem for path in CONFIGS.glob("*.json")}
    assert names == {"zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"}


def write(folder: Path, config: object) -> Sharding:
    path = folder / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return Sharding(config=str(path))


@pytest.mark.parametrize(
    ("setting", "recipe_key"),
    [
        ({"train_batch_size": 64}, "batching.batch_size"),
        ({"train_micro_batch_size_per_gpu": 4}, "batching.micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "batching.micro_batch_size"),
        ({"gradient_clipping": 0.5}, "optimization.max_grad_norm"),
        ({"optimizer": {"type": "AdamW"}}, "optimization"),
        ({"scheduler": {"type": "WarmupLR"}}, "optimization.scheduler"),
        ({"bf16": {"enabled": True}}, "dtype"),
        ({"fp16": {"enabled": False}}, "dtype"),
    ],
)
def test_a_file_that_says_what_the_recipe_says_is_refused_with_the_recipes_key(
    tmp_path: Path, setting: dict[str, object], recipe_key: str
) -> None:
    sharding = write(tmp_path, {"zero_optimization": {"stage": 2}, **setting})
    (problem,) = config_problems(sharding, "stages[0].sft.launch.sharding")
    assert problem.where == "stages[0].sft.launch.sharding.config"
    assert next(iter(setting)) in problem.message
    assert f"write `{recipe_key}`" in str(problem.fix)
    with pytest.raises(RecipeError):
        deepspeed_config(sharding)


def test_a_file_may_leave_values_to_the_trainer_and_set_what_the_recipe_cannot(
    tmp_path: Path,
) -> None:
    sharding = write(
        tmp_path,
        {
            "train_batch_size": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "initial_scale_power": 12},
            "zero_optimization": {"stage": 3, "sub_group_size": 1000},
        },
    )
    config = deepspeed_config(sharding)
    assert config["fp16"] == {"enabled": "auto", "initial_scale_power": 12}
    zero = config["zero_optimization"]
    assert isinstance(zero, dict)
    assert zero["sub_group_size"] == 1000
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ({"zero_optimization": {"stage": 0}}, "stage` of 1, 2 or 3"),
        ({}, "stage` of 1, 2 or 3"),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "stage3_gather_16bit_weights_on_model_save": False,
                }
            },
            "saved complete",
        ),
    ],
)
def test_a_file_that_cannot_work_is_refused(tmp_path: Path, content: object, message: str) -> None:
    (problem,) = config_problems(write(tmp_path, content), "launch.sharding")
    assert message in problem.message


def test_a_missing_file_is_named() -> None:
    (problem,) = config_problems(Sharding(config="no/such.json"), "launch.sharding")
    assert "no/such.json" in problem.message


def test_extra_args_point_to_the_recipes_keys() -> None:
    problems = check_extra_args(["deepspeed", "fsdp"])
    assert [problem.fix for problem in problems] == [
        "write `launch.sharding` of the stage instead"
    ] * 2


# The recipe


def test_full_in_short_is_sharding_of_all_weights() -> None:
    config = SftConfig.model_validate(
        {"stage": "sft", "dataset": "chats", "full": {"zero": 3, "offload": "optimizer"}}
    )
    assert config.adapter is None
    assert config.launch.sharding == Sharding(zero=3, offload="optimizer")
    assert config.launch.distributed


@pytest.mark.parametrize("sharding", [{"zero": 3}, {"fsdp": True}])
def test_four_bit_weights_are_not_divided(sharding: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="zero: 2"):
        SftConfig.model_validate(
            {
                "stage": "sft",
                "dataset": "chats",
                "quantization": {},
                "launch": {"sharding": sharding},
            }
        )


def test_two_places_that_say_how_to_shard_are_refused() -> None:
    with pytest.raises(ValueError, match=r"launch\.sharding"):
        SftConfig.model_validate(
            {
                "stage": "sft",
                "dataset": "chats",
                "full": {"zero": 3},
                "launch": {"sharding": {"zero": 2}},
            }
        )
