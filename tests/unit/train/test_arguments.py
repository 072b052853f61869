import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from posttrain.errors import RecipeError
from posttrain.recipe import STAGES, TrainingConfig
from posttrain.recipe.sft import SftConfig
from posttrain.train.arguments import (
    HAS_RECIPE_KEY,
    MANAGED,
    METHOD_KEYS,
    check_extra_args,
    config_class,
    plan_schedule,
    training_arguments,
)


def test_an_unknown_name_is_told_its_neighbours() -> None:
    (problem,) = check_extra_args(["adam_beta"], where="stages[1].sft.extra_args")
    assert problem.where == "stages[1].sft.extra_args.adam_beta"
    assert problem.fix is not None
    assert "`adam_beta1`" in problem.fix


def test_a_name_with_a_recipe_key_is_sent_there() -> None:
    (problem,) = check_extra_args(["learning_rate"])
    assert problem.fix is not None
    assert "optimization.learning_rate" in problem.fix


def test_names_that_posttrain_sets_are_refused_with_the_reason() -> None:
    (problem,) = check_extra_args(["output_dir"])
    assert "work directory" in problem.message


def test_other_fields_pass() -> None:
    assert check_extra_args(["label_smoothing_factor", "adam_beta2", "optim"]) == []


def test_a_recipe_cannot_replace_anything_that_is_set_here(tmp_path) -> None:
    """Every argument that differs from TRL's default is one that `extra_args` refuses."""
    from trl import SFTConfig as TrlSftConfig

    config = SftConfig(dataset="chats", seed=3, optimization={"weight_decay": 0.1})
    schedule = plan_schedule(config, entries=100, world_size=1)
    ours = training_arguments(config, schedule, tmp_path, "float32", resumed=False, method={})
    plain = TrlSftConfig(output_dir="elsewhere", use_cpu=True)
    # Defaults of ours that a recipe may replace; the first is another name of the last.
    free = {"activation_checkpointing", "dataloader_pin_memory", "gradient_checkpointing"}
    for field in dataclasses.fields(TrlSftConfig):
        if getattr(ours, field.name) != getattr(plain, field.name) and field.init:
            assert field.name in {*HAS_RECIPE_KEY, *MANAGED, *free}, field.name


def test_the_tables_name_each_field_once() -> None:
    assert not HAS_RECIPE_KEY.keys() & MANAGED.keys()


METHODS = {
    config.trl_config: config
    for config in STAGES.values()
    if issubclass(config, TrainingConfig) and config.trl_config in METHOD_KEYS
}


@pytest.mark.parametrize("trl_config", METHOD_KEYS)
def test_a_methods_own_keys_are_fields_of_trl_and_send_to_keys_of_the_stage(
    trl_config: str,
) -> None:
    fields = {field.name for field in dataclasses.fields(config_class(trl_config))}
    stage = METHODS[trl_config]
    for name, key in METHOD_KEYS[trl_config].items():
        assert name in fields
        assert key.partition(".")[0] in stage.model_fields
        (problem,) = check_extra_args([name], trl_config=trl_config)
        assert problem.fix == f"write `{key}` of the stage instead"


def test_a_methods_arguments_come_last_and_are_its_own_class(tmp_path) -> None:
    config = STAGES["dpo"](dataset="pairs", extra_args={"discopop_tau": 0.1})
    schedule = plan_schedule(config, entries=100, world_size=1)
    arguments = training_arguments(
        config, schedule, tmp_path, "float32", resumed=False, method={"beta": 0.3}
    )
    assert isinstance(arguments, config_class("DPOConfig"))
    assert (arguments.beta, arguments.discopop_tau) == (0.3, 0.1)


def test_what_would_move_the_reference_is_refused() -> None:
    (problem,) = check_extra_args(["sync_ref_model"], trl_config="DPOConfig")
    assert "one reference throughout" in problem.message


def test_an_extra_argument_reaches_trl(tmp_path) -> None:
    config = SftConfig(dataset="chats", extra_args={"adam_beta2": 0.95})
    schedule = plan_schedule(config, entries=100, world_size=1)
    arguments = training_arguments(config, schedule, tmp_path, "float32", resumed=True, method={})
    assert arguments.adam_beta2 == 0.95


def test_a_wrong_value_is_an_error_of_the_recipe(tmp_path) -> None:
    config = SftConfig(dataset="chats", extra_args={"optim": "sgdd"})
    schedule = plan_schedule(config, entries=100, world_size=1)
    with pytest.raises(RecipeError, match="extra_args"):
        training_arguments(config, schedule, tmp_path, "float32", resumed=True, method={})


@given(
    per_process=st.integers(1, 64),
    processes=st.integers(1, 8),
    rows=st.integers(1, 1000),
    epochs=st.floats(0.1, 5),
)
def test_the_global_batch_does_not_depend_on_the_processes(
    per_process: int, processes: int, rows: int, epochs: float
) -> None:
    batching = {"batch_size": per_process * processes}
    one = SftConfig(dataset="chats", epochs=epochs, batching=batching)
    many = one.model_copy(
        update={"launch": one.launch.model_copy(update={"num_processes": processes})}
    )
    alone = plan_schedule(one, rows, world_size=1)
    together = plan_schedule(many, rows, world_size=processes)
    for schedule in (alone, together):
        assert schedule.rows_a_pass * schedule.accumulation == one.batching.batch_size
    assert (alone.steps, alone.evaluate_every) == (together.steps, together.evaluate_every)
    assert 1 <= alone.evaluate_every <= alone.steps


@pytest.mark.parametrize(
    ("batching", "processes", "fix"),
    [
        ({"batch_size": 6, "micro_batch_size": 4}, 1, "micro_batch_size must divide"),
        ({"batch_size": 7}, 2, "must be a multiple of"),
        ({"batch_size": 1}, 2, "must be a multiple of"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(
    batching: dict[str, int], processes: int, fix: str
) -> None:
    with pytest.raises(ValidationError, match=fix):
        SftConfig(dataset="chats", batching=batching, launch={"num_processes": processes})
