"""Pairs, marked answers, and stage directories for the tests of the stages that learn from them."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

from posttrain.data.prepared import write_dataset
from posttrain.data.rows import KtoExample, Message, Preference
from posttrain.recipe import STAGES, ReferenceConfig
from posttrain.recipe.base import StageConfig
from posttrain.stages.program import StageContext, StageInput, StageResult
from tests.unit.train.programs import COLOURS, THINGS, make_stage_dir


def make_pairs(count: int, seed: int = 0) -> list[Preference]:
    """Pairs with a rule to learn: the chosen answer names the colour that was asked for."""
    draw = random.Random(seed)
    pairs = []
    for row in range(1, count + 1):
        colour, other = draw.sample(COLOURS, 2)
        pairs.append(
            Preference(
                id=f"{seed:04}{row:012}",
                file="pairs.jsonl",
                row=row,
                prompt=(Message("user", f"What is {colour}? ({row})"),),
                chosen=(Message("assistant", f"The {draw.choice(THINGS)} is {colour}."),),
                rejected=(Message("assistant", f"All is {other}. " * draw.randint(1, 3)),),
            )
        )
    return pairs


def make_marked(count: int, seed: int = 0, wanted: float = 0.5) -> list[KtoExample]:
    """The pairs' answers one by one, a share of them the wanted ones."""
    return [
        KtoExample(
            id=f"{seed:04}{number:012}",
            file="marked.jsonl",
            row=number + 1,
            prompt=pair.prompt,
            completion=pair.chosen if number < wanted * count else pair.rejected,
            label=number < wanted * count,
        )
        for number, pair in enumerate(make_pairs(count, seed))
    ]


def make_pair_dataset(folder: Path, train: int = 22, held_out: int = 7) -> Path:
    """A prepared dataset of pairs; both sides are no multiple of a batch."""
    rows = {"train": make_pairs(train), "validation": make_pairs(held_out, seed=1)}
    write_dataset(folder, "preferences", rows)  # type: ignore[arg-type]
    return folder


def make_marked_dataset(
    folder: Path, train: int = 22, held_out: int = 7, wanted: float = 0.5
) -> Path:
    """A prepared dataset of marked answers."""
    rows = {
        "train": make_marked(train, wanted=wanted),
        "validation": make_marked(held_out, seed=1),
    }
    write_dataset(folder, "kto", rows)  # type: ignore[arg-type]
    return folder


def answers_stage_dir(
    folder: Path,
    stage: str,
    model: Path,
    dataset: Path,
    cached: Path | None = None,
    **config: object,
) -> Path:
    """A work directory of a short run: two epochs in batches of 8, evaluated every second step.

    `cached` is the output of a `reference` stage to compare with.
    """
    settings: dict[str, object] = {
        "dataset": "answers",
        "epochs": 2,
        "adapter": {"rank": 4},
        "optimization": {"learning_rate": 5e-3},
        "batching": {"batch_size": 8, "max_length": 64},
        "validation": {"every_steps": 2},
        "dtype": "float32",
        **config,
    }
    if stage == "reference":
        settings = {"max_length": 64, "max_held_out_rows": 200, "dtype": "float32", **config}
    inputs = {
        "model": StageInput(kind="model", path=str(model), digest="base-digest"),
        "dataset": StageInput(kind="dataset", path=str(dataset), digest="dataset-digest"),
    }
    if cached is not None:
        inputs["reference"] = StageInput(kind="report", path=str(cached), digest="reference")
        settings["reference"] = "cached"
    return make_stage_dir(folder, stage, settings, inputs)


def run_here(stage: str, stage_dir: Path) -> StageResult:
    """Run the stage in this process, which has the libraries loaded already."""
    config: type[StageConfig] = ReferenceConfig if stage == "reference" else STAGES[stage]
    context = StageContext(stage_dir, config)
    context.output.mkdir(exist_ok=True)
    result: StageResult | None = importlib.import_module(f"posttrain.stages.{stage}").main(context)
    assert result is not None
    return result


def make_reference(folder: Path, method: str, model: Path, dataset: Path, **config: object) -> Path:
    """Run the `reference` stage; its output."""
    stage_dir = answers_stage_dir(folder, "reference", model, dataset, method=method, **config)
    run_here("reference", stage_dir)
    return stage_dir / "output"
