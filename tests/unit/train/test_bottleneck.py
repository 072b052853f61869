from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from posttrain.errors import ModelError
from posttrain.recipe.adapters import BottleneckConfig
from posttrain.train.bottleneck import (
    BottleneckLayer,
    BottleneckPeftConfig,
    add_bottleneck,
    find_blocks,
    register,
)
from posttrain.train.outputs import save_adapter
from tests.unit.train.programs import digests_of

IDS = torch.arange(40, 64).reshape(2, 12)

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}

DECODERS = [
    ("Llama", SMALL, r"model\.layers\.\d+\.(self_attn|mlp)"),
    ("Qwen2", SMALL, r"model\.layers\.\d+\.(self_attn|mlp)"),
    ("Mistral", SMALL, r"model\.layers\.\d+\.(self_attn|mlp)"),
    ("Mixtral", {**SMALL, "num_local_experts": 4}, r"model\.layers\.\d+\.(self_attn|mlp)"),
    ("Gemma2", {**SMALL, "head_dim": 8}, r"model\.layers\.\d+\.(self_attn|mlp)"),
    ("GPT2", {**GPT2, "eos_token_id": 2}, r"transformer\.h\.\d+\.(attn|mlp)"),
    ("GPTNeoX", NEOX, r"gpt_neox\.layers\.\d+\.(attention|mlp)"),
    ("OPT", {**NEOX, "ffn_dim": 64}, r"model\.decoder\.layers\.\d+\.(self_attn|fc2)"),
]


def bottleneck(**settings: object) -> BottleneckConfig:
    return BottleneckConfig.model_validate({"type": "bottleneck", "reduction": 4, **settings})


def base_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(input_ids=IDS, use_cache=False).logits
    return values


