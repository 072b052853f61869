"""What happens around the steps: progress, checkpoints, stopping.

Importing this module imports transformers: do it inside functions.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from posttrain.errors import ModelError
from posttrain.events import EventWriter
from posttrain.recipe.training import Validation
from posttrain.train.checkpoints import mark_complete
from posttrain.train.history import method_values
from posttrain.train.processes import any_process, wait_for_all

EXIT_TERMINATED = 128 + signal.SIGTERM
"""Exit code of a program that was asked to stop and did so in good order."""


def training_callbacks(
    validation: Validation,
    report: ReportProgress,
    events: EventWriter,
    describe_rows: Callable[[int], str],
    *,
    next_token_loss: bool = True,
    save_at_multiples_of: int = 1,
) -> list[TrainerCallback]:
    """All callbacks of a training stage, in the order in which they must run.

    Args:
        validation: When to stop early.
        report: Progress.
        events: Told of a stop.
        describe_rows: Names the rows that an optimizer step read, for an error.
        next_token_loss: Whether the loss is that of next tokens, which guessing bounds.
        save_at_multiples_of: Optimizer steps after which a run can go on from a checkpoint.
    """
    callbacks = [
        RefuseDivergence(describe_rows, next_token_loss),
        report,
        CompleteCheckpoints(),
        StopOnSignal(events, save_at_multiples_of),
    ]
    if validation.patience is not None:
        callbacks.append(EarlyStoppingCallback(validation.patience, validation.min_delta))
    return callbacks


class RefuseDivergence(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Ends the run when its loss is not a number or has exploded, before it is saved."""

    _PATIENCE = 3
    """Steps in a row with a loss worse than guessing: one alone may be an odd batch."""

    def __init__(self, describe_rows: Callable[[int], str], next_token_loss: bool = True) -> None:
        self._describe_rows = describe_rows
        self._next_token_loss = next_token_loss
        self._guessing = math.inf
        self._worse = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **_: object,
    ) -> None:
        """Learn the loss of a model that knows nothing: ln(vocabulary), in nats a token."""
        if model is not None and self._next_token_loss:
            self._guessing = math.log(model.config.get_text_config().vocab_size)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Look at the numbers of the step."""
        logs = logs or {}
        for name in ("loss", "eval_loss", "grad_norm"):
            value = logs.get(name, 0.0)
            # In float16 the loss scaler meets infinite gradients on purpose and skips the step.
            if not math.isfinite(value) and not (name == "grad_norm" and args.fp16):
                raise ModelError(
                    f"{name} is {value} at step {state.global_step}{self._rows(state)}; lower "
                    "`optimization.learning_rate`, or train in float32 (`dtype: float32`)"
                )
        if "eval_loss" in logs and state.global_step == 0:
            # A model that is worse than guessing to begin with may stay so for a while.
            self._guessing = max(self._guessing, logs["eval_loss"])
        if "loss" in logs:
            self._worse = self._worse + 1 if logs["loss"] > self._guessing + 1 else 0
        if self._worse >= self._PATIENCE:
            raise ModelError(
                f"the loss exploded: {logs['loss']:.1f} at step {state.global_step}, "
                f"{self._PATIENCE} steps in a row worse than guessing ({self._guessing:.1f})"
                f"{self._rows(state)}; lower `optimization.learning_rate` or raise "
                "`optimization.warmup`"
            )

    def _rows(self, state: TrainerState) -> str:
        read = self._describe_rows(state.global_step) if state.global_step else ""
        return f" (rows of the batch: {read})" if read else ""


class ReportProgress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Turns the trainer's log into events; rank 0 only."""

    def __init__(
        self,
        events: EventWriter,
        every: int,
        utilization: Callable[[float], float | None] = lambda _: None,
    ) -> None:
        """Report to `events` every so many steps.

        Args:
            events: Where to.
            every: Steps between two reports.
            utilization: Tokens a second -> model FLOPs utilization, None where not known.
        """
        self._events = events
        self._every = every
        self._utilization = utilization
        self._tokens = 0
        self._training_s = 0.0
        self._started = self._step_began = time.monotonic()
        self._first_step = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over all processes, evaluations and checkpoints not counted."""
        return self._tokens / max(self._training_s, 1e-9)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Start the clock."""
        self._started = time.monotonic()
        self._first_step = state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Start the step's clock."""
        self._step_began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Stop it."""
        self._training_s += time.monotonic() - self._step_began

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Report a step's numbers, or a held-out loss."""
        logs = logs or {}
        self._tokens += int(logs.get("tokens", 0))
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            losses = {key: logs[key] for key in logs if key.startswith("eval_loss")}
            others = {f"eval_{key}": value for key, value in method_values(logs, "eval_").items()}
            self._events.values(state.global_step, {**losses, **others})
        elif "loss" in logs and (
            state.global_step % self._every == 0 or state.global_step == state.max_steps
        ):
            self._progress(state, logs)

    def _progress(self, state: TrainerState, logs: dict[str, float]) -> None:
        done_here = state.global_step - self._first_step
        per_step = (time.monotonic() - self._started) / max(done_here, 1)
        shown = ("loss", "learning_rate", "grad_norm")
        values: dict[str, float] = {key: logs[key] for key in shown if key in logs}
        values |= method_values(logs)
        utilization = self._utilization(self.tokens_per_second)
        if utilization is not None:
            values["mfu"] = round(utilization, 4)
        self._events.progress(
            state.global_step,
            state.max_steps,
            eta_s=round(per_step * (state.max_steps - state.global_step), 1),
            values={
                **values,
                "tokens_per_s": round(self.tokens_per_second, 1),
                "memory_gib": round(_memory_gib(), 3),
            },
        )


class CompleteCheckpoints(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Marks a checkpoint once every process has written its part of it."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Wait for all, then mark."""
        wait_for_all()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        wait_for_all()


class StopOnSignal(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """On SIGTERM: a checkpoint at the next step that allows for one, then exit code 143."""

    def __init__(self, events: EventWriter, every: int = 1) -> None:
        """Stop at multiples of `every` steps only: what lies between them is in no checkpoint."""
        self._events = events
        self._every = every
        self._asked = False
        self._stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Listen, from here on only: what comes before has nothing worth saving."""
        signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        """Save at this step if any process was asked to stop.

        `should_training_stop` stays as it is: it is saved, and a resumed run would end at once.
        """
        if any_process(self._asked, args.device) and state.global_step % self._every == 0:
            self._stopping = True
            control.should_save = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Leave, after CompleteCheckpoints has marked the checkpoint."""
        if self._stopping:
            if state.is_world_process_zero:
                step = state.global_step
                self._events.warning(f"stopped at step {step}; the next run goes on from here")
            sys.exit(EXIT_TERMINATED)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """The end is near; a signal from here on stops the program as usual."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _ask(self, *_: object) -> None:
        self._asked = True


def _memory_gib() -> float:
    """Peak memory of the GPU where there is one, else the process's resident memory, in GiB."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
