from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from posttrain.data.batch import RowBatch, row_text
from posttrain.data.mix_parts import assert_no_leak, read_part
from posttrain.data.mix_report import MixReport, headline
from posttrain.data.mix_shares import apportion
from posttrain.data.mixing import mix_datasets
from posttrain.data.operations.base import Side
from posttrain.data.prefix import prefixed
from posttrain.data.prepared import LedgerLine, PreparedDataset, write_dataset
from posttrain.data.rows import (
    Chat,
    Document,
    KtoExample,
    Message,
    Preference,
    Row,
    family_of,
    row_id,
)
from posttrain.data.slabs import Slabs
from posttrain.data.split import SIDES, group_key
from posttrain.data.text import normalise
from posttrain.errors import DataError
from posttrain.recipe import MixConfig

Sides = Mapping[Side, Sequence[Row]]
CONTENT = ("train.parquet", "validation.parquet", "test.parquet", "dataset.json")


def chat(prompt: str, row: int = 1, file: str = "a.jsonl", answer: str = "Yes.") -> Chat:
    messages = (Message("user", prompt), Message("assistant", answer))
    return Chat(id=row_id(prompt + answer, file, row), file=file, row=row, messages=messages)


def chats(name: str, train: int, validation: int = 1, test: int = 0) -> Sides:
    """Rows that say `NAME SIDE NUMBER`."""
    sizes: dict[Side, int] = {"train": train, "validation": validation, "test": test}
    return {
        side: [chat(f"{name} {side} {n}", n + 1, f"{side}.jsonl") for n in range(size)]
        for side, size in sizes.items()
    }


