from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from posttrain.lineage import Graph
from posttrain.model_card import write_card
from posttrain.model_card.facts import public_source
from posttrain.registry import judged_by
from posttrain.store import Artifact
from tests.unit.registry_store import Judging


@pytest.fixture
def made(tmp_path: Path) -> Judging:
    return Judging(tmp_path / "store")


def card(made: Judging, model: Artifact, **more: object) -> str:
    graph = Graph.read(made.store)
    return write_card(graph, model, judged=judged_by(graph, model), **more)  # type: ignore[arg-type]


def license_in_the_job(made: Judging, license: str) -> None:
    dataset = next(a for a in made.store.artifacts() if a.kind == "dataset")
    spec = {"source": "hub:OWNER/rows", "revision": "main", "license": license}
    (dataset.path / ".stage").mkdir(exist_ok=True)
    job = {"inputs": {"rows": {"spec": spec}}}
    (dataset.path / ".stage" / "stage.json").write_text(json.dumps(job))


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_header_is_what_the_hub_reads(made: Judging) -> None:
    data = ModelCard(card(made, made.candidate(), name="assistant", license="mit")).data
    assert data.base_model == "OWNER/tiny"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.license == "mit"
    assert data.tags == ["merge", "posttrain", "sft"]
    assert data.model_name == "assistant"
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        *("hellaswag", "acc_norm"),
        0.44,
    )


def test_a_base_that_is_not_on_the_hub_is_named_in_the_text_alone(made: Judging) -> None:
    model = made.candidate()
    text = card(made, model).replace("OWNER/tiny", "tiny")
    assert "`tiny@0123" in text
    from posttrain.model_card.facts import Facts
    from posttrain.model_card.header import header

    facts = Facts.collect(Graph.read(made.store), model, None, {})
    local = Facts(**{**vars(facts), "bases": ("tiny.gguf",)})
    assert "base_model" not in yaml.safe_load(header(local, "x", None))
    assert "license" not in yaml.safe_load(header(local, "x", None))


def test_data_with_rows_sources_and_licences(made: Judging) -> None:
    model = made.candidate()
    data = section(card(made, model), "Data")
    assert "| chats | chats.jsonl | not stated | 4 | 2 | 1 | 1 |" in data
    license_in_the_job(made, "cc-by-4.0")
    assert "| chats | chats.jsonl@main | cc-by-4.0 | 4 |" in section(card(made, model), "Data")
    later = section(card(made, model, licenses={"chats": "odc-by"}), "Data")
    assert "| odc-by |" in later


def test_stages_with_their_settings_and_without_secrets(made: Judging) -> None:
    training = section(card(made, made.candidate()), "Training")
    assert "### sft" in training
    assert "| `optimization.learning_rate` | 0.0002 |" in training
    assert "hub_token" not in training
    assert training.index("### sft") < training.index("### merge")


def test_benchmarks_with_intervals_beside_base_and_champion(made: Judging) -> None:
    model = made.candidate(champion="champion assistant v3")
    evaluation = section(card(made, model), "Evaluation")
    heads = "| task | metric | base | champion | this model | to base | to champion |"
    assert heads in evaluation
    row = (
        "| hellaswag | acc_norm | 0.410 | 0.420 | 0.440 | +0.030 [+0.015, +0.045] "
        "| +0.020 [+0.005, +0.035] | 400 | 0.031 |"
    )
    assert row in evaluation
    assert "Gate: **pass**" in evaluation
    assert "Held-out perplexity: 9.80 (base), 5.10 (this model); +0.653 [+0.600" in evaluation
    assert "Beside champion assistant v3: **pass**" in evaluation
    assert "at most 400 items a task, drawn with seed 0" in evaluation


def test_a_model_that_nobody_judged_says_so(made: Judging) -> None:
    model = made.candidate(1, None)
    text = card(made, model)
    assert "Gate: **not judged by a gate**" in text
    assert "Not measured." in section(text, "Evaluation")
    assert "No benchmark was run" in section(text, "Limits")
    assert "model-index" not in text


def test_limits_name_what_could_not_have_been_seen(made: Judging) -> None:
    limits = section(card(made, made.candidate()), "Limits")
    assert "`hellaswag`: a drop of less than 0.031 may not show on 400 items" in limits
    assert "not checked (`chats`)" in limits
    assert "not safety, bias or truthfulness" in limits
    assert "The licence of `chats` is not stated" in limits


def test_lineage_in_order_with_a_diagram(made: Judging) -> None:
    model = made.candidate()
    lineage = section(card(made, model), "Lineage")
    steps = [line.split("|")[1].strip() for line in lineage.splitlines() if line.startswith("| t")]
    assert steps == [f"tiny/{name}" for name in ("prepare", "sft", "merge", "evaluate", "gate")]
    assert '  s2["merge<br>' in lineage
    assert "  s1 --> s2\n" in lineage
    assert "  s0 --> s2\n" not in lineage  # merge only looks at the dataset
    assert "  s2 -.-> s3\n" in lineage


def test_the_same_store_gives_the_same_card_without_paths_or_dates(made: Judging) -> None:
    model = made.candidate()
    text = card(made, model)
    assert text == card(made, model)
    assert str(made.store.root) not in text
    assert "/home/somebody" not in text
    assert f"{model.manifest.created:%Y-%m-%d}" not in text


def test_how_to_load_it_fits_the_tokenizer(made: Judging) -> None:
    model = made.candidate()
    assert "apply_chat_template" not in section(card(made, model), "How to use it")
    (model.path / "chat_template.jinja").write_text("{{ messages }}")
    usage = section(card(made, model), "How to use it")
    assert "apply_chat_template" in usage
    compile(usage.split("```python\n")[1].split("```")[0], "usage", "exec")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/ada/a.jsonl, ~/b.jsonl, docs/c.md", "a.jsonl, b.jsonl, docs/c.md"),
        ("hub:OWNER/NAME", "hub:OWNER/NAME"),
        ("builtin:python-docs/chats", "builtin:python-docs/chats"),
    ],
)
def test_sources_are_shown_without_paths_of_the_machine(source: str, shown: str) -> None:
    assert public_source(source) == shown
