"""Estimated and measured peak memory of training, one JSON line a case.

    python benchmarks/memory.py                        # random models of 0.2M and 4M parameters
    python benchmarks/memory.py --model FOLDER ...     # and these

Each case runs the program of `sft` on rows of equal length, as `posttrain run` would, and compares
its `resources.json`: `estimate_gib` and `measured_gib` are the whole process with its libraries,
`model_estimate_gib` and `model_measured_gib` what came on top once the libraries were loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from posttrain.data.prepared import write_dataset
from posttrain.data.rows import Chat, Message
from posttrain.hardware import allocator_settings
from posttrain.stages.program import StageInput, StageJob
from posttrain.store.files import write_json
from posttrain.train.resources import RESOURCES

METHODS: dict[str, dict[str, object]] = {
    "full": {"adapter": None},
    "lora": {"adapter": {"type": "lora"}},
    "qlora": {"adapter": {"type": "lora"}, "quantization": {"type": "nf4"}},
}
WORDS = ["red", "green", "blue", "black", "white", "door", "roof", "boat", "lamp", "coat", "leaf"]
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
)


def main() -> None:
    """Print one JSON line a case, and the table's worst ratio at the end on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--length", type=int, action="append")
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-random-models", action="store_true")
    options = parser.parse_args()
    lengths = options.length or [64, 256]
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        models = list(options.model)
        if not options.no_random_models:
            models = [*_random_models(Path(scratch)), *models]
        for model, method, length in _cases(models, options.method or list(METHODS), lengths):
            work = Path(scratch) / f"{model.name}-{method}-{length}"
            found = measure(model, method, length, options.micro, options.dtype, work)
            ratios.append(float(str(found["ratio"])))
            print(json.dumps(found), flush=True)
    print(f"ratios from {min(ratios):.2f} to {max(ratios):.2f}", file=sys.stderr)


def measure(
    model: Path, method: str, length: int, micro: int, dtype: str, work: Path
) -> dict[str, object]:
    """Train for three steps of one pass each, and compare."""
    dataset = work / "dataset"
    rows = [_chat(number, length) for number in range(3 * micro + 2)]
    write_dataset(dataset, "chats", {"train": rows[:-2], "validation": rows[-2:]})  # type: ignore[arg-type]
    config: dict[str, object] = {
        "stage": "sft",
        "dataset": "chats",
        "batching": {"batch_size": micro, "micro_batch_size": micro, "max_length": length},
        "validation": {"every_steps": 3},
        "dtype": dtype,
        **METHODS[method],
    }
    inputs = {
        "model": StageInput(kind="model", path=str(model), digest="model"),
        "dataset": StageInput(kind="dataset", path=str(dataset), digest="dataset"),
    }
    job = StageJob(stage="sft", name="sft", config=config, inputs=inputs)
    write_json(work / "stage.json", job.model_dump(mode="json"))
    environment = {**os.environ, **allocator_settings()}
    command = [sys.executable, "-m", "posttrain.stages.sft", str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        events = (work / "events.jsonl").read_text(encoding="utf-8").splitlines()
        sys.exit(f"{model.name} {method} {length}: {events[-1] if events else done.stderr}")
    record = json.loads((work / "output" / RESOURCES).read_bytes())
    return {
        "model": model.name,
        "method": method,
        "dtype": dtype,
        "max_length": length,
        "micro_batch_size": micro,
        **_compare(record),
    }


def _compare(record: dict[str, object]) -> dict[str, object]:
    parts = record["memory_estimate_gib"]
    assert isinstance(parts, dict)
    estimate, measured = parts["total"], float(str(record["memory_peak_gib"]))
    before = float(str(record["memory_before_model_gib"]))
    above, measured_above = estimate - parts["runtime"], measured - before
    return {
        "estimate_gib": round(estimate, 3),
        "measured_gib": round(measured, 3),
        "ratio": round(estimate / measured, 3),
        "model_estimate_gib": round(above, 3),
        "model_measured_gib": round(measured_above, 3),
        "model_ratio": round(above / measured_above, 3),
        "libraries_gib": round(before, 3),
        "moment": record["moment"],
    }


def _cases(
    models: list[Path], methods: list[str], lengths: list[int]
) -> Iterator[tuple[Path, str, int]]:
    for model in models:
        for method in methods:
            for length in lengths:
                yield model, method, length


def _chat(number: int, length: int) -> Chat:
    """A chat that is longer than any row may be, so that all rows have the full length."""
    draw = random.Random(number)
    text = " ".join(draw.choice(WORDS) for _ in range(2 * length))
    messages = (Message("user", f"Row {number}?"), Message("assistant", text))
    return Chat(id=f"{number:016x}", file="chats.jsonl", row=number + 1, messages=messages)


def _random_models(folder: Path) -> list[Path]:
    """Llamas of 0.2 and 4 million parameters with random weights."""
    shapes = {"llama-0.2m": (64, 128, 2, 600), "llama-4m": (256, 768, 4, 2000)}
    return [_random_model(folder / name, *shape) for name, shape in shapes.items()]


def _random_model(folder: Path, hidden: int, inner: int, layers: int, vocabulary: int) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(WORDS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
