"""What a recipe and this machine say of a situation, so that it need not be typed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.advisor.situation import Goal
from posttrain.data.advice import tokens_of
from posttrain.data.check import check_dataset
from posttrain.data.formats import read_rows
from posttrain.data.records import BadRecord
from posttrain.data.rows import Document
from posttrain.data.sources import HUB
from posttrain.errors import DataError, ModelError
from posttrain.estimate.architecture import Architecture, read_architecture
from posttrain.model_reference import resolve_model
from posttrain.recipe.base import RowFamily
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.mix import MixConfig
from posttrain.recipe.recipe import Recipe
from posttrain.recipe.training import TrainingConfig

_MOST_ROWS = 1_000_000
"""Rows counted of a dataset; no rule tells more of them apart."""
_ROLES: dict[RowFamily, str] = {
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
class KnownModel:
    """The size of a model, as far as it is known without loading or fetching it."""

    parameters: float | None
    """Billions."""
    sizes: Architecture | None
    """Its layers and widths, where its files are on this machine."""


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
    model: KnownModel
    roles: Mapping[str, str]
    """Names of the recipe's datasets by what they are for: `chats`, `documents`, `pairs`, ..."""
    assumptions: tuple[str, ...]


def read_situation(recipe: Recipe) -> Found:
    """Count a recipe's datasets and infer its goals. What cannot be counted is assumed unknown."""
    trained = _trained_on(recipe)
    counts: dict[str, Counted] = {}
    notes = []
    for name, spec in recipe.datasets.items():
        if name not in trained:
            continue
        try:
            counts[name] = count(spec)
            reason = "it has not been downloaded"
        except DataError as error:
            counts[name] = Counted(None, None)
            reason = str(error)
        if counts[name].rows is None:
            notes.append(f"The size of `{name}` is unknown: {reason}.")
    roles: dict[str, str] = {}
    totals: dict[str, int | None] = {}
    for name, counted in counts.items():
        role = _ROLES[counted.family or _wanted(recipe, name)]
        roles.setdefault(role, name)
        before = totals.get(role, 0)
        known = before is not None and counted.rows is not None
        totals[role] = (before or 0) + (counted.rows or 0) if known else None
    tokens = [counted.tokens for counted in counts.values() if counted.tokens is not None]
    goals = _goals(recipe, roles)
    tasks = _tasks(recipe)
    roles |= {f"task-{number}": name for number, name in enumerate(tasks, 1) if name in counts}
    notes.append(f"The goal is taken to be {' and '.join(sorted(goals))}; --goal says otherwise.")
    return Found(
        goals=goals,
        rows=totals.get("chats", 0),
        pairs=totals.get("pairs", 0),
        thumbs=totals.get("ratings", 0),
        documents=totals.get("documents", 0),
        tokens=sum(tokens) if tokens else None,
        tasks=max(1, len(tasks)),
        model=known_model(recipe.model),
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


def known_model(reference: str) -> KnownModel:
    """What is known of a model from its files if they are here, else from its name.

    The Hub is not asked: `OWNER/NAME-7B` says its size, and `OWNER/NAME` leaves it open.
    """
    folder = Path(reference).expanduser()
    gguf = reference.startswith(("package:", "gguf:")) or folder.suffix == ".gguf"
    if gguf or folder.is_dir():
        from posttrain.home import Home

        try:
            sizes = read_architecture(
                resolve_model(reference, Home.find().store.digests) if gguf else folder
            )
        except ModelError:
            return KnownModel(None, None)
        return KnownModel(sizes.parameters / 1e9, sizes)
    match = _SIZE.search(reference.replace("_", "-"))
    if match is None:
        return KnownModel(None, None)
    number = float(match[1])
    return KnownModel(number if match[2] in "bB" else number / 1000, None)


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


def _wanted(recipe: Recipe, dataset: str) -> RowFamily:
    """What the stage that learns from a dataset needs it to be."""
    for stage in recipe.stages:
        if isinstance(stage, TrainingConfig) and dataset in recipe.made_of(stage.dataset):
            return stage.family
    return "chats"


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


def _tasks(recipe: Recipe) -> list[str]:
    """Datasets of the largest mix that names its tasks by prefixes."""
    mixes = [stage for stage in recipe.stages if isinstance(stage, MixConfig)]
    named = [[one.dataset for one in stage.sources if one.prefix is not None] for stage in mixes]
    return max(named, key=len, default=[])
