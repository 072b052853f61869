"""Every way to train, from the stage's program to the model that comes back from disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from posttrain.models import load_causal_lm
from posttrain.recipe.sft import SftConfig
from posttrain.stages.program import StageContext, StageInput, StageResult
from posttrain.stages.sft import main
from posttrain.train.rows import encode_rows
from tests.unit.train.programs import history_of, make_chats, make_dataset, sft_stage_dir

METHODS: dict[str, dict[str, Any]] = {
    "all weights": {"adapter": None},
    "lora": {"adapter": {}},
    "rslora": {"adapter": {"rank": 32, "rank_stabilized": True}},
    "dora": {"adapter": {"rank": 4, "dora": True}},
    "pissa": {"adapter": {"rank": 4, "init": "pissa"}},
    "adalora": {
        "adapter": {"type": "adalora", "rank": 2, "initial_rank": 4},
        "optimization": {"learning_rate": 5e-2},
    },
    "ia3": {"adapter": {"type": "ia3"}},
    "vera": {"adapter": {"type": "vera", "rank": 16}},
    "prefix": {"adapter": {"type": "prefix", "virtual_tokens": 4}},
    "prompt": {"adapter": {"type": "prompt", "virtual_tokens": 4}},
    "pfeiffer": {"adapter": {"type": "bottleneck", "reduction": 4}},
    "houlsby": {"adapter": {"type": "bottleneck", "reduction": 4, "placement": "houlsby"}},
    "qlora": {"adapter": {}, "quantization": {}},
    "neftune": {"adapter": None, "optimization": {"learning_rate": 2e-3, "neftune_alpha": 5}},
}
QUANTIZED = {"qlora"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "chats")


@pytest.fixture(scope="module", params=METHODS)
def trained(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path, StageResult]:
    settings = {"epochs": 4, "optimization": {"learning_rate": 5e-3}, **METHODS[request.param]}
    stage_dir = tmp_path_factory.mktemp("sft") / "run"
    sft_stage_dir(stage_dir, tiny_model, dataset, **settings)
    context = StageContext(stage_dir, SftConfig)
    context.output.mkdir()
    result = main(context)
    assert result is not None
    return request.param, stage_dir, result


def reload(stage_dir: Path, base: Path) -> Any:
    output = stage_dir / "output"
    kind = "adapter" if (output / "adapter_config.json").exists() else "model"
    source = StageInput(kind=kind, path=str(output), digest="", base=str(base))
    return load_causal_lm(source, "float32")


def test_the_held_out_loss_falls(trained: tuple[str, Path, StageResult]) -> None:
    metrics = trained[2].metrics
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"] - 0.002
    steps = history_of(trained[1]).steps
    assert sum(step.loss for step in steps[-3:]) < sum(step.loss for step in steps[:3])


def test_what_was_saved_has_the_held_out_loss_that_was_reported(
    trained: tuple[str, Path, StageResult], tiny_model: Path
) -> None:
    name, stage_dir, result = trained
    model = reload(stage_dir, tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(stage_dir / "output")
    rows = encode_rows(tokenizer, make_chats(8, seed=1), 64).rows
    total = 0.0
    for row in rows:
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor([row.input_ids]),
                attention_mask=torch.ones(1, len(row.input_ids), dtype=torch.long),
                labels=torch.tensor([row.labels]),
            )
        total += float(out.loss) * row.trainable
    loss = total / sum(row.trainable for row in rows)
    # The unquantized base is not the one that was trained on.
    tolerance = 0.05 if name in QUANTIZED else 1e-4
    assert loss == pytest.approx(result.metrics["held_out_loss"], abs=tolerance)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_what_was_saved_generates(trained: tuple[str, Path, StageResult], tiny_model: Path) -> None:
    model = reload(trained[1], tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(trained[1] / "output")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is red?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert said.shape[1] >= 5


def test_an_adapter_trains_few_parameters_and_says_how_many(
    trained: tuple[str, Path, StageResult],
) -> None:
    share = trained[2].metrics["trainable_share"]
    assert share == 1 if METHODS[trained[0]]["adapter"] is None else 0 < share < 0.6
