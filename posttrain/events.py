"""Progress as JSON lines: what a stage's program says while it works.

A program appends one line an event to `STAGE_DIR/events.jsonl`; whoever runs the stage tails the
file. The file is also the buffer: a tracking server that is away misses nothing.

An event is `{"time": unix seconds, "event": kind, ...}` with one of these kinds:

- `phase`     `message`: what is being done now, in a few words
- `progress`  `done`, `total`, `unit`, optional `eta_s`, and `values`: numbers at this point
- `values`    `step`, `values`: numbers to be tracked, such as a held-out loss
- `warning`   `message`
- `error`     `message`, `type`: the program's last words
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    time: float
    rank: int = 0


class Phase(_Event):
    """What the program does now."""

    event: Literal["phase"] = "phase"
    message: str


class Progress(_Event):
    """How far the program is."""

    event: Literal["progress"] = "progress"
    done: int
    total: int
    unit: str = "step"
    eta_s: float | None = None
    values: dict[str, float] = {}


class Values(_Event):
    """Numbers to be tracked at a step."""

    event: Literal["values"] = "values"
    step: int
    values: dict[str, float]


class Warn(_Event):
    """Something a person should know; the program goes on."""

    event: Literal["warning"] = "warning"
    message: str


class Failure(_Event):
    """The program's last words."""

    event: Literal["error"] = "error"
    message: str
    type: str


Event = Annotated[Phase | Progress | Values | Warn | Failure, Field(discriminator="event")]
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)


class EventWriter:
    """Appends events to a file; one short write a line, so that a reader never sees half a one."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        self._path = path
        self._rank = rank

    def phase(self, message: str) -> None:
        """Say what is being done now."""
        self._write(Phase(time=time.time(), rank=self._rank, message=message))

    def progress(
        self,
        done: int,
        total: int,
        *,
        unit: str = "step",
        eta_s: float | None = None,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """Report `done` of `total` units, with numbers worth tracking at this point."""
        self._write(
            Progress(
                time=time.time(),
                rank=self._rank,
                done=done,
                total=total,
                unit=unit,
                eta_s=eta_s,
                values=_finite(values or {}),
            )
        )

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Track numbers at a step."""
        self._write(Values(time=time.time(), rank=self._rank, step=step, values=_finite(values)))

    def warning(self, message: str) -> None:
        """Say something a person should know."""
        self._write(Warn(time=time.time(), rank=self._rank, message=message))

    def error(self, error: BaseException) -> None:
        """Leave the last words."""
        message = str(error) or type(error).__name__
        self._write(
            Failure(time=time.time(), rank=self._rank, message=message, type=type(error).__name__)
        )

    def _write(self, event: Event) -> None:
        line = json.dumps(event.model_dump(exclude_none=True), ensure_ascii=False) + "\n"
        with self._path.open("ab", buffering=0) as file:
            file.write(line.encode())


class EventReader:
    """Reads the events that were appended since the last look, or beyond `offset` bytes."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self._offset = offset

    def read(self) -> Iterator[Event]:
        """Yield new complete events; a line still being written waits for the next call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                event = parse_event(line)
                if event is not None:
                    yield event


def parse_event(line: bytes | str) -> Event | None:
    """One event, or None for a line that is none (a newer program's kind, a torn line)."""
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError:
        return None


def describe_progress(event: Progress) -> str:
    """`step 12/60, loss 2.310, 85 tokens/s, 3 min 10 s left`."""
    parts = [f"{event.unit} {event.done}/{event.total}"]
    if "loss" in event.values:
        parts.append(f"loss {event.values['loss']:.3f}")
    if "tokens_per_s" in event.values:
        parts.append(f"{event.values['tokens_per_s']:,.0f} tokens/s")
    if "mfu" in event.values:
        parts.append(f"MFU {event.values['mfu']:.0%}")
    if event.eta_s is not None:
        minutes, seconds = divmod(round(event.eta_s), 60)
        parts.append(f"{minutes} min {seconds} s left" if minutes else f"{seconds} s left")
    return ", ".join(parts)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN; a number that is not finite is left out."""
    return {key: float(value) for key, value in values.items() if math.isfinite(value)}
