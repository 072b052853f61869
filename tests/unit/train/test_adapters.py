from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from posttrain.errors import ModelError
from posttrain.models import load_causal_lm
from posttrain.recipe.adapters import (
    AdaLoraConfig,
    AdapterConfig,
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
)
from posttrain.stages.program import StageInput
from posttrain.train.adapter_training import ExactAdapterCheckpoints
from posttrain.train.adapters import (
    Trainable,
    adapter_callbacks,
    add_adapter,
    can_recompute_activations,
    check_trainable,
    count_trainable,
)
from posttrain.train.outputs import final_logits, max_difference, save_adapter
from tests.unit.train.programs import digests_of

METHODS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(rank=4),
    "rslora": LoraConfig(rank=4, rank_stabilized=True),
    "dora": LoraConfig(rank=4, dora=True),
    "pissa": LoraConfig(rank=4, init="pissa", dropout=0),
    "rslora, dora and pissa": LoraConfig(
        rank=4, rank_stabilized=True, dora=True, init="pissa", dropout=0
    ),
    "adalora": AdaLoraConfig(type="adalora", rank=2, initial_rank=4),
    "ia3": Ia3Config(type="ia3"),
    "vera": VeraConfig(type="vera", rank=16),
    "prefix": PrefixTuningConfig(type="prefix", virtual_tokens=4),
    "projected prefix": PrefixTuningConfig(type="prefix", virtual_tokens=4, projection_size=16),
    "prompt": PromptTuningConfig(type="prompt", virtual_tokens=4),
    "prompt of a text": PromptTuningConfig(type="prompt", virtual_tokens=4, init_text="Answer"),
    "bottleneck": BottleneckConfig(type="bottleneck", reduction=4),
}
PROMPTS = [[1, 50, 60, 70], [1, 80, 81, 82, 83, 84]]
STEPS = 6

every_method = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS.keys())


class ExactTrainer(ExactAdapterCheckpoints, Trainer):  # type: ignore[misc]
    pass


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load_base(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    return load_causal_lm(StageInput(kind="model", path=str(folder), digest="b"), dtype)  # type: ignore[arg-type]


def load_saved(folder: Path, base: Path, dtype: str = "float32") -> PreTrainedModel:
    source = StageInput(kind="adapter", path=str(folder), digest="a", base=str(base))
    return load_causal_lm(source, dtype)  # type: ignore[arg-type]


def adapted(folder: Path, config: AdapterConfig, steps: int = STEPS) -> peft.PeftModel:
    set_seed(0)
    return add_adapter(load_base(folder), config, steps)


def make_trainer(
    model: peft.PeftModel, config: AdapterConfig, folder: Path, **arguments: Any
) -> ExactTrainer:
    """Plain transformers on twelve rows of one sentence, which is soon known by heart."""
    rows = [[1, 70 + row % 3, 40, 41, 42, 43, 44, 2] for row in range(12)]
    table = {"input_ids": rows, "labels": rows, "attention_mask": [[1] * 8] * 12}
    return ExactTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=10 * config.peak_learning_rate,
            lr_scheduler_type="constant",
            seed=0,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **{"save_strategy": "steps", "save_steps": 1, **arguments},
        ),
        train_dataset=Dataset.from_dict(table),
        callbacks=adapter_callbacks(model, config),
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_values(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[AdapterConfig, tuple[ExactTrainer, Path]]:
    """A run of each method, with the folder of its checkpoints; made when asked for."""

    class Runs(dict):  # type: ignore[type-arg]
        def __missing__(self, config: AdapterConfig) -> tuple[ExactTrainer, Path]:
            folder = tmp_path_factory.mktemp("run")
            trainer = make_trainer(adapted(tiny_model, config), config, folder)
            trainer.train()
            trainer.model.eval()
            self[config] = trainer, folder
            return self[config]

    return Runs()


@every_method
def test_training_lowers_the_loss_and_touches_the_adapter_alone(
    config: AdapterConfig, trained: Any, tiny_model: Path
) -> None:
    trainer, _ = trained[config]
    before, after = losses(trainer)[0], losses(trainer)[-1]
    assert after < before - 0.01
    trainable = count_trainable(trainer.model)
    check_trainable(trainable, adapter=True)
    assert 0 < trainable.share < 0.6
    fresh = adapted(tiny_model, config).get_base_model().state_dict()
    for name, weight in trainer.model.get_base_model().state_dict().items():
        if "base_layer" in name or "embed_tokens" in name:
            torch.testing.assert_close(weight, fresh[name], atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # said of prompt tuning
@every_method
def test_a_saved_adapter_on_a_fresh_base_is_the_model_in_memory(
    config: AdapterConfig, trained: Any, tiny_model: Path, tmp_path: Path
) -> None:
    model = trained[config][0].model
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "a", "digest")
    expected = final_logits(model, PROMPTS)
    loaded = load_saved(tmp_path / "a", tiny_model)
    assert max_difference(expected, final_logits(loaded, PROMPTS)) < 2e-5
    plain = final_logits(load_base(tiny_model), PROMPTS)
    assert max_difference(expected, plain) > 1e-3
    ids = torch.tensor([PROMPTS[0]])
    said = loaded.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3
    )
    assert said.shape == (1, 7)
    assert torch.isfinite(loaded(input_ids=ids, labels=ids).loss)


