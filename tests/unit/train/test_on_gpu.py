"""What only a GPU can show: 16-bit compute, paged optimizers, FlashAttention, recomputation."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.recipe.sft import SftConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.stages.sft import main
from posttrain.train.attention import separate_rows
from posttrain.train.tables import make_table
from posttrain.train.tokenize import Encoded
from tests.unit.train.programs import make_dataset, sft_stage_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def train(stage_dir: Path) -> StageResult:
    context = StageContext(stage_dir, SftConfig)
    context.output.mkdir()
    result = main(context)
    assert result is not None
    return result


@pytest.mark.parametrize(
    "method",
    [
        {"adapter": None},
        {"adapter": {"rank": 4}},
        {"adapter": {"rank": 4}, "quantization": {}},
        {"adapter": {"type": "bottleneck", "reduction": 4}},
    ],
    ids=["all weights", "lora", "qlora", "bottleneck"],
)
def test_training_in_16_bits_lowers_the_held_out_loss(
    method: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    dataset = make_dataset(tmp_path / "data")
    stage_dir = sft_stage_dir(
        tmp_path / "run", tiny_model, dataset, **{"epochs": 6, "dtype": "bfloat16", **method}
    )
    metrics = train(stage_dir).metrics
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"]
    assert metrics["memory_peak_gib"] > 0


def test_qlora_pages_its_optimizer(tiny_model: Path, tmp_path: Path) -> None:
    from posttrain.recipe.adapters import Quantization
    from posttrain.train.quantization import optimizer_name

    assert optimizer_name(Quantization()).startswith("paged_")


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_flash_attention_keeps_packed_rows_apart(tiny_model: Path) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = [tokenizer(text)["input_ids"] for text in ("The door is red.", "Leaves are green.")]
    table = make_table([Encoded(row, list(row)) for row in ids], 64, True, 1, 0)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(table.dataset))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).cuda().eval()
    alone = [model(torch.tensor([row]).cuda()).logits[0].float() for row in ids]
    separate_rows(model)
    assert model.config._attn_implementation == "flash_attention_2"
    read = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    packed = model(**read, use_cache=False).logits[0].float()
    flat = batch["input_ids"][0].tolist()
    for row, logits in zip(ids, alone, strict=True):
        start = next(i for i in range(len(flat)) if flat[i : i + len(row)] == row)
        torch.testing.assert_close(packed[start : start + len(row)], logits, atol=0.1, rtol=0.1)
