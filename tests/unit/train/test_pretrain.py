import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.data.prepared import write_dataset
from posttrain.data.rows import Document
from posttrain.errors import DataError
from posttrain.recipe.pretrain import PretrainConfig
from posttrain.stages.pretrain import main
from posttrain.stages.program import StageContext, StageInput, StageResult
from posttrain.train.tokenize import encode_document
from tests.unit.train.programs import COLOURS, THINGS, history_of, make_dataset, make_stage_dir

# Losses of the run below; see test_sft.py.
GOLDEN_LOSSES = [6.425255, 6.412567, 6.167127, 5.837197, 5.511774, 5.133283]


def make_documents(folder: Path, train: int = 40, held_out: int = 6) -> Path:
    """Short documents, and one longer than three blocks."""
    texts = [
        f"The {THINGS[n % 8]} of house {n} is {COLOURS[n % 6]}. It was {COLOURS[n // 8]} before."
        for n in range(train + held_out)
    ]
    texts[0] = " ".join(texts[:12])
    rows = [
        Document(id=f"{n:016x}", file="docs.txt", row=n + 1, text=text)
        for n, text in enumerate(texts)
    ]
    write_dataset(folder, "documents", {"train": rows[:train], "validation": rows[train:]})
    return folder


def pretrain_stage_dir(folder: Path, model: Path, dataset: Path, **config: object) -> Path:
    settings: dict[str, object] = {
        "dataset": "docs",
        "epochs": 12,
        "optimization": {"learning_rate": 5e-3},
        "batching": {"batch_size": 4, "max_length": 96, "packing": True},
        "validation": {"every_steps": 20},
        "dtype": "float32",
        **config,
    }
    inputs = {
        "model": StageInput(kind="model", path=str(model), digest="base-digest"),
        "dataset": StageInput(kind="dataset", path=str(dataset), digest="dataset-digest"),
    }
    return make_stage_dir(folder, "pretrain", settings, inputs)


def train(stage_dir: Path) -> StageResult:
    context = StageContext(stage_dir, PretrainConfig)
    context.output.mkdir()
    result = main(context)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_documents(tmp_path_factory.mktemp("documents") / "docs")


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StageResult]:
    stage_dir = pretrain_stage_dir(
        tmp_path_factory.mktemp("pretrain") / "run", tiny_model, documents
    )
    return stage_dir, train(stage_dir)


def test_losses_are_those_of_the_last_release(trained: tuple[Path, StageResult]) -> None:
    losses = [step.loss for step in history_of(trained[0]).steps]
    assert losses[:6] == pytest.approx(GOLDEN_LOSSES, abs=1e-4)


def test_perplexity_on_held_out_documents_is_told_before_and_after(
    trained: tuple[Path, StageResult], documents: Path
) -> None:
    """Recomputed document by document from the saved model."""
    stage_dir, result = trained
    model = AutoModelForCausalLM.from_pretrained(stage_dir / "output").eval()
    tokenizer = AutoTokenizer.from_pretrained(stage_dir / "output")
    texts = pq.read_table(documents / "validation.parquet").column("text").to_pylist()
    total = tokens = 0.0
    for text in texts:
        row = encode_document(tokenizer, text)
        with torch.no_grad():
            out = model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels]))
        total, tokens = total + float(out.loss) * row.trainable, tokens + row.trainable
    metrics = result.metrics
    assert metrics["held_out_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert metrics["held_out_perplexity"] < metrics["held_out_perplexity_before"] / 4
    assert result.headline.startswith("held-out perplexity ")


def test_the_model_goes_on_with_what_it_read(trained: tuple[Path, StageResult]) -> None:
    output = trained[0] / "output"
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    start = tokenizer("The door of house", return_tensors="pt")
    said = tokenizer.decode(model.generate(**start, max_new_tokens=30, do_sample=False)[0])
    assert any(f" is {colour}." in said for colour in COLOURS)


def test_documents_in_blocks_are_accounted_for_one_by_one(
    trained: tuple[Path, StageResult], tiny_model: Path
) -> None:
    account = pq.read_table(trained[0] / "output/rows.parquet").to_pydict()
    assert len(account["id"]) == 40
    assert set(account["verdict"]) == {"trained"}
    assert account["tokens"][0] > 3 * 96
    assert account["cut"] == [0] * 40, "a long document goes on in another block"
    assert trained[1].metrics["best_step"] == trained[1].metrics["steps"]
    assert set(account["passes"]) == {12}
    read = history_of(trained[0]).tokens
    fillers = read - 12 * sum(account["tokens"])
    assert 0 <= fillers < 12 * 4


def test_held_out_losses_are_kept_by_document(trained: tuple[Path, StageResult]) -> None:
    rows = pq.read_table(trained[0] / "output/held_out.parquet").to_pydict()
    assert len(rows["id"]) == 6
    loss = sum(rows["nll"]) / sum(rows["tokens"])
    assert loss == pytest.approx(trained[1].metrics["held_out_loss"], abs=1e-6)


def test_chats_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    chats = make_dataset(tmp_path / "chats")
    with pytest.raises(DataError, match="pretrain needs documents and these rows are chats"):
        train(pretrain_stage_dir(tmp_path / "run", tiny_model, chats))


def test_the_saved_settings_name_no_attention_of_ours(trained: tuple[Path, StageResult]) -> None:
    config = json.loads((trained[0] / "output/config.json").read_text())
    assert "sdpa_by_row" not in json.dumps(config)