@dataclass
class Told:
    """Remembers what it is told."""

    warnings: list[str] = field(default_factory=list)

    def phase(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        self.warnings.append(message)


@dataclass
class Mixed:
    dataset: PreparedDataset
    report: MixReport
    warnings: list[str]

    @property
    def ledger(self) -> list[LedgerLine]:
        return self.dataset.ledger()

    def counts(self, side: Side = "train") -> dict[str, int]:
        """Rows by the first word of the prompt: the dataset's name."""
        found = Counter(row_text(row).split()[0] for row in self.dataset.rows(side))
        return dict(sorted(found.items()))


Mix = Callable[..., Mixed]


def run_mix(folder: Path, datasets: Mapping[str, Sides], **config: Any) -> Mixed:
    folder.mkdir(exist_ok=True)
    folders = {}
    for name, sides in datasets.items():
        folders[name] = folder / "in" / name
        write_dataset(folders[name], family_of(sides["train"][0]), sides)
    config.setdefault("sources", [{"dataset": name} for name in datasets])
    told = Told()
    report = mix_datasets(MixConfig(name="blend", **config), folders, folder / "out", told)
    return Mixed(PreparedDataset.open(folder / "out"), report, told.warnings)


@pytest.fixture
def mix(tmp_path: Path) -> Mix:
    """Mixes datasets; any setting of the recipe's mix."""
    return lambda datasets, **config: run_mix(tmp_path / "mix", datasets, **config)


# Shares


def test_weights_decide_on_the_shares(mix: Mix) -> None:
    sources = [{"dataset": "a", "weight": 3}, {"dataset": "b", "weight": 1}]
    mixed = mix({"a": chats("a", 300, 60), "b": chats("b", 50, 10)}, sources=sources)
    assert mixed.counts() == {"a": 150, "b": 50}
    assert mixed.counts("validation") == {"a": 30, "b": 10}
    assert headline(mixed.report) == "200 train + 40 validation: a 150 (75%), b 50 (25%)"


def test_without_weights_every_row_is_there(mix: Mix) -> None:
    mixed = mix({"a": chats("a", 30, 2, 2), "b": chats("b", 10, 5, 1)})
    assert mixed.counts() == {"a": 30, "b": 10}
    assert mixed.counts("validation") == {"a": 2, "b": 5}
    assert mixed.counts("test") == {"a": 2, "b": 1}
    assert mixed.warnings == []


def test_a_temperature_of_two_takes_the_square_root_of_the_sizes(mix: Mix) -> None:
    mixed = mix({"a": chats("a", 900), "b": chats("b", 100)}, temperature=2, max_repeats=3)
    assert mixed.counts() == {"a": 900, "b": 300}


def test_replay_and_adversarial_rows_have_their_share_of_the_whole(mix: Mix) -> None:
    mixed = mix(
        {name: chats(name, 200, 20) for name in ("a", "b", "general", "tricky")},
        sources=[{"dataset": "a", "weight": 1}, {"dataset": "b", "weight": 1}],
        replay={"dataset": "general", "fraction": 0.1},
        adversarial={"dataset": "tricky", "fraction": 0.05},
        rows=200,
    )
    assert mixed.counts() == {"a": 85, "b": 85, "general": 20, "tricky": 10}
    assert headline(mixed.report).endswith(
        "a 85 (42.5%), b 85 (42.5%), replay general 20 (10%), adversarial tricky 10 (5%)"
    )


def test_a_share_that_cannot_be_had_makes_the_mix_smaller_and_says_so(mix: Mix) -> None:
    mixed = mix(
        {"a": chats("a", 1000), "general": chats("general", 60)},
        sources=[{"dataset": "a"}],
        replay={"dataset": "general", "fraction": 0.1},
        rows=1000,
    )
    assert mixed.counts() == {"a": 540, "general": 60}
    assert mixed.warnings == [
        "replay `general` wants 10% = 100 rows but has 60 (max_repeats: 1). Shares stay, so the "
        "mix has 600 training rows instead of 1,000: raise `max_repeats` to 2, or lower the share"
    ]


def test_a_source_is_repeated_only_while_another_has_new_rows(mix: Mix) -> None:
    even = [{"dataset": "a", "weight": 1}, {"dataset": "b", "weight": 1}]
    mixed = mix({"a": chats("a", 100), "b": chats("b", 30)}, sources=even, max_repeats=10)
    assert mixed.counts() == {"a": 100, "b": 100}
    times = Counter(Counter(row.id for row in mixed.dataset.train()).values())
    assert times == {1: 100, 3: 20, 4: 10}


def test_a_large_replay_set_does_not_make_the_sources_repeat(mix: Mix) -> None:
    mixed = mix(
        {"a": chats("a", 90, 9), "general": chats("general", 900, 300)},
        sources=[{"dataset": "a"}],
        replay={"dataset": "general", "fraction": 0.1},
        max_repeats=5,
    )
    assert mixed.counts() == {"a": 90, "general": 10}
    assert mixed.counts("validation") == {"a": 9, "general": 1}


def test_a_replay_set_with_few_validation_rows_leaves_the_others_theirs(mix: Mix) -> None:
    mixed = mix(
        {"a": chats("a", 90, 50), "general": chats("general", 10, 1)},
        sources=[{"dataset": "a"}],
        replay={"dataset": "general", "fraction": 0.1},
    )
    assert mixed.counts("validation") == {"a": 50, "general": 1}


def test_a_source_without_test_rows_is_named(mix: Mix) -> None:
    mixed = mix({"a": chats("a", 20, 2, 2), "b": chats("b", 20, 2)})
    assert mixed.counts("test") == {"a": 2}
    assert mixed.warnings == ["`b`: no test row, so the mix's test rows do not measure it"]


@given(
    st.integers(0, 500),
    st.lists(st.integers(1, 100), min_size=1, max_size=6),
)
def test_rounding_keeps_the_total_and_takes_nothing_when_the_total_grows(
    total: int, weights: list[int]
) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    sizes, more = apportion(total, shares), apportion(total + 1, shares)
    assert (sum(sizes), sum(more)) == (total, total + 1)
    assert all(one <= other for one, other in zip(sizes, more, strict=True))
    if len(shares) <= 3:
        assert all(abs(s - total * w) <= 1 for s, w in zip(sizes, shares, strict=True))


# Which rows, in which order


def test_a_larger_mix_takes_the_same_rows_in_the_same_order_and_more(tmp_path: Path) -> None:
    datasets = {"a": chats("a", 60), "b": chats("b", 50), "c": chats("c", 40)}
    weights = [{"dataset": name, "weight": w} for name, w in zip("abc", (5, 3, 1), strict=True)]
    found = [
        [row.id for row in run_mix(tmp_path / str(rows), datasets, sources=weights, rows=rows,
                                   max_repeats=2).dataset.train()]
        for rows in (9, 17, 40, 41, 90)
    ]  # fmt: skip
    for fewer, more in pairwise(found):
        rest = iter(more)
        assert all(row in rest for row in fewer)


def test_the_order_of_rows_in_their_files_changes_no_byte(tmp_path: Path) -> None:
    datasets = {"a": chats("a", 60, 8, 8), "b": chats("b", 50, 8, 8)}
    twice = [replace(row, id=f"{n:016}") for n, row in enumerate(datasets["a"]["train"])]
    datasets["a"] = {**datasets["a"], "train": [*datasets["a"]["train"], *twice]}
    turned: dict[str, Sides] = {
        name: {side: rows[::-1] for side, rows in sides.items()} for name, sides in datasets.items()
    }
    for number, given_datasets in enumerate((datasets, turned)):
        run_mix(tmp_path / str(number), given_datasets, rows=50, seed=3)
    for name in CONTENT:
        first, second = (tmp_path / str(n) / "out" / name for n in (0, 1))
        assert first.read_bytes() == second.read_bytes()


def test_mixing_twice_gives_the_same_bytes_and_another_seed_other_rows(tmp_path: Path) -> None:
    datasets = {"a": chats("a", 60), "b": chats("b", 50)}
    for number, seed in enumerate((1, 1, 2)):
        run_mix(tmp_path / str(number), datasets, rows=50, seed=seed, max_repeats=2)
    files = [*CONTENT, "ledger.parquet"]
    folders = [tmp_path / str(n) / "out" for n in range(3)]
    for name in files:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    ids = [{row.id for row in PreparedDataset.open(folder).train()} for folder in folders]
    assert ids[0] != ids[2]


def test_sources_are_interleaved(mix: Mix) -> None:
    mixed = mix({"a": chats("a", 200), "b": chats("b", 200)})
    names = [row_text(row).split()[0] for row in mixed.dataset.train()]
    # 400 fair coin tosses have fewer than 150 changes with a probability below 1e-6.
    assert sum(one != other for one, other in pairwise(names)) > 150


def test_the_first_validation_rows_are_of_all_sources(mix: Mix) -> None:
    mixed = mix({"a": chats("a", 100, 100), "b": chats("b", 100, 100)})
    names = Counter(row_text(row).split()[0] for row in mixed.dataset.validation(50))
    assert min(names["a"], names["b"]) >= 10


def test_repeats_of_a_row_stand_apart(mix: Mix) -> None:
    even = [{"dataset": "a", "weight": 1}, {"dataset": "b", "weight": 1}]
    mixed = mix({"a": chats("a", 200), "b": chats("b", 50)}, sources=even, max_repeats=4)
    ids = [row.id for row in mixed.dataset.train()]
    # 300 pairs of copies at random places among 400 rows: 1.5 neighbours are to be expected.
    assert sum(one == other for one, other in pairwise(ids)) < 10


def test_rows_stand_in_order_beyond_one_block(mix: Mix) -> None:
    rows = [chat(f"a train {n}", n) for n in range(12_000)]
    few: Sides = {"train": [chat("b train 0")], "validation": [chat("b validation")]}
    mixed = mix({"a": {"train": rows, "validation": [chat("a validation")]}, "b": few})
    ids = [row.id for row in mixed.dataset.train()]
    assert len(set(ids)) == 12_001
    assert {line.id: line.output for line in mixed.ledger if line.split == "train"} == {
        row: place for place, row in enumerate(ids)
    }


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.data())
def test_slabs_give_rows_in_any_order_any_number_of_times(
    sizes: list[int], data: st.DataObject
) -> None:
    slabs, count = Slabs(slab_bytes=40), sum(sizes)
    numbers = iter(range(count))
    for size in sizes:
        slabs.append(pa.table({"n": pa.array([next(numbers) for _ in range(size)], pa.int64())}))
    assert len(slabs) == count
    if count:
        rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20))
        assert slabs.take(np.array(rows)).column("n").to_pylist() == rows


