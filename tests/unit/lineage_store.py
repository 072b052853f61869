"""Stores with datasets and models made by hand, for the tests of lineage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.data.prepared import LedgerLine, ledger_schema, write_dataset
from posttrain.data.rows import Chat, Message, Row
from posttrain.recipe.base import ArtifactKind
from posttrain.store import Artifact, InputRecord, Manifest, Store
from posttrain.store.fingerprint import stage_fingerprint
from posttrain.store.manifest import now
from posttrain.store.store import content_digest

ACCOUNTS = frozenset({"ledger.parquet", "rows.parquet"})


def row_name(number: int) -> str:
    return f"{number:016x}"


def chat(number: int, said: str = "", file: str = "rows.jsonl") -> Chat:
    messages = (
        Message("user", f"Question {number}?"),
        Message("assistant", said or f"No {number}"),
    )
    return Chat(id=row_name(number), file=file, row=number, messages=messages)


def kept(number: int, split: str = "train", output: int = 0, **more: Any) -> LedgerLine:
    given: dict[str, Any] = {"verdict": "keep", "file": "rows.jsonl", **more}
    return LedgerLine(id=row_name(number), row=number, split=split, output=output, **given)  # type: ignore[arg-type]


def dropped(number: int, operation: str, kept_id: int | None = None, **more: Any) -> LedgerLine:
    return LedgerLine(
        id=row_name(number),
        file=more.pop("file", "rows.jsonl"),
        row=number,
        verdict="drop",
        operation=operation,
        reason=more.pop("reason", operation),
        kept_id=None if kept_id is None else row_name(kept_id),
        **more,
    )


def source(name: str = "data/rows.jsonl") -> InputRecord:
    return InputRecord(kind="source", digest=f"digest of {name}", source=name)


def of(artifact: Artifact) -> InputRecord:
    return InputRecord(kind=artifact.kind, digest=artifact.digest, fingerprint=artifact.fingerprint)


class Made:
    """A store that is filled artifact by artifact."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        # Manifests know the time to the second, and what is made here is made faster than that.
        self._moments = (now() + timedelta(seconds=count) for count in itertools.count())

    def put(
        self,
        stage: str,
        kind: ArtifactKind,
        inputs: dict[str, InputRecord],
        write: Callable[[Path], object],
        *,
        name: str | None = None,
        recipe: str = "tiny",
        config: dict[str, Any] | None = None,
        mlflow: str | None = None,
    ) -> Artifact:
        config = config or {}
        digests = {key: record.digest for key, record in inputs.items()}
        fingerprint = stage_fingerprint(stage, 1, config, digests)
        work = self.store.work_folder(fingerprint)
        (work / "output").mkdir()
        write(work / "output")
        files = self.store.record_files(work / "output", ACCOUNTS)
        manifest = Manifest(
            kind=kind,
            stage=stage,
            name=name or stage,
            recipe=recipe,
            fingerprint=fingerprint,
            content_digest=content_digest(files),
            code_version=1,
            config=config,
            inputs=inputs,
            files=files,
            created=next(self._moments),
            seconds=1.0,
            packages={},
            hardware={},
            mlflow_run_id=mlflow,
        )
        return self.store.publish(work, manifest)

    def dataset(
        self,
        ledger: Sequence[LedgerLine],
        rows: dict[str, list[Row]] | None = None,
        inputs: dict[str, InputRecord] | None = None,
        dataset: str = "chats",
        stage: str = "prepare",
        **more: Any,
    ) -> Artifact:
        def write(folder: Path) -> None:
            sides: dict[str, list[Row]] = {"train": [], "validation": []}
            for line in ledger:
                if line.split:
                    sides.setdefault(line.split, []).append(chat(line.row, file=line.file))
            write_dataset(folder, "chats", rows or sides)  # type: ignore[arg-type]
            lines = pa.Table.from_pylist([asdict(li) for li in ledger], schema=ledger_schema())
            pq.write_table(lines, folder / "ledger.parquet")

        config = {"dataset": dataset} if stage == "prepare" else {}
        more = {"config": config, **more}
        return self.put(stage, "dataset", inputs or {"rows": source()}, write, **more)

    def trained(
        self,
        dataset: Artifact,
        account: Sequence[tuple[int, str, int | None]] | None = None,
        kind: ArtifactKind = "adapter",
        inputs: dict[str, InputRecord] | None = None,
        **more: Any,
    ) -> Artifact:
        """An sft artifact; `account` has (row, verdict, passes)."""
        base = {"model": InputRecord(kind="model", digest="base", source="base")}

        def write(folder: Path) -> None:
            (folder / "weights").write_text(str(more))
            if account is not None:
                records = [
                    {"id": row_name(row), "verdict": verdict, "passes": passes}
                    for row, verdict, passes in account
                ]
                schema = pa.schema(
                    [("id", pa.string()), ("verdict", pa.string()), ("passes", pa.int64())]
                )
                pq.write_table(pa.Table.from_pylist(records, schema), folder / "rows.parquet")

        more = {"config": {"validation": {"max_rows": 1}}, **more}
        given = {**base, **(inputs or {}), "dataset": of(dataset)}
        return self.put("sft", kind, given, write, **more)

    def merged(self, adapter: Artifact, dataset: Artifact, **more: Any) -> Artifact:
        inputs = {"model": of(adapter), "prompts": of(dataset)}
        more = {"config": {"check_prompts": 2}, **more}
        return self.put(
            "merge", "model", inputs, lambda f: (f / "weights").write_text("merged"), **more
        )