@every_method
def test_saving_twice_leaves_the_same_bytes_and_nothing_of_this_machine(
    config: AdapterConfig, trained: Any, tiny_model: Path, tmp_path: Path
) -> None:
    model, tokenizer = trained[config][0].model, AutoTokenizer.from_pretrained(tiny_model)
    save_adapter(model, tokenizer, tmp_path / "one", "digest")
    save_adapter(model, tokenizer, tmp_path / "two", "digest")
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")
    text = (tmp_path / "one/adapter_config.json").read_text()
    assert str(tiny_model) not in text
    assert '"base_model_name_or_path": "digest"' in text
    assert not (tmp_path / "one/README.md").exists()
    weights = load_file(tmp_path / "one/adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@every_method
def test_a_killed_and_resumed_run_ends_in_the_same_bits(
    config: AdapterConfig, trained: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """From a checkpoint, in a new model, as the program that follows a killed one does it.

    At the second step AdaLoRA is on the way to its final ranks, at the fourth it has them.
    """
    complete, folder = trained[config]
    expected = trained_values(complete.model)
    for killed_after in (2, 4):
        again = make_trainer(adapted(tiny_model, config), config, tmp_path, save_strategy="no")
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{killed_after}"))
        assert losses(again)[killed_after:] == losses(complete)[killed_after:]
        for name, value in trained_values(again.model).items():
            torch.testing.assert_close(value, expected[name], atol=0, rtol=0)


@every_method
def test_the_weights_of_an_earlier_checkpoint_can_be_restored(
    config: AdapterConfig, trained: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """The best one, when the run has gone on after it; what is saved is the earlier model."""
    trainer, folder = trained[config]
    model, tokenizer = trainer.model, AutoTokenizer.from_pretrained(tiny_model)
    last = trained_values(model)
    trainer.state.best_model_checkpoint = str(folder / "checkpoint-3")
    trainer._load_best_model()
    earlier = final_logits(model, PROMPTS)
    assert max_difference(earlier, final_logits(load_base(tiny_model), PROMPTS)) > 0
    assert any(not torch.equal(last[name], value) for name, value in trained_values(model).items())
    save_adapter(model, tokenizer, tmp_path / "a", "digest")
    saved = final_logits(load_saved(tmp_path / "a", tiny_model), PROMPTS)
    assert max_difference(earlier, saved) < 2e-5
    trainer.state.best_model_checkpoint = str(folder / f"checkpoint-{STEPS}")
    trainer._load_best_model()
    assert all(torch.equal(last[name], value) for name, value in trained_values(model).items())


@every_method
def test_a_16_bit_base_has_an_adapter_in_float32_unless_it_is_asked_otherwise(
    config: AdapterConfig, tiny_model: Path
) -> None:
    for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        set_seed(0)
        model = add_adapter(load_base(tiny_model, "bfloat16"), config, STEPS, autocast)
        dtypes = {parameter.dtype for parameter in trained_values(model).values()}
        assert dtypes == {expected}
        ids = torch.tensor([PROMPTS[0]])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert torch.isfinite(loss)
