"""Learning curves of PPO, GRPO and RLOO on one task, as a Markdown table and JSON.

A model of a million parameters first learns by SFT to answer `What is red?` with a thing of that
colour, each of eight things as often as the others. The reward wants the colour that was asked for,
and a boat: 1 for both, else 0. Every method then writes as many answers an update, at the same
learning rate and price of KL, and otherwise with its own defaults, with several seeds.

    python benchmarks/online.py [--seeds 3] [--updates 24]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from made import byte_tokenizer
from turns import stage

from posttrain.data.prepared import write_dataset
from posttrain.data.rows import Chat, Message
from posttrain.stages.program import StageInput
from posttrain.train.history import History

METHODS = ("ppo", "grpo", "rloo")
COLOURS = ("red", "green", "blue", "black", "white", "amber")
THINGS = ("door", "roof", "boat", "lamp", "coat", "leaf", "road", "cup")
ANSWERS = 64
"""Written an update."""
LOOKS = 8
"""Evaluations of a run."""

REWARD = """
def boat(prompts, answers):
    asked = [prompt[-1]["content"].split()[2].rstrip("?") for prompt in prompts]
    return [float(a == f"The boat is {colour}.") for a, colour in zip(answers, asked)]
"""


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--updates", type=int, default=24, help="updates of each run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = make_dataset(folder / "chats")
        model = teach(folder, make_model(folder / "random"), dataset)
        runs = {
            method: [
                curve(folder, method, seed, model, dataset, given) for seed in range(given.seeds)
            ]
            for method in METHODS
        }
    print(table(runs))
    print(json.dumps(runs))


def make_dataset(folder: Path) -> Path:
    """Questions for a colour, and an answer with one of eight things."""
    draw = random.Random(0)
    chats = [
        Chat(
            id=f"{row:016x}",
            file="chats.jsonl",
            row=row,
            messages=(
                Message("user", f"What is {(colour := draw.choice(COLOURS))}? ({row})"),
                Message("assistant", f"The {draw.choice(THINGS)} is {colour}."),
            ),
        )
        for row in range(1, 513)
    ]
    write_dataset(folder, "chats", {"train": chats[:448], "validation": chats[448:]})
    return folder


def make_model(folder: Path) -> Path:
    """A random Llama of a million parameters with a byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def teach(folder: Path, model: Path, dataset: Path) -> Path:
    """Supervised fine-tuning until the form of the answers is known."""
    settings = {
        "epochs": 6,
        "batching": {"batch_size": 16, "micro_batch_size": 16, "max_length": 128},
        "optimization": {"learning_rate": 2e-3},
        "validation": {"patience": None},
    }
    done = run(folder / "sft", "sft", settings, {"model": model, "dataset": dataset})
    loss = History.read(done).best.loss
    print(f"sft: held-out loss {loss:.3f}", file=sys.stderr)
    return done


def curve(
    folder: Path, method: str, seed: int, model: Path, dataset: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """Held-out reward and KL over the answers written so far."""
    file = folder / "rewards.py"
    file.write_text(REWARD)
    price: dict[str, Any] = {"kl": {"coef": 0.02}} if method == "ppo" else {"beta": 0.02}
    settings = {
        **price,
        "reward": "rewards.py:boat",
        "seed": seed,
        "max_steps": given.updates,
        "rollout": {"max_new_tokens": 24, "batch_size": ANSWERS},
        "batching": {"batch_size": ANSWERS, "micro_batch_size": ANSWERS},
        "optimization": {"learning_rate": 2e-4},
        "validation": {
            "every_steps": max(1, given.updates // LOOKS),
            "patience": None,
            "max_rows": 64,
        },
    }
    began = time.monotonic()
    inputs = {"model": model, "dataset": dataset, "reward:boat": file}
    done = run(folder / f"{method}-{seed}", method, settings, inputs)
    history, seconds = History.read(done), time.monotonic() - began
    print(f"{method} {seed}: {seconds:.0f} s", file=sys.stderr)
    return {
        "seconds": round(seconds, 1),
        "answers": [ANSWERS * look.step for look in history.held_out],
        "reward": [round(look.values["reward"], 4) for look in history.held_out],
        "kl": [round(look.values["kl"], 4) for look in history.held_out],
    }


def run(stage_dir: Path, name: str, settings: dict[str, Any], inputs: dict[str, Path]) -> Path:
    """Run a stage's program over all weights; returns the folder of what it left."""
    config = {"stage": name, "dataset": "chats", "adapter": None, "dtype": "float32", **settings}
    kinds = {"model": "model", "dataset": "dataset"}
    given = {
        key: StageInput(kind=kinds.get(key, "source"), path=str(path), digest=key)
        for key, path in inputs.items()
    }
    stage(stage_dir, name, config, given)
    return stage_dir / "output"


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over the seeds: reward, and KL in nats an answer."""
    lines = [
        "| answers written |" + "".join(f" {m} reward | {m} KL |" for m in runs),
        "|---:|" + "---:|---:|" * len(runs),
    ]
    points = next(iter(runs.values()))[0]["answers"]
    for position, answers in enumerate(points):
        cells = ""
        for several in runs.values():
            for number in ("reward", "kl"):
                values = [one[number][position] for one in several]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells += f" {statistics.mean(values):.2f} ± {spread:.2f} |"
        lines.append(f"| {answers} |{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
