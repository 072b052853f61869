"""What a person sees in the terminal: progress while it runs, and the end of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from posttrain import events
from posttrain.estimate.stage import StageEstimate
from posttrain.evaluate.results import EvaluationResults, PerplexityResult
from posttrain.execute import Outcome, StageObserver
from posttrain.pipeline import BoundStep, Output, Pipeline
from posttrain.plan import Plan
from posttrain.run import stage_rows, verdict_of
from posttrain.store import Artifact

_SECONDS_BETWEEN_LINES = 10.0


def observer(console: Console) -> StageObserver:
    """Live bars where somebody looks at a terminal, plain lines elsewhere."""
    return BarObserver(console) if console.is_terminal else LineObserver(console)


class OutcomeKeeper(StageObserver):
    """Keeps how every step ended, for the summary."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}

    def finished(self, step: BoundStep, outcome: Outcome) -> None:
        """Keep it."""
        self.outcomes[step.step.name] = outcome


class LineObserver(StageObserver):
    """One line for what begins and ends, and one every few seconds in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0.0

    def started(self, step: BoundStep) -> None:
        """Name the stage."""
        self._say(step, "started")

    def waiting(self, step: BoundStep) -> None:
        """Say why nothing moves."""
        self._say(step, "another run works on this; waiting for its result")

    def event(self, step: BoundStep, event: events.Event) -> None:
        """Phases and warnings at once, progress every few seconds."""
        match event:
            case events.Phase():
                self._say(step, event.message)
            case events.Warn():
                self._say(step, f"warning: {event.message}")
            case events.Progress() if time.monotonic() >= self._next:
                self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
                self._say(step, events.describe_progress(event))
            case _:
                pass

    def finished(self, step: BoundStep, outcome: Outcome) -> None:
        """The headline."""
        seconds = f" in {outcome.seconds:.1f} s" if outcome.status == "ran" else ""
        self._say(step, f"{outcome.status}{seconds}: {outcome.artifact.manifest.headline}")

    def _say(self, step: BoundStep, text: str) -> None:
        line = Text(f"{step.step.name}: {text}")
        self._console.print(line, soft_wrap=True, highlight=False)


class BarObserver(StageObserver):
    """A live bar for the stage that runs; finished stages stay above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[stage]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._live: Live | None = None

    def started(self, step: BoundStep) -> None:
        """Show a bar."""
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._bars.add_task("starting", total=None, stage=step.step.name)
        if self._live is None:
            self._live = Live(self._bars, console=self._console, transient=True)
            self._live.start()

    def waiting(self, step: BoundStep) -> None:
        """Say why nothing moves."""
        self._console.print(Text(f"  {step.step.name}: another run works on this; waiting"))

    def event(self, step: BoundStep, event: events.Event) -> None:
        """Move the bar."""
        task = self._bars.task_ids[-1] if self._bars.task_ids else None
        match event:
            case events.Warn():
                self._console.print(Text(f"  {step.step.name}: {event.message}", style="yellow"))
            case events.Phase() if task is not None:
                self._bars.update(task, description=event.message, total=None, completed=0)
            case events.Progress() if task is not None:
                text = events.describe_progress(event)
                self._bars.update(task, description=text, total=event.total, completed=event.done)
            case _:
                pass

    def finished(self, step: BoundStep, outcome: Outcome) -> None:
        """Leave a line behind."""
        self._stop()
        seconds = f"{outcome.seconds:6.1f} s" if outcome.status == "ran" else "  reused"
        line = Text(f"  {step.step.name:<18} {seconds}  {outcome.artifact.manifest.headline}")
        self._console.print(line)

    def failed(self, step: BoundStep, error: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def show_plan(
    console: Console, plan: Plan, estimates: Mapping[str, StageEstimate | str] | None = None
) -> None:
    """Which stages would run or be reused, and why; what those that train would need."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "would", "because"):
        table.add_column(column, overflow="fold")
    styles = {"reuse": "green", "resume": "yellow", "run": "cyan"}
    for planned in plan.steps:
        reason = "in the store" if planned.action == "reuse" else planned.reason
        action = Text(planned.action, style=styles[planned.action])
        table.add_row(planned.step.name, action, Text(reason))
    console.print(table)
    waiting = {step.step.name for step in plan.steps if step.action != "reuse"}
    shown = {name: found for name, found in (estimates or {}).items() if name in waiting}
    if shown:
        console.print()
        show_estimates(console, shown)


def show_estimates(console: Console, estimates: Mapping[str, StageEstimate | str]) -> None:
    """Memory and time of training stages, and what to change where they do not fit."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("training", "trains", "memory", "fits", "steps", "time"):
        table.add_column(column, overflow="fold")
    for name, found in estimates.items():
        if isinstance(found, StageEstimate):
            table.add_row(name, *_estimate_cells(found))
    if table.row_count:
        console.print(table)
    for name, found in estimates.items():
        if isinstance(found, str):
            console.print(Text(f"{name}: no estimate: {found}"), soft_wrap=True)
            continue
        console.print(Text(f"{name}: rows: {found.basis}", style="dim"), soft_wrap=True)
        for number, change in enumerate(found.advice):
            verdict = "fits" if change.fits else "still too much"
            step = "to fit, write" if number == 0 else "and then"
            line = f"  {step} `{change.write}`: {change.memory.gib:.1f} GiB, {verdict}"
            console.print(Text(line, style="yellow"), soft_wrap=True)
            if change.fits:
                break


def _estimate_cells(found: StageEstimate) -> tuple[Text, ...]:
    share = f"{found.trainable / found.parameters:.2%} of {found.parameters / 1e6:,.1f}M"
    memory = f"{found.memory.gib:.1f} of {found.device.gib:.1f} GiB"
    if found.memory.host:
        memory += f", {found.memory.host / 2**30:.1f} in the machine's memory"
    fits = Text("yes", style="green") if found.fits else Text("no", style="bold red")
    time = "unknown" if found.seconds is None else f"about {_duration(found.seconds)}"
    steps = "unknown" if found.steps is None else f"{found.steps:,}"
    return (Text(share), Text(memory), fits, Text(steps), Text(time))


def _duration(seconds: float) -> str:
    """Two significant figures, in the unit that a person would say."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            count = seconds / size
            return f"{count:.2g} {unit}" if count < 100 else f"{count:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def show_summary(
    console: Console,
    pipeline: Pipeline,
    artifacts: Mapping[str, Artifact],
    outcomes: Mapping[str, Outcome],
) -> None:
    """Stages, numbers of base and tuned model, sample answers, and where the model lies."""
    console.print()
    console.print(_stage_table(stage_rows(pipeline, artifacts, outcomes)))
    evaluations = _evaluations(pipeline, artifacts)
    if evaluations:
        console.print()
        console.print(_number_table(evaluations))
        _show_samples(console, evaluations)
    verdict = verdict_of(pipeline, artifacts)
    if verdict != "no gate":
        style = {"pass": "bold green", "fail": "bold red"}.get(verdict, "bold yellow")
        console.print(Text(f"\nGate: {verdict}", style=style))
        _show_reasons(console, pipeline, artifacts)
    model = final_model(pipeline, artifacts)
    if model is not None:
        console.print(Text(f"\nModel: {display_path(model.path)}"), soft_wrap=True)


def show_next_steps(console: Console, lines: Sequence[str]) -> None:
    """What to do after a gate's no."""
    if lines:
        console.print()
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def final_model(pipeline: Pipeline, artifacts: Mapping[str, Artifact]) -> Artifact | None:
    """The last model or adapter that a training or merging stage left."""
    made = [
        artifacts[step.name]
        for step in pipeline.steps
        if step.kind in ("model", "adapter") and step.stage != "convert" and step.name in artifacts
    ]
    return made[-1] if made else None


def display_path(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _stage_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    for row in rows:
        tokens = f"{row['tokens']:,.0f}" if row["tokens"] else ""
        ran = row["status"] == "ran"
        seconds = f"{row['seconds']:.1f}" if ran else ""
        style = "" if ran else "dim"
        table.add_row(
            row["stage"], row["status"], seconds, tokens, Text(row["headline"]), style=style
        )
    return table


def _evaluations(
    pipeline: Pipeline, artifacts: Mapping[str, Artifact]
) -> dict[str, Artifact] | None:
    """What the last gate compares, the base first; without a gate the last two evaluations."""
    gates = [step for step in pipeline.steps if step.stage == "gate"]
    if gates:
        named = {"candidate": "tuned", "base": "base", "champion": "champion"}
        found = {
            named.get(name, name.partition(":")[2]): value.step
            for name, value in gates[-1].inputs.items()
            if isinstance(value, Output) and value.kind == "evaluation"
        }
    else:
        steps = [step.name for step in pipeline.steps if step.kind == "evaluation"]
        found = dict(zip(("base", "tuned"), steps[-2:], strict=False))
    if len(found) < 2 or not set(found.values()) <= artifacts.keys():
        return None
    return {name: artifacts[step] for name, step in found.items()}


def _number_table(evaluations: Mapping[str, Artifact]) -> Table:
    results = [EvaluationResults.load(artifact.path) for artifact in evaluations.values()]
    base, *candidates = results
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("measured")
    for column in ("items", *evaluations):
        table.add_column(column, justify="right")
    tuned = [{task.task: task for task in candidate.tasks} for candidate in candidates]
    for task in base.tasks:
        others = [tasks.get(task.task) for tasks in tuned]
        shown = [f"{other.value:.3f}" if other else "" for other in others]
        name = f"{task.task} ({task.metric})"
        table.add_row(name, str(task.n), f"{task.value:.3f}", *shown)
    for dataset in ("", *base.other_perplexities):
        found = [_perplexity(one, dataset) for one in results]
        if found[0] is not None:
            values = [f"{one.perplexity:.2f}" if one else "" for one in found]
            name = f"perplexity on {dataset}" if dataset else "perplexity"
            table.add_row(name, str(found[0].rows), *values)
    return table


def _perplexity(results: EvaluationResults, dataset: str) -> PerplexityResult | None:
    return results.other_perplexities.get(dataset) if dataset else results.perplexity


def _show_samples(console: Console, evaluations: Mapping[str, Artifact]) -> None:
    """The same prompts, answered before and after."""
    base, *tuned = evaluations
    labels = ["before", "after"] if len(tuned) == 1 else [base, *tuned]
    width = max(len(label) for label in labels)
    answers = [_samples(artifact.path) for artifact in evaluations.values()]
    for versions in zip(*answers, strict=False):
        console.print()
        console.print(Text(f"> {_one_line(versions[0]['prompt'])}", style="bold"))
        for label, version in zip(labels, versions, strict=True):
            said = _one_line(version["answer"])
            console.print(Text(f"  {f'{label}:':<{width + 1}} {said}"))


def _samples(folder: Path) -> list[dict[str, str]]:
    path = folder / "samples.json"
    return list(json.loads(path.read_bytes())) if path.exists() else []


def _one_line(text: str, limit: int = 220) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _show_reasons(console: Console, pipeline: Pipeline, artifacts: Mapping[str, Artifact]) -> None:
    for step in pipeline.steps:
        if step.kind == "verdict" and step.name in artifacts:
            for reason in artifacts[step.name].manifest.details.get("reasons", []):
                console.print(Text(f"  {reason}"))


def show_results(console: Console, results: EvaluationResults, artifact: Artifact) -> None:
    """The numbers of one evaluation, with their standard errors."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task")
    for column in ("metric", "items", "value", "standard error"):
        table.add_column(column, justify="right")
    for task in results.tasks:
        error = f"{task.standard_error:.3f}" if task.standard_error is not None else ""
        table.add_row(task.task, task.metric, str(task.n), f"{task.value:.3f}", error)
    for name, found in results.other_perplexities.items():
        table.add_row(f"perplexity on {name}", "", str(found.rows), f"{found.perplexity:.2f}", "")
    console.print(table)
    console.print(Text(f"Items: {display_path(artifact.path / 'items.parquet')}"), soft_wrap=True)


def show_artifacts(console: Console, artifacts: list[Artifact]) -> None:
    """One line an artifact."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("fingerprint", "kind", "recipe", "stage", "made", "size", "result"):
        justify: Any = "right" if column == "size" else "left"
        table.add_column(column, justify=justify, no_wrap=column != "result")
    for artifact in artifacts:
        manifest = artifact.manifest
        made = manifest.created.strftime("%Y-%m-%d %H:%M")
        size = f"{artifact.size / 1e6:,.1f} MB"
        short = artifact.fingerprint[:12]
        table.add_row(
            short,
            artifact.kind,
            manifest.recipe,
            manifest.name,
            made,
            size,
            Text(manifest.headline),
        )
    console.print(table)
