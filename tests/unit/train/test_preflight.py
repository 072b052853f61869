import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from posttrain.errors import DataError, ModelError, RecipeError
from posttrain.recipe import STAGES
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
    method: str = "sft",
) -> tuple[Path, StageResult]:
    inputs = {
        "model": StageInput(kind="model", path=str(model), digest="m"),
        "rows": StageInput(
            kind="source", path=str(source), digest="r", spec={"source": str(source)}
        ),
    }
    config = {
        "method": method,
        "max_length": max_length,
        "extra_args": list(extra_args),
        "trl_config": STAGES[method].trl_config,
    }
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


def write_pairs(path: Path, *pairs: tuple[str, str]) -> Path:
    lines = (
        json.dumps({"prompt": "Which one?", "chosen": chosen, "rejected": rejected})
        for chosen, rejected in pairs
    )
    path.write_text("\n".join(lines))
    return path


def test_pairs_are_read_as_the_method_reads_them(tiny_model: Path, tmp_path: Path) -> None:
    """The second pair differs only where it is cut off."""
    same = "word " * 100
    source = write_pairs(tmp_path / "pairs.jsonl", ("red", "blue"), (same + "a", same + "b"))
    shares = set()
    for method in ("dpo", "orpo", "reward", "kto"):
        stage_dir, result = preflight(tmp_path / method, tiny_model, source, method=method)
        report = json.loads((stage_dir / "output" / "report.json").read_bytes())
        assert report["untrainable_rows"] == 1
        assert report["longest_tokens"] > 100
        assert "2 rows: " in result.headline
        shares.add(report["trainable_share"])
    assert len(shares) == 1


def test_pairs_that_do_not_differ_as_far_as_they_are_read_are_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    same = "word " * 100
    source = write_pairs(tmp_path / "pairs.jsonl", (same + "a", same + "b"))
    with pytest.raises(DataError, match=r"none of the first 1 rows has two answers that differ"):
        preflight(tmp_path / "stage", tiny_model, source, method="dpo")


def test_rows_that_a_method_cannot_read_are_told_the_formats_that_do(
    tiny_model: Path, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", "yes")
    with pytest.raises(DataError, match=r"kto needs kto or preferences; .*: preference, kto"):
        preflight(tmp_path / "kto", tiny_model, source, method="kto")


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_methods_that_write_answers_are_told_which_prompts_are_too_long(
    tiny_model: Path, tmp_path: Path, method: str
) -> None:
    rows = [{"prompt": "Say it."}, {"prompt": "Say it. " * 50}]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps({**row, "completion": "yes"}) for row in rows))
    _, result = preflight(tmp_path / "stage", tiny_model, source, method=method)
    assert result.headline.startswith("2 rows: 1 prompts, longest ")
    assert result.headline.endswith(", 1 left out")
    with pytest.raises(DataError, match=r"at most 8 tokens \(`rollout\.max_prompt_tokens`\)"):
        preflight(tmp_path / "short", tiny_model, source, method=method, max_length=8)


def test_a_method_of_ours_takes_no_further_arguments(tiny_model: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", "yes")
    with pytest.raises(RecipeError, match=r"extra_args\.adam_beta2: `ppo` is no trainer of TRL"):
        preflight(tmp_path / "stage", tiny_model, source, method="ppo", extra_args=["adam_beta2"])
