"""What a sweep has to do: which stages its keys reach, how far each trial goes, what is shared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from posttrain.errors import UsageError
from posttrain.opening import open_pipeline
from posttrain.pipeline import Input, Output, Pipeline, Rows, Step
from posttrain.recipe import TrainingConfig, result_config
from posttrain.recipe.load import load_recipe
from posttrain.store import Store
from posttrain.store.fingerprint import canonical_json
from posttrain.sweeping.gating import IMPROVEMENT, gate_on, last_gate
from posttrain.sweeping.space import Point, Space, override, parse_space

HELD_OUT_LOSS = "held_out_loss"
"""Metric of every training stage: nats a trained token at its best checkpoint."""

DEFAULT_TRIALS = 20
"""Of a sweep over a range."""


@dataclass(frozen=True)
class SweepRequest:
    """What a user asks for."""

    file: Path
    """The recipe."""
    over: tuple[str, ...]
    """What follows each `--over`."""
    overrides: tuple[str, ...] = ()
    """What follows each `--set`."""
    metric: str | None = None
    """`STAGE.METRIC`, or a gate's name: its improvement. Default: the held-out loss of the last
    training stage whose own settings the keys change, or else of the first one that depends on
    them, or else the gate after the merge that they change."""
    maximize: bool = False
    """Whether more of the metric is better."""
    trials: int | None = None
    """Combinations to try where a key has a range; a grid is tried in full."""
    seeds: int = 1
    """Runs of each trial, with as many seeds."""
    prune: bool = True
    """Whether to stop hopeless trials early."""


@dataclass(frozen=True)
class Objective:
    """The number that decides."""

    step: str
    metric: str
    maximize: bool = False
    gate: str | None = None
    """The gate that a trial has to pass to be chosen."""

    @property
    def name(self) -> str:
        """`sft.held_out_loss`."""
        return f"{self.step}.{self.metric}"

    @property
    def is_held_out_loss(self) -> bool:
        """Whether held-out losses while training foretell it, and rows give it an error."""
        return self.metric == HELD_OUT_LOSS and not self.maximize

    @property
    def ends(self) -> frozenset[str]:
        """The steps that a trial has to reach."""
        return frozenset({self.step} if self.gate is None else {self.step, self.gate})


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, checked and ready to run."""

    request: SweepRequest
    space: Space
    objective: Objective
    trials: int
    """Combinations to try."""
    pipeline: Pipeline
    """The recipe as it stands, up to the objective; the shared steps are the same in all trials."""
    shared: tuple[str, ...]
    """Names of the steps before the swept ones, in order."""
    seed_keys: tuple[tuple[str, int], ...]
    """Key and present value of the seed of every training stage that is not shared."""

    @property
    def digest(self) -> str:
        """What is swept and from what: the same question gets the same folder."""
        question = {
            "steps": [[step.name, _identity(step)] for step in self.pipeline.steps],
            "over": list(self.request.over),
            "objective": [self.objective.name, self.objective.maximize],
            "seeds": self.request.seeds,
        }
        return hashlib.sha256(canonical_json(question)).hexdigest()

    def folder(self, home: Path) -> Path:
        """Where the sweep is kept, below `POSTTRAIN_HOME`."""
        return home / "sweeps" / f"{self.pipeline.recipe.name}-{self.digest[:12]}"

    def shared_steps(self) -> list[Step]:
        """The steps that no swept key reaches."""
        return [self.pipeline.step(name) for name in self.shared]

    def seeds_of_a_trial(self) -> list[int | None]:
        """What `open_trial` takes; None leaves the recipe's own seed."""
        return [None] if self.request.seeds == 1 else list(range(self.request.seeds))

    def overrides_of(self, point: Point, seed: int | None) -> tuple[str, ...]:
        """A trial's own `--set`, on top of the user's."""
        seeds = [override(key, base + (seed or 0)) for key, base in self.seed_keys]
        return (*_texts(point), *(seeds if seed else []))

    def open_trial(self, point: Point, seed: int | None, store: Store) -> Pipeline:
        """The recipe with a trial's values, as far as the trial goes.

        Raises:
            RecipeError: the values do not go together, or the recipe has changed meanwhile.
        """
        overrides = [*self.request.overrides, *self.overrides_of(point, seed)]
        return _up_to(open_pipeline(self.request.file, overrides, store), self.objective)

    def own_steps(self, pipeline: Pipeline) -> list[Step]:
        """The steps that a trial has for itself."""
        return [step for step in pipeline.steps if step.name not in self.shared]


