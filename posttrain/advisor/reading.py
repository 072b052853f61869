"""What a recipe and this machine say of a situation, so that it need not be typed."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from posttrain.advisor.situation import Goal
from posttrain.data.advice import tokens_of
from posttrain.data.check import check_dataset
from posttrain.data.formats import read_rows
from posttrain.data.records import BadRecord
from posttrain.data.rows import Document
from posttrain.data.sources import HUB
from posttrain.errors import DataError, ModelError
from posttrain.recipe.base import RowFamily
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.mix import MixConfig
from posttrain.recipe.recipe import Recipe
from posttrain.recipe.training import TrainingConfig

_MOST_ROWS = 1_000_000
"""Rows counted of a dataset; no rule tells more of them apart."""
_ROLES: dict[str, str] = {
    "documents": "documents",
    "chats": "chats",
    "preferences": "pairs",
    "kto": "ratings",
}
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)\s*([bBmM])(?![A-Za-z0-9])")


@dataclass(frozen=True)
class Counted:
    """How much there is of a dataset."""

    family: RowFamily | None
    rows: int | None
    """Rows that can be read; None where nobody has counted, as on the Hub."""
    tokens: int | None = None
    """Of documents, estimated from words."""


@dataclass(frozen=True)
class Found:
    """What a recipe says of a situation."""

    goals: frozenset[Goal]
    rows: int | None
    pairs: int | None
    thumbs: int | None
    documents: int | None
    tokens: int | None
    tasks: int
    parameters: float | None
    """Billions; None where the model does not say."""
    roles: Mapping[str, str]
    """Names of the recipe's datasets by what they are for: `chats`, `documents`, `pairs`, ..."""
    assumptions: tuple[str, ...]


def read_situation(recipe: Recipe) -> Found:
    """Count a recipe's datasets and infer its goals.

    Raises:
        DataError: a dataset cannot be read at all.
    """
    trained = _trained_on(recipe)
    counts = {name: count(spec) for name, spec in recipe.datasets.items() if name in trained}
    notes = [
        f"The size of `{name}` is unknown until it has been downloaded."
        for name, counted in counts.items()
        if counted.rows is None
    ]
    roles: dict[str, str] = {}
    totals: dict[str, int | None] = {}
    for name, counted in counts.items():
        role = _ROLES.get(counted.family or "chats", "chats")
        roles.setdefault(role, name)
        before = totals.get(role, 0)
        known = before is not None and counted.rows is not None
        totals[role] = (before or 0) + (counted.rows or 0) if known else None
    tokens = [counted.tokens for counted in counts.values() if counted.tokens is not None]
    goals = _goals(recipe, roles)
    notes.append(f"The goal is taken to be {' and '.join(sorted(goals))}; --goal says otherwise.")
    parameters = model_size(recipe.model)
    return Found(
        goals=goals,
        rows=totals.get("chats", 0),
        pairs=totals.get("pairs", 0),
        thumbs=totals.get("ratings", 0),
        documents=totals.get("documents", 0),
        tokens=sum(tokens) if tokens else None,
        tasks=_tasks(recipe),
        parameters=parameters,
        roles=roles,
        assumptions=tuple(notes),
    )


def count(spec: DatasetSpec) -> Counted:
    """Rows of a dataset, and the tokens of documents. The Hub is not asked.

    Raises:
        DataError: it cannot be read at all.
    """
    sources = (spec.source,) if isinstance(spec.source, str) else spec.source
    family, problems = check_dataset("data", spec, None)
    if any(source.startswith(HUB) for source in sources):
        return Counted(family, None)
    if problems:
        raise DataError(problems[0].message)
    rows = words = 0
    good = spec.model_copy(update={"on_bad_row": "skip"})
    for row in itertools.islice(read_rows(good), _MOST_ROWS):
        if isinstance(row, BadRecord):
            continue
        rows += 1
        words += len(row.text.split()) if isinstance(row, Document) else 0
    return Counted(family, rows, tokens_of(words) if family == "documents" else None)


def model_size(reference: str) -> float | None:
    """Billions of parameters of a model, by its weights if they are here, else by its name.

    The Hub is not asked: `OWNER/NAME-7B` says it, and `OWNER/NAME` leaves it open.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return _size_of_folder(folder)
    if reference.startswith(("package:", "gguf:")) or folder.suffix == ".gguf":
        return _size_of_gguf(reference)
    match = _SIZE.search(reference.replace("_", "-"))
    if match is None:
        return None
    number = float(match[1])
    return number if match[2] in "bB" else number / 1000


@cache
def gpu_memory() -> tuple[float, ...]:
    """Memory in GiB of each NVIDIA GPU that a process started here would see."""
    from posttrain.hardware import gpu_names

    if not gpu_names() or shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return tuple(float(line) / 1024 for line in done.stdout.split() if line.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()


def _trained_on(recipe: Recipe) -> set[str]:
    """Datasets that training stages learn from; replayed and unused ones do not count."""
    replayed = {
        stage.replay.dataset
        for stage in recipe.stages
        if isinstance(stage, MixConfig) and stage.replay is not None
    }
    names: set[str] = set()
    for stage in recipe.stages:
        if isinstance(stage, TrainingConfig):
            names |= set(recipe.made_of(stage.dataset)) - replayed
    return names or set(recipe.datasets)


def _goals(recipe: Recipe, roles: Mapping[str, str]) -> frozenset[Goal]:
    kinds = {stage.stage for stage in recipe.stages}
    goals: set[Goal] = set()
    if "pretrain" in kinds or "documents" in roles:
        goals.add("knowledge")
    if kinds & {"dpo", "ppo", "reward", "orpo", "kto"} or {"pairs", "ratings"} & roles.keys():
        goals.add("alignment")
    if not goals:
        goals.add("instructions")
    return frozenset(goals)


def _tasks(recipe: Recipe) -> int:
    """Sources of the largest mix that names its tasks by prefixes."""
    mixes = [stage for stage in recipe.stages if isinstance(stage, MixConfig)]
    named = [sum(source.prefix is not None for source in stage.sources) for stage in mixes]
    return max([1, *named])


def _size_of_folder(folder: Path) -> float | None:
    """From the headers of its safetensors files: 8 bytes of length, then JSON."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, 100_000_000)))
        except (OSError, ValueError, struct.error):
            return None
        for name, tensor in header.items():
            if name != "__metadata__":
                total += _product(tensor["shape"])
    return total / 1e9 if total else None


def _size_of_gguf(reference: str) -> float | None:
    from gguf import GGUFReader

    from posttrain.home import Home
    from posttrain.model_reference import resolve_model

    try:
        model = resolve_model(reference, Home.find().store.digests)
        return (
            float(sum(int(tensor.n_elements) for tensor in GGUFReader(model.location).tensors))
            / 1e9
        )
    except (ModelError, OSError, ValueError):
        return None


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