# Leaks


def test_a_row_that_another_dataset_holds_out_is_not_trained_on(mix: Mix) -> None:
    b = chats("b", 10, 2, 2)
    prompt = chat("B  VALIDATION 1", 90, answer="Another answer.")
    tested = chat("b test 0", 91)
    a = chats("a", 10, 2)
    a = {**a, "train": [*a["train"], prompt, tested], "validation": [*a["validation"], tested]}
    mixed = mix({"a": a, "b": b})
    found = {(line.id, line.reason) for line in mixed.ledger if line.verdict == "drop"}
    assert found >= {(prompt.id, "held out in b"), (tested.id, "held out in b")}
    assert {row.id for row in mixed.dataset.train() + mixed.dataset.validation()}.isdisjoint(
        {prompt.id, tested.id}
    )


def test_a_prefix_hides_no_leak(mix: Mix) -> None:
    a: Sides = {"train": [chat("one"), chat("two")], "validation": [chat("three")]}
    b: Sides = {"train": [chat("four")], "validation": [chat("Say: one"), chat("two")]}
    mixed = mix(
        {"a": {**a, "train": [*a["train"], chat("five")]}, "b": b},
        sources=[{"dataset": "a", "prefix": "Say: "}, {"dataset": "b"}],
    )
    drops = {line.id for line in mixed.ledger if line.reason == "held out in b"}
    assert drops == {chat("one").id, chat("two").id}


