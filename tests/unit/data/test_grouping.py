from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.grouping import group_equal

KEYS = st.lists(st.sampled_from([0, 1, 2, 3, 2**63, 2**64 - 1]), max_size=30)


def groups_of(keys: list[int], memory_cap: int) -> list[list[int]]:
    rows = np.arange(len(keys)) * 10
    groups = group_equal(np.array(keys, np.uint64), rows, memory_cap)
    assert groups.sizes.tolist() == [len(group) for group in groups]
    return [group.tolist() for group in groups]


@given(KEYS)
def test_groups_are_the_rows_that_share_a_key(keys: list[int]) -> None:
    expected = [
        [row * 10 for row, other in enumerate(keys) if other == key] for key in sorted(set(keys))
    ]
    assert groups_of(keys, 2**30) == [group for group in expected if len(group) > 1]


@settings(max_examples=10, deadline=None)
@given(KEYS)
def test_on_disk_it_is_the_same(keys: list[int]) -> None:
    assert groups_of(keys, memory_cap=1) == groups_of(keys, memory_cap=2**30)


@pytest.mark.parametrize("cap", [1, 2**30])
def test_a_million_keys(cap: int) -> None:
    draw = np.random.default_rng(0)
    keys = draw.integers(0, 2**64, 300_000, dtype=np.uint64)
    keys[100_000:100_500] = keys[:500]
    groups = group_equal(keys, np.arange(len(keys)), cap)
    assert len(groups.sizes) == 500
    assert set(groups.rows) == {*range(500), *range(100_000, 100_500)}
