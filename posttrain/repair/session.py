"""Repairing a recipe of which the store has a verdict: diagnose, count the cost, write."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import RecipeError, UsageError
from posttrain.evaluate.results import Verdict
from posttrain.opening import open_pipeline
from posttrain.pipeline import Pipeline
from posttrain.plan import Plan, make_plan
from posttrain.recipe.load import apply_override
from posttrain.repair.history import Repair, children, history, next_file, number_of, with_line
from posttrain.repair.propose import propose
from posttrain.repair.remedy import Remedy
from posttrain.repair.text import differences, edit_text, read_data
from posttrain.run import verdict_of
from posttrain.store import Artifact, Store
from posttrain.store.files import write_bytes


@dataclass(frozen=True)
class Attempt:
    """A repair of this recipe, one that led to it, or one that was run under another name."""

    remedy: str
    """Its id."""
    file: str
    """Empty where the store alone knows of it."""
    verdict: str | None
    """`pass`, `fail`, `not enough evidence`; None where it was not run to its end yet."""


@dataclass(frozen=True)
class Cost:
    """What a run of the repaired recipe would do."""

    runs: tuple[str, ...]
    """Stages that run."""
    reused: int
    """Stages that are in the store."""
    seconds: float | None
    """What those that run took the last time; None where one of them is new."""


@dataclass(frozen=True)
class Option:
    """A remedy, and what it takes."""

    remedy: Remedy
    cost: Cost | None
    """None where nothing can be written."""
    obstacle: str = ""
    """Why it cannot be written."""
    text: str = ""
    """The recipe that it makes, without its history."""
    verdict: str | None = None
    """Where that recipe was run already, what came out."""


@dataclass(frozen=True)
class Diagnosis:
    """What a gate said of a recipe, and what would help."""

    file: Path
    gate: str
    verdict: Verdict
    options: tuple[Option, ...]
    """The one to try first at the head."""
    attempts: tuple[Attempt, ...]

    @property
    def first(self) -> int | None:
        """Position of the first option that can be written."""
        ready = [n for n, option in enumerate(self.options) if option.cost is not None]
        return ready[0] if ready else None

    @property
    def passing(self) -> Attempt | None:
        """A repair that passes already."""
        return next((one for one in self.attempts if one.verdict == "pass"), None)


def diagnose(file: Path, overrides: Sequence[str], store: Store) -> Diagnosis:
    """What the last run's gate said of a recipe, and the remedies for it.

    Args:
        file: the recipe.
        overrides: the `--set` that it was run with.
        store: where its verdict is.

    Raises:
        RecipeError: the recipe is not valid.
        UsageError: it has no gate, or no gate's verdict is in the store.
    """
    pipeline = open_pipeline(file, overrides, store)
    plan = make_plan(pipeline, store)
    gate, verdict = _verdict(file, overrides, pipeline, plan.artifacts())
    if verdict.verdict == "pass":
        return Diagnosis(file, gate, verdict, (), ())
    text = _with_overrides(file, overrides)
    attempts = _attempts(file, text, store)
    while True:
        tried = [attempt.remedy for attempt in attempts]
        remedies = propose(verdict, pipeline.recipe, gate=gate, tried=tried)
        options = [_option(remedy, text, plan, store) for remedy in remedies]
        failed = [
            Attempt(one.remedy.id, "", one.verdict)
            for one in options
            if one.verdict not in (None, "pass")
        ]
        if not failed:
            break
        attempts += failed
    # One that is known to pass is better than any that may.
    options = sorted(_one_replay(options), key=lambda one: one.verdict != "pass")
    return Diagnosis(file, gate, verdict, tuple(options), tuple(attempts))


def write(diagnosis: Diagnosis, position: int, out: Path | None = None) -> Path:
    """Write the recipe of one option.

    Args:
        diagnosis: of `diagnose`.
        position: of the option, from 0.
        out: the file to write. Default: beside the recipe, with the next free number.

    Raises:
        UsageError: there is no such option, it cannot be written, or the file exists.
    """
    if not 0 <= position < len(diagnosis.options):
        raise UsageError(f"--remedy {position + 1}: there are {len(diagnosis.options)} remedies")
    option = diagnosis.options[position]
    if option.cost is None:
        raise UsageError(f"--remedy {position + 1} cannot be written: {option.obstacle}")
    target = out or next_file(diagnosis.file)
    if target.exists():
        raise UsageError(f"--out {target}: the file exists; name another one")
    number = number_of(target) or number_of(next_file(diagnosis.file))
    repair = Repair(number, diagnosis.file.name, option.remedy.id)
    reasons = "; ".join(diagnosis.verdict.reasons[:1])
    reason = f"{diagnosis.gate}: {diagnosis.verdict.verdict}: {reasons}"
    write_bytes(target, with_line(option.text, repair, reason).encode())
    return target


def _verdict(
    file: Path, overrides: Sequence[str], pipeline: Pipeline, artifacts: Mapping[str, Artifact]
) -> tuple[str, Verdict]:
    """The first gate that said no, or the last one."""
    gates = [step.name for step in pipeline.steps if step.stage == "gate"]
    if not gates:
        raise UsageError(f"{file}: has no gate, so nothing was decided; add `- gate: {{}}`")
    done = {name: Verdict.load(artifacts[name].path) for name in gates if name in artifacts}
    if not done:
        command = " ".join(["posttrain run", str(file), *(f"--set {one}" for one in overrides)])
        raise UsageError(
            f"{file}: the store has no verdict of this recipe as it stands; run it first: {command}"
        )
    refused = [name for name in done if done[name].verdict != "pass"]
    missing = [name for name in gates if name not in done]
    if not refused and missing:
        raise UsageError(f"{file}: `{missing[0]}` has not decided yet; run the recipe to its end")
    name = (refused or list(done))[0 if refused else -1]
    return name, done[name]


def _with_overrides(file: Path, overrides: Sequence[str]) -> str:
    """The recipe's text with `--set` written into it."""
    text = file.read_text(encoding="utf-8-sig")
    for override in overrides:
        before = read_data(text)
        after = copy.deepcopy(before)
        apply_override(after, override)
        text = edit_text(text, differences(before, after, "from --set"))
    return text


