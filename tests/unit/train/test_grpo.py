import json
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from posttrain.data.prepared import PreparedDataset, write_dataset
from posttrain.data.rows import Document
from posttrain.errors import DataError, ModelError, UsageError
from posttrain.events import EventReader
from posttrain.recipe.grpo import GrpoConfig
from posttrain.recipe.online import Rollout
from posttrain.stages.program import StageContext, StageInput, StageResult
from posttrain.train.callbacks import RefuseDivergence
from posttrain.train.group_learning import learn, plan_steps
from posttrain.train.group_trainers import _count_positions, _seed
from posttrain.train.prompts import encode_prompts
from posttrain.train.rollout import answer_log_probs, make_rollouts
from tests.unit.train.programs import (
    digests_of,
    history_of,
    losses,
    make_chats,
    make_dataset,
    make_stage_dir,
    progress_of,
    run,
    start,
)

REWARDS = """
def letters(answers):
    return [sum(c in "abcdefghijklmnopqrstuvwxyz" for c in a) / max(len(a), 1) for a in answers]

def short(answers):
    return [-len(answer) / 100 for answer in answers]

def broken(answers):
    return [1 / (len(answer) - len(answer)) for answer in answers]
"""

LEARNS = {
    "max_steps": 10,
    "answers": 8,
    "beta": 0.001,
    "rollout": {"max_new_tokens": 6},
    "batching": {"batch_size": 32},
    "validation": {"every_steps": 5, "patience": None},
}


def group_stage_dir(folder: Path, stage: str, model: Path, dataset: Path, **config: object) -> Path:
    """A work directory of a short run: six steps of four answers to each of four prompts."""
    rewards = folder.parent / "rewards.py"
    rewards.write_text(REWARDS)
    settings: dict[str, object] = {
        "dataset": "chats",
        "max_steps": 6,
        "adapter": {"rank": 4, "dropout": 0.1},
        "reward": "rewards.py:letters",
        "answers": 4,
        "beta": 0.01,
        "rollout": {"max_new_tokens": 8},
        "optimization": {"learning_rate": 2e-2, "scheduler": "constant", "warmup": 0.0},
        "batching": {"batch_size": 16},
        "validation": {"every_steps": 2},
        "dtype": "float32",
        **config,
    }
    source = StageInput(kind="source", path=str(rewards), digest="rewards-digest")
    inputs = {
        "model": StageInput(kind="model", path=str(model), digest="base-digest"),
        "dataset": StageInput(kind="dataset", path=str(dataset), digest="dataset-digest"),
        **{f"reward:{name}": source for name in ("letters", "short", "broken")},
    }
    return make_stage_dir(folder, stage, settings, inputs)


def make_sharp_model(tiny_model: Path, folder: Path) -> Path:
    """The tiny model with opinions: larger embeddings, so that an adapter can change its mind."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def train(stage_dir: Path) -> StageResult:
    """Run the stage in this process, which has the libraries loaded already."""
    context = StageContext(stage_dir, GrpoConfig)
    context.output.mkdir()
    result = learn(context)
    assert result is not None
    return result


def warnings_of(stage_dir: Path) -> str:
    return (stage_dir / "events.jsonl").read_text()


def wait_for_step(stage_dir: Path, step: int) -> None:
    """Return once the program has reported the step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (stage_dir / "events.jsonl").exists() and any(
            event.done >= step for event in progress_of(stage_dir)
        ):
            return
        time.sleep(0.02)
    raise AssertionError((stage_dir / "log.txt").read_text())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "chats")


@pytest.fixture(scope="module")
def sharp_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sharp_model(tiny_model, tmp_path_factory.mktemp("sharp"))


@pytest.fixture(scope="module")
def trained(
    sharp_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StageResult]:
    folder = tmp_path_factory.mktemp("grpo") / "run"
    stage_dir = group_stage_dir(folder, "grpo", sharp_model, dataset)
    return stage_dir, train(stage_dir)


