from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.prepared import LedgerLine
from posttrain.errors import StoreError, UsageError
from posttrain.lineage import Graph
from posttrain.lineage.graph import gaps
from posttrain.lineage.rows import RowAnswer, RowHistory, scope_of
from posttrain.lineage.summary import export_rows, training_sets
from posttrain.store import InputRecord
from posttrain.store.fingerprint import combine
from tests.unit.lineage_store import Made, chat, dropped, kept, of, row_name, source


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "store")


def ask(made: Made, row: int | str) -> RowAnswer:
    reference = row_name(row) if isinstance(row, int) else row
    (answer,) = RowHistory(Graph.read(made.store)).find(reference)
    return answer


def names(answer: RowAnswer) -> list[str]:
    return [use.model.name for use in answer.trained]


BAD = LedgerLine("", "rows.jsonl", 9, "bad", "read", "bad", "`messages` is missing")
LEDGER = [
    kept(1, output=0),
    kept(2, output=1, verdict="edit", operation="pii", detail="1 email"),
    kept(3, output=2),
    kept(4, "validation", 0),
    kept(5, "validation", 1),
    dropped(6, "exact_dedup", kept_id=1, reason="duplicate"),
    dropped(7, "near_dedup", kept_id=3, reason="near duplicate", detail="similarity 0.91"),
    dropped(8, "length", reason="too long"),
    BAD,
]
ACCOUNT = [(1, "trained", 2), (2, "trained", 1), (3, "not read", 0)]


def test_the_models_of_a_row_are_those_trained_on_it_and_all_made_from_these(made: Made) -> None:
    data = made.dataset(LEDGER)
    adapter = made.trained(data, ACCOUNT, mlflow="run-7")
    merged = made.merged(adapter, data)
    more = made.dataset([kept(11, file="more.jsonl")], inputs={"rows": source("more.jsonl")})
    made.trained(more, [(11, "trained", 1)], "model", {"model": of(merged)}, name="sft-2")
    answer = ask(made, 1)
    assert [(use.model.name, use.how, use.passes, use.way) for use in answer.trained] == [
        ("tiny/sft", "trained", 2, ()),
        ("tiny/merge", "trained", 2, ("tiny/sft",)),
        ("tiny/sft-2", "trained", 2, ("tiny/sft", "tiny/merge")),
    ]
    assert answer.trained[0].model.mlflow_run_id == "run-7"
    assert names(ask(made, 11)) == ["tiny/sft-2"]


def test_an_edited_row_was_used_as_edited(made: Made) -> None:
    made.trained(made.dataset(LEDGER), ACCOUNT)
    assert ask(made, 2).trained[0].edited == "1 email"


def test_a_row_that_training_did_not_reach_or_could_not_use_made_no_model(made: Made) -> None:
    data = made.dataset(LEDGER)
    made.trained(data, [(1, "left out", 0), (2, "trained", 1), (3, "not read", 0)])
    assert [(u.how, "no token" in u.reason) for u in ask(made, 1).unused] == [("left out", True)]
    assert [(u.how, "before it was read" in u.reason) for u in ask(made, 3).unused] == [
        ("not read", True)
    ]
    assert ask(made, 1).trained == ask(made, 3).trained == ()


@pytest.mark.parametrize("account", [None, [(1, "trained", None)]])
def test_no_more_is_claimed_than_is_recorded(
    made: Made, account: list[tuple[int, str, int | None]] | None
) -> None:
    made.trained(made.dataset(LEDGER), account)
    assert [(use.how, use.passes) for use in ask(made, 1).trained] == [
        ("in the training set", None)
    ]


def test_a_duplicate_was_used_through_the_row_that_stays(made: Made) -> None:
    data = made.dataset(LEDGER)
    made.trained(data, [(1, "trained", 1), (2, "trained", 1), (3, "trained", 1)])
    for row, stays, alike in ((6, 1, "exact duplicate"), (7, 3, "near duplicate")):
        (use,) = ask(made, row).trained
        assert use.through is not None
        assert (use.through.id, use.through.alike) == (row_name(stays), alike)
    assert ask(made, 1).repeated_by == (row_name(6),)


def test_over_several_steps_the_loosest_likeness_counts_and_circles_end(made: Made) -> None:
    first = made.dataset(
        [dropped(6, "near_dedup", kept_id=7), dropped(7, "exact_dedup", kept_id=3), kept(3)]
    )
    made.trained(first, [(3, "trained", 1)])
    # In another dataset the roles are the other way round.
    made.dataset(
        [dropped(3, "near_dedup", kept_id=6), kept(6)],
        inputs={"rows": source("other.jsonl")},
    )
    (use,) = ask(made, 6).trained
    assert use.through is not None
    assert (use.through.id, use.through.alike) == (row_name(3), "near duplicate")