def _attempts(file: Path, text: str, store: Store) -> list[Attempt]:
    """What led here did not help, or this recipe would have passed; then what was made of it."""
    found = [Attempt(repair.remedy, repair.of, "fail") for repair in history(text)]
    for path, repair in children(file):
        found.append(Attempt(repair.remedy, path.name, _verdict_of_file(path, store)))
    return found


def _verdict_of_file(file: Path, store: Store) -> str | None:
    try:
        pipeline = open_pipeline(file, (), store)
    except (RecipeError, UsageError):
        return None
    plan = make_plan(pipeline, store)
    return verdict_of(pipeline, plan.artifacts()) if plan.nothing_to_do else None


def _option(remedy: Remedy, text: str, plan: Plan, store: Store) -> Option:
    if not remedy.can_be_written:
        return Option(remedy, None, remedy.by_hand)
    edited = edit_text(text, remedy.edits)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "recipe.yaml"
        write_bytes(trial, edited.encode())
        try:
            pipeline = open_pipeline(trial, (), store)
        except RecipeError as error:
            problems = "; ".join(f"{one.where}: {one.message}" for one in error.problems)
            return Option(remedy, None, f"the recipe would not be valid: {problems}")
    repaired = make_plan(pipeline, store)
    verdict = verdict_of(pipeline, repaired.artifacts()) if repaired.nothing_to_do else None
    return Option(remedy, _cost(repaired, plan), "", edited, verdict)


def _one_replay(options: Sequence[Option]) -> list[Option]:
    """Of the datasets that could be replayed the first that can be mixed in, or the first."""
    replays = [option for option in options if option.remedy.id.startswith("replay-")]
    kept = [option for option in replays if option.cost is not None][:1] or replays[:1]
    return [option for option in options if option not in replays or option in kept]


def _cost(repaired: Plan, plan: Plan) -> Cost:
    before = {name: artifact.manifest.seconds for name, artifact in plan.artifacts().items()}
    runs = [planned.step.name for planned in repaired.steps if planned.action != "reuse"]
    known = all(name in before for name in runs)
    return Cost(
        runs=tuple(runs),
        reused=len(repaired.steps) - len(runs),
        seconds=sum(before[name] for name in runs) if known else None,
    )
