import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.data.prepared import write_dataset
from posttrain.data.rows import Chat, Message
from posttrain.errors import ModelError
from posttrain.estimate import rows
from posttrain.estimate.activations import Computation, Pass, one_layer
from posttrain.estimate.architecture import Architecture, from_config, read_architecture
from posttrain.estimate.device import GIB, Device
from posttrain.estimate.memory import Training, estimate_memory, four_bit_bytes
from posttrain.estimate.rows import RowLengths, lay_out, lengths_of_dataset, lengths_of_files
from posttrain.estimate.speed import flops_per_token, gpu_peak_flops, measure_cpu
from posttrain.estimate.stage import estimate_stage
from posttrain.estimate.trainable import trainable_parameters
from posttrain.recipe import STAGES, TrainingConfig
from posttrain.recipe.adapters import AdapterConfig, LoraConfig, Quantization
from posttrain.recipe.sft import SftConfig
from posttrain.recipe.training import Sharding

LLAMA_7B = from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "llama-7b",
)
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", 80 * GIB, 8, 1000 * GIB)
GPU_24 = Device("cuda", "NVIDIA GeForce RTX 4090", 24 * GIB, 1, 64 * GIB)
ADAPTERS: list[dict[str, object]] = [
    {"type": "lora", "rank": 4},
    {"type": "lora", "rank": 4, "dora": True},
    {"type": "lora", "target_modules": ["q_proj", "v_proj"]},
    {"type": "adalora", "rank": 2, "initial_rank": 3},
    {"type": "ia3"},
    {"type": "vera", "rank": 8},
    {"type": "prefix", "virtual_tokens": 5, "projection_size": 7},
    {"type": "prefix", "virtual_tokens": 5},
    {"type": "prompt", "virtual_tokens": 5},
    {"type": "bottleneck", "reduction": 4},
    {"type": "bottleneck", "placement": "houlsby"},
]


def adapter_of(settings: dict[str, object]) -> AdapterConfig:
    adapter = SftConfig.model_validate({"dataset": "chats", "adapter": settings}).adapter
    assert adapter is not None
    return adapter


def training(**changes: object) -> Training:
    """All weights of a model on one H100, four rows of 512 tokens a pass."""
    standard = Training(None, None, "bfloat16", Pass(2048, 512, True), 1, True, True)
    return replace(standard, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["GPT2Config", "LlamaConfig", "Qwen2Config", "Qwen3Config", "MistralConfig", "Gemma2Config"],
)
def test_parameters_by_formula_are_those_of_the_model(name: str) -> None:
    import torch
    import transformers

    config = getattr(transformers, name)()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    sizes = from_config(json.loads(config.to_json_string(use_diff=False)), name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sizes.parameters == pytest.approx(count, rel=1e-6)


def test_a_folder_has_the_parameters_of_its_weights(tiny_model: Path) -> None:
    sizes = read_architecture(tiny_model)
    assert sizes.counted == replace(sizes, counted=None).parameters
    assert (sizes.layers, sizes.hidden, sizes.kv_width, sizes.tied) == (2, 64, 32, True)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4, "num_local_experts": 8}, "experts"),
        ({"hidden_size": 64, "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "resnet"}, "no `num_attention_heads`"),
    ],
)
def test_a_model_that_the_formulae_are_not_for_is_named_as_such(
    config: dict[str, object], why: str
) -> None:
    with pytest.raises(ModelError, match=why):
        from_config(config, "OWNER/NAME")


