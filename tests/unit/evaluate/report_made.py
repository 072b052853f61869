"""Evaluations for the tests of `report.html`, small and without any model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from posttrain.evaluate.items import Item, PerplexityRow, write_items, write_perplexity
from posttrain.evaluate.results import (
    EvaluationResults,
    PerplexityResult,
    Settings,
    TaskResult,
    TaskSettings,
)
from posttrain.evaluate.samples import Sample
from posttrain.store.files import write_json

CHOICES = ("north", "south", "east", "west")


def item(
    task: str,
    number: int,
    value: float,
    *,
    group: str | None = None,
    metric: str = "acc",
    margin: float = 1.0,
    **texts: object,
) -> Item:
    """A question whose right answer is `north`; it leads by `margin` where the item is right."""
    right = -2.0 if value == 1 else -2.0 - margin
    wrong = -2.0 - margin if value == 1 else -2.0
    said = {
        "question": f"Where does needle {number} point?",
        "choices": CHOICES,
        "target": "north",
        "answer": "north" if value == 1 else "south",
    }
    return Item(
        task=task,
        group=group or task,
        item_id=number,
        item_digest=hashlib.sha256(f"{task} {group} {number}".encode()).hexdigest(),
        metric=metric,
        value=value,
        metrics={metric: value},
        log_likelihoods=(right, wrong, -9.0, -9.5),
        **{**said, **texts},
    )


def quiz(scores: Sequence[float], task: str = "quiz", group: str | None = None) -> list[Item]:
    return [item(task, number, value, group=group) for number, value in enumerate(scores)]


def rows(
    nats: float, count: int = 40, *, tokens: int = 10, dataset: str = "", group: str = ""
) -> list[PerplexityRow]:
    """Held-out rows of about `nats` a token of ten."""
    noise = np.random.default_rng(0).normal(size=count)
    return [
        PerplexityRow(f"{dataset}{group}{n}", 10 * nats + float(noise[n]), tokens, 50, dataset,
                      group)
        for n in range(count)
    ]  # fmt: skip


def evaluation(
    folder: Path,
    items: Sequence[Item] = (),
    held_out: Sequence[PerplexityRow] = (),
    *,
    samples: Mapping[str, str] | None = None,
    test_sets: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write an evaluation's folder: results over the items and rows that are given."""
    folder.mkdir(parents=True)
    tasks = tuple(_task([one for one in items if one.task == name])
                  for name in dict.fromkeys(one.task for one in items))  # fmt: skip
    datasets = list(dict.fromkeys(row.dataset for row in held_out))
    settings = Settings(
        lm_eval="0.4.13",
        tasks=tuple(TaskSettings(name=one.task, version="1", num_fewshot=0) for one in tasks),
        limit=None,
        seed=seed,
        dtype="float32",
        questions_in_chat_template=False,
        chat_template=None,
        perplexity_rows=200,
        perplexity_max_length=1024,
        test_sets=tuple({"dataset": name, "metrics": ["exact_match"]} for name in test_sets),
    )
    results = EvaluationResults(
        tasks=tasks,
        perplexity=_perplexity([row for row in held_out if row.dataset == datasets[0]])
        if datasets
        else None,
        other_perplexities={
            name: _perplexity([row for row in held_out if row.dataset == name])
            for name in datasets[1:]
        },
        settings=settings,
        settings_digest=settings.digest,
    )
    results.save(folder)
    write_items(folder, items)
    write_perplexity(folder, held_out)
    said = [
        Sample(id=f"s{n}", prompt=prompt, answer=answer, reference="a reference").model_dump()
        for n, (prompt, answer) in enumerate((samples or {}).items())
    ]
    write_json(folder / "samples.json", said)
    return folder


def _task(items: Sequence[Item]) -> TaskResult:
    scores = np.array([one.value for one in items])
    groups = dict.fromkeys(one.group for one in items)
    return TaskResult(
        task=items[0].task,
        metric=items[0].metric,
        value=float(scores.mean()),
        standard_error=float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None,
        n=len(scores),
        higher_is_better=True,
        metrics={items[0].metric: float(scores.mean())},
        groups=dict.fromkeys(groups, 0.5) if len(groups) > 1 else {},
    )


def _perplexity(of: Sequence[PerplexityRow]) -> PerplexityResult:
    nats, tokens = sum(row.nats for row in of), sum(row.tokens for row in of)
    size = sum(row.bytes for row in of)
    groups = sorted({row.group for row in of} - {""})
    return PerplexityResult(
        perplexity=math.exp(nats / tokens),
        nats_per_token=nats / tokens,
        bits_per_byte=nats / size / math.log(2),
        rows=len(of),
        tokens=tokens,
        bytes=size,
        groups={
            name: _perplexity([
                PerplexityRow(row.id, row.nats, row.tokens, row.bytes)
                for row in of if row.group == name
            ])
            for name in groups
        },
    )  # fmt: skip