def plan_sweep(request: SweepRequest, store: Store) -> SweepPlan:
    """Check a sweep before its first trial: every combination, every key, the objective.

    Args:
        request: What is asked for.
        store: For digests of what the recipe reads.

    Raises:
        RecipeError: a combination of values makes no valid recipe.
        UsageError: a key does not exist or changes nothing, or the options contradict each other.
    """
    space = parse_space(request.over)
    trials = _count_trials(space, request.trials)
    if request.seeds < 1:
        raise UsageError("--seeds: at least 1")
    base = open_pipeline(request.file, request.overrides, store)
    _check_points(space, request)
    variants = _Variants(space, request, store)
    # The shared steps are run from the recipe as it stands, so it is compared as well.
    changed = _differing([base, *variants.pipelines])
    objective = _objective(base, changed, request)
    for key in space.keys:
        _check_reaches(key, variants.changed_by(key), objective, variants.pipelines)
    pipeline, reached = _up_to(base, objective), _and_after(base, changed)
    seed_keys = _seed_keys(base, [s.name for s in pipeline.steps if s.name in reached])
    if request.seeds > 1 and not seed_keys:
        raise UsageError("--seeds: no stage that the keys reach has a seed")
    return SweepPlan(
        request=request,
        space=space,
        objective=objective,
        trials=trials,
        pipeline=pipeline,
        shared=tuple(step.name for step in pipeline.steps if step.name not in reached),
        seed_keys=seed_keys,
    )


def needed_steps(pipeline: Pipeline, objective: Objective) -> list[Step]:
    """The objective's step, its gate, and all before them that they depend on, in order.

    A preflight is nobody's input and belongs to them all the same: it stops a run that is bound
    to fail before its first long stage.
    """
    wanted = set(objective.ends)
    for _ in pipeline.steps:
        wanted |= {
            name for step in pipeline.steps if step.name in wanted for name in step.waits_for()
        }
    return [
        step
        for step in pipeline.steps
        if step.name in wanted or (step.stage == "preflight" and step.waits_for() <= wanted)
    ]


def _up_to(pipeline: Pipeline, objective: Objective) -> Pipeline:
    return Pipeline(pipeline.recipe, tuple(needed_steps(pipeline, objective)))


class _Variants:
    """The recipe's steps under other values: what each key changes."""

    def __init__(self, space: Space, request: SweepRequest, store: Store) -> None:
        self._points = space.star()
        self.pipelines = [
            open_pipeline(request.file, [*request.overrides, *_texts(point)], store)
            for point in self._points
        ]

    def changed_by(self, key: str) -> set[str]:
        """Names of the steps whose own settings or sources the key changes."""
        first = self._points[0]
        along = [
            pipeline
            for point, pipeline in zip(self._points, self.pipelines, strict=True)
            if all(point[other] == first[other] for other in first if other != key)
        ]
        return _differing(along)


def _differing(pipelines: Iterable[Pipeline]) -> set[str]:
    seen: dict[str, set[bytes | None]] = {}
    laid_out = [{step.name: _identity_bytes(step) for step in p.steps} for p in pipelines]
    for name in {name for steps in laid_out for name in steps}:
        seen[name] = {steps.get(name) for steps in laid_out}
    return {name for name, identities in seen.items() if len(identities) > 1}


def _identity_bytes(step: Step) -> bytes:
    return canonical_json(_identity(step))


def _identity(step: Step) -> JsonValue:
    """A step without what its inputs turn out to be."""
    return [
        step.stage,
        step.config.code_version,
        result_config(step.config),
        {name: _source(value) for name, value in step.inputs.items()},
    ]


def _source(value: Input) -> str:
    match value:
        case Output():
            return value.step
        case Rows():
            return value.reading_digest
        case _:
            return value.digest