def test_a_dataset_that_others_hold_out_whole_is_an_error(mix: Mix) -> None:
    a: Sides = {"train": [chat("b validation 0")], "validation": [chat("a")]}
    with pytest.raises(DataError) as caught:
        mix({"a": a, "b": chats("b", 3)})
    assert str(caught.value) == (
        "blend: `a` has no training row to mix: all of its 1 are held out in `b`; leave it out of "
        "the mix"
    )


def test_a_leak_that_got_through_stops_the_mix(tmp_path: Path) -> None:
    own: Sides = {"train": [chat("one")], "validation": [chat("ONE", answer="Another.")]}
    write_dataset(tmp_path, "chats", own)
    parts = {side: [read_part(PreparedDataset.open(tmp_path), side, None)] for side in SIDES}
    for (part,) in parts.values():
        part.copies[:] = 1
    with pytest.raises(RuntimeError, match="on two sides: train and validation"):
        assert_no_leak(parts)


PROMPTS = st.sampled_from([f"p{n}" for n in range(12)])
ROW = st.builds(chat, PROMPTS, st.integers(1, 3), answer=st.sampled_from(["x", "y"]))


@st.composite
def dataset(draw: st.DrawFn) -> Sides:
    """Rows of a few prompts, no prompt on two sides, rows repeated."""
    side_of = draw(st.fixed_dictionaries({f"p{n}": st.sampled_from(SIDES) for n in range(12)}))
    rows = [*draw(st.lists(ROW, max_size=25)), chat("only train"), chat("only validation")]
    side_of |= {"only train": "train", "only validation": "validation"}
    return {side: [r for r in rows if side_of[r.messages[0].content] == side] for side in SIDES}


