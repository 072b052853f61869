"""A named dataset of a recipe: where its rows are and how they are written."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain.recipe.base import RowFormat, Strict, unhashed


class DatasetSpec(Strict):
    """Rows from files, a folder, a glob, a Hub dataset or a built-in source."""

    source: str | tuple[str, ...]
    """File, folder, glob, `hub:OWNER/NAME`, or `builtin:python-docs/chats`. Several are joined."""
    format: RowFormat | Literal["auto"] = "auto"
    """How rows are written. `auto` detects it and fails, with the columns shown, if it cannot."""
    columns: dict[str, str] = {}
    """Renames: `{prompt: question}` says that the prompt stands in the column `question`."""
    split: str = "train"
    """Split to read of a Hub dataset; files ignore it."""
    subset: str | None = None
    """Configuration name of a Hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a Hub dataset; pinned to a commit when the run starts."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows, in source order. For trying a recipe out."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at the first row that cannot be read, or skip it and count it."""
    license: str | None = unhashed(None, "Licence of the data, carried into the model card.")
