"""From what is typed, what a recipe says and what this machine is, to one situation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast

from posttrain.advisor.reading import Found, KnownModel, known_model
from posttrain.advisor.situation import GOALS, Goal, Situation
from posttrain.errors import UsageError
from posttrain.estimate.device import GIB, present_device

USUAL_SIZE = 7.0
"""Billions of parameters assumed where nothing says how large the model is."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Told:
    """What somebody said; None is "did not say". Fields as in `Situation`."""

    goals: tuple[str, ...] = ()
    rows: int | None = None
    pairs: int | None = None
    thumbs: int | None = None
    documents: int | None = None
    tokens: int | None = None
    model: str | None = None
    parameters: float | None = None
    gpu_gb: float | None = None
    gpus: int | None = None
    tasks: int | None = None
    separate: bool = False
    structured: bool = False
    quality: bool = False
    latency: bool = False
    one_run: bool = False


@dataclass(frozen=True)
class Gathered:
    """A situation, and what had to be assumed of it."""

    situation: Situation
    assumptions: tuple[str, ...]


def gather(told: Told, found: Found | None = None) -> Gathered:
    """Put a situation together; what was said goes before what was found.

    Raises:
        UsageError: nothing was said, or something that cannot be.
    """
    notes: list[str] = list(found.assumptions) if found is not None and not told.goals else []
    goals = _goals(told, found, notes)
    rows, pairs = _rows_and_pairs(told, found, goals, notes)
    gpu_gb, gpus, ram_gb = _hardware(told, notes)
    model = _model(told, found, notes)
    try:
        situation = Situation(
            goals=goals,
            rows=rows,
            pairs=pairs,
            thumbs=_first(told.thumbs, found.thumbs if found else 0),
            documents=_first(told.documents, found.documents if found else 0),
            tokens=_first(told.tokens, found.tokens if found else None),
            parameters=model.parameters or USUAL_SIZE,
            model=model.sizes,
            gpu_gb=gpu_gb,
            gpus=gpus,
            ram_gb=ram_gb,
            tasks=told.tasks or (found.tasks if found else 1),
            separate=told.separate,
            structured=told.structured,
            quality=told.quality,
            latency=told.latency,
            one_run=told.one_run,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Gathered(situation, tuple(notes))


def _first(told: T | None, otherwise: T | None) -> T | None:
    return told if told is not None else otherwise


def _goals(told: Told, found: Found | None, notes: list[str]) -> frozenset[Goal]:
    unknown = [goal for goal in told.goals if goal not in GOALS]
    if unknown:
        listed = "; ".join(f"{name}: {meaning}" for name, meaning in GOALS.items())
        raise UsageError(f"--goal {unknown[0]}: the goals are {listed}")
    if told.goals:
        return frozenset(cast(Goal, goal) for goal in told.goals)
    if found is not None:
        return found.goals
    inferred: list[Goal] = []
    if told.pairs or told.thumbs:
        inferred.append("alignment")
    if told.documents or told.tokens:
        inferred.append("knowledge")
    if told.rows and not inferred:
        inferred.append("instructions")
    if not inferred:
        raise UsageError("give a RECIPE, or numbers such as --rows 3000, and a --goal")
    notes.append(f"The goal is taken to be {' and '.join(inferred)}; --goal says otherwise.")
    return frozenset(inferred)


def _rows_and_pairs(
    told: Told, found: Found | None, goals: frozenset[Goal], notes: list[str]
) -> tuple[int | None, int | None]:
    rows = _first(told.rows, found.rows if found else 0)
    pairs = _first(told.pairs, found.pairs if found else 0)
    only_rows = told.rows and told.pairs is None and told.thumbs is None and found is None
    if only_rows and goals == {"alignment"}:
        notes.append(
            f"The {told.rows:,} rows are taken to be preference pairs, as the goal is alignment; "
            "write --rows and --pairs where they are not."
        )
        return 0, told.rows
    return rows, pairs


def _hardware(told: Told, notes: list[str]) -> tuple[float, int, float]:
    """Memory of one GPU in GiB, the number of GPUs, and the machine's memory in GiB."""
    here = present_device()
    ram_gb = round(here.host_memory / GIB, 1)
    if told.gpu_gb is not None:
        return told.gpu_gb, told.gpus or 1, ram_gb
    if here.kind == "cuda":
        gpus = told.gpus or here.count
        notes.append(f"The hardware is this machine's: {gpus} x {here.name}, {here.gib:.0f} GiB.")
        return round(here.gib, 1), gpus, ram_gb
    notes.append("This machine has no GPU that can be seen; --gpu-gb names another one.")
    return 0.0, 1, ram_gb


def _model(told: Told, found: Found | None, notes: list[str]) -> KnownModel:
    if told.parameters is not None:
        return KnownModel(told.parameters, None)
    named = known_model(told.model) if told.model is not None else found and found.model
    if named and named.parameters:
        return named
    notes.append(
        f"The model is taken to have {USUAL_SIZE:g} billion parameters; --model or --parameters "
        "says otherwise."
    )
    return KnownModel(USUAL_SIZE, None)
