import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from posttrain.errors import DataError, ModelError, RecipeError
from posttrain.recipe.preflight import PreflightConfig
from posttrain.stages.preflight import main
from posttrain.stages.program import StageContext, StageInput, StageResult
from tests.unit.train.programs import make_stage_dir


def preflight(
    folder: Path,
    model: Path,
    source: Path,
    max_length: int = 64,
    extra_args: Sequence[str] = (),
) -> tuple[Path, StageResult]:
    inputs = {
        "model": StageInput(kind="model", path=str(model), digest="m"),
        "rows": StageInput(
            kind="source", path=str(source), digest="r", spec={"source": str(source)}
        ),
    }
    config = {"max_length": max_length, "extra_args": list(extra_args)}
    stage_dir = make_stage_dir(folder, "preflight", config, inputs)
    context = StageContext(stage_dir, PreflightConfig)
    context.output.mkdir()
    return stage_dir, main(context)


def write_rows(path: Path, *answers: str) -> Path:
    lines = (json.dumps({"prompt": "Say it.", "completion": answer}) for answer in answers)
    path.write_text("\n".join(lines))
    return path


def test_it_reports_what_training_would_see(tiny_model: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", "yes", "no " * 100)
    stage_dir, result = preflight(tmp_path / "stage", tiny_model, source)
    report = json.loads((stage_dir / "output" / "report.json").read_bytes())
    assert report["rows"] == 2
    assert report["truncated_rows"] == 1
    assert report["longest_tokens"] > 64
    assert 0 < report["trainable_share"] < 1
    share = f"{report['trainable_share']:.0%}"
    longest = report["longest_tokens"]
    assert result.headline == (
        f"2 rows: {share} of tokens trainable, longest {longest}, 1 truncated"
    )


def test_it_reads_real_rows(tiny_model: Path, real_data: Path, tmp_path: Path) -> None:
    source = real_data / "alpaca_en_demo.json"
    _, result = preflight(tmp_path / "stage", tiny_model, source, max_length=4096)
    assert result.metrics["rows"] == 64
    assert result.headline.endswith("none truncated")


def test_a_model_without_a_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    source = write_rows(tmp_path / "rows.jsonl", "yes")
    with pytest.raises(ModelError, match=r"rows\.jsonl:1: .*no chat template"):
        preflight(tmp_path / "stage", tmp_path / "bare", source)


def test_rows_that_train_nothing_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    # Markers around nothing: the mistake that trains on no token at all, and says nothing.
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{% generation %}{% endgeneration %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "empty")
    source = write_rows(tmp_path / "rows.jsonl", "yes", "no")
    with pytest.raises(DataError, match="none of the first 2 rows"):
        preflight(tmp_path / "stage", tmp_path / "empty", source)


def test_a_misspelt_training_argument_is_found_before_training(
    tiny_model: Path, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", "yes", "no")
    with pytest.raises(RecipeError, match="did you mean `neftune_noise_alpha`"):
        preflight(tmp_path / "stage", tiny_model, source, extra_args=["neftune_noise_alfa"])
