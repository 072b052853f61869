from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import minhash, similar
from posttrain.data.near_duplicates import deduplicate_jsonl
from posttrain.data.operations.near_dedup import NearDuplicates, sortable
from posttrain.data.rows import Document, Row
from posttrain.errors import DataError
from posttrain.recipe.prepare import NearDedup
from tests.unit.data.corpora import chat, document, documents, dropped, drops_of

WORDS = [f"word{number}" for number in range(500)]


def text(seed: int, length: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def edited(source: str, changes: int, seed: int = 0) -> str:
    """The text with a run of words replaced, so that about `changes + 4` shingles differ."""
    words = source.split()
    start = random.Random(seed).randrange(len(words) - changes)
    words[start : start + changes] = [f"new{seed}x{n}" for n in range(changes)]
    return " ".join(words)


def near(threshold: float = 0.8, bands: Literal[16, 32] = 32, **config: object) -> NearDuplicates:
    return NearDuplicates(NearDedup(threshold=threshold, bands=bands, **config))  # type: ignore[arg-type]


def kept_texts(texts: Sequence[str], threshold: float = 0.8) -> list[str]:
    gone = set(drops_of(near(threshold), documents(texts)).rows.tolist())
    return [one for row, one in enumerate(texts) if row not in gone]


def similarity(one: str, other: str) -> float:
    sets = minhash.shingle_sets([one, other])
    return float(minhash.jaccard(sets, np.array([0]), np.array([1]))[0])


def corpus(seed: int) -> list[str]:
    """Texts in clusters of every kind: copies, near copies, chains, look-alikes, short ones."""
    draw = random.Random(seed)
    texts: list[str] = []
    for number in range(12):
        source = text(seed * 100 + number)
        texts.append(source)
        texts += [edited(source, draw.choice([2, 6, 12, 30]), n) for n in range(draw.randrange(4))]
    chain = [text(seed * 100 + 99)]
    for step in range(6):
        chain.append(edited(chain[-1], 5, step))
    return [*texts, *chain, "short", "short", "short one", "", "...", "你好世界", "你好"]


# What the recipe promises


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1_000), st.sampled_from([0.7, 0.8, 0.9]))
def test_a_dropped_row_has_a_similar_one_that_stays_and_those_that_stay_are_unlike(
    seed: int, threshold: float
) -> None:
    texts = corpus(seed)
    drops = drops_of(near(threshold), documents(texts))
    gone = set(drops.rows.tolist())
    for row, kept in zip(drops.rows, drops.kept, strict=True):
        assert kept not in gone
        assert similarity(texts[row], texts[kept]) >= threshold
    stays = [row for row in range(len(texts)) if row not in gone]
    sets = minhash.shingle_sets([texts[row] for row in stays])
    left, right = np.triu_indices(len(stays), 1)
    alike = minhash.jaccard(sets, left, right) >= threshold
    # 32 bands of 4 miss a pair of similarity 0.8 once in ten thousand; 0.7 once in 500.
    assert alike.sum() <= (1 if threshold < 0.8 else 0)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1_000), st.randoms(use_true_random=False), st.integers(1, 40))
def test_what_stays_depends_neither_on_order_nor_on_batches(
    seed: int, order: random.Random, batch_size: int
) -> None:
    texts = corpus(seed)
    expected = sorted(kept_texts(texts))
    shuffled = texts.copy()
    order.shuffle(shuffled)
    gone = set(drops_of(near(), documents(shuffled), batch_size).rows.tolist())
    assert sorted(t for row, t in enumerate(shuffled) if row not in gone) == expected


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1_000))
def test_a_second_time_changes_nothing(seed: int) -> None:
    once = kept_texts(corpus(seed))
    assert kept_texts(once) == once


def test_longest_newest_or_best_stays() -> None:
    source = text(1)
    longer = source + " and more"
    rows: list[Row] = [
        document(1, source, date="2024-03-01", score=0.5),
        document(2, longer, date="2024-02-28T10:00:00", score=-2.0),
        document(3, edited(source, 2), date="2023-12-31", score=3.0),
    ]
    assert dropped(near(keep="longest"), rows) == {1: 2, 3: 2}
    assert dropped(near(keep="newest"), rows) == {2: 1, 3: 1}
    assert dropped(near(keep="best"), rows) == {1: 3, 2: 3}
    with pytest.raises(DataError, match=r"a:4: no `score`, which near_dedup needs.*columns: "):
        drops_of(near(keep="best"), [*rows, document(4, "x")])