@pytest.mark.parametrize("adapter", [{"rank": 8}, None], ids=["lora", "full"])
def test_the_reward_rises(
    sharp_model: Path, dataset: Path, tmp_path: Path, adapter: dict[str, int] | None
) -> None:
    rate = {"learning_rate": 2e-2 if adapter else 5e-3, "scheduler": "constant"}
    stage_dir = group_stage_dir(
        tmp_path / "run",
        "grpo",
        sharp_model,
        dataset,
        **{**LEARNS, "adapter": adapter, "optimization": rate},
    )
    metrics = train(stage_dir).metrics
    assert metrics["held_out_reward_after"] > metrics["held_out_reward_before"] + 0.3
    assert metrics["held_out_kl"] > 1
    assert metrics["trainable_share"] == 1 or adapter


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_the_reward_rises_with_every_loss_and_seed(
    sharp_model: Path, dataset: Path, tmp_path: Path, loss: str, seed: int
) -> None:
    settings = {**LEARNS, "loss": loss, "seed": seed}
    stage_dir = group_stage_dir(tmp_path / "run", "grpo", sharp_model, dataset, **settings)
    metrics = train(stage_dir).metrics
    assert metrics["held_out_reward_after"] > metrics["held_out_reward_before"] + 0.3


def test_the_result_says_what_was_gained(trained: tuple[Path, StageResult]) -> None:
    stage_dir, result = trained
    metrics, history = result.metrics, history_of(stage_dir)
    before, after = metrics["held_out_reward_before"], metrics["held_out_reward_after"]
    assert f"held-out reward {before:.2f} -> {after:.2f} at " in result.headline
    assert result.headline.endswith(f"{metrics['held_out_kl']:.1f} nats of KL in 6 steps")
    assert metrics["tokens"] == sum(step.tokens for step in history.steps)
    assert 0 < metrics["trained_tokens"] < metrics["tokens"]
    assert [e.step for e in history.held_out] == [0, 2, 4, 6]
    for evaluation in history.held_out:
        gained = evaluation.values["reward"] - 0.01 * evaluation.values["kl"]
        assert evaluation.loss == pytest.approx(-gained, abs=1e-9)
    assert metrics["held_out_loss"] == min(e.loss for e in history.held_out[1:])


def test_every_step_has_the_numbers_of_trl_and_none_of_the_machine(
    trained: tuple[Path, StageResult],
) -> None:
    for step in history_of(trained[0]).steps:
        assert step.values.keys() >= {
            "reward",
            "reward_std",
            "kl",
            "entropy",
            "rewards/letters/mean",
            "clip_ratio/region_mean",
            "completions/mean_length",
            "completions/clipped_ratio",
        }
        assert "step_time" not in step.values
        assert step.values["entropy"] > 0
        assert step.values["reward"] == pytest.approx(step.values["rewards/letters/mean"])
        assert step.trained_tokens == pytest.approx(16 * step.values["completions/mean_length"])
    shown = progress_of(trained[0])[-1].values
    assert {"reward", "kl", "tokens_per_s"} <= shown.keys()


def test_the_held_out_answers_and_their_kl_are_those_of_the_saved_adapter(
    trained: tuple[Path, StageResult], sharp_model: Path, dataset: Path
) -> None:
    """Written and scored again without the trainer, one answer at a time."""
    tokenizer = AutoTokenizer.from_pretrained(sharp_model)
    base = AutoModelForCausalLM.from_pretrained(sharp_model).eval()
    model = PeftModel.from_pretrained(base, trained[0] / "output").eval()
    rows = PreparedDataset.open(dataset).validation()
    found = [prompt for prompt in encode_prompts(tokenizer, rows, 256) if prompt]
    prompts = [prompt.input_ids for prompt in found]
    rollout = Rollout(max_new_tokens=8, batch_size=1)
    answers = make_rollouts(model, tokenizer, rollout).write(prompts, _seed(0, 0))
    kl = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        both = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad():
            policy = model(both).logits.log_softmax(-1)
            with model.disable_adapter():
                reference = model(both).logits.log_softmax(-1)
        ratio = (policy - reference)[0, len(prompt) - 1 : -1]
        kl += float(ratio.gather(1, torch.tensor(answer.token_ids)[:, None]).sum())
    metrics = trained[1].metrics
    assert metrics["held_out_kl"] == pytest.approx(kl / len(prompts), abs=1e-3)
    assert metrics["held_out_length"] == np.mean([len(a.token_ids) for a in answers])
    kept = pq.read_table(trained[0] / "output/answers.parquet").to_pydict()
    last = [a for a, s in zip(kept["answer"], kept["step"], strict=True) if s]
    assert {answer.text for answer in answers} <= set(last)


