from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.data.prepared import PreparedDataset
from posttrain.errors import ModelError
from posttrain.recipe.adapters import (
    AdaLoraConfig,
    AdapterConfig,
    Ia3Config,
    LoraConfig,
    PrefixTuningConfig,
    Quantization,
    VeraConfig,
)
from posttrain.recipe.merge import MergeConfig
from posttrain.stages.merge import main
from posttrain.stages.program import StageContext, StageInput, StageResult
from posttrain.train.adapters import add_adapter
from posttrain.train.outputs import check_reload, final_logits, max_difference, save_adapter
from posttrain.train.quantization import load_quantized
from posttrain.train.rows import encode_rows
from tests.unit.train.programs import digests_of, make_dataset, make_stage_dir


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter that changes something: peft starts B at zero, this one does not."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "adapter", "digest")
    return tmp_path / "adapter"


def merge(
    folder: Path, adapter: Path, base: Path | None, **config: object
) -> tuple[Path, StageResult]:
    inputs = {
        "model": StageInput(
            kind="adapter" if base else "model",
            path=str(adapter),
            digest="a",
            base=str(base) if base else None,
        ),
        "prompts": StageInput(
            kind="dataset",
            path=str(make_dataset(folder.parent / f"{folder.name}-data")),
            digest="b",
        ),
    }
    context = StageContext(make_stage_dir(folder, "merge", config, inputs), MergeConfig)
    context.output.mkdir()
    return context.output, main(context)


def test_the_merged_model_says_what_the_adapter_said(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    output, result = merge(tmp_path / "merge", adapter, tiny_model)
    prompts = [[1, 50, 60, 70], [1, 80]]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = final_logits(base.eval(), prompts)
    adapted = final_logits(PeftModel.from_pretrained(base, adapter).eval(), prompts)
    merged = final_logits(AutoModelForCausalLM.from_pretrained(output).eval(), prompts)
    assert max_difference(adapted, merged) < 1e-4
    assert max_difference(plain, merged) > 1e-2
    assert result.metrics["max_logit_difference"] < 1e-4
    assert "on 4 prompts (bound 0.001)" in result.headline
    assert not (output / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(output).chat_template


def test_the_same_merge_leaves_the_same_bytes(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    first, _ = merge(tmp_path / "first", adapter, tiny_model)
    second, _ = merge(tmp_path / "second", adapter, tiny_model)
    assert digests_of(first) == digests_of(second)
    for path in first.glob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_a_16_bit_base_stays_16_bit_and_the_rounding_is_told(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base16"
    AutoModelForCausalLM.from_pretrained(tiny_model).to(torch.bfloat16).save_pretrained(base)
    output, result = merge(tmp_path / "merge", adapter, base)
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    assert result.metrics["rounding_logit_difference"] > 0
    assert "rounding to 16 bits" in result.headline


def test_a_difference_beyond_the_bound_is_refused(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="max_logit_difference"):
        merge(tmp_path / "merge", adapter, tiny_model, max_logit_difference=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank_stabilized=True),
        LoraConfig(dora=True),
        LoraConfig(rank=4, init="pissa"),
        AdaLoraConfig(type="adalora", rank=2, initial_rank=4),
        Ia3Config(type="ia3"),
        VeraConfig(type="vera", rank=8),
    ],
    ids=["rslora", "dora", "pissa", "adalora", "ia3", "vera"],
)
def test_every_adapter_that_can_be_merged_says_the_same_afterwards(
    tiny_model: Path, tmp_path: Path, config: AdapterConfig
) -> None:
    trained_adapter(tiny_model, tmp_path / "adapter", config)
    output, result = merge(tmp_path / "merge", tmp_path / "adapter", tiny_model)
    prompts = [[1, 50, 60, 70], [1, 80]]
    plain = final_logits(AutoModelForCausalLM.from_pretrained(tiny_model).eval(), prompts)
    merged = final_logits(AutoModelForCausalLM.from_pretrained(output).eval(), prompts)
    assert max_difference(plain, merged) > 1e-2
    assert result.metrics["max_logit_difference"] < 1e-4


def test_an_adapter_that_has_no_weights_to_change_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = PrefixTuningConfig(type="prefix", virtual_tokens=4)
    trained_adapter(tiny_model, tmp_path / "adapter", config)
    with pytest.raises(ModelError, match="`evaluate` takes adapters as they are"):
        merge(tmp_path / "merge", tmp_path / "adapter", tiny_model)


def trained_adapter(base: Path, folder: Path, config: AdapterConfig) -> None:
    """An adapter with noise on what would be trained."""
    torch.manual_seed(0)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(base), config, total_steps=10)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_adapter(model, AutoTokenizer.from_pretrained(base), folder, "digest")


def test_the_difference_to_the_4_bit_model_that_was_trained_is_told(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    output, result = merge(
        tmp_path / "merge", adapter, tiny_model, quantization=Quantization().model_dump()
    )
    plain, unquantized = merge(tmp_path / "plain", adapter, tiny_model)
    assert digests_of(output) == digests_of(plain)
    assert not any(name.startswith("quantized") for name in unquantized.metrics)
    source = StageInput(kind="model", path=str(tiny_model), digest="")
    base = load_quantized(source, Quantization(), "float32")
    trained = peft.PeftModel.from_pretrained(base, adapter).eval()
    prompts = check_prompts(tmp_path / "merge-data", tiny_model)
    apart = max_difference(
        final_logits(trained, prompts),
        final_logits(AutoModelForCausalLM.from_pretrained(output).eval(), prompts),
    )
    metrics = result.metrics
    assert metrics["quantized_logit_difference"] == pytest.approx(apart, rel=1e-3)
    assert 0 < metrics["quantized_mean_logit_difference"] < apart
    assert metrics["quantized_divergence"] > 0
    assert metrics["max_logit_difference"] < 1e-4
    assert metrics["perplexity"] != pytest.approx(metrics["quantized_perplexity"], rel=1e-6)
    assert "from the 4-bit model that was trained by at most" in result.headline


def check_prompts(dataset: Path, model: Path) -> list[list[int]]:
    rows = PreparedDataset.open(dataset).validation(4)
    return [r.input_ids for r in encode_rows(AutoTokenizer.from_pretrained(model), rows, 512).rows]


def test_complete_weights_cannot_be_merged(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs an adapter"):
        merge(tmp_path / "merge", tiny_model, None)


def test_a_saved_model_that_is_another_one_is_refused(tiny_model: Path) -> None:
    prompts = [[1, 50, 60]]
    logits = final_logits(AutoModelForCausalLM.from_pretrained(tiny_model).eval(), prompts)
    check_reload(tiny_model, logits, prompts, bound=1e-5)
    with pytest.raises(ModelError, match="not the one in memory"):
        check_reload(tiny_model, [logits[0] + 1], prompts, bound=1e-5)
