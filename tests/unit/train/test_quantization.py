from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, set_seed

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
    Quantization,
    VeraConfig,
)
from posttrain.stages.program import StageInput
from posttrain.train.adapters import add_adapter, count_trainable, keep_dtypes
from posttrain.train.outputs import final_logits, max_difference, save_adapter
from posttrain.train.quantization import load_quantized, optimizer_name

METHODS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(rank=4),
    "dora": LoraConfig(rank=4, dora=True),
    "adalora": AdaLoraConfig(type="adalora", rank=2, initial_rank=4),
    "ia3": Ia3Config(type="ia3"),
    "vera": VeraConfig(type="vera", rank=16),
    "prefix": PrefixTuningConfig(type="prefix", virtual_tokens=4),
    "prompt": PromptTuningConfig(type="prompt", virtual_tokens=4),
    "bottleneck": BottleneckConfig(type="bottleneck", reduction=4),
}
PROMPTS = [[1, 50, 60, 70], [1, 80, 81, 82, 83, 84]]


@pytest.fixture
def source(tiny_model: Path) -> StageInput:
    return StageInput(kind="model", path=str(tiny_model), digest="base")


def learn(model: PreTrainedModel, learning_rate: float, steps: int = 8) -> list[float]:
    """Losses of AdamW steps on one sentence."""
    ids = torch.tensor([[1, 70, 40, 41, 42, 43, 44, 2]] * 2)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS.keys())
def test_an_adapter_trained_on_4_bits_loads_on_the_unquantized_base(
    config: AdapterConfig, source: StageInput, tmp_path: Path
) -> None:
    set_seed(0)
    model = add_adapter(load_quantized(source, Quantization(), "float32"), config, 8)
    losses = learn(model, 10 * config.peak_learning_rate)
    assert losses[-1] < losses[0] - 0.01
    save_adapter(model, AutoTokenizer.from_pretrained(source.path), tmp_path / "a", "base")
    saved = StageInput(kind="adapter", path=str(tmp_path / "a"), digest="a", base=source.path)
    loaded = load_causal_lm(saved, "float32")
    assert not getattr(loaded, "is_loaded_in_4bit", False)
    # It is another model, by the error of the quantization, and has learned the same.
    quantized = load_quantized(source, Quantization(), "float32")
    plain = load_causal_lm(source, "float32")
    error = max_difference(final_logits(quantized, PROMPTS), final_logits(plain, PROMPTS))
    apart = max_difference(final_logits(model, PROMPTS), final_logits(loaded, PROMPTS))
    assert 0 < apart < 5 * error
    ids = torch.tensor([[1, 70, 40, 41, 42, 43, 44, 2]])
    with torch.no_grad():
        assert float(loaded(input_ids=ids, labels=ids).loss) < losses[0] - 0.005


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_linear_layers_and_nothing_else_are_in_4_bits_and_frozen(
    kind: Any, double: bool, source: StageInput
) -> None:
    model = load_quantized(source, Quantization(type=kind, double=double), "float32")
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == (kind, double)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_is_not_quantized_stays_in_16_bits(source: StageInput) -> None:
    model = load_quantized(source, Quantization(), "bfloat16")
    assert {model.lm_head.weight.dtype, model.model.norm.weight.dtype} == {torch.bfloat16}


def test_parameters_in_4_bits_are_counted_one_by_one(source: StageInput) -> None:
    quantized = count_trainable(load_quantized(source, Quantization(), "float32"))
    assert quantized.total == count_trainable(load_causal_lm(source, "float32")).total
    assert quantized.count == 0


def test_a_4_bit_base_is_a_little_off_and_not_another_model(source: StageInput) -> None:
    plain = final_logits(load_causal_lm(source, "float32"), PROMPTS)
    quantized = final_logits(load_quantized(source, Quantization(), "float32"), PROMPTS)
    spread = float(torch.cat(plain).std())
    assert 0 < max_difference(plain, quantized) < spread


def test_an_evaluation_leaves_gradients_as_they_were(source: StageInput) -> None:
    """On some CPUs bitsandbytes packs weights at the first one, and gradients end there."""

    def gradients(evaluates: bool) -> dict[str, torch.Tensor]:
        set_seed(0)
        base = load_quantized(source, Quantization(), "float32")
        model = add_adapter(base, LoraConfig(rank=4, dropout=0), 8)
        ids = torch.tensor([[1, 70, 40, 41, 42, 43, 44, 2]])
        if evaluates:
            final_logits(model.eval(), PROMPTS)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if ".lora_B." in n}

    plain, evaluated = gradients(evaluates=False), gradients(evaluates=True)
    assert all(torch.equal(gradient, evaluated[name]) for name, gradient in plain.items())
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())


def test_trl_does_not_turn_the_adapter_on_4_bits_into_bfloat16(
    source: StageInput, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def construct(model: PreTrainedModel) -> None:
        SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(tmp_path),
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            processing_class=AutoTokenizer.from_pretrained(source.path),
            train_dataset=Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}),
        )

    set_seed(0)
    model = add_adapter(load_quantized(source, Quantization(), "float32"), LoraConfig(), 8)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with keep_dtypes(model):
        construct(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {after[name].dtype for name in before} == {torch.float32}
    construct(model)
    assert {after[name].dtype for name in before} == {torch.bfloat16}, "TRL no longer does it"


def test_pissa_needs_the_weights_unquantized(source: StageInput) -> None:
    model = load_quantized(source, Quantization(), "float32")
    with pytest.raises(ModelError, match="remove `init` or `quantization`"):
        add_adapter(model, LoraConfig(init="pissa"), 8)


def test_a_folder_without_weights_is_refused_by_name(tmp_path: Path) -> None:
    empty = StageInput(kind="model", path=str(tmp_path), digest="")
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_quantized(empty, Quantization(), "float32")


def test_without_bitsandbytes_the_error_says_what_to_install(
    source: StageInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError, match=r"install `bitsandbytes>=0\.50`"):
        load_quantized(source, Quantization(), "float32")


def test_the_optimizer_is_paged_where_there_is_a_gpu_to_page_from() -> None:
    plain = optimizer_name(None)
    assert plain == "adamw_torch_fused"
    expected = "paged_adamw_32bit" if torch.cuda.is_available() else plain
    assert optimizer_name(Quantization()) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_paged_optimizer_trains_an_adapter_on_4_bits_on_the_gpu(source: StageInput) -> None:
    import bitsandbytes

    set_seed(0)
    model = add_adapter(load_quantized(source, Quantization(), "bfloat16"), LoraConfig(rank=4), 8)
    assert next(model.parameters()).is_cuda
    ids = torch.tensor([[1, 70, 40, 41, 42, 43, 44, 2]] * 2, device="cuda")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW32bit(parameters, lr=2e-3)
    losses = []
    for _ in range(8):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