@settings(max_examples=40, deadline=None)
@given(
    datasets=st.lists(dataset(), min_size=1, max_size=3),
    repeats=st.integers(1, 3),
    rows=st.none() | st.integers(1, 60),
    temperature=st.none() | st.sampled_from([1.0, 2.0, 5.0]),
    prefix=st.none() | st.just("Do: "),
    seed=st.integers(0, 3),
)
def test_every_row_is_accounted_for_none_leaks_and_shares_hold(
    datasets: list[Sides],
    repeats: int,
    rows: int | None,
    temperature: float | None,
    prefix: str | None,
    seed: int,
) -> None:
    named = dict(zip("abc", datasets, strict=False))
    sources = [{"dataset": name, "prefix": prefix} for name in named]
    with tempfile.TemporaryDirectory() as folder:
        mixed = run_mix(Path(folder), named, sources=sources, rows=rows, max_repeats=repeats,
                        temperature=temperature, seed=seed)  # fmt: skip
        sides = {side: mixed.dataset.rows(side) for side in SIDES}
        ledger = mixed.ledger
    given_ids = [row.id for sides_ in datasets for side in SIDES for row in sides_[side]]
    assert sorted(line.id for line in ledger) == sorted(given_ids)
    assert_positions_match(ledger, sides)
    for one, other in combinations(SIDES, 2):
        for key in (group_key, lambda row: normalise(row_text(row))):
            assert {key(row) for row in sides[one]}.isdisjoint(map(key, sides[other]))
    for mixed_dataset in mixed.report.datasets:
        out = mixed_dataset.sides["train"].rows_out
        assert abs(out - mixed_dataset.share * len(sides["train"])) <= 1
    assert len(sides["train"]) <= mixed.report.wanted


def assert_positions_match(ledger: Sequence[LedgerLine], sides: Mapping[Side, list[Row]]) -> None:
    """Each output row is named by one line, by `output` or in its `detail`, under its id."""
    named: dict[Side, dict[int, str]] = {side: {} for side in SIDES}
    for line in ledger:
        assert (line.verdict == "drop") == (line.split is None) == (line.output is None)
        if line.split is None or line.output is None:
            assert (line.operation, bool(line.reason)) == ("mix", True)
            continue
        also = (line.detail or "").partition("also at ")[2]
        for place in [line.output, *(int(word) for word in also.split(", ") if word)]:
            assert place not in named[line.split]
            assert place >= line.output
            named[line.split][place] = line.id
    for side, rows in sides.items():
        assert named[side] == {place: row.id for place, row in enumerate(rows)}


# Ledger and prefixes


def test_the_ledger_says_where_a_repeated_and_prefixed_row_went(mix: Mix) -> None:
    mixed = mix(
        {"a": chats("a", 1), "b": chats("b", 3)},
        sources=[{"dataset": "a", "weight": 1, "prefix": "Äh: "}, {"dataset": "b", "weight": 1}],
        max_repeats=3,
    )
    line = mixed.ledger[0]
    texts = [row_text(row) for row in mixed.dataset.train()]
    first, second, third = (n for n, text in enumerate(texts) if text.startswith("Äh: a train 0"))
    assert line == LedgerLine(
        id=chats("a", 1)["train"][0].id,
        file="a/train.jsonl",
        row=1,
        verdict="edit",
        operation="mix",
        detail=f'prefix "Äh: "; 3 times, also at {second}, {third}',
        split="train",
        output=first,
    )
    assert mixed.report.datasets[0].sides["train"].rows_taken == 1


USER, SYSTEM, ASSISTANT = (
    Message("user", "Hi"), Message("system", "Be kind."), Message("assistant", "Ho")
)  # fmt: skip
SAID = Message("user", "Do: Hi")
ORIGIN: dict[str, Any] = {"id": "0" * 16, "file": "f", "row": 1}
PREFIXED: dict[str, tuple[Row, Row]] = {
    "documents": (Document(text="Hi", **ORIGIN), Document(text="Do: Hi", **ORIGIN)),
    "chats": (
        Chat(messages=(SYSTEM, USER, ASSISTANT, USER), **ORIGIN),
        Chat(messages=(SYSTEM, SAID, ASSISTANT, USER), **ORIGIN),
    ),
    "preferences": (
        Preference(prompt=(USER,), chosen=(ASSISTANT,), rejected=(USER,), **ORIGIN),
        Preference(prompt=(SAID,), chosen=(ASSISTANT,), rejected=(USER,), **ORIGIN),
    ),
    "kto": (
        KtoExample(prompt=(SYSTEM, USER), completion=(ASSISTANT,), label=True, **ORIGIN),
        KtoExample(prompt=(SYSTEM, SAID), completion=(ASSISTANT,), label=True, **ORIGIN),
    ),
}