def test_a_duplicate_of_another_dataset_is_followed_there(made: Made) -> None:
    other = made.dataset([kept(1, file="old.jsonl")], inputs={"rows": source("old.jsonl")})
    made.trained(other, [(1, "trained", 1)])
    compared = made.dataset(
        [dropped(6, "exact_dedup", kept_id=1), kept(3)],
        inputs={"rows": source(), "against:old": of(other)},
    )
    assert names(ask(made, 6)) == ["tiny/sft"]
    # What is only compared with gets into nothing.
    assert list(Graph.read(made.store).ancestors(compared)) == [compared.fingerprint]


def test_held_out_rows_measure_as_far_as_they_are_looked_at(made: Made) -> None:
    data = made.dataset([*LEDGER, kept(10, "validation", 2)])
    adapter = made.trained(data, ACCOUNT)
    made.merged(adapter, data)
    evaluate = {"max_perplexity_rows": 2, "samples": {"count": 1}}
    inputs = {"model": of(adapter), "dataset": of(data)}
    made.put("evaluate", "evaluation", inputs, lambda f: (f / "r").write_text(""), config=evaluate)
    measured = {row: {one.by.name for one in ask(made, row).measured} for row in (1, 4, 5, 10)}
    assert measured == {
        1: set(),
        4: {"tiny/sft", "tiny/merge", "tiny/evaluate"},
        5: {"tiny/merge", "tiny/evaluate"},
        10: set(),
    }
    assert ask(made, 4).trained == ()


def test_a_mix_is_followed_to_its_sources(made: Made) -> None:
    chats = made.dataset(LEDGER)
    docs = made.dataset(
        [kept(11, file="more.jsonl"), dropped(12, "length")],
        inputs={"rows": source("more.jsonl")},
        dataset="docs",
        name="prepare-docs",
    )
    mixed = made.dataset(
        [
            kept(1, file="chats/rows.jsonl", output=1, detail="2 times, also at 2"),
            dropped(2, "mix", reason="not sampled"),
            kept(11, file="docs/more.jsonl", output=0, verdict="edit", detail="prefix Q"),
        ],
        inputs={"mixed:chats": of(chats), "mixed:docs": of(docs)},
        stage="mix",
        name="both",
    )
    model = made.trained(mixed, [(11, "trained", 1), (1, "trained", 1), (1, "trained", 2)])
    assert [(use.how, use.passes) for use in ask(made, 1).trained] == [("trained", 3)]
    assert ask(made, 1).file == "rows.jsonl"
    assert ask(made, 11).trained[0].edited == "prefix Q"
    assert ask(made, 2).trained == ()
    assert names(ask(made, 6)) == ["tiny/sft"], "its exact duplicate is in the mix"

    graph = Graph.read(made.store)
    (one,) = training_sets(graph, model)
    shares = {share.dataset: (share.source, dict(share.rows)) for share in one.shares}
    assert shares["docs"] == ("more.jsonl", {"trained": 1, "dropped": 1})
    assert shares["chats"][1]["trained"] == 1
    assert shares["chats"][1]["bad"] == 1


def test_a_row_of_two_datasets_of_a_mix_is_counted_for_each(made: Made) -> None:
    chats = made.dataset([kept(1)])
    docs = made.dataset([kept(1)], inputs={"rows": source("copy/rows.jsonl")}, dataset="docs")
    mixed = made.dataset(
        [kept(1, file="chats/rows.jsonl"), dropped(1, "mix", file="docs/rows.jsonl")],
        inputs={"mixed:chats": of(chats), "mixed:docs": of(docs)},
        stage="mix",
    )
    model = made.trained(mixed, [(1, "trained", 1)])
    (one,) = training_sets(Graph.read(made.store), model)
    assert {share.dataset: share.rows for share in one.shares} == {
        "chats": {"trained": 1},
        "docs": {"dropped": 1},
    }


def test_equal_content_connects_what_early_cutoff_reused(made: Made) -> None:
    """Another source that ends in the same rows: training was not repeated, and knows the first."""
    first = made.dataset(LEDGER)
    made.trained(first, ACCOUNT)
    second = made.dataset(
        [*LEDGER[:5], dropped(20, "exact_dedup", kept_id=2)],
        inputs={"rows": source("other/rows.jsonl")},
    )
    assert first.digest == second.digest
    assert names(ask(made, 20)) == ["tiny/sft"]
    shutil.rmtree(first.path)
    assert Graph.read(made.store).gone == ()
    assert names(ask(made, 1)) == ["tiny/sft"]


