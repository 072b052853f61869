import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
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
from posttrain.models import load_causal_lm, virtual_positions
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
            **{
                "output_dir": str(folder),
                "max_steps": STEPS,
                "per_device_train_batch_size": 2,
                "learning_rate": 10 * config.peak_learning_rate,
                "lr_scheduler_type": "constant",
                "seed": 0,
                "logging_steps": 1,
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "dataloader_pin_memory": False,
                "save_strategy": "steps",
                "save_steps": 1,
                **arguments,
            }
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
    positions = loaded(input_ids=torch.tensor([PROMPTS[0]])).logits.shape[1]
    assert positions == len(PROMPTS[0]) + virtual_positions(loaded)
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
    for value in json.loads(text).values():
        if isinstance(value, list):
            assert value == sorted(value), "peft keeps names as sets, whose order is chance"
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
    for killed_after in (2, 4) if isinstance(config, AdaLoraConfig) else (2,):
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


def test_lora_has_rank_16_alpha_32_and_dropout_of_a_twentieth_on_all_linear_layers_by_default(
    tiny_model: Path,
) -> None:
    model = adapted(tiny_model, LoraConfig())
    config = model.active_peft_config
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert isinstance(config.lora_alpha, int), "other tools read no 32.0"
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trained_values(model)}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 2


def test_rslora_scales_by_the_square_root_of_the_rank(tiny_model: Path) -> None:
    def scale(**settings: Any) -> float:
        model = adapted(tiny_model, LoraConfig(**settings))
        return float(model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"])

    assert scale(rank=64, alpha=16, rank_stabilized=True) == 2
    assert scale(rank=64, alpha=16) == 0.25
    assert scale(rank=64, rank_stabilized=True) == 2


def test_dora_trains_a_magnitude_for_each_output(tiny_model: Path) -> None:
    magnitudes = {
        name: value
        for name, value in trained_values(adapted(tiny_model, LoraConfig(dora=True))).items()
        if "lora_magnitude_vector" in name
    }
    assert len(magnitudes) == 14
    assert {value.shape for value in magnitudes.values()} == {(64,), (32,), (128,)}


def test_pissa_starts_as_the_base_and_trains_the_largest_directions(tiny_model: Path) -> None:
    base = load_base(tiny_model)
    plain, weight = final_logits(base, PROMPTS), base.model.layers[0].mlp.up_proj.weight.clone()
    set_seed(0)
    model = add_adapter(base, METHODS["pissa"], STEPS)
    assert max_difference(plain, final_logits(model.eval(), PROMPTS)) < 2e-5
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    update = layer.get_delta_weight("default")
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(update)[:4], values[:4], rtol=0.05, atol=0)


def test_adalora_moves_ranks_to_the_layers_that_need_them(
    trained: Any, tiny_model: Path, tmp_path: Path
) -> None:
    config = METHODS["adalora"]
    assert isinstance(config, AdaLoraConfig)
    model = trained[config][0].model
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model), tmp_path, "digest")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    ranks = [len(weight) for name, weight in weights.items() if name.endswith("lora_E")]
    assert len(ranks) == 14
    assert sum(ranks) == 14 * config.rank, "the mean is what was asked for"
    assert min(ranks) < max(ranks)