@pytest.mark.parametrize("family", PREFIXED)
def test_a_prefix_stands_before_what_the_user_says_first(family: str) -> None:
    row, wanted = PREFIXED[family]
    table, changed = prefixed(RowBatch.of(family_of(row), [row, row]), "Do: ")
    assert RowBatch(family_of(row), table).rows == [wanted, wanted]
    assert changed.all()


TURNS = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.text(max_size=3)),
    max_size=4,
)


@given(st.lists(TURNS, min_size=1, max_size=8), st.integers(0, 7))
def test_prefixes_in_columns_are_those_in_objects(turns: list[list[Message]], skip: int) -> None:
    rows: list[Row] = [
        Chat(id=f"{n:016}", file="f", row=n, messages=tuple(own)) for n, own in enumerate(turns)
    ]
    batch = RowBatch.of("chats", rows)
    # A slice, as batches of a file may be.
    batch = RowBatch("chats", batch.table.slice(min(skip, len(rows) - 1)))
    table, changed = prefixed(batch, "Do: ")
    wanted = [with_prefix(row) for row in batch.rows]
    assert RowBatch("chats", table).rows == wanted
    assert changed.tolist() == [one != other for one, other in zip(batch.rows, wanted, strict=True)]


def with_prefix(row: Row) -> Row:
    assert isinstance(row, Chat)
    for n, message in enumerate(row.messages):
        if message.role == "user":
            said = Message("user", "Do: " + message.content)
            return replace(row, messages=(*row.messages[:n], said, *row.messages[n + 1 :]))
    return row


# What cannot be mixed


def test_rows_of_two_kinds_are_refused(mix: Mix) -> None:
    documents: Sides = {
        "train": [Document(id="1", file="f", row=1, text="one")],
        "validation": [Document(id="2", file="f", row=2, text="two")],
    }
    with pytest.raises(
        DataError, match="`a` has chats and `b` has documents; a mix is of one kind"
    ):
        mix({"a": chats("a", 2), "b": documents})


A, B = {"dataset": "a"}, {"dataset": "b"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"sources": []}, "name at least one dataset"),
    "a weight missing": ({"sources": [{**A, "weight": 1}, B]}, "`b` has no `weight`: give every"),
    "weights and temperature": (
        {"sources": [{**A, "weight": 1}], "temperature": 2},
        "`a` has a weight, and `temperature` decides on shares too: remove one",
    ),
    "a dataset twice": (
        {"sources": [A], "replay": {**A, "fraction": 0.1}},
        "`a` occurs twice: name it once",
    ),
    "nothing left": (
        {"sources": [A], "replay": {**B, "fraction": 0.6},
         "adversarial": {"dataset": "c", "fraction": 0.4}},
        "make up 100% and leave nothing to the sources: write fractions that sum to less than 1",
    ),
    "itself": ({"sources": [{"dataset": "blend"}]}, "mixed into itself: give the mix another name"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_settings_that_contradict_each_other_say_what_to_write(mistake: str) -> None:
    config, message = WRONG[mistake]
    with pytest.raises(ValidationError) as caught:
        MixConfig(name="blend", **config)
    assert message in str(caught.value)


def test_real_chats_mix_with_nothing_lost(mix: Mix, real_data: Path) -> None:
    records = json.loads((real_data / "alpaca_en_demo.json").read_text())[:600]
    rows = [
        chat(f"{record['instruction']}\n{record['input']}", n, answer=record["output"])
        for n, record in enumerate(records)
    ]
    halves = np.array_split(np.arange(len(rows)), 2)
    named: dict[str, Sides] = {
        name: {
            "train": [rows[n] for n in half[30:]],
            "validation": [rows[n] for n in half[:30]],
        }
        for name, half in zip("ab", halves, strict=True)
    }
    mixed = mix(named)
    lost = sum(line.verdict == "drop" for line in mixed.ledger)
    assert len(mixed.ledger) == 600
    assert sum(mixed.report.rows.values()) == 600 - lost
    assert lost < 30