def test_an_adapter_is_known_by_its_content_together_with_its_base(made: Made) -> None:
    data = made.dataset(LEDGER)
    adapter = made.trained(data, ACCOUNT)
    record = InputRecord(
        kind="adapter", digest=combine(adapter.digest, "base"), fingerprint="f" * 64
    )
    made.put("merge", "model", {"model": record}, lambda f: (f / "w").write_text(""))
    assert names(ask(made, 1)) == ["tiny/sft", "tiny/merge"]


def test_what_is_gone_is_said(made: Made) -> None:
    data = made.dataset(LEDGER)
    made.trained(data, ACCOUNT)
    made.store.record_run("r", {"recipe": "tiny", "started": "1", "artifacts": {"sft": "e" * 64}})
    shutil.rmtree(data.path)
    graph = Graph.read(made.store)
    assert {gone.fingerprint for gone in graph.gone} == {data.fingerprint, "e" * 64}
    (said,) = gaps(graph)
    assert "2 artifacts are named by manifests or runs but no longer in the store" in said
    # The model's own account still knows the row.
    answer = ask(made, 1)
    assert (names(answer), answer.file) == (["tiny/sft"], None)


def test_an_artifact_whose_manifest_is_damaged_is_said(made: Made) -> None:
    (made.dataset(LEDGER).path / "manifest.json").write_text("{")
    (said,) = gaps(Graph.read(made.store))
    assert "1 artifact has a manifest that cannot be read" in said


def test_a_damaged_ledger_is_an_error_and_no_answer(made: Made) -> None:
    data = made.dataset(LEDGER)
    (data.path / "ledger.parquet").write_bytes(b"no parquet")
    with pytest.raises(StoreError, match="no full answer"):
        ask(made, 1)


def test_a_bad_row_is_found_by_its_place(made: Made) -> None:
    made.trained(made.dataset(LEDGER), ACCOUNT)
    answer = ask(made, "rows.jsonl:9")
    assert [fate.line.detail for fate in answer.fates] == ["`messages` is missing"]
    assert answer.trained == ()


@pytest.mark.parametrize(
    "reference",
    ["rows.jsonl:1", "data/rows.jsonl:1", "/home/me/data/rows.jsonl:1", "chats/rows.jsonl:1"],
)
def test_a_place_is_enough_as_far_as_it_is_clear(made: Made, reference: str) -> None:
    made.dataset(LEDGER)
    assert ask(made, reference).id == row_name(1)


@pytest.mark.parametrize("reference", ["ows.jsonl:1", "other/rows.jsonl:1", "rows.jsonl:99"])
def test_another_place_is_another_row(made: Made, reference: str) -> None:
    made.dataset(LEDGER)
    assert RowHistory(Graph.read(made.store)).find(reference) == []


def test_a_place_that_stands_for_several_rows_is_refused_with_the_choices(made: Made) -> None:
    made.dataset(LEDGER)
    other = LedgerLine(row_name(21), "rows.jsonl", 1, "keep", split="train", output=0)
    made.dataset([other], inputs={"rows": source("b/rows.jsonl")})
    with pytest.raises(UsageError, match=rf"{row_name(1)}[^$]*{row_name(21)}"):
        ask(made, "rows.jsonl:1")
    assert ask(made, "b/rows.jsonl:1").id == row_name(21)


def test_a_reference_that_is_neither_id_nor_place_is_refused(made: Made) -> None:
    with pytest.raises(UsageError, match="16 hex digits"):
        ask(made, "rows.jsonl")


def test_texts_are_searched_in_every_turn_and_the_search_says_what_it_did_not_see(
    made: Made,
) -> None:
    rows = {"train": [chat(1, "Write to Jane"), chat(2, "ask  JANE "), chat(3)]}
    data = made.dataset(LEDGER, {**rows, "validation": [chat(4, "jane"), chat(5)]})  # type: ignore[dict-item]
    # What a mix did not take is in the dataset that it was mixed from.
    left_out = [dropped(1, "mix", reason="not sampled")]
    made.dataset(left_out, {"train": []}, {"mixed:chats": of(data)}, stage="mix")
    history = RowHistory(Graph.read(made.store))
    found, searched = history.search("jane")
    assert [answer.id for answer in found] == [row_name(n) for n in (1, 2, 4)]
    assert (searched.rows, searched.edited, searched.dropped) == (5, 1, 4)
    assert [a.id for a in history.search("question 3?")[0]] == [row_name(3)]
    assert [a.id for a in history.search("ask JANE", whole=True)[0]] == [row_name(2)]
    assert history.search("Write to", whole=True)[0] == []
    assert history.search(".*")[0] == []


