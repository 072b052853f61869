"""Task prefixes: a text put before what the user says, in columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.batch import RowBatch
from posttrain.data.rows import arrow_schema
from posttrain.recipe.base import RowFamily

if TYPE_CHECKING:
    import pyarrow as pa

_PROMPT: dict[RowFamily, str] = {"chats": "messages", "preferences": "prompt", "kto": "prompt"}
"""The column with the user's first turn."""


def prefixed(batch: RowBatch, prefix: str) -> tuple[pa.Table, np.ndarray]:
    """The rows with `prefix` before the first user turn; of documents, before the text.

    Multi-task training tells tasks apart so (Raffel et al. 2020, arXiv:1910.10683, section 2.4).

    Returns:
        The rows' table, and a mask of those that were changed: a conversation without a user
        turn stays as it is.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if batch.family == "documents":
        texts = pc.binary_join_element_wise(prefix, batch.table.column("text"), "")
        return _replaced(batch, "text", texts), np.ones(len(batch), bool)
    column = _PROMPT[batch.family]
    conversations = batch.table.column(column).combine_chunks()
    lengths = pc.list_value_length(conversations).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    roles, contents = conversations.flatten().flatten()
    users = np.flatnonzero(pc.equal(roles, "user").to_numpy(zero_copy_only=False))
    # The first user turn at or after each conversation's begin, if it stands before its end.
    found = np.searchsorted(users, ends - lengths)
    turn = np.append(users, len(roles))[found]
    changed = turn < ends
    mask = np.zeros(len(roles), bool)
    mask[turn[changed]] = True
    said = pc.if_else(pa.array(mask), pc.binary_join_element_wise(prefix, contents, ""), contents)
    turns = pa.StructArray.from_arrays([roles, said], ["role", "content"])
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    return _replaced(batch, column, pa.ListArray.from_arrays(offsets, turns)), changed


def _replaced(batch: RowBatch, column: str, values: pa.Array) -> pa.Table:
    schema = arrow_schema(batch.family)
    table = batch.table.set_column(batch.table.schema.get_field_index(column), column, values)
    return table.cast(schema)
