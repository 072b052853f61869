"""A tiny recipe with everything in it, run once for all tests of the flow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

COLOURS = ("blue", "red", "green", "white")
THINGS = ("door", "boat", "lamp", "coat", "kite", "vase", "shoe", "drum", "leaf", "bell",
          "cart", "desk", "fork", "gate", "hook", "jar", "knot", "lock", "mask", "nest",
          "oar", "pipe", "quilt", "rope", "sail", "tent", "urn", "veil", "wall",
          "yarn")  # fmt: skip

RECIPE = """\
name: tiny
model: {model}
datasets:
  chats: {{source: {rows}}}
stages:
  - prepare: {{dataset: chats, split: {{validation: 0.3}}}}
  - sft:
      dataset: chats
      adapter: {{rank: 16}}
      max_steps: 24
      optimization: {{learning_rate: 0.02}}
      batching: {{batch_size: 4, max_length: 96}}
      validation: {{every_steps: 12}}
      dtype: float32
  - merge: {{}}
  - evaluate:
      tasks: [colours]
      task_folders: [{tasks}]
      samples: {{max_new_tokens: 8}}
      dtype: float32
  - gate: {{max_drop: 0.9, perplexity: must_improve}}
"""

TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@dataclass(frozen=True)
class Tiny:
    """Where the tiny recipe and all it needs lie."""

    folder: Path
    recipe: Path
    rows: Path
    model: Path
    home: Path


QUESTIONS = ("What colour is the {}?", "Tell me the colour of the {}.")


def chat(thing: str, colour: str, question: str = QUESTIONS[0]) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": question.format(thing)},
            {"role": "assistant", "content": f"The {thing} is {colour}."},
        ]
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    rows = folder / "rows.jsonl"
    chats = [chat(t, COLOURS[n % 4], q) for q in QUESTIONS for n, t in enumerate(THINGS)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in chats))
    tasks = folder / "tasks"
    tasks.mkdir()
    items = tasks / "items.jsonl"
    items.write_text(
        "".join(
            json.dumps({"question": f"The {thing} is", "choices": list(COLOURS), "answer": n % 4})
            + "\n"
            for n, thing in enumerate(THINGS)
        )
    )
    (tasks / "colours.yaml").write_text(TASK.format(items=items))
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_model, rows=rows, tasks=tasks))
    return Tiny(folder, recipe, rows, tiny_model, folder / "home")


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One temporary Prefect server for the whole session: it takes seconds to start."""
    from posttrain.servers import prefer_quiet_prefect

    prefer_quiet_prefect()
    os.environ["PREFECT_HOME"] = str(tmp_path_factory.mktemp("prefect"))
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