def test_the_output_holds_the_adapter_that_is_trained_and_no_copy_of_it(
    trained: tuple[Path, StageResult],
) -> None:
    stage_dir, result = trained
    assert {path.name for path in (stage_dir / "output").iterdir()} == {
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
    tensors = load_file(stage_dir / "output/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert sum(t.numel() for t in tensors.values()) == result.metrics["trainable_parameters"]
    assert not any("ref" in name.split(".") for name in tensors)
    assert not list((stage_dir / "checkpoints").rglob("ref"))


def test_the_same_run_leaves_the_same_bytes(
    trained: tuple[Path, StageResult], sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    again = group_stage_dir(tmp_path / "elsewhere", "grpo", sharp_model, dataset)
    train(again)
    assert digests_of(again / "output") == digests_of(trained[0] / "output")


def test_every_prompt_is_accounted_for(trained: tuple[Path, StageResult]) -> None:
    stage_dir, result = trained
    account = pq.read_table(stage_dir / "output/rows.parquet").to_pydict()
    assert account["id"] == [chat.id for chat in make_chats(24)]
    assert sum(account["passes"]) == 4 * result.metrics["best_step"]
    assert account["verdict"] == ["trained" if n else "not read" for n in account["passes"]]


def test_the_trainer_asks_the_tokens_of_the_chat_template(
    sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """All prompts once, in one step: its tokens are those that the account gives them."""
    stage_dir = group_stage_dir(
        tmp_path / "run",
        "grpo",
        sharp_model,
        dataset,
        batching={"batch_size": 96},
        max_steps=None,
        epochs=1,
        validation={},
    )
    train(stage_dir)
    history = history_of(stage_dir)
    assert len(history.steps) == 1
    account = pq.read_table(stage_dir / "output/rows.parquet").to_pydict()
    assert account["passes"] == [1] * 24
    asked = history.steps[0].tokens - history.steps[0].trained_tokens
    assert asked == 4 * sum(account["tokens"])
    tokenizer = AutoTokenizer.from_pretrained(sharp_model)
    expected = [
        len(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": chat.messages[0].content}],
                add_generation_prompt=True,
                return_dict=True,
            )["input_ids"]
        )
        for chat in make_chats(24)
    ]
    assert account["tokens"] == expected


def test_long_prompts_are_left_out_and_counted(sharp_model: Path, tmp_path: Path) -> None:
    texts = ["Tell me", "Tell me " * 30, "Why is it", "When it was"]
    rows = [
        Document(id=f"{n:016}", file="a.txt", row=n, text=text)
        for n, text in enumerate([*texts, *texts[:2]])
    ]
    write_dataset(tmp_path / "docs", "documents", {"train": rows[:4], "validation": rows[4:]})
    stage_dir = group_stage_dir(
        tmp_path / "run",
        "grpo",
        sharp_model,
        tmp_path / "docs",
        rollout={"max_new_tokens": 4, "max_prompt_tokens": 12},
        max_steps=2,
    )
    metrics = train(stage_dir).metrics
    assert (metrics["prompts"], metrics["prompts_left_out"]) == (3, 1)
    said = warnings_of(stage_dir)
    assert "1 training rows have no prompt, or one of more than 12 tokens" in said
    assert "1 held-out rows have no prompt" in said
    account = pq.read_table(stage_dir / "output/rows.parquet").to_pydict()
    assert account["verdict"][1] == "left out"
    assert account["passes"][1] == 0
    assert sum(account["passes"]) == 4 * metrics["best_step"], "three prompts, asked in turn"


def test_without_a_prompt_that_is_short_enough_it_says_so(
    sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    rollout = {"max_prompt_tokens": 3}
    stage_dir = group_stage_dir(tmp_path / "run", "grpo", sharp_model, dataset, rollout=rollout)
    with pytest.raises(DataError, match=r"none of the 24 .* raise `rollout.max_prompt_tokens`"):
        train(stage_dir)


def test_the_terms_of_a_reward_are_learned_by_their_weights(
    sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    reward = [
        {"function": "rewards.py:letters", "weight": 2.0},
        {"function": "rewards.py:short", "weight": -3.0},
    ]
    stage_dir = group_stage_dir(
        tmp_path / "run", "grpo", sharp_model, dataset, reward=reward, max_steps=2
    )
    metrics = train(stage_dir).metrics
    for step in history_of(stage_dir).steps:
        letters, short = (step.values[f"rewards/{name}/mean"] for name in ("letters", "short"))
        assert step.values["reward"] == pytest.approx(2 * letters - 3 * short, abs=1e-6)
    assert metrics["held_out_reward_after"] == pytest.approx(
        2 * metrics["held_out_reward/letters"] - 3 * metrics["held_out_reward/short"]
    )


def test_a_reward_function_that_fails_ends_the_stage_with_its_message(
    sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = group_stage_dir(
        tmp_path / "run", "grpo", sharp_model, dataset, reward="rewards.py:broken"
    )
    with pytest.raises(UsageError, match=r"rewards.py:broken failed in line 9: ZeroDivisionError"):
        train(stage_dir)


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """Two steps learn from the same answers, and 24 prompts are asked more than once."""
    settings = {"passes": 2, "max_steps": 12, "validation": {"every_steps": 4}}
    whole = group_stage_dir(tmp_path / "whole", "grpo", sharp_model, dataset, **settings)
    train(whole)
    killed = group_stage_dir(tmp_path / "killed", "grpo", sharp_model, dataset, **settings)
    program = start("grpo", killed)
    wait_for_step(killed, 6)
    program.kill()
    program.wait()
    assert not (killed / "result.json").exists()
    run("grpo", killed)
    for step, expected in zip(history_of(killed).steps, history_of(whole).steps, strict=True):
        assert step == expected
    assert digests_of(killed / "output") == digests_of(whole / "output")


def test_a_run_that_is_told_to_stop_keeps_the_answers_it_has_learned_from(
    sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    settings = {"passes": 2, "max_steps": 40, "validation": {"every_steps": 20}}
    stage_dir = group_stage_dir(tmp_path / "run", "grpo", sharp_model, dataset, **settings)
    program = start("grpo", stage_dir)
    wait_for_step(stage_dir, 3)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=60) == 143, (stage_dir / "log.txt").read_text()
    [checkpoint] = (stage_dir / "checkpoints").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert step % 2 == 0
    assert 3 <= step < 20
    assert (checkpoint / "COMPLETE").exists()


@pytest.mark.slow
def test_two_processes_write_and_learn_what_one_does(
    sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    quiet = {"adapter": {"rank": 4, "dropout": 0.0}, "max_steps": 4}
    one = group_stage_dir(tmp_path / "one", "grpo", sharp_model, dataset, **quiet)
    two = group_stage_dir(
        tmp_path / "two", "grpo", sharp_model, dataset, **quiet, launch={"num_processes": 2}
    )
    train(one)
    run("grpo", two, processes=2)
    alone, together = history_of(one), history_of(two)
    assert losses(together) == pytest.approx(losses(alone), abs=1e-4)
    for mine, theirs in zip(alone.steps, together.steps, strict=True):
        assert theirs.values["reward"] == pytest.approx(mine.values["reward"], abs=1e-6)
        assert (theirs.tokens, theirs.trained_tokens) == (mine.tokens, mine.trained_tokens)
    assert [e.loss for e in together.held_out] == pytest.approx(
        [e.loss for e in alone.held_out], abs=1e-4
    )
    accounts = [pq.read_table(run_dir / "output/rows.parquet") for run_dir in (one, two)]
    assert accounts[0].equals(accounts[1])


def test_a_base_in_four_bits_is_its_own_reference(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = group_stage_dir(
        tmp_path / "run",
        "grpo",
        tiny_model,
        dataset,
        quantization={"type": "nf4"},
        max_steps=2,
        optimization={"learning_rate": 1e-3, "scheduler": "constant"},
    )
    train(stage_dir)
    first, second = history_of(stage_dir).steps
    assert first.values["kl"] == 0
    assert second.values["kl"] > 0
    tensors = load_file(stage_dir / "output/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_without_a_price_all_weights_learn_without_a_reference(
    sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = group_stage_dir(
        tmp_path / "run", "grpo", sharp_model, dataset, adapter=None, beta=0, max_steps=2
    )
    result = train(stage_dir)
    assert result.metrics["held_out_kl"] != 0, "measured all the same"
    assert "kl" not in history_of(stage_dir).steps[-1].values
    last = history_of(stage_dir).held_out[-1]
    assert last.loss == -last.values["reward"]
    assert json.loads((stage_dir / "output/training.json").read_bytes())["best_step"] == 2


def test_a_loss_that_is_not_a_number_ends_the_run_and_names_the_rows(
    sharp_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage_dir = group_stage_dir(
        tmp_path / "run",
        "grpo",
        sharp_model,
        dataset,
        adapter=None,
        optimization={"learning_rate": 1e30, "warmup": 0.0},
    )
    with pytest.raises((ModelError, UsageError), match=r"(nan|inf|finite)"):
        train(stage_dir)


def test_a_loss_of_rewards_may_be_larger_than_that_of_guessing(tmp_path: Path) -> None:
    watch = RefuseDivergence(lambda _: "", next_token_loss=False)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=1))
    args, state, control = TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl()
    watch.on_train_begin(args, state, control, model=model)
    watch.on_log(args, state, control, logs={"eval_loss": -5.0})
    for _ in range(5):
        watch.on_log(args, state, control, logs={"loss": 1e6})
    with pytest.raises(ModelError, match="loss is nan"):
        watch.on_log(args, state, control, logs={"loss": float("nan")})


def test_padding_before_a_prompt_changes_no_probability() -> None:
    """Of a model that has learned a vector for each position."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)).eval()
    model.register_forward_pre_hook(_count_positions, with_kwargs=True)
    text = [3, 4, 5, 6, 7]
    padded = torch.tensor([[0, 0, *text]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask).logits[0, 4:-1]
    scored = logits.log_softmax(-1).gather(1, torch.tensor([[6], [7]]))[:, 0]
    [expected] = answer_log_probs(model, [text[:3]], [text[3:]], 1.0, 1, 0)
    torch.testing.assert_close(scored, expected)


@pytest.mark.parametrize(
    ("settings", "steps", "every"),
    [
        ({"epochs": 1}, 6, 1),
        ({"epochs": 2, "passes": 3}, 36, 3),
        ({"max_steps": 40, "passes": 4}, 40, 4),
        ({"max_steps": 40, "passes": 8}, 40, 8),
        ({"epochs": 1, "passes": 2, "validation": {"every_steps": 6}}, 12, 6),
    ],
)
def test_every_prompt_is_asked_as_often_as_there_are_epochs(
    settings: dict[str, object], steps: int, every: int
) -> None:
    """24 prompts, four at once."""
    config = GrpoConfig.model_validate(
        {
            "dataset": "chats",
            "reward": "a.py:b",
            "answers": 4,
            "batching": {"batch_size": 16},
            **settings,
        }
    )
    schedule = plan_steps(config, 24, 1)
    assert (schedule.steps, schedule.evaluate_every) == (steps, every)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batching": {"batch_size": 10}}, r"no whole groups of 4"),
        ({"passes": 4, "max_steps": 6}, r"`max_steps` is 6, and 4 steps learn from the same"),
        ({"passes": 4, "validation": {"every_steps": 6}}, r"`validation.every_steps` is 6"),
        ({"extra_args": {"top_p": 0.9}}, r"`extra_args.top_p`: .*nothing is cut off"),
        ({"adapter": {"init": "pissa"}}, r"`init: pissa` changes the base"),
        ({"full": {"fsdp": True}}, r"`fsdp` divide: write `sharding: \{zero: 2\}`"),
        ({"full": {"zero": 3}}, r"`zero: 3` and `fsdp` divide"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(settings: dict[str, object], message: str) -> None:
    recipe = {"dataset": "chats", "reward": "a.py:b", "answers": 4, **settings}
    with pytest.raises(ValueError, match=message):
        GrpoConfig.model_validate(recipe)


def test_the_events_tell_the_held_out_reward(trained: tuple[Path, StageResult]) -> None:
    events = EventReader(trained[0] / "events.jsonl").read()
    values = [event.values for event in events if hasattr(event, "values")]
    assert sum("eval_reward" in value for value in values) == 4