def disturb(model: PeftModel, seed: int, adapter: str = "default") -> None:
    """Give an adapter weights that are no longer those of an identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if f"bottleneck_up.{adapter}." in name:
            weight.data.normal_(0, 0.3, generator=generator)


def make(folder: Path, model: Path, seed: int, **settings: object) -> Tensor:
    """Save a disturbed adapter; returns its logits."""
    torch.manual_seed(seed)
    adapted = add_bottleneck(base_model(model), bottleneck(**settings)).eval()
    disturb(adapted, seed)
    save_adapter(adapted, AutoTokenizer.from_pretrained(model), folder, base_digest="base")
    return logits(adapted)


@pytest.fixture(scope="module")
def saved(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Tensor]]:
    """Two adapters on one base, and what each makes of it."""
    folder = tmp_path_factory.mktemp("bottlenecks")
    adapters = {}
    for seed, (name, placement) in enumerate((("first", "pfeiffer"), ("second", "houlsby"))):
        made = make(folder / name, tiny_model, seed, placement=placement)
        adapters[name] = (folder / name, made)
    return adapters


@pytest.mark.parametrize(("family", "settings", "blocks"), DECODERS)
@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_a_new_adapter_changes_no_logit_of_any_decoder(
    family: str, settings: dict[str, object], blocks: str, placement: str
) -> None:
    config = getattr(transformers, f"{family}Config")(**settings)
    base = AutoModelForCausalLM.from_config(config).eval()
    before = logits(base)
    model = add_bottleneck(base, bottleneck(placement=placement)).eval()
    assert torch.equal(logits(model), before)
    if placement == "houlsby":
        assert model.peft_config["default"].target_modules == blocks
    layers = [m for m in model.modules() if isinstance(m, BottleneckLayer)]
    assert len(layers) == (4 if placement == "houlsby" else 2)
    disturb(model, 0)
    assert not torch.allclose(logits(model), before)
    model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, attention_mask=IDS > 0)


def test_the_output_is_that_of_the_papers(tiny_model: Path) -> None:
    model = add_bottleneck(base_model(tiny_model), bottleneck(nonlinearity="gelu")).eval()
    disturb(model, 0)
    layer = model.base_model.model.model.layers[0].mlp
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    assert down.weight.shape == (16, 64)
    entered = torch.randn(3, 5, 64)
    hidden = layer.base_layer(entered)
    expected = hidden + up(torch.nn.functional.gelu(down(hidden)))
    assert torch.allclose(layer(entered), expected, atol=1e-6)
    assert layer.gate_proj is layer.base_layer.gate_proj


def test_dropout_is_for_training_only(tiny_model: Path) -> None:
    model = add_bottleneck(base_model(tiny_model), bottleneck(dropout=0.5))
    disturb(model, 0)
    assert not torch.equal(logits(model.train()), logits(model.train()))
    assert torch.equal(logits(model.eval()), logits(model.eval()))


def test_blocks_that_differ_from_layer_to_layer_are_all_named() -> None:
    config = transformers.GPT2Config(**GPT2)
    model = AutoModelForCausalLM.from_config(config)
    layer = model.transformer.h[1]
    layer.feed_forward = layer.mlp
    del layer.mlp
    assert (
        find_blocks(model, "pfeiffer") == r"transformer\.h\.0\.mlp|transformer\.h\.1\.feed_forward"
    )


def test_a_model_without_attention_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ModelError, match="no list of 2 decoder layers with attention"):
        add_bottleneck(AutoModelForCausalLM.from_config(config), bottleneck())


def test_a_layer_whose_blocks_cannot_be_told_apart_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(transformers.GPT2Config(**GPT2))
    model.transformer.h[1].moe = torch.nn.Linear(32, 32)
    with pytest.raises(ModelError, match=r"h\.1: .*feed-forward block .*mlp \(GPT2MLP\), moe"):
        add_bottleneck(model, bottleneck())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_leaves_the_base_alone(
    tiny_model: Path, checkpointing: bool
) -> None:
    torch.manual_seed(0)
    model = add_bottleneck(base_model(tiny_model), bottleneck(placement="houlsby", dropout=0.1))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    base = {name: w.clone() for name, w in model.state_dict().items() if "bottleneck_" not in name}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert sum(w.numel() for w in trained) == 2 * 2 * (64 * 16 + 16 + 16 * 64 + 64)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    model.train()
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    after = model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in base.items())


def test_weights_are_float32_beside_a_16_bit_base_with_and_without_autocast(
    tiny_model: Path,
) -> None:
    exact = add_bottleneck(base_model(tiny_model), bottleneck(placement="houlsby")).eval()
    half = add_bottleneck(base_model(tiny_model, torch.bfloat16), bottleneck(placement="houlsby"))
    half.eval()
    disturb(exact, 0)
    weights = {n: w for n, w in exact.named_parameters() if "bottleneck_" in n}
    for name, weight in half.named_parameters():
        if "bottleneck_" in name:
            assert weight.dtype == torch.float32
            weight.data.copy_(weights[name])
    plain = logits(half)
    with torch.autocast("cpu", torch.bfloat16):
        cast, mixed = logits(half), logits(exact)
    assert plain.dtype == torch.bfloat16
    for rounded in (plain, cast, mixed):
        assert torch.allclose(rounded.float(), logits(exact), atol=0.05)


def test_a_saved_adapter_gives_the_same_logits_in_a_fresh_process(
    saved: dict[str, tuple[Path, Tensor]], tiny_model: Path, tmp_path: Path
) -> None:
    folder, expected = saved["second"]
    program = (
        "import sys, torch; from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "from posttrain.train.bottleneck import register\n"
        "register(); register(); torch.set_num_threads(1)\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2]).eval()\n"
        "ids = torch.arange(40, 64).reshape(2, 12)\n"
        "torch.save(model(input_ids=ids, use_cache=False).logits.detach(), sys.argv[3])\n"
    )
    command = [sys.executable, "-c", program, str(tiny_model), str(folder), str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=120, env={"CUDA_VISIBLE_DEVICES": ""})
    assert torch.equal(torch.load(tmp_path / "out"), expected)


def test_the_same_adapter_has_the_same_bytes_and_no_base_in_it(
    saved: dict[str, tuple[Path, Tensor]], tiny_model: Path, tmp_path: Path
) -> None:
    make(tmp_path / "again", tiny_model, 1, placement="houlsby")
    assert digests_of(tmp_path / "again") == digests_of(saved["second"][0])
    names = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * 4
    assert all(".bottleneck_down." in name or ".bottleneck_up." in name for name in names)
    loaded = PeftModel.from_pretrained(base_model(tiny_model), tmp_path / "again")
    loaded.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "peft" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_two_adapters_on_one_base_are_swapped_disabled_and_deleted(
    saved: dict[str, tuple[Path, Tensor]], tiny_model: Path
) -> None:
    register()
    base = base_model(tiny_model)
    bare = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, saved["first"][0], adapter_name="first").eval()
        model.load_adapter(saved["second"][0], "second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(logits(model), saved[name][1])
        with model.disable_adapter():
            assert torch.equal(logits(model), bare)
    model.set_adapter("second")
    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"]
    assert torch.equal(logits(model), saved["second"][1])
    assert torch.equal(logits(model.unload()), bare)
    assert not any(isinstance(module, BottleneckLayer) for module in base.modules())


def test_an_adapter_is_read_without_being_made_first(
    saved: dict[str, tuple[Path, Tensor]], tiny_model: Path
) -> None:
    register()
    base, (folder, expected) = base_model(tiny_model), saved["second"]
    model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(model), expected)


def test_a_further_adapter_is_added_beside_another(
    saved: dict[str, tuple[Path, Tensor]], tiny_model: Path
) -> None:
    register()
    model = PeftModel.from_pretrained(base_model(tiny_model), saved["first"][0], "first").eval()
    model.add_adapter("new", BottleneckPeftConfig(placement="houlsby", bottleneck_size=8))
    assert torch.equal(logits(model), saved["first"][1])
    model.set_adapter("new")
    assert torch.equal(logits(model), logits(base_model(tiny_model)))


def test_only_the_chosen_adapter_is_trained(
    saved: dict[str, tuple[Path, Tensor]], tiny_model: Path
) -> None:
    register()
    base = base_model(tiny_model)
    model = PeftModel.from_pretrained(base, saved["first"][0], "first", is_trainable=True)
    model.load_adapter(saved["second"][0], "second", is_trainable=True)
    for name in ("first", "second"):
        model.set_adapter(name)
        trained = [n for n, weight in model.named_parameters() if weight.requires_grad]
        assert trained
        assert all(f".{name}." in weight for weight in trained)


def test_generation_with_a_key_value_cache_says_the_same_as_without(
    saved: dict[str, tuple[Path, Tensor]], tiny_model: Path
) -> None:
    register()
    model = PeftModel.from_pretrained(base_model(tiny_model), saved["second"][0]).eval()
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    cached = model.generate(input_ids=IDS, **settings)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **settings))
    assert not torch.equal(cached, base_model(tiny_model).generate(input_ids=IDS, **settings))


def test_merging_is_refused_with_the_reason(
    saved: dict[str, tuple[Path, Tensor]], tiny_model: Path
) -> None:
    register()
    model = PeftModel.from_pretrained(base_model(tiny_model), saved["first"][0]).eval()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ModelError, match="cannot be merged: it has a nonlinearity"):
            merge()
    assert torch.equal(logits(model), saved["first"][1])


def test_peft_keeps_its_own_adapters(tiny_model: Path) -> None:
    register()
    model = peft.get_peft_model(base_model(tiny_model), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert any("lora_A" in name for name, _ in model.named_parameters())
