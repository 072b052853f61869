"""`prepare_dataset` as a whole: what must be true of any data and any settings."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import shards
from posttrain.data.preparation import Preparation, Sources, prepare_dataset
from posttrain.data.prepared import PreparedDataset
from posttrain.data.reporting import report_of
from posttrain.data.rows import Chat, Document, Row
from posttrain.errors import DataError
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.prepare import (
    AnswerQuality,
    Balance,
    DocumentQuality,
    ExactDedup,
    Language,
    LengthBounds,
    NearDedup,
    Pii,
    PrepareConfig,
    Split,
)
from tests.unit.data.test_near_dedup import edited, text


class Silent:
    """Hears everything and says nothing."""

    def phase(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        pass


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 5)


def write(path: Path, records: Sequence[object]) -> DatasetSpec:
    """JSON Lines; a string is written as it is, to be a bad row."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(line + "\n" for line in lines))
    return DatasetSpec(source=str(path), on_bad_row="skip")


def prepared(
    folder: Path,
    records: Sequence[object],
    processes: int = 1,
    sources: dict[str, object] | None = None,
    **config: object,
) -> tuple[Preparation, PreparedDataset]:
    folder.mkdir(parents=True, exist_ok=True)
    spec = write(folder / "rows.jsonl", records)
    config = {"decontaminate": None, **config}
    done = prepare_dataset(
        Sources("rows", spec, "rows.jsonl", **(sources or {})),  # type: ignore[arg-type]
        PrepareConfig(dataset="rows", **config),  # type: ignore[arg-type]
        folder / "output",
        folder / "scratch",
        Silent(),
        processes,
    )
    return done, PreparedDataset.open(folder / "output")


def everything(dataset: PreparedDataset) -> list[Row]:
    return [*dataset.train(), *dataset.validation(), *dataset.test()]


def said(rows: Sequence[Row]) -> list[str]:
    return sorted(
        row.text if isinstance(row, Document) else json.dumps([m.content for m in row.messages])  # type: ignore[union-attr]
        for row in rows
    )


WORDS = st.lists(
    st.sampled_from(["alpha", "beta", "gamma", "delta", "mail", "a@b.com", "1.2.3.4"]), max_size=9
)
RECORDS = st.lists(
    WORDS.map(lambda words: {"text": " ".join(words)})
    | st.sampled_from(["{torn", '{"text": 5}', '{"text": ""}', "[]"])
    | st.integers(0, 4).map(lambda n: {"text": edited(text(n), 3, n)})
    | st.integers(0, 4).map(lambda n: {"text": text(n)}),
    min_size=1,
    max_size=30,
)
SETTINGS = st.fixed_dictionaries(
    {
        "length": st.sampled_from([None, LengthBounds(), LengthBounds(min_characters=12)]),
        "exact_dedup": st.sampled_from([None, ExactDedup(), ExactDedup(ignore_case=True)]),
        "near_dedup": st.sampled_from([None, NearDedup(), NearDedup(threshold=0.6)]),
        "pii": st.sampled_from([None, Pii(), Pii(action="drop")]),
        "language": st.sampled_from([None, Language(min_characters=400)]),
        "split": st.sampled_from(
            [Split(validation=0.4), Split(test=0.3), Split(near_duplicates=None)]
        ),
    }
)