def test_an_answer_about_one_model_leaves_the_others_out(made: Made) -> None:
    data = made.dataset(LEDGER)
    adapter = made.trained(data, ACCOUNT)
    made.merged(adapter, data)
    made.trained(data, ACCOUNT, recipe="other", config={"epochs": 9})
    graph = Graph.read(made.store)
    (answer,) = RowHistory(graph, scope_of(graph, adapter).values()).find(row_name(1))
    assert names(answer) == ["tiny/sft"]
    (answer,) = RowHistory(graph, scope_of(graph, data).values()).find(row_name(1))
    assert sorted(names(answer)) == ["other/sft", "tiny/merge", "tiny/sft"]


def test_an_artifact_is_found_by_path_digits_or_stage(made: Made) -> None:
    adapter = made.trained(made.dataset(LEDGER), ACCOUNT)
    graph = Graph.read(made.store)
    for reference in (str(adapter.path), adapter.fingerprint[:6], "sft", "tiny/sft"):
        assert graph.find(reference).fingerprint == adapter.fingerprint
    for reference in ("dpo", adapter.fingerprint[:5], "x/sft"):
        with pytest.raises(UsageError, match="no such artifact"):
            graph.find(reference)


def test_a_stage_stands_for_what_its_recipes_latest_run_used(made: Made) -> None:
    data = made.dataset(LEDGER)
    models = [made.trained(data, ACCOUNT, config={"epochs": epochs}) for epochs in (1, 2)]
    for started, model in enumerate([*models, models[0]]):
        artifacts = {"sft": model.fingerprint}
        run = {"recipe": "tiny", "started": str(started), "artifacts": artifacts}
        made.store.record_run(f"r{-started}", run)
        assert Graph.read(made.store).find("sft").fingerprint == model.fingerprint
    run = {"recipe": "tiny", "started": "3", "artifacts": {"sft": "e" * 64}}
    made.store.record_run("gone", run)
    with pytest.raises(UsageError, match="no such artifact"):
        Graph.read(made.store).find("sft")
    (made.store.root / "runs" / "gone.json").unlink()
    made.trained(data, ACCOUNT, recipe="other", config={"epochs": 8})
    with pytest.raises(UsageError, match=r"other/sft[^$]*tiny/sft"):
        Graph.read(made.store).find("sft")


def test_which_rows_made_a_model_adds_up_to_all_rows(made: Made, tmp_path: Path) -> None:
    data = made.dataset(LEDGER)
    merged = made.merged(made.trained(data, ACCOUNT), data)
    graph = Graph.read(made.store)
    (one,) = training_sets(graph, merged)
    (share,) = one.shares
    assert share.rows == {"trained": 2, "not read": 1, "validation": 2, "dropped": 3, "bad": 1}
    assert share.dropped["length: too long"] == 1
    for suffix in (".parquet", ".jsonl"):
        assert export_rows(graph, merged, tmp_path / f"out{suffix}") == len(LEDGER)
    written = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(line["id"], line["verdict"]) for line in written[:4]] == [
        (row_name(1), "trained"),
        (row_name(2), "trained"),
        (row_name(3), "not read"),
        (row_name(4), "validation"),
    ]
    assert (tmp_path / "out.jsonl").read_text().count("\n") == len(LEDGER)
    with pytest.raises(UsageError, match=r"\.parquet or \.jsonl"):
        export_rows(graph, merged, tmp_path / "out.csv")


def test_a_ledger_of_an_earlier_version_is_read_without_what_it_lacks(made: Made) -> None:
    data = made.dataset(LEDGER)
    ledger = data.path / "ledger.parquet"
    table = pq.read_table(ledger)
    pq.write_table(table.drop_columns(["output", "kept_id"]), ledger)
    made.trained(data, None)
    assert names(ask(made, 1)) == ["tiny/sft"]
    assert ask(made, 6).trained == ()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["train", "validation", "dropped"]),
            st.sampled_from(["trained", "not read", "left out"]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_the_two_directions_agree(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    """A row is among those that made a model exactly if the model is among those of the row."""
    made = Made(tmp_path_factory.mktemp("store"))
    ledger = [
        dropped(n, "length") if side == "dropped" else kept(n, side, output=n)
        for n, (side, _) in enumerate(rows)
    ]
    account = [
        (n, verdict, int(verdict == "trained"))
        for n, (side, verdict) in enumerate(rows)
        if side == "train"
    ]
    model = made.trained(made.dataset(ledger), account)
    graph = Graph.read(made.store)
    target = made.store.root / "out.parquet"
    export_rows(graph, model, target)
    written = pq.read_table(target).filter(pa.compute.field("verdict") == "trained")
    there = set(written.column("id").to_pylist())
    answers = RowHistory(graph).trace([row_name(n) for n in range(len(rows))])
    assert {answer.id for answer in answers if answer.trained} == there
