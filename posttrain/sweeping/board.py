"""What a person sees of a sweep in the terminal."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from posttrain import events
from posttrain.console import display_path
from posttrain.execute import Outcome, StageObserver
from posttrain.pipeline import BoundStep
from posttrain.sweeping.page import (
    PAGE,
    ending,
    headline,
    marks,
    state_line,
    table_head,
    table_row,
)
from posttrain.sweeping.plan import SweepPlan
from posttrain.sweeping.record import SweepRecord, Trial
from posttrain.sweeping.run import Proposal, SweepWatcher, new_record
from posttrain.sweeping.space import show_value

_SECONDS_BETWEEN_LINES = 10.0


def board(console: Console, plan: SweepPlan) -> Board:
    """A table that moves where somebody looks at a terminal, plain lines elsewhere."""
    return LiveBoard(console, plan) if console.is_terminal else Board(console, plan)


class Board(StageObserver, SweepWatcher):
    """Lines: what begins and ends, and one every few seconds in between."""

    def __init__(self, console: Console, plan: SweepPlan) -> None:
        self.record = new_record(plan)
        self._console = console
        self._plan = plan
        self._proposal: Proposal | None = None
        self._next = 0.0

    # The sweep

    def sweep_opened(self, record: SweepRecord) -> None:
        """Say what there is to do, and what was done before."""
        self.record = record
        known = len(record.trials)
        again = f"; {known} known from before" if known else ""
        self._say(f"{record.planned} trials by {record.objective}{again}")

    def trial_started(self, proposal: Proposal) -> None:
        """Name the trial."""
        self._proposal = proposal
        self._say(f"trial {proposal.number + 1} of {self._plan.trials}: {proposal.label}")

    def trial_finished(self, trial: Trial, record: SweepRecord) -> None:
        """Its number, or how it ended without one."""
        self._proposal, self.record = None, record
        value = f"{record.objective} {trial.value:.4f}, " if trial.value is not None else ""
        self._say(f"  {value}{ending(trial)}, {trial.seconds:.1f} s")

    def close(self) -> None:
        """Leave the terminal as it was."""

    # Its stages

    def started(self, step: BoundStep) -> None:
        """Name the stage."""
        self._of_stage(step, "started")

    def waiting(self, step: BoundStep) -> None:
        """Say why nothing moves."""
        self._of_stage(step, "another run works on this; waiting for its result")

    def event(self, step: BoundStep, event: events.Event) -> None:
        """Warnings and held-out losses at once, progress every few seconds."""
        match event:
            case events.Warn():
                self._of_stage(step, f"warning: {event.message}")
            case events.Values() if "eval_loss" in event.values:
                loss = event.values["eval_loss"]
                self._of_stage(step, f"held-out loss {loss:.4f} at step {event.step}")
            case events.Progress() if time.monotonic() >= self._next:
                self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
                self._of_stage(step, events.describe_progress(event))
            case _:
                pass

    def finished(self, step: BoundStep, outcome: Outcome) -> None:
        """The headline of a stage that all trials share; a trial has its own line."""
        if self._proposal is None:
            self._of_stage(step, f"{outcome.status}: {outcome.artifact.manifest.headline}")

    def _of_stage(self, step: BoundStep, text: str) -> None:
        indent = "  " if self._proposal is not None else ""
        self._say(f"{indent}{step.step.name}: {text}")

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True, highlight=False)


class LiveBoard(Board):
    """The table of the trials, the one that runs with its progress, redrawn as they go on."""

    def __init__(self, console: Console, plan: SweepPlan) -> None:
        super().__init__(console, plan)
        self._doing = ""
        self._loss = ""
        self._live: Live | None = None

    def trial_started(self, proposal: Proposal) -> None:
        """Add a row."""
        self._proposal, self._doing, self._loss = proposal, "starting", ""
        if self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=4)
            self._live.start()
        self._redraw()

    def trial_finished(self, trial: Trial, record: SweepRecord) -> None:
        """Put the numbers into the row."""
        self._proposal, self.record = None, record
        self._redraw()

    def started(self, step: BoundStep) -> None:
        """Name the stage."""
        self._doing = f"{step.step.name}: starting"
        self._redraw()

    def event(self, step: BoundStep, event: events.Event) -> None:
        """Move the row; warnings stay above the table."""
        match event:
            case events.Warn():
                self._say(f"{step.step.name}: {event.message}")
            case events.Phase():
                self._doing = f"{step.step.name}: {event.message}"
            case events.Values() if "eval_loss" in event.values:
                self._loss = f"{event.values['eval_loss']:.4f}"
            case events.Progress():
                self._doing = f"{step.step.name}: {events.describe_progress(event)}"
            case _:
                pass
        self._redraw()

    def close(self) -> None:
        """Take the table away; the final one is printed."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _redraw(self) -> None:
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        table = trial_table(self.record, skip=self._proposal.number if self._proposal else None)
        if self._proposal is not None:
            values = [show_value(value) for value in self._proposal.values.values()]
            cells = [*values, self._loss, "", "", "", self._doing]
            table.add_row(str(self._proposal.number + 1), *map(Text, cells), style="cyan")
        return table


def show_result(console: Console, record: SweepRecord, folder: Path) -> None:
    """The table, the choice, and the command that runs the recipe with it."""
    console.print()
    console.print(trial_table(record))
    console.print(Text(f"\n{state_line(record)}", style="dim"))
    for note in record.notes:
        console.print(Text(note, style="yellow"))
    console.print(Text(f"\n{headline(record)}", style="bold"))
    if record.choice is not None:
        console.print(Text(f"\n  {record.choice.command}\n"), soft_wrap=True)
    console.print(Text(f"Plot: {display_path(folder / PAGE)}", style="dim"), soft_wrap=True)


def trial_table(record: SweepRecord, skip: int | None = None) -> Table:
    """One line a trial; `skip` leaves one out."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial", no_wrap=True)
    head = table_head(record)
    for position, name in enumerate(head):
        last = position == len(head) - 1
        numbers = len(record.keys) <= position and not last
        table.add_column(
            name, justify="right" if numbers else "left", overflow="fold", no_wrap=not last
        )
    styles = {"pruned": "dim", "failed": "red"}
    for trial in record.trials:
        if trial.number == skip:
            continue
        mark = marks(record, trial)
        style = "bold green" if "chosen" in mark else styles.get(trial.status, "")
        if trial.verdict not in (None, "pass"):
            style = "yellow"
        name = f"{trial.number + 1} {mark}".rstrip()
        table.add_row(name, *map(Text, table_row(record, trial)), style=style)
    return table
