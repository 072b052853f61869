"""The flow that aligns a model: two methods side by side, from a model in the store, one gate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import yaml

from posttrain.evaluate.results import Verdict
from posttrain.home import Home
from posttrain.lineage import Graph
from posttrain.store import Artifact
from tests.flows.conftest import COLOURS, QUESTIONS, THINGS, Tiny

REWARDS = "def brevity(answers): return [-len(answer) / 10 for answer in answers]\n"
SHORT = {"max_steps": 2, "dtype": "float32", "validation": {"every_steps": 2, "max_rows": 4}}
OVERRIDES = [
    *(
        f"{method}.{key}={json.dumps(value)}"
        for method in ("dpo", "grpo")
        for key, value in SHORT.items()
    ),
    "grpo.answers=2",
    "grpo.rollout.max_new_tokens=6",
    "grpo.batching.batch_size=4",
    "dpo.batching.batch_size=4",
    "evaluate-dpo.samples.max_new_tokens=4",
    "evaluate-grpo.samples.max_new_tokens=4",
]


pytestmark = pytest.mark.slow  # some thirty programs, each of which imports torch


@dataclass(frozen=True)
class Aligned:
    """What the flow left."""

    home: Home
    start: Artifact
    artifacts: dict[str, Artifact]
    state: str


@pytest.fixture(scope="module")
def aligned(
    tiny: Tiny, prefect_server: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Aligned]:
    """A fine-tuned model, then DPO and GRPO on the same pairs."""
    folder = tmp_path_factory.mktemp("align")
    home = Home(folder / "home")
    pairs, rewards = folder / "pairs.jsonl", folder / "rewards.py"
    rows = [
        {
            "prompt": question.format(thing),
            "chosen": f"The {thing} is {COLOURS[number % 4]}.",
            "rejected": f"No idea, {thing}.",
        }
        for question in QUESTIONS
        for number, thing in enumerate(THINGS)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards.write_text(REWARDS)
    recipe = yaml.safe_load(tiny.recipe.read_text())
    _, sft, merge, *_ = recipe["stages"]
    sft["sft"] |= {"max_steps": 4, "validation": {"every_steps": 4}}
    first = folder / "first.yaml"
    first.write_text(yaml.safe_dump({**recipe, "name": "first", "stages": [sft, merge]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_HOME", str(home.root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        from flows.align_model import align_model
        from flows.post_training import post_training

        assert post_training(str(first), return_state=True).is_completed()
        state = align_model(
            model="artifact:first/merge",
            data=str(pairs),
            method="dpo",
            compare_with="grpo",
            reward=f"{rewards}:brevity",
            texts=str(tiny.rows),
            overrides=OVERRIDES,
            return_state=True,
        )
        graph = Graph.read(home.store)
        artifacts = {a.manifest.name: a for a in graph.artifacts.values()}
        start = graph.find("first/merge")
        yield Aligned(home, start, artifacts, f"{state.name}: {state.message}")


def test_both_methods_start_from_the_model_in_the_store(aligned: Aligned) -> None:
    for method in ("dpo", "grpo"):
        source = aligned.artifacts[method].manifest.inputs["model"]
        assert source.fingerprint == aligned.start.fingerprint, aligned.state


def test_one_gate_compares_both_with_the_base_and_with_each_other(aligned: Aligned) -> None:
    gate = aligned.artifacts["gate"]
    verdict = Verdict.load(gate.path)
    assert set(verdict.candidates) == {"evaluate-dpo", "evaluate-grpo"}
    assert len(verdict.comparisons) == 1
    assert {"base", "candidate:evaluate-dpo", "watch:evaluate-grpo:grpo"} < set(
        gate.manifest.inputs
    )
    assert ("pass" in aligned.state) == (verdict.verdict == "pass")


def test_the_recipe_that_was_run_is_kept(aligned: Aligned) -> None:
    [file] = (aligned.home.root / "recipes").iterdir()
    stages = [next(iter(stage)) for stage in yaml.safe_load(file.read_text())["stages"]]
    assert stages == ["dpo", "merge", "evaluate", "grpo", "merge", "evaluate", "gate"]


def test_rows_of_the_start_lead_to_the_aligned_model(aligned: Aligned) -> None:
    graph = Graph.read(aligned.home.store)
    ancestors = {found.fingerprint for found, _ in graph.models_from(aligned.start)}
    assert aligned.artifacts["merge-dpo"].fingerprint in ancestors