def test_the_micro_batch_does_not_change_what_adalora_learns(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = AdaLoraConfig(type="adalora", rank=2, initial_rank=4, dropout=0)
    whole, halves = (
        make_trainer(adapted(tiny_model, config), config, tmp_path, save_strategy="no", **batch)
        for batch in (
            {},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        )
    )
    whole.train()
    halves.train()
    assert losses(halves) == pytest.approx(losses(whole), abs=1e-4)
    first = trained_values(whole.model)
    for name, value in trained_values(halves.model).items():
        torch.testing.assert_close(value, first[name], atol=2e-3, rtol=0)


def test_adalora_keeps_its_singular_vectors_near_orthogonal(trained: Any) -> None:
    """They start short, at 0.02 a number, and the penalty alone makes them longer."""
    from posttrain.train.adapter_training import _distance_from_orthogonal

    trainer, folder = trained[METHODS["adalora"]]

    def distance() -> float:
        vectors = [
            (parameter, ".lora_A." in name)
            for name, parameter in trainer.model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        ]
        return float(_distance_from_orthogonal(vectors).detach())

    last = distance()
    trainer.state.best_model_checkpoint = str(folder / "checkpoint-1")
    trainer._load_best_model()
    first = distance()
    trainer.state.best_model_checkpoint = str(folder / f"checkpoint-{STEPS}")
    trainer._load_best_model()
    assert last < first


def test_a_layer_that_adalora_leaves_no_rank_is_saved_and_loaded(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = adapted(tiny_model, METHODS["adalora"]).eval()
    pattern = {}
    for name, parameter in model.named_parameters():
        if ".lora_E." in name:
            rank = 0 if "q_proj" in name else 2
            parameter.data[:rank] = 1.0
            pattern[name.removeprefix("base_model.model.")] = [n < rank for n in range(4)]
    model.active_peft_config.rank_pattern = pattern
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model), tmp_path, "digest")
    saved = final_logits(load_saved(tmp_path, tiny_model), PROMPTS)
    assert max_difference(final_logits(model, PROMPTS), saved) < 2e-5


def test_adalora_that_has_nothing_to_move_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValidationError, match="write an `initial_rank` above `rank`"):
        AdaLoraConfig(type="adalora", rank=12, initial_rank=12)
    with pytest.raises(ModelError, match="this run has one step"):
        adapted(tiny_model, AdaLoraConfig(type="adalora"), 1)


def test_adalora_works_in_the_shortest_runs(tiny_model: Path, tmp_path: Path) -> None:
    config = METHODS["adalora"]
    for steps in (2, 3, 4):
        model = adapted(tiny_model, config, steps)
        make_trainer(model, config, tmp_path, max_steps=steps, save_strategy="no").train()
        folder = tmp_path / str(steps)
        save_adapter(model.eval(), AutoTokenizer.from_pretrained(tiny_model), folder, "digest")
        saved = final_logits(load_saved(folder, tiny_model), PROMPTS)
        assert max_difference(final_logits(model, PROMPTS), saved) < 2e-5


def test_ia3_scales_keys_values_and_the_feed_forward_input_by_default(tiny_model: Path) -> None:
    config = adapted(tiny_model, Ia3Config(type="ia3")).active_peft_config
    assert config.target_modules == {"k_proj", "v_proj", "down_proj"}
    assert config.feedforward_modules == {"down_proj"}


