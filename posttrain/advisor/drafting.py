"""A recipe from advice: YAML that is ready to run but for the names of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import ValidationError

from posttrain.advisor import memory
from posttrain.advisor.engine import Advice
from posttrain.recipe.adapters import LoraConfig
from posttrain.recipe.load import validate_recipe
from posttrain.recipe.recipe import STAGES, Recipe
from posttrain.recipe.training import Batching

MODEL = "OWNER/NAME"
"""Stands for the base model where none was named."""

_MOST_TASKS = 4
"""Tasks that are written out."""
_BENCHMARKS = ["mmlu", "hellaswag"]
_ITEMS = 200
_REPLAY = 0.05
_WIDTH = 70
"""Characters of a stage that stands on one line."""

Plain = dict[str, Any]


@dataclass(frozen=True)
class Draft:
    """A recipe, and the same as text with comments."""

    text: str
    """YAML."""
    recipe: Recipe
    missing: tuple[str, ...]
    """Advised stages that this posttrain does not have; comments stand in their places."""


@dataclass(frozen=True)
class Names:
    """What the recipe calls things. Datasets left out get files of these names to be filled in."""

    recipe: str = "advised"
    model: str = MODEL
    datasets: Mapping[str, tuple[str, Plain]] = field(default_factory=dict)
    """Name and settings of the datasets that are there, by role: `chats`, `task-1`, `documents`,
    `pairs`, `ratings`, `general-text`, `general-chats`."""


@dataclass
class _Sheet:
    """Datasets and stages as they are written down."""

    advice: Advice
    names: Names
    datasets: dict[str, Plain] = field(default_factory=dict)
    stages: list[Plain | str] = field(default_factory=list)
    """Stages; a string is a comment that stands in the place of one."""
    missing: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    """Datasets that SFT learns from."""

    def dataset(self, role: str, row_format: str | None = None) -> str:
        """Name of the dataset in this role; a file to be filled in if there is none."""
        made: Plain = {"source": f"{role}.jsonl"}
        if row_format is not None:
            made["format"] = row_format
        name, spec = self.names.datasets.get(role, (role, made))
        self.datasets.setdefault(name, spec)
        return name

    def add(self, stage: str, body: Plain) -> None:
        """Put a stage at the end."""
        self.stages.append({stage: body})


def draft(advice: Advice, names: Names | None = None) -> Draft:
    """Write the recipe that follows from advice.

    It holds only stages that this posttrain has; for each other one a comment says what belongs
    there. Without anything to train it measures the base model, as a baseline.
    """
    sheet = _Sheet(advice, names or Names())
    if advice.stages:
        _write_training(sheet)
    trains = any(isinstance(one, dict) and next(iter(one)) in advice.stages for one in sheet.stages)
    if trains or not advice.stages:
        sheet.add("evaluate", {"tasks": _BENCHMARKS, "limit": _ITEMS})
    if trains:
        sheet.add("gate", {"perplexity": "must_improve"})
    data = {
        "name": sheet.names.recipe,
        "model": sheet.names.model,
        "datasets": sheet.datasets,
        "stages": [stage for stage in sheet.stages if isinstance(stage, dict)],
    }
    recipe = validate_recipe(data)
    return Draft(_text(sheet), recipe, tuple(sheet.missing))


def _write_training(sheet: _Sheet) -> None:
    """All training stages, with what they need before and after them."""
    advice = sheet.advice
    bodies = {stage: _body(sheet, stage) for stage in advice.stages}
    roles = dict.fromkeys(sheet.datasets)
    prepared = [stage for stage in sheet.stages if isinstance(stage, dict)]
    sheet.stages = [*({"prepare": _prepare(sheet, name)} for name in roles), *prepared]
    for position, stage in enumerate(advice.stages):
        if not _put(sheet, stage, bodies[stage]):
            continue
        weights = advice.pretrain_weights if stage == "pretrain" else advice.weights
        followed = any(later in STAGES for later in advice.stages[position + 1 :])
        # A reward model is not what the next stage starts from.
        if stage != "reward" and weights != "full" and (followed or advice.merge):
            sheet.add("merge", {})


def _put(sheet: _Sheet, stage: str, body: Plain) -> bool:
    """Write a stage down, or a comment in its place if this posttrain has no such stage."""
    config = STAGES.get(stage)
    if config is not None:
        try:
            config.model_validate({**body, "stage": stage})
        except ValidationError:
            config = None
    if config is not None:
        sheet.add(stage, body)
        return True
    sheet.missing.append(stage)
    sheet.stages.append(f"posttrain has no stage `{stage}` yet. What belongs here:")
    sheet.stages.append(f"- {stage}: {_flow(body)}")
    return False


def _body(sheet: _Sheet, stage: str) -> Plain:
    """Settings of a training stage."""
    advice = sheet.advice
    body: Plain = {"dataset": _dataset_of(sheet, stage)}
    weights = advice.pretrain_weights if stage == "pretrain" else advice.weights
    if weights == "full":
        body["full"] = {}
    else:
        body["adapter"] = {"type": "lora", "rank": LoraConfig().rank}
        if weights == "qlora":
            body["quantization"] = {"type": "nf4"}
    for setting in advice.settings:
        if setting.stage == stage:
            _set(body, setting.key.split(".")[1:], setting.value)
    if stage == "ppo":
        body["reward"] = "reward"
    if stage == "pretrain":
        body["replay"] = {"dataset": sheet.dataset("general-text", "text")}
    _launch(sheet, body, weights, divisible=stage != "ppo")
    return body


def _dataset_of(sheet: _Sheet, stage: str) -> str:
    """Name of what a stage learns from."""
    match stage:
        case "pretrain":
            return sheet.dataset("documents", "text")
        case "sft":
            return _examples(sheet)
        case "ppo" if sheet.advice.situation.labelled:
            return sheet.dataset("chats")
        case "kto":
            return sheet.dataset("ratings", "kto")
        case _:
            return sheet.dataset("pairs", "preference")


def _examples(sheet: _Sheet) -> str:
    """What SFT learns from: chats, several tasks, or the chosen answers of pairs."""
    advice, situation = sheet.advice, sheet.advice.situation
    if not situation.labelled and situation.paired:
        _, pairs = sheet.names.datasets.get("pairs", ("pairs", {"source": "pairs.jsonl"}))
        columns = {**pairs.get("columns", {}), "completion": "chosen"}
        sheet.datasets["chosen"] = {**pairs, "format": "prompt_completion", "columns": columns}
        return "chosen"
    if advice.together is None:
        sources = [{"dataset": sheet.dataset("chats")}]
    else:
        tasks = min(situation.tasks, _MOST_TASKS) if advice.together == "mix" else 1
        names = [sheet.dataset(f"task-{number + 1}") for number in range(tasks)]
        sources = [{"dataset": name, "prefix": f"{name}: "} for name in names]
    sheet.examples += [source["dataset"] for source in sources]
    if len(sources) == 1 and not advice.replay:
        return sources[0]["dataset"]
    mix: Plain = {"name": "training", "sources": sources}
    if len(sources) > 1:
        mix["temperature"] = 2
    if advice.replay:
        mix["replay"] = {"dataset": sheet.dataset("general-chats"), "fraction": _REPLAY}
    sheet.add("mix", mix)
    return "training"


def _prepare(sheet: _Sheet, dataset: str) -> Plain:
    """Settings of `prepare` for a dataset."""
    body: Plain = {"dataset": dataset, "near_dedup": {"threshold": 0.8}}
    for setting in sheet.advice.settings:
        if setting.stage == "prepare" and dataset in sheet.examples:
            _set(body, setting.key.split(".")[1:], setting.value)
    return body


def _launch(sheet: _Sheet, body: Plain, weights: memory.Weights | None, divisible: bool) -> None:
    """Processes for all GPUs, and sharding where one GPU does not hold everything."""
    situation = sheet.advice.situation
    if not situation.gpu or situation.gpus == 1 or weights is None:
        return
    body["launch"] = {"num_processes": situation.gpus}
    divided = weights != "qlora" and not memory.fits_undivided(
        weights, situation.sizes, situation.device
    )
    if weights == "full" and divisible:
        body["full"] = {"zero": 3 if divided else 2}
    elif divided and divisible:
        body["launch"]["sharding"] = {"zero": 3}
    rows = body.get("batching", {}).get("batch_size", Batching().batch_size)
    if rows % situation.gpus:
        whole = -(-rows // situation.gpus) * situation.gpus
        _set(body, ["batching", "batch_size"], whole)


def _set(body: Plain, path: list[str], value: object) -> None:
    for part in path[:-1]:
        body = body.setdefault(part, {})
    body[path[-1]] = value


# --- the text -----------------------------------------------------------------------------------


def _text(sheet: _Sheet) -> str:
    """YAML with a comment on everything that has to be filled in."""
    lines = [f"# {line}" for line in _heading(sheet.advice)]
    lines.append(f"name: {_flow(sheet.names.recipe)}")
    todo = "  # your base model" if sheet.names.model == MODEL else ""
    lines.append(f"model: {_flow(sheet.names.model)}{todo}")
    if sheet.datasets:
        known = {name for name, _ in sheet.names.datasets.values()}
        lines += ["", "datasets:"]
        for name, spec in sheet.datasets.items():
            todo = "" if name in known else "  # your file"
            lines.append(f"  {name}: {_flow(spec)}{todo}")
    lines += ["", "stages:"]
    for stage in sheet.stages:
        lines += _stage_lines(stage)
    return "\n".join(lines) + "\n"


def _heading(advice: Advice) -> list[str]:
    lines = [f"{advice.title}."]
    if not advice.stages:
        lines.append("Measures the base model, as the baseline that later training has to beat.")
    tasks = advice.situation.tasks
    if advice.together == "mix" and tasks > _MOST_TASKS:
        lines.append(f"Go on like this to task-{tasks}, under `datasets` and in the mix.")
    if advice.together == "adapters":
        lines.append("This is the first task; the others differ in the source of its dataset.")
    return lines


def _stage_lines(stage: Plain | str) -> list[str]:
    if isinstance(stage, str):
        return [f"  # {stage}"]
    kind, body = next(iter(stage.items()))
    if len(_flow(body)) <= _WIDTH:
        return [f"  - {kind}: {_flow(body)}"]
    lines = [f"  - {kind}:"]
    for key, value in body.items():
        if isinstance(value, list) and len(_flow(value)) > _WIDTH:
            lines += [f"      {key}:", *(f"        - {_flow(item)}" for item in value)]
        else:
            lines.append(f"      {key}: {_flow(value)}")
    return lines


def _flow(value: object) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
    )
    return str(text).removesuffix("\n").removesuffix("\n...").strip()
