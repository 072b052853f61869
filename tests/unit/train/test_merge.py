from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import ModelError
from posttrain.recipe.merge import MergeConfig
from posttrain.stages.merge import main
from posttrain.stages.program import StageContext, StageInput, StageResult
from posttrain.train.outputs import check_reload, final_logits, max_difference, save_adapter
from tests.unit.train.programs import digests_of, make_dataset, make_stage_dir


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter that changes something: peft starts B at zero, this one does not."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
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


def test_complete_weights_cannot_be_merged(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs an adapter"):
        merge(tmp_path / "merge", tiny_model, None)


def test_a_saved_model_that_is_another_one_is_refused(tiny_model: Path) -> None:
    prompts = [[1, 50, 60]]
    logits = final_logits(AutoModelForCausalLM.from_pretrained(tiny_model).eval(), prompts)
    check_reload(tiny_model, logits, prompts, bound=1e-5)
    with pytest.raises(ModelError, match="not the one in memory"):
        check_reload(tiny_model, [logits[0] + 1], prompts, bound=1e-5)