def _and_after(pipeline: Pipeline, names: set[str]) -> set[str]:
    """The steps and all that depend on them."""
    reached = set(names)
    for _ in pipeline.steps:
        reached |= {step.name for step in pipeline.steps if step.waits_for() & reached}
    return reached


def _objective(base: Pipeline, changed: set[str], request: SweepRequest) -> Objective:
    metric = request.metric
    if metric is not None:
        return _named_objective(base, metric, request.maximize)
    if request.maximize:
        raise UsageError("--maximize: name the metric to be maximised with --metric STAGE.METRIC")
    training = [step.name for step in base.steps if isinstance(step.config, TrainingConfig)]
    own = [name for name in training if name in changed]
    after = [name for name in training if name in _and_after(base, changed)]
    merges = any(base.step(name).stage == "merge" for name in changed if _has(base, name))
    gate = last_gate(base)
    if not after and merges and gate in _and_after(base, changed):
        return _named_objective(base, str(gate), maximize=True)
    if not after:
        raise UsageError(
            "no training stage depends on the swept keys; name the number to go by with "
            "--metric STAGE.METRIC"
        )
    return Objective(own[-1] if own else after[0], HELD_OUT_LOSS)


def _named_objective(base: Pipeline, metric: str, maximize: bool) -> Objective:
    step, dot, name = metric.partition(".")
    names = [step.name for step in base.steps]
    if step in names and not dot and base.step(step).stage == "gate":
        return Objective(step, IMPROVEMENT, maximize=True, gate=step)
    if not name or step not in names:
        raise UsageError(
            f"--metric {metric}: write STAGE.METRIC, such as sft.held_out_loss, or the name of a "
            f"gate; the stages are {', '.join(names)}"
        )
    return Objective(step, name, maximize, gate_on(base, step))


def _has(pipeline: Pipeline, name: str) -> bool:
    return any(step.name == name for step in pipeline.steps)


def _check_points(space: Space, request: SweepRequest) -> None:
    """Every combination must be a valid recipe before the first one is trained."""
    for point in space.grid():
        texts = _texts(point)
        try:
            load_recipe(request.file, [*request.overrides, *texts])
        except UsageError as error:
            message = str(error)
            for key, text in zip(point, texts, strict=True):  # the user wrote no `--set`
                message = message.replace(f"--set {text}:", f"--over {key}:")
            raise UsageError(message) from None


def _texts(point: Point) -> list[str]:
    return [override(key, value) for key, value in point.items()]


def _check_reaches(
    key: str, changed: set[str], objective: Objective, pipelines: Sequence[Pipeline]
) -> None:
    for pipeline in pipelines:
        if not objective.ends <= {step.name for step in pipeline.steps}:
            raise UsageError(
                f"--over {key}: `{objective.step}`, whose {objective.metric} decides, is not in "
                "the recipe with every value"
            )
    needed = {step.name for pipeline in pipelines for step in needed_steps(pipeline, objective)}
    if not changed & needed:
        instead = f"it changes {', '.join(sorted(changed))}" if changed else "it changes no result"
        raise UsageError(
            f"--over {key}: changes nothing that {objective.name} depends on; {instead}"
        )


def _count_trials(space: Space, trials: int | None) -> int:
    if space.is_grid:
        if trials is not None:
            raise UsageError("--trials: lists of values are tried in full; give a range LOW..HIGH")
        return len(space.grid())
    if trials is not None and trials < 1:
        raise UsageError("--trials: at least 1")
    return trials or DEFAULT_TRIALS


def _seed_keys(pipeline: Pipeline, reached: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Seeds of the training steps among `reached`, by where they stand in the recipe.

    Every training stage of a recipe is one step, in the same order.
    """
    stages = [
        f"stages[{position}].{config.stage}.seed"
        for position, config in enumerate(pipeline.recipe.stages)
        if isinstance(config, TrainingConfig)
    ]
    steps = [step for step in pipeline.steps if isinstance(step.config, TrainingConfig)]
    return tuple(
        (key, step.config.seed)
        for key, step in zip(stages, steps, strict=True)
        if step.name in reached and isinstance(step.config, TrainingConfig)
    )