@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
def test_trainable_parameters_are_those_that_peft_trains(
    settings: dict[str, object], tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from posttrain.train.adapters import add_adapter, count_trainable

    adapter = adapter_of(settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    trained = count_trainable(add_adapter(model, adapter, total_steps=10)).count
    assert trainable_parameters(read_architecture(tiny_model), adapter) == trained


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [None, {"rank": 4}, {"rank": 4, "dropout": 0.0}], ids=str)
def test_the_activations_of_a_layer_are_what_autograd_saves(
    settings: dict[str, object] | None, dtype: str, flat: bool, tiny_model: Path
) -> None:
    adapter = None if settings is None else adapter_of(settings)
    saved = saved_by_a_layer(tiny_model, adapter, dtype, flat)
    batch = Pass(100, 50, flat, padded=not flat)
    how = Computation(4 if dtype == "float32" else 2, False, False, False)
    estimate = one_layer(read_architecture(tiny_model), adapter, batch, how)
    # Autocast saves copies of the small weights as well, which are no activations.
    assert estimate == pytest.approx(saved, rel=0.02 if dtype == "float32" else 0.12)


def saved_by_a_layer(folder: Path, adapter: AdapterConfig | None, dtype: str, flat: bool) -> int:
    """Bytes that the second layer keeps for two rows of 50 tokens, or one of 50 and one of 40."""
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.train.adapters import add_adapter
    from posttrain.train.attention import separate_rows

    width = "float32" if adapter is None else dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, width))
    if flat:
        separate_rows(model)
    body = model.model
    whole = model if adapter is None else add_adapter(model, adapter, 10)
    whole.train()
    ids = torch.randint(5, 100, (2, 50), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, object] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 40:] = 0  # type: ignore[index]
    if flat:
        bounds = torch.tensor([0, 50, 100], dtype=torch.int32)
        places = torch.arange(50).repeat(2)[None]
        inputs = {"input_ids": ids.view(1, -1), "position_ids": places}
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    known = {parameter.untyped_storage().data_ptr() for parameter in whole.parameters()}
    inside, kept = [False], {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        is_weight_copy = tensor.dtype == torch.bfloat16 and 100 not in tensor.shape
        if inside[0] and place not in known and not (is_weight_copy and tensor.dim() == 2):
            kept[place] = tensor
        elif place not in kept:
            known.add(place)
        return tensor

    body.layers[1].register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    body.layers[1].register_forward_hook(lambda *_: inside.__setitem__(0, False))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        body(**inputs, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_four_bit_weights_take_what_the_paper_says() -> None:
    """Dettmers et al., 2023, section 3: 0.5 bits for constants, 0.127 with double quantization."""
    assert 8 * four_bit_bytes(Quantization(double=False)) == pytest.approx(4.5)
    assert 8 * four_bit_bytes(Quantization(double=True)) == pytest.approx(4.127, abs=1e-3)


def test_zero_divides_what_the_paper_says() -> None:
    """Rajbhandari et al., 2020, figure 1: 16 bytes a parameter in mixed precision with Adam."""
    count, share = LLAMA_7B.parameters, 64

    def states(stage: int | None, **more: object) -> float:
        sharding = None if stage is None else Sharding(zero=stage, **more)  # type: ignore[arg-type]
        found = estimate_memory(LLAMA_7B, training(sharding=sharding, world_size=share))
        gradients = found.gradients or 2 * count / (share if (stage or 0) >= 2 else 1)
        return (found.parameters + gradients + found.optimizer) / count

    assert states(1) == pytest.approx(2 + 2 + 12 / share, rel=0.01)
    assert states(2) == pytest.approx(2 + (2 + 12) / share, rel=0.01)
    assert states(3) == pytest.approx(16 / share, rel=0.01)


def test_offloaded_states_are_in_the_machines_memory() -> None:
    kept = estimate_memory(LLAMA_7B, training(sharding=Sharding(zero=3), world_size=1))
    moved = estimate_memory(
        LLAMA_7B, training(sharding=Sharding(zero=3, offload="all"), world_size=1)
    )
    assert moved.optimizer == moved.parameters == 0
    assert moved.host >= kept.optimizer + kept.parameters
    assert moved.total < kept.total


def test_less_is_needed_by_every_means_to_that_end() -> None:
    full = training(checkpointing=False)
    steps = [
        full,
        replace(full, checkpointing=True),
        replace(full, checkpointing=True, batch=Pass(512, 512, True)),
        replace(full, checkpointing=True, batch=Pass(512, 512, True), adapter=LoraConfig()),
        replace(
            full,
            checkpointing=True,
            batch=Pass(512, 512, True),
            adapter=LoraConfig(),
            quantization=Quantization(),
        ),
    ]
    totals = [estimate_memory(LLAMA_7B, step).total for step in steps]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 100 * GIB
    assert totals[-1] < 8 * GIB


def test_what_does_not_fit_comes_with_what_would() -> None:
    config = SftConfig(dataset="chats", adapter=None, dtype="bfloat16")
    lengths = RowLengths(np.full(1000, 700), "a test")
    found = estimate_stage(LLAMA_7B, config, lengths, GPU_24)
    assert not found.fits
    assert "micro_batch_size" in found.advice[0].write
    assert any("lora" in change.write for change in found.advice)
    fitting = [change.write for change in found.advice if change.fits]
    assert "quantization: {type: nf4}" in fitting
    assert estimate_stage(LLAMA_7B, config, lengths, replace(H100, memory=500 * GIB)).advice == ()


def test_steps_and_time_follow_the_rows() -> None:
    config = SftConfig(dataset="chats", epochs=2, dtype="bfloat16")
    found = estimate_stage(LLAMA_7B, config, RowLengths(np.full(1000, 500), "a test"), H100)
    assert found.steps == 250
    assert found.tokens == 1_000_000
    flops = flops_per_token(LLAMA_7B, found.trainable, 500)
    assert found.seconds is not None
    assert found.seconds > found.tokens * flops / 989e12, "no hardware is faster than its peak"


def test_flops_are_six_a_parameter_and_four_where_the_base_is_frozen() -> None:
    entries = LLAMA_7B.matrix_parameters
    assert flops_per_token(LLAMA_7B) == 6 * entries
    assert flops_per_token(LLAMA_7B, trainable=1_000_000) == 4 * entries + 6_000_000
    longer = flops_per_token(LLAMA_7B, length=2048) - flops_per_token(LLAMA_7B)
    assert longer == 12 * 32 * 4096 * 2048 / 2


def test_flops_agree_with_trl() -> None:
    """TRL counts attention to all positions and a frozen base as trained."""
    from transformers import LlamaConfig
    from trl.trainer.utils import compute_flops_per_token

    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    sizes = from_config(json.loads(config.to_json_string(use_diff=False)), "llama")
    assert flops_per_token(sizes, length=2 * 300) == compute_flops_per_token(config, 300)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla T4", None),
        ("Some other GPU", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name: str, peak: float | None) -> None:
    assert gpu_peak_flops(name, "bfloat16") == peak


def test_a_cpu_does_more_than_a_billion_operations_a_second() -> None:
    assert 1e9 < measure_cpu(seconds=0.05) < 1e14


def test_rows_are_laid_out_as_the_trainer_does() -> None:
    lengths = RowLengths(np.array([10, 200, 30, 90]), "a test")
    flat = lay_out(lengths, 100, False, 2, flat=True, cut=True)
    assert (flat.entries, flat.tokens, flat.widest) == (4, 230, Pass(190, 100, True))
    padded = lay_out(lengths, 100, False, 2, flat=False, cut=True)
    assert padded.widest == Pass(200, 100, False, padded=True)
    packed = lay_out(lengths, 100, True, 2, flat=True, cut=False)
    assert (packed.entries, packed.tokens, packed.widest.tokens) == (4, 330, 200)


def test_lengths_of_a_dataset_are_those_of_its_tokens(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = [f"What is {'very ' * number}red?" for number in range(1, 41)]
    chats = [
        Chat(
            id=f"{n:016}",
            file="a.jsonl",
            row=n,
            messages=(Message("user", text), Message("assistant", "It is.")),
        )
        for n, text in enumerate(texts)
    ]
    write_dataset(tmp_path / "chats", "chats", {"train": chats, "validation": chats[:2]})  # type: ignore[arg-type]
    found = lengths_of_dataset(tmp_path / "chats", tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    exact = sum(
        len(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}, {"role": "assistant", "content": "It is."}],
                tokenize=True,
                return_dict=True,
            )["input_ids"]
        )
        for text in texts
    )
    assert len(found.tokens) == 40
    assert found.tokens.sum() == pytest.approx(exact, rel=0.35)
    assert "tokenizer" in found.basis


def test_without_a_dataset_the_size_of_the_files_is_a_guess(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("x" * 399 + "\n" + "y" * 399 + "\n")
    found = lengths_of_files([file], limit=None)
    assert found.tokens.tolist() == [100, 100]
    assert "guess" in found.basis
    assert len(lengths_of_files([file], limit=1).tokens) == 1


def test_nothing_in_the_package_imports_torch() -> None:
    names = ("planning", "stage", "speed", "memory", "device")
    imports = ", ".join(f"posttrain.estimate.{name}" for name in names)
    script = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_guessed_bytes_of_a_token_are_those_of_english() -> None:
    assert 3 <= rows.BYTES_A_TOKEN <= 5


def test_sizes_survive_being_kept(tmp_path: Path) -> None:
    from pydantic import TypeAdapter

    adapter = TypeAdapter(Architecture)
    assert adapter.validate_json(adapter.dump_json(LLAMA_7B)) == LLAMA_7B


def test_models_beside_the_trained_one_are_counted() -> None:
    """DPO over all weights holds its reference; with an adapter, or from a cache, it does not."""
    lengths = RowLengths(np.full(32, 100, np.int64), "made up")

    def beside(stage: dict[str, object]) -> float:
        kind = str(stage["stage"])
        config = STAGES[kind].model_validate({"dataset": "rows", "dtype": "float32", **stage})
        assert isinstance(config, TrainingConfig)
        return estimate_stage(LLAMA_7B, config, lengths, H100).memory.beside

    weights = 4.0 * LLAMA_7B.parameters
    assert beside({"stage": "dpo", "adapter": None}) == weights
    assert beside({"stage": "dpo", "adapter": None, "reference": "cached"}) == 0
    assert beside({"stage": "dpo"}) == 0
    assert beside({"stage": "grpo", "reward": "r.py:f"}) == 0
    assert beside({"stage": "grpo", "reward": "judge"}) == weights
    # Reference, reward model, and a critic with gradients and AdamW's two states.
    assert beside({"stage": "ppo", "adapter": None, "reward": "judge"}) == (2 + 4) * weights