@given(st.lists(st.floats(allow_nan=False), min_size=2, max_size=8))
def test_scores_are_ordered_as_numbers(values: list[float]) -> None:
    array = np.array(values) + 0.0  # -0.0 and 0.0 are one number
    keys = sortable(array)
    assert np.array_equal(np.argsort(array, kind="stable"), np.argsort(keys, kind="stable"))


def test_rows_of_another_dataset_push_ours_out_and_are_never_dropped() -> None:
    theirs = [text(1), text(1) + " longer", text(2)]
    ours = [text(1) + " the longest of all", text(3), text(3)]
    config = NearDedup(against=("other",))
    drops = drops_of(
        NearDuplicates(config), documents(theirs + ours), foreign=[True] * 3 + [False] * 3
    )
    assert drops.rows.tolist()[0] == 3
    assert drops.kept.tolist()[0] in (0, 1)
    assert len(drops.rows) == 2


# Faults of other libraries that ours must not have


def test_problems_that_differ_in_their_numbers_are_two() -> None:
    one = "A train leaves at 9 with 12 passengers and 7 get off at stop 3 so how many are left"
    other = "A train leaves at 8 with 45 passengers and 6 get off at stop 2 so how many are left"
    assert kept_texts([one, other]) == [one, other]


def test_short_and_empty_texts_neither_vanish_nor_collapse_into_one() -> None:
    texts = ["yes", "no", "", "...", "你好", "谢谢", "Yes!", "42", "43", "thank you very much"]
    assert kept_texts(texts) == ["yes", *texts[1:6], *texts[7:]] or kept_texts(texts) == texts[1:]
    assert len(kept_texts(texts)) == len(texts) - 1


def test_chinese_texts_are_compared_by_characters() -> None:
    base = "".join(chr(0x4E00 + n) for n in range(200))
    changed = base[:100] + "人" + base[101:]
    other = "".join(chr(0x5E00 + n) for n in range(200))
    assert len(kept_texts([base, changed, other])) == 2


def test_one_of_a_cluster_always_stays() -> None:
    assert len(kept_texts([text(1)] * 50)) == 1


def test_a_chain_is_thinned_and_not_swallowed() -> None:
    """Each text is like the next one, and the ends have nothing in common."""
    words = [f"w{number}" for number in range(400)]
    chain = [" ".join(words[start : start + 100]) for start in range(0, 200, 8)]
    assert similarity(chain[0], chain[1]) > 0.8
    assert similarity(chain[0], chain[-1]) == 0.0
    kept = kept_texts(chain)
    assert len(kept) >= len(chain) / 3
    assert all(max(similarity(one, other) for other in kept) >= 0.8 for one in chain)


def test_identifiers_that_are_falsy_survive() -> None:
    rows: list[Row] = [
        Document(id="0", file="", row=0, text=text(1), score=0.0, category=""),
        Document(id="1", file="a", row=1, text=text(2)),
    ]
    assert len(drops_of(near(), rows).rows) == 0


def test_an_equal_system_prompt_does_not_make_chats_alike() -> None:
    from dataclasses import replace

    from posttrain.data.rows import Message

    prompt = Message("system", text(7, 300))
    rows: list[Row] = [chat(n, f"Question {n} {text(n, 12)}", text(50 + n, 20)) for n in range(6)]
    with_prompt = [replace(row, messages=(prompt, *row.messages)) for row in rows]  # type: ignore[union-attr,type-var]
    assert len(drops_of(near(), with_prompt).rows) == 0


# Crowds


