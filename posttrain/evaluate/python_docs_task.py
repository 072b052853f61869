"""Our own benchmark: what does this Python object do? As lm-eval tasks, written where needed.

Four descriptions of similar objects, one of them right. The items come from the documentation of
the running Python and are divided by what the prepared dataset contains:

- `python_docs_held_out`: about objects that occur in no row of it. What the model cannot have
  learnt by heart.
- `python_docs_trained`: about objects that occur in its training rows. What it should have learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Protocol

import yaml

from posttrain.errors import DataError
from posttrain.store.files import write_bytes

HELD_OUT = "python_docs_held_out"
TRAINED = "python_docs_trained"
TASKS = (HELD_OUT, TRAINED)


class Choice(Protocol):
    """A multiple-choice item, as `posttrain.data.python_docs.choices` gives it."""

    @property
    def subject(self) -> str:
        """Dotted name of the object asked about."""

    @property
    def question(self) -> str:
        """What is asked."""

    @property
    def choices(self) -> Sequence[str]:
        """Possible answers."""

    @property
    def answer(self) -> int:
        """Index of the right one."""


def write_tasks(
    folder: Path,
    names: Iterable[str],
    items: Sequence[Choice],
    trained: Set[str],
    held_out: Set[str],
) -> None:
    """Write the named tasks, a YAML and a JSON Lines file each, for lm-eval to find in `folder`.

    Args:
        folder: Created if missing; to be given to lm-eval as a folder with tasks.
        names: Which of `TASKS` to write.
        items: All items.
        trained: Subjects of the prepared dataset's training rows.
        held_out: Subjects of its held-out rows.

    Raises:
        DataError: no item is left for a task, because the dataset is not about Python's
            documentation or covers all of it.
    """
    selections = {
        HELD_OUT: [item for item in items if item.subject not in trained | held_out],
        TRAINED: [item for item in items if item.subject in trained],
    }
    for name in names:
        if not selections[name]:
            raise DataError(_nothing_to_ask(name))
        rows = folder / f"{name}.jsonl"
        write_bytes(rows, "".join(map(_line, selections[name])).encode())
        write_bytes(folder / f"{name}.yaml", yaml.safe_dump(_task(name, rows)).encode())


def _nothing_to_ask(name: str) -> str:
    if name == TRAINED:
        return (
            f"evaluate.tasks: `{TRAINED}` asks about objects that the dataset's training rows are "
            "about, and there are none; it needs a dataset with `source: builtin:python-docs/chats`"
        )
    return f"evaluate.tasks: `{name}` has no item left: the dataset's rows are about all objects"


def _line(item: Choice) -> str:
    row = {
        "subject": item.subject,
        "question": item.question,
        "choices": list(item.choices),
        "answer": item.answer,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _task(name: str, rows: Path) -> dict[str, object]:
    """The task as lm-eval reads it. Descriptions are scored whole, so lengths differ: acc_norm."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }
