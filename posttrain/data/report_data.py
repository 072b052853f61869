"""What the report of a prepared dataset shows: plain data, kept as `report.json` beside it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class FunnelStep(_Frozen):
    """One operation: how many rows came to it, and what it did."""

    operation: str
    """`read` for the reading of the source, else the recipe key, such as `near_dedup`."""
    rows: int
    """Rows that came to it."""
    dropped: dict[str, int] = {}
    """Rows dropped, by reason."""
    edited: int = 0
    """Rows whose text it changed."""
    found: dict[str, int] = {}
    """What else it counted, such as rows by language or findings by kind."""


class Histogram(_Frozen):
    """Counts between edges; one edge more than counts. The last bin is open to the right."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mean: float = 0.0
    median: float = 0.0
    p95: float = 0.0
    """The value that 95% of rows stay below."""


class Example(_Frozen):
    """A row that an operation dropped or edited."""

    operation: str
    reason: str
    detail: str | None = None
    file: str
    row: int
    id: str
    text: str
    """Its beginning; of an edited row, as it is after the operation."""


class Cluster(_Frozen):
    """Near duplicates: the row that stays and some of those that go."""

    size: int
    kept: Example
    dropped: tuple[Example, ...]


class Hit(_Frozen):
    """A row that gives away an item of an evaluation."""

    benchmark: str
    rows: int
    """Rows that share an n-gram with an item of it."""
    example: str
    """The shared words of one of them."""


class Advice(_Frozen):
    """What a practitioner would say to these numbers."""

    level: Literal["good", "note", "warning"]
    text: str


class SideSummary(_Frozen):
    """One side of the split."""

    side: str
    rows: int
    words: int


class ReportData(_Frozen):
    """Everything the page shows."""

    dataset: str
    """Name in the recipe, or the source's."""
    source: str
    family: str
    rows_in: int
    sides: tuple[SideSummary, ...]
    funnel: tuple[FunnelStep, ...]
    files: dict[str, int] = {}
    """Rows read, by file; the largest twenty."""
    lengths_before: Histogram
    """Words of each row as read."""
    lengths_after: Histogram
    """Words of each row that stays."""
    examples: tuple[Example, ...] = ()
    clusters: tuple[Cluster, ...] = ()
    """The largest clusters of near duplicates."""
    cluster_sizes: dict[int, int] = {}
    """Clusters by number of rows."""
    labels: dict[str, dict[str, int]] = {}
    """Training rows by label before and after balancing, under `before` and `after`."""
    languages: dict[str, int] = {}
    contamination: tuple[Hit, ...] = ()
    preference_lengths: dict[str, float] = {}
    """Of preferences: mean words of `chosen` and `rejected`, and the share of pairs whose chosen
    answer is the longer one."""
    advice: tuple[Advice, ...] = ()
    leak_check: str = ""
    """What was checked about rows on two sides, in one sentence."""
    seconds: dict[str, float] = {}
    """Wall-clock time by phase."""