def test_a_crowd_of_copies_takes_linear_work(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    jaccard = minhash.jaccard

    def counting(sets: object, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(left)
        return jaccard(sets, left, right)  # type: ignore[arg-type]

    monkeypatch.setattr(minhash, "jaccard", counting)
    texts = [f"{text(1)} tail{n}" for n in range(1_500)]
    assert len(kept_texts(texts)) == 1
    assert compared < 40 * len(texts)


def test_in_a_crowd_the_same_rows_go_as_without_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [edited(text(n % 3), 3, n) for n in range(150)]
    crowded = kept_texts(texts)
    monkeypatch.setattr(similar, "CROWDED", 10_000)
    assert kept_texts(texts) == crowded


# Oracles


def test_recall_of_planted_pairs_is_as_the_formula_says() -> None:
    draw = random.Random(5)
    texts, pairs = [], []
    for number in range(150):
        source = text(1_000 + number)
        pairs.append((len(texts), len(texts) + 1))
        texts += [source, edited(source, draw.choice([2, 4, 6]), number)]
    close = [(a, b) for a, b in pairs if similarity(texts[a], texts[b]) >= 0.8]
    assert len(close) > 80
    for bands, bound in ((16, 0.97), (32, 0.999)):
        gone = set(drops_of(near(bands=bands), documents(texts), 64).rows.tolist())  # type: ignore[arg-type]
        found = sum(a in gone or b in gone for a, b in close)
        assert found / len(close) >= bound


def test_datasketch_agrees_on_similarity() -> None:
    from datasketch import MinHash

    for seed in range(12):
        one = text(seed)
        other = edited(one, 4 + 6 * seed, seed)
        estimates = []
        for words in (one.split(), other.split()):
            sketch = MinHash(num_perm=256, seed=1)
            for start in range(len(words) - 4):
                sketch.update(" ".join(words[start : start + 5]).encode())
            estimates.append(sketch)
        assert estimates[0].jaccard(estimates[1]) == pytest.approx(similarity(one, other), abs=0.15)


def test_gaoya_finds_the_same_pairs_above_the_threshold() -> None:
    from gaoya.minhash import MinHashStringIndex

    texts = corpus(3)[:40]
    index = MinHashStringIndex(
        jaccard_threshold=0.6,
        num_bands=32,
        band_size=4,
        num_hashes=128,
        analyzer="word",
        ngram_range=(5, 5),
        lowercase=True,
    )
    for row, one in enumerate(texts):
        index.insert_document(row, one)
    found = {(a, b) for a, one in enumerate(texts) for b in index.query(one) if a < b}
    ours = near()
    drops_of(ours, documents(texts))
    assert ours.pairs is not None
    pairs = set(zip(ours.pairs.left.tolist(), ours.pairs.right.tolist(), strict=True))
    long = {(a, b) for a, b in found if similarity(texts[a], texts[b]) >= 0.8}
    assert long <= pairs
    assert all(similarity(texts[a], texts[b]) >= 0.8 for a, b in pairs)


# From files to a file


def lines_of(texts: Sequence[str]) -> bytes:
    import json

    return "".join(json.dumps({"n": n, "text": t}) + "\n" for n, t in enumerate(texts)).encode()


def test_files_are_copied_without_near_duplicates(tmp_path: Path) -> None:
    texts = corpus(1)
    lines = lines_of(texts).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b"".join(lines[:20]), b""]))
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[20:]).rstrip(b"\n"))
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    stats = deduplicate_jsonl(paths, tmp_path / "out.jsonl", processes=2)
    gone = set(drops_of(near(), documents(texts)).rows.tolist())
    assert set(stats.dropped.tolist()) == gone
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(
        line for row, line in enumerate(lines) if row not in gone
    )


@pytest.mark.parametrize(
    "data",
    [
        b'{"text": "a"}{"text": "b"}\n{"text":\n"c"}\n',  # as many objects as lines
        b'{"text": 5}\n',
        b'{"other": "a"}\n',
        b'{"text": "a"}\n{torn\n',
        b"[1]\n",
    ],
)
def test_what_is_no_json_lines_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        deduplicate_jsonl([tmp_path / "a.jsonl"], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_empty_files_give_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n \n")
    stats = deduplicate_jsonl([tmp_path / "a.jsonl"], tmp_path / "out.jsonl")
    assert (stats.rows, (tmp_path / "out.jsonl").read_bytes()) == (0, b"")