@pytest.mark.parametrize(
    ("architecture", "settings", "scaled", "feedforward"),
    [
        # In peft's table, but with queries instead of keys.
        ("qwen3", {}, {"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
        # Not in peft's table.
        ("olmo2", {}, {"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
        # Keys, values and queries are one layer: as peft has it.
        ("gpt_neox", {}, {"query_key_value", "dense_4h_to_h"}, {"dense_4h_to_h"}),
    ],
)
def test_ia3_finds_its_layers_in_other_models(
    architecture: str, settings: dict[str, Any], scaled: set[str], feedforward: set[str]
) -> None:
    config = add_adapter(tiny_of(architecture), Ia3Config(type="ia3"), STEPS).active_peft_config
    assert (config.target_modules, config.feedforward_modules) == (scaled, feedforward)


def test_ia3_takes_the_layers_that_the_recipe_names(tiny_model: Path) -> None:
    named = Ia3Config(type="ia3", target_modules=("v_proj", "down_proj"))
    config = adapted(tiny_model, named).active_peft_config
    assert config.target_modules == {"v_proj", "down_proj"}
    assert config.feedforward_modules == {"down_proj"}


def test_ia3_says_what_to_name_in_a_model_that_it_does_not_understand() -> None:
    """Phi-3 has one layer for queries, keys and values, and peft does not know it."""
    with pytest.raises(ModelError, match=r"phi3 model.*feedforward_modules.*qkv_proj"):
        add_adapter(tiny_of("phi3"), Ia3Config(type="ia3"), STEPS)


def test_the_random_matrices_of_vera_are_saved(
    trained: Any, tiny_model: Path, tmp_path: Path
) -> None:
    model = trained[METHODS["vera"]][0].model
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model), tmp_path, "digest")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert weights["base_model.vera_A"].shape == (16, 128)


def test_a_prefix_starts_as_words_and_leaves_the_loss_near_that_of_the_base(
    tiny_model: Path,
) -> None:
    prefix = adapted(tiny_model, METHODS["prefix"]).prompt_encoder["default"].embedding.weight
    assert prefix.std().item() < 0.5, "random numbers have a spread of 1, this model's values 0.1"
    base = load_base(tiny_model)
    ids = torch.tensor([[1, 70, 40, 41, 42, 43, 44, 2]])
    with torch.no_grad():
        before = float(base(input_ids=ids, labels=ids).loss)
        after = float(adapted(tiny_model, METHODS["prefix"])(input_ids=ids, labels=ids).loss)
    assert after == pytest.approx(before, abs=0.1)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=("q_proj", "query")),
        AdaLoraConfig(type="adalora", target_modules=("query",)),
        VeraConfig(type="vera", target_modules=("query",)),
        Ia3Config(type="ia3", target_modules=("query",)),
        Ia3Config(type="ia3", target_modules=("k_proj",), feedforward_modules=("query",)),
    ],
)
def test_a_name_that_is_no_layers_is_told_those_that_are(
    config: AdapterConfig, tiny_model: Path
) -> None:
    with pytest.raises(ModelError, match=r"_modules: .*called query; .*down_proj, .*v_proj"):
        adapted(tiny_model, config)


def test_a_layer_of_another_kind_is_refused_in_one_sentence(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter: peft refuses it .*mlp|LlamaMLP"):
        adapted(tiny_model, LoraConfig(target_modules=("mlp",)))


def test_an_adapter_of_another_base_is_refused(
    trained: Any, tiny_model: Path, tmp_path: Path
) -> None:
    model = trained[METHODS["lora"]][0].model
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "a", "digest")
    other = tiny_of("llama", hidden_size=32)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="cannot be loaded as an adapter of its base"):
        load_saved(tmp_path / "a", tmp_path / "other")


def test_activations_are_not_recomputed_under_a_prefix() -> None:
    prefixes = {name for name, config in METHODS.items() if not can_recompute_activations(config)}
    assert prefixes == {"prefix", "projected prefix"}
    assert can_recompute_activations(None)


def test_an_adapter_that_trains_nothing_or_everything_is_refused() -> None:
    with pytest.raises(ModelError, match="no parameter is trained"):
        check_trainable(Trainable(0, 10), adapter=True)
    with pytest.raises(ModelError, match="no parameter is trained"):
        check_trainable(Trainable(0, 10), adapter=False)
    with pytest.raises(ModelError, match="`adapter: null`"):
        check_trainable(Trainable(10, 10), adapter=True)
    check_trainable(Trainable(10, 10), adapter=False)
    check_trainable(Trainable(1, 10), adapter=True)


def test_the_share_that_is_trained_is_readable_however_small() -> None:
    assert str(Trainable(4_884_480, 139_400_064)) == (
        "4,884,480 of 139,400,064 parameters (3.5%) are trained"
    )
    assert "(0.0086%)" in str(Trainable(11_520, 134_526_528))
    assert "(100.0%)" in str(Trainable(7, 7))


def tiny_of(architecture: str, **settings: Any) -> PreTrainedModel:
    """A random model of another architecture."""
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            **settings,
        },
    )
    return AutoModelForCausalLM.from_config(config)
