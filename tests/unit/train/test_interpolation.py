"""Between base and tuned model: both ends, the line between them, what is measured and refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from posttrain.errors import ModelError
from posttrain.recipe.merge import MergeConfig
from posttrain.stages.merge import main
from posttrain.stages.program import StageContext, StageInput, StageResult
from posttrain.train.outputs import final_logits, max_difference, save_adapter, save_model
from tests.unit.train.programs import digests_of, make_dataset, make_stage_dir

Weights = Mapping[str, torch.Tensor]
Interpolate = Callable[..., tuple[Path, StageResult]]

PROMPTS = [[1, 50, 60, 70], [1, 80]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def noisy(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The base with a little noise on every weight, as training would leave it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.generation_config.max_new_tokens = 7
    save_model(model.to(dtype), AutoTokenizer.from_pretrained(base), folder)
    return folder


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete weights trained from the tiny model, as far as anybody can see."""
    return noisy(tiny_model, tmp_path_factory.mktemp("tuned") / "model")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model that changes something: peft starts B at zero, not this one."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model), folder, "digest")
    return folder


@pytest.fixture
def interpolate(tmp_path: Path, tiny_model: Path) -> Interpolate:
    """Runs the stage; an adapter's base is the tiny model, as is `base` unless another is given."""

    def run(
        model: Path, weight: float | None, base: Path | None = None, name: str = "merge"
    ) -> tuple[Path, StageResult]:
        is_adapter = (model / "adapter_config.json").exists()
        dataset = make_dataset(tmp_path / f"{name}-chats")
        inputs = {
            "model": StageInput(
                kind="adapter" if is_adapter else "model",
                path=str(model),
                digest="tuned",
                base=str(tiny_model) if is_adapter else None,
            ),
            "base": StageInput(kind="model", path=str(base or tiny_model), digest="base"),
            "prompts:chats": StageInput(kind="dataset", path=str(dataset), digest="rows"),
        }
        config = {"method": "interpolate", **({} if weight is None else {"weight": weight})}
        stage_dir = make_stage_dir(tmp_path / name, "merge", config, inputs)
        context = StageContext(stage_dir, MergeConfig)
        context.output.mkdir()
        result = main(context)
        assert not (stage_dir / "scratch").exists()
        return context.output, result

    return run


def weights(folder: Path) -> Weights:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def logits(folder: Path) -> list[torch.Tensor]:
    return final_logits(AutoModelForCausalLM.from_pretrained(folder).eval(), PROMPTS)


def test_weight_1_is_the_tuned_model_and_weight_0_the_base(
    tiny_model: Path, tuned: Path, interpolate: Interpolate
) -> None:
    for weight, end in ((1.0, tuned), (0.0, tiny_model)):
        output, result = interpolate(tuned, weight, name=f"at-{weight:g}")
        assert max_difference(logits(output), logits(end)) == 0.0
        assert all(torch.equal(w, weights(end)[name]) for name, w in weights(output).items())
        measured = result.details["perplexity"]["chats"]
        assert measured["merged"] == measured["tuned" if weight else "base"]


@pytest.mark.parametrize("weight", [0.25, 0.7, None])
def test_in_between_the_weights_lie_on_the_line(
    tiny_model: Path, tuned: Path, interpolate: Interpolate, weight: float | None
) -> None:
    output, _ = interpolate(tuned, weight)
    part = 0.5 if weight is None else weight
    base, end = weights(tiny_model), weights(tuned)
    assert weights(output).keys() == base.keys()
    for name, found in weights(output).items():
        assert torch.allclose(found, base[name] + part * (end[name] - base[name]), atol=1e-7), name


def test_an_adapter_is_folded_with_its_scale_times_the_weight(
    tiny_model: Path, adapter: Path, interpolate: Interpolate
) -> None:
    output, _ = interpolate(adapter, 0.3)
    scaled = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    for module in scaled.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: 0.3 * scale for name, scale in module.scaling.items()}
    assert max_difference(final_logits(scaled.eval(), PROMPTS), logits(output)) < 1e-4
    assert max_difference(logits(tiny_model), logits(output)) > 1e-2
    assert not (output / "adapter_config.json").exists()


def test_the_result_has_the_bases_precision_and_what_the_tuned_model_says_of_generating(
    tiny_model: Path, tuned: Path, interpolate: Interpolate, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    save_model(model, AutoTokenizer.from_pretrained(tiny_model), half)
    output, _ = interpolate(tuned, 0.5, base=half)
    found = weights(output)
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    base, end = weights(half), weights(tuned)
    for name, weight in found.items():
        # Mixed in float32 and rounded once: not the mean of two rounded numbers.
        assert torch.equal(weight, ((base[name].float() + end[name]) / 2).bfloat16()), name
    assert GenerationConfig.from_pretrained(output).max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(output).chat_template


def test_weights_in_several_files_are_mixed_like_those_in_one(
    tiny_model: Path, tuned: Path, interpolate: Interpolate, tmp_path: Path
) -> None:
    whole, _ = interpolate(tuned, 0.7, name="whole")
    parts = tmp_path / "parts"
    model = AutoModelForCausalLM.from_pretrained(tuned)
    model.save_pretrained(parts, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tuned).save_pretrained(parts)
    assert len(list(parts.glob("*.safetensors"))) > 2
    output, _ = interpolate(parts, 0.7, name="parts-merge")
    found = weights(whole)
    assert all(torch.equal(weight, found[name]) for name, weight in weights(output).items())


def test_the_same_interpolation_leaves_the_same_bytes(
    adapter: Path, interpolate: Interpolate, tmp_path: Path
) -> None:
    first, _ = interpolate(adapter, 0.7, name="first")
    second, _ = interpolate(adapter, 0.7, name="second")
    assert digests_of(first) == digests_of(second)
    for path in first.glob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_both_ends_and_the_result_are_measured(tuned: Path, interpolate: Interpolate) -> None:
    _, result = interpolate(tuned, 0.7)
    assert sorted(result.metrics) == [
        "perplexity/chats",
        "perplexity/chats/base",
        "perplexity/chats/tuned",
    ]
    assert result.headline.startswith(
        "interpolated, 0.7 of the way from base to tuned; perplexity on chats "
    )


def test_a_tuned_model_with_added_tokens_is_refused(
    tuned: Path, interpolate: Interpolate, tmp_path: Path
) -> None:
    wide = tmp_path / "wide"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tuned),
        AutoTokenizer.from_pretrained(tuned),
    )
    tokenizer.add_tokens(["<|tool|>"])
    model.resize_token_embeddings(len(tokenizer))
    save_model(model, tokenizer, wide)
    with pytest.raises(ModelError, match=r"`tuned` and `base` cannot be merged: .*601 x 64"):
        interpolate(wide, 0.5)
    narrow = tmp_path / "narrow"
    shutil.copytree(tuned, narrow)
    tokenizer.save_pretrained(narrow)
    with pytest.raises(ModelError, match="the same token different numbers"):
        interpolate(narrow, 0.5, name="again")