@settings(max_examples=40, deadline=None)
@given(RECORDS, SETTINGS)
def test_no_row_is_lost_or_invented(records: list[object], config: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            done, dataset = prepared(Path(folder), records, **config)
        except DataError:  # too few rows for two sides
            return
        counts, ledger = done.counts, dataset.ledger()
        assert [line.row for line in ledger] == list(range(1, len(records) + 1))
        verdicts = Counter(line.verdict for line in ledger)
        assert counts.rows_in == len(records) == verdicts.total()
        assert verdicts["bad"] == counts.bad
        assert verdicts["drop"] == counts.rows_dropped
        rows = {side: dataset.rows(side) for side in dataset.sizes}
        assert sum(map(len, rows.values())) == verdicts["keep"] + verdicts["edit"]
        for line in ledger:
            if line.verdict in ("keep", "edit"):
                assert line.split is not None
                assert line.output is not None
                assert rows[line.split][line.output].id == line.id
            elif line.kept_id is not None:
                kept = next(other for other in ledger if other.id == line.kept_id)
                assert kept.verdict in ("keep", "edit") or kept.operation in ("near_dedup", "pii")
        assert report_of(done).rows_in == len(records)


@settings(max_examples=15, deadline=None)
@given(RECORDS, SETTINGS)
def test_preparing_a_prepared_set_changes_nothing(
    records: list[object], config: dict[str, object]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            _, once = prepared(Path(folder) / "1", records, **config)
            again = [{"text": row.text} for row in everything(once) if isinstance(row, Document)]
            _, twice = prepared(Path(folder) / "2", again, **config)
        except DataError:
            return
        assert said(everything(twice)) == said(everything(once))


@settings(max_examples=15, deadline=None)
@given(RECORDS, st.randoms(use_true_random=False))
def test_what_is_left_and_on_which_side_does_not_depend_on_the_order(
    records: list[object], order: object
) -> None:
    shuffled = records.copy()
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    config = {"near_dedup": NearDedup(), "split": Split(validation=0.3)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            _, one = prepared(Path(folder) / "1", records, **config)
            _, other = prepared(Path(folder) / "2", shuffled, **config)
        except DataError:
            return
        assert said(one.train()) == said(other.train())
        assert said(one.validation()) == said(other.validation())


def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    records = [{"text": edited(text(n % 20), 3, n)} for n in range(60)]
    records += [{"text": f"write to user{n}@example.org {text(n + 100, 30)}"} for n in range(10)]
    config = {"near_dedup": NearDedup(), "pii": Pii()}
    _, one = prepared(tmp_path / "1", records, processes=1, **config)
    _, two = prepared(tmp_path / "2", records, processes=2, **config)
    for name in ("train.parquet", "validation.parquet", "ledger.parquet", "dataset.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_an_error_in_a_worker_process_reaches_the_user(tmp_path: Path) -> None:
    records = [{"text": text(n)} for n in range(12)]
    with pytest.raises(DataError, match=r"rows.jsonl:1: no `score`"):
        prepared(tmp_path, records, processes=2, near_dedup=NearDedup(keep="best"))


def test_operations_run_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    records = [{"text": f"{text(1)} mail a{n}@example.org"} for n in range(3)]
    records += [{"text": text(n)} for n in range(5, 12)]
    order = ("pii", "exact_dedup", "length", "near_dedup", "decontaminate")
    first, _ = prepared(tmp_path / "1", records, pii=Pii())
    then, _ = prepared(tmp_path / "2", records, pii=Pii(), order=order)
    assert "exact_dedup" not in first.counts.dropped
    assert then.counts.dropped["exact_dedup"] == {"duplicate": 2}


def test_edited_rows_say_what_was_changed(tmp_path: Path) -> None:
    records = [{"text": text(n)} for n in range(8)]
    records[3] = {"text": "Write to ann@example.org or bob@example.org, please."}
    done, dataset = prepared(tmp_path, records, pii=Pii())
    line = dataset.ledger()[3]
    assert (line.verdict, line.operation, line.detail) == ("edit", "pii", "2 email")
    row = next(row for row in everything(dataset) if row.id == line.id)
    assert isinstance(row, Document)
    assert row.text == "Write to <EMAIL> or <EMAIL>, please."
    shown = [e.text for e in report_of(done).examples]
    assert not any("@example.org" in one for one in shown)


def test_rows_that_another_dataset_holds_are_dropped(tmp_path: Path) -> None:
    theirs = [{"text": text(n)} for n in range(12)]
    _, other = prepared(tmp_path / "other", theirs)
    ours = [
        {"text": text(3)},
        {"text": edited(text(4), 2)},
        *({"text": text(n)} for n in range(50, 60)),
    ]
    done, dataset = prepared(
        tmp_path / "own",
        ours,
        sources={"against": {"other": other.folder}},
        exact_dedup=ExactDedup(against=("other",)),
        near_dedup=NearDedup(against=("other",)),
    )
    assert done.counts.rows_in == 12
    assert [line.operation for line in dataset.ledger()[:2]] == ["exact_dedup", "near_dedup"]
    known = {row.id for row in everything(other)}
    assert all(line.kept_id in known for line in dataset.ledger()[:2])
    assert len(everything(dataset)) == 10


def test_a_test_set_of_the_user_is_kept_as_it_is(tmp_path: Path) -> None:
    spec = write(tmp_path / "test.jsonl", [{"text": text(n)} for n in (1, 1, 2)])
    ours = [{"text": edited(text(1), 2)}, *({"text": text(n)} for n in range(2, 14))]
    done, dataset = prepared(
        tmp_path / "own", ours, sources={"test": spec}, split=Split(test_dataset="test")
    )
    assert said(dataset.test()) == sorted([text(1), text(1), text(2)])
    assert done.counts.dropped == {"split": {"repeats the test set": 2}}
    assert done.counts.rows_in == 16
    assert {line.file for line in dataset.ledger() if line.split == "test"} == {"test.jsonl"}


def test_labels_are_balanced_among_the_training_rows_alone(tmp_path: Path) -> None:
    records = [
        {"prompt": f"{text(n, 20)} is?", "completion": "yes" if n % 10 else "No."}
        for n in range(200)
    ]
    _, plain = prepared(tmp_path / "1", records)
    done, dataset = prepared(tmp_path / "2", records, balance=Balance(by="answer", cap=30))

    def answers(rows: Sequence[Row]) -> Counter[str]:
        return Counter(row.messages[-1].content for row in rows if isinstance(row, Chat))

    before, after = answers(plain.train()), answers(dataset.train())
    assert after == {"yes": 30, "No.": before["No."]}
    assert answers(dataset.validation()) == answers(plain.validation())
    assert done.counts.dropped["balance"] == {"balanced away": before["yes"] - 30}
    assert done.labels["before"] == {"yes": before["yes"], "no.": before["No."]}
    _, even = prepared(tmp_path / "3", records, balance=Balance(by="answer", temperature=1_000))
    assert len(set(answers(even.train()).values())) == 1


def test_a_label_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no training row has a `category`; name a column"):
        prepared(tmp_path, [{"text": text(n)} for n in range(9)], balance=Balance(cap=3))


def test_quality_rules_know_what_they_are_for(tmp_path: Path) -> None:
    documents = [{"text": text(n)} for n in range(9)]
    with pytest.raises(DataError, match="document_quality"):
        prepared(tmp_path / "1", documents, answer_quality=AnswerQuality())
    chats = [{"prompt": f"{n}?", "completion": text(n)} for n in range(9)]
    with pytest.raises(DataError, match="answer_quality"):
        prepared(tmp_path / "2", chats, document_quality=DocumentQuality())


def test_the_report_counts_what_was_written(tmp_path: Path) -> None:
    records: list[object] = [{"text": edited(text(n % 25), 2, n)} for n in range(60)]
    records += ["{torn", {"text": "x"}, {"text": "user@example.org wrote " + text(400)}]
    done, dataset = prepared(
        tmp_path, records, near_dedup=NearDedup(), length=LengthBounds(min_characters=2), pii=Pii()
    )
    report = report_of(done)
    assert {s.side: s.rows for s in report.sides} == {
        side: n for side, n in dataset.sizes.items() if n
    }
    dropped = sum(sum(step.dropped.values()) for step in report.funnel)
    assert dropped == report.rows_in - sum(side.rows for side in report.sides)
    assert sum(report.lengths_before.counts) == report.rows_in - 1
    assert sum(report.lengths_after.counts) == sum(side.rows for side in report.sides)
    words = sum(len(row.text.split()) for row in dataset.train() if isinstance(row, Document))
    assert next(s.words for s in report.sides if s.side == "train") == pytest.approx(
        words, rel=0.02
    )
    assert report.clusters
    assert sum(size * n for size, n in report.cluster_sizes.items()) > len(report.clusters)
    by_operation = Counter(example.operation for example in report.examples)
    assert {"length", "near_dedup", "pii"} <= set(by_operation)


def test_too_few_rows_left_says_what_dropped_the_others(tmp_path: Path) -> None:
    records = [{"text": "short"}] * 3 + [{"text": text(1)}]
    with pytest.raises(DataError, match=r"keep rows away.*dropped so far: 3 too short"):
        prepared(tmp_path, records, length=LengthBounds(min_characters=20))


def test_a_long_preparation_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.data import cleaning, preparation

    said: list[str] = []
    monkeypatch.setattr(Silent, "phase", lambda self, message: said.append(message))
    for module in (cleaning, preparation):
        monkeypatch.setattr(module, "SECONDS_BETWEEN_REPORTS", 0.0)
    prepared(tmp_path, [{"text": text(n)} for n in range(12)])
    assert "reading rows.jsonl: 10 rows" in said
    assert "cleaning, pass 2: 12 of 12 rows" in said
